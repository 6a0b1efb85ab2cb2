"""Prefill, and the round: draft, verify in one pass, accept, commit.

Everything here takes a list of sequences; rows of all of them share a pass. A round is a transaction: whatever goes
wrong while its graph is built leaves every sequence as it was.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp_backend import cache
from mlx_mtp_backend.api import Rule, Sampling, TokenLogprob
from mlx_mtp_backend.decode import acceptance, draws, logprobs, noise, sampling
from mlx_mtp_backend.decode.acceptance import Outcome
from mlx_mtp_backend.decode.drafters import Draft, Drafter, grouped, reordered
from mlx_mtp_backend.decode.logprobs import Measured
from mlx_mtp_backend.decode.noise import Purpose
from mlx_mtp_backend.decode.processors import processed
from mlx_mtp_backend.decode.sampling import Law, joined
from mlx_mtp_backend.decode.sequence import Sequence
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.families.base import Hidden, Model, Segment, split_rows
from mlx_mtp_backend.host import evaluate, flags, ints, table


@dataclass(frozen=True, slots=True)
class Committed:
    """What a round did for one sequence: its new tokens, or why it cannot go on, and how many drafts it verified."""

    tokens: list[int]
    drafted: int = 0
    error: EngineError | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Round:
    """What a round did.

    Attributes:
        committed: for each sequence.
        seconds_draft: wall time to build the drafts' graph.
        seconds_verify: to build the verify pass, and until the device was done with both.
        seconds_commit: to take over the outcome.
    """

    committed: list[Committed]
    seconds_draft: float
    seconds_verify: float
    seconds_commit: float

    @property
    def seconds(self) -> float:
        return self.seconds_draft + self.seconds_verify + self.seconds_commit


def prefill_chunk(model: Model, sequence: Sequence, chunk: int) -> Committed | None:
    """Run the next chunk of the prompt; chunks are aligned to absolute positions, so that they are the same for any
    prompt that shares the tokens.

    Returns:
        None before the last chunk; after it the first token.
    """
    start = sequence.prefilled
    end = min(sequence.prompt_length, (start // chunk + 1) * chunk)
    sequence.begin()
    try:
        hidden = model.trunk(mx.array(sequence.tokens[start:end], mx.int32), [Segment(sequence.trunk, end - start)])
        primed = _prime_head(model, sequence, hidden.carried, start)
        last = end == sequence.prompt_length
        logits = model.logits(hidden.normed[-1:]) if last else None
        token = None if logits is None else _first_token(model, sequence, logits)
    except BaseException:
        sequence.abort()
        raise
    cache.commit(sequence.trunk, end - start)
    cache.commit(sequence.head, primed)
    sequence.prefilled = end
    sequence.pending = [hidden.carried[-1:]] if sequence.head else []
    settled = [array for layer in sequence.caches for array in layer.arrays]
    if logits is None or token is None:
        evaluate([*settled, hidden.carried])
        return None
    finite = _all_finite(logits)
    told = None if sequence.logprobs is None else logprobs.measure(logits, token, sequence.logprobs)
    evaluate([*settled, token, finite, *(told.arrays if told else [])])
    return _settle(sequence, ints(token), flags(finite), told)


def _first_token(model: Model, sequence: Sequence, logits: mx.array) -> mx.array:
    position = sequence.prompt_length
    if draws.direct(model, sequence):
        return draws.draw(model, logits, [(sequence, position)], Purpose.TARGET)
    if sequence.processors is not None:
        logits = processed(logits, [(sequence.processors, slice(0, 1), None)])
    law = sampling.transform(logits, sequence.sampling)
    return sampling.choose(law, noise.keys([sequence.seed]), mx.array([position]), Purpose.TARGET)


@mx.compile
def _all_finite(logits: mx.array) -> mx.array:
    """Of each row: bool [R]."""
    return mx.all(mx.isfinite(logits), axis=-1)


def _prime_head(model: Model, sequence: Sequence, carried: mx.array, start: int) -> int:
    """Run the head over the prompt's slots, one behind the trunk: the last slot needs a token not known yet.

    Returns:
        how many slots it ran.
    """
    if not sequence.head:
        return 0
    before = sequence.pending
    slots = mx.concatenate([*before, carried[:-1]]) if before else carried[:-1]
    count = slots.shape[0]
    if count:
        first = start - 1 if before else start
        tokens = mx.array(sequence.tokens[first + 1 : first + 1 + count], mx.int32)
        model.head(tokens, slots, [Segment(sequence.head, count)])
    return count


@dataclass(frozen=True, slots=True)
class _Built:
    """A round's graph, not evaluated. `rows` are the tokens of the verify pass."""

    drafts: list[Draft | None]
    rows: mx.array
    segments: list[Segment]
    hidden: Hidden
    outcome: Outcome
    finite: mx.array
    logprobs: list[Measured | None]


@dataclass(frozen=True, slots=True)
class _Read:
    """What the host reads of an evaluated round, row by row."""

    rows: list[int]
    stands: list[bool]
    token: list[int]
    finite: list[bool]


def run_round(model: Model, drafter: Drafter, sequences: list[Sequence]) -> Round:
    """One round for sequences that are past their prefill.

    Raises:
        DeviceFailure: the evaluation failed; these sequences are lost.
        Exception: anything else was raised while the graph was built, and no sequence has changed.
    """
    times = [time.perf_counter()]
    for sequence in sequences:
        sequence.begin()
    try:
        drafts = drafter.draft(sequences)
        times.append(time.perf_counter())
        built = _build(model, drafts, sequences)
    except BaseException:
        for sequence in sequences:
            sequence.abort()
        raise
    told = [array for measured in built.logprobs if measured is not None for array in measured.arrays]
    said = _joined(built.rows, built.outcome.stands, built.outcome.token, built.finite)
    evaluate([said, built.hidden.carried, *told])
    times.append(time.perf_counter())
    read = _read(said)
    committed = [_commit(sequence, built, read, place) for place, sequence in enumerate(sequences)]
    times.append(time.perf_counter())
    return Round(committed, *(after - before for before, after in itertools.pairwise(times)))


@mx.compile
def _joined(rows: mx.array, stands: mx.array, token: mx.array, finite: mx.array) -> mx.array:
    """One array, as each that the host reads is a copy of its own: int32 [4, R]."""
    return mx.stack([rows, stands.astype(mx.int32), token, finite.astype(mx.int32)])


def _read(said: mx.array) -> _Read:
    rows, stands, token, finite = table(said)
    return _Read(rows, [bool(value) for value in stands], token, [bool(value) for value in finite])


def _build(model: Model, drafts: list[Draft | None], sequences: list[Sequence]) -> _Built:
    segments = [Segment(sequence.trunk, _rows(draft)) for sequence, draft in zip(sequences, drafts, strict=True)]
    slices = split_rows(segments)
    tokens = _verified(sequences, drafts)
    hidden = model.trunk(tokens, segments)
    logits = model.logits(hidden.normed)
    outcome = _judge(model, sequences, drafts, slices, logits, _spoken_for(tokens, slices))
    measured = [
        None if one.logprobs is None else _measure(logits[part], draft, outcome, part, one.logprobs)
        for one, draft, part in zip(sequences, drafts, slices, strict=True)
    ]
    return _Built(drafts, tokens, segments, hidden, outcome, _all_finite(logits), measured)


def _verified(sequences: list[Sequence], drafts: list[Draft | None]) -> mx.array:
    """Each sequence's newest token and its drafts, one after another: int32 [R]."""
    newest = mx.array([sequence.tokens[-1] for sequence in sequences], mx.int32)
    known = [draft.tokens for draft in drafts if draft is not None]
    if not known:
        return newest
    if len(known) == len(drafts) and len({tokens.shape for tokens in known}) == 1:  # the same in fewer launches
        return mx.concatenate([newest[:, None], mx.stack(known)], axis=1).flatten()
    pairs = zip(newest.split(len(drafts)), drafts, strict=True)
    return mx.concatenate([part for own, draft in pairs for part in ([own] if draft is None else [own, draft.tokens])])


def _spoken_for(tokens: mx.array, slices: list[slice]) -> mx.array:
    """The draft that each row speaks for, which is the next row's token, -1 in the last row of each sequence."""
    last = [row + 1 == part.stop for part in slices for row in range(part.start, part.stop)]
    if all(last):
        return mx.full(tokens.shape, -1, mx.int32)
    return mx.where(mx.array(last), -1, mx.concatenate([tokens[1:], tokens[:1]]))


def _measure(logits: mx.array, draft: Draft | None, outcome: Outcome, part: slice, count: int) -> Measured:
    """Log-probabilities of the token that each row commits if the round gets to it: its draft where that stands."""
    token = outcome.token[part]
    if draft is not None:
        kept = outcome.stands[part][:-1]
        token = mx.concatenate([mx.where(kept, draft.tokens, token[:-1]), token[-1:]])
    return logprobs.measure(logits, token, count)


def _judge(
    model: Model,
    sequences: list[Sequence],
    drafts: list[Draft | None],
    slices: list[slice],
    logits: mx.array,
    spoken_for: mx.array,
) -> Outcome:
    """Every row of the pass; those that the kernel draws together, of the others those that sample alike."""
    rules = [
        Rule.COUPLING if draft is None else sequence.rule for sequence, draft in zip(sequences, drafts, strict=True)
    ]
    kinds = [
        None if rule is Rule.COUPLING and draws.direct(model, sequence) else (sequence.sampling, rule)
        for sequence, rule in zip(sequences, rules, strict=True)
    ]
    parts = [
        (one.processors, part, None if draft is None else draft.tokens)
        for one, part, draft in zip(sequences, slices, drafts, strict=True)
        if one.processors is not None
    ]
    treated = processed(logits, parts)
    groups = grouped(kinds)
    rows = {kind: [row for place in own for row in _range(slices[place])] for kind, own in groups.items()}
    outcomes = []
    for kind, places in groups.items():
        source, own = logits if kind is None else treated, spoken_for
        if len(groups) > 1:
            source, own = source[mx.array(rows[kind])], own[mx.array(rows[kind])]
        members = [(sequences[place], drafts[place]) for place in places]
        outcomes.append(
            _draw(model, members, source, own) if kind is None else _judge_alike(members, source, own, *kind)
        )
    stands, token = (reordered([getattr(o, name) for o in outcomes], rows) for name in ("stands", "token"))
    return Outcome(stands, token)


def _range(part: slice) -> range:
    return range(part.start, part.stop)


def _judge_alike(
    members: list[tuple[Sequence, Draft | None]],
    logits: mx.array,
    spoken_for: mx.array,
    parameters: Sampling,
    rule: Rule,
) -> Outcome:
    seeds: list[int] = []
    positions: list[int] = []
    drafted: list[int] = []
    laws: list[Law] = []
    for sequence, draft in members:
        depth = _rows(draft) - 1
        drafted += range(len(seeds), len(seeds) + depth)
        seeds += [sequence.seed] * (depth + 1)
        positions += range(len(sequence.tokens), len(sequence.tokens) + depth + 1)
        laws += [draft.law] if draft is not None and draft.law is not None else []
    p = sampling.transform(logits, parameters)
    q = joined(laws) if laws else None
    return acceptance.judge(rule, p, q, spoken_for, drafted, noise.keys(seeds), mx.array(positions), logits.shape[-1])


def _draw(
    model: Model, members: list[tuple[Sequence, Draft | None]], logits: mx.array, spoken_for: mx.array
) -> Outcome:
    """Coupling through the kernel."""
    places = [(one, len(one.tokens) + row) for one, draft in members for row in range(_rows(draft))]
    token = draws.draw(model, logits, places, Purpose.TARGET)
    return Outcome(token == spoken_for, token)


def _rows(draft: Draft | None) -> int:
    return 1 + (0 if draft is None else draft.tokens.shape[0])


def _commit(sequence: Sequence, built: _Built, read: _Read, place: int) -> Committed:
    """Accept left to right and keep exactly the rows that stand. Committed slots wait for the head with their true
    hiddens; rows it ran on its own output are dropped."""
    part = split_rows(built.segments)[place]
    drafts = read.rows[part][1:]
    tokens = acceptance.committed(drafts, read.stands[part], read.token[part])
    cache.commit(sequence.trunk, len(tokens))
    if drafts and sequence.pending:
        cache.commit(sequence.head, sequence.pending_rows)
        sequence.pending = []
    else:
        cache.abort(sequence.head)
    sequence.keep_pending(built.hidden.carried[part][: len(tokens)])
    sequence.count(len(drafts), len(tokens) - 1)
    return _settle(sequence, tokens, read.finite[part][: len(tokens)], built.logprobs[place], len(drafts))


def _settle(
    sequence: Sequence, tokens: list[int], finite: list[bool], measured: Measured | None, drafted: int = 0
) -> Committed:
    if not all(finite):
        detail = "the model gave logits that are not finite"
        return Committed([], drafted, EngineError(ErrorReason.NON_FINITE_LOGITS, detail))
    sequence.tokens += tokens
    if sequence.processors is not None:
        sequence.processors.commit(tokens)
    return Committed(tokens, drafted, logprobs=measured.told(tokens) if measured else ())
