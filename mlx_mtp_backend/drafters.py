"""Where drafts come from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import mlx.core as mx

from mlx_mtp_backend import cache, draws, noise, sampling
from mlx_mtp_backend.acceptance import draft_purpose
from mlx_mtp_backend.api import Rule, Sampling
from mlx_mtp_backend.families.base import Model, Segment
from mlx_mtp_backend.noise import Purpose
from mlx_mtp_backend.processors import processed
from mlx_mtp_backend.sampling import Law
from mlx_mtp_backend.sequence import Sequence

Kind = TypeVar("Kind", bound=Hashable)

CATCH_UP_ROWS = 256  # that heads run in one round because they missed them: no more than a chunk of a prompt


@dataclass(frozen=True, slots=True)
class Draft:
    """One sequence's drafts of a round.

    Attributes:
        tokens: int32 [D].
        law: the law that each was really drawn from, D rows; None under coupling, which does not ask.
    """

    tokens: mx.array
    law: Law | None


class Drafter(Protocol):
    def draft(self, sequences: list[Sequence]) -> list[Draft | None]:
        """Draft `round_depth` tokens for each sequence, None where that is 0.

        Head caches are inside a transaction: the rows of a sequence's pending slots come first, others after them.
        """


class HeadDrafter:
    """The model's own head, run on its own output for the later drafts.

    A head that missed many slots, as nothing was drafted for long, catches up in slices, a round each, before it drafts
    again. It skips none: wrong or missing slots would change no reply, as any draft is verified, but fewer would stand.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    def draft(self, sequences: list[Sequence]) -> list[Draft | None]:
        runs = [_Run(sequence) for sequence in self._ready(sequences)]
        if runs:
            self._catch_up(runs)
        left = runs
        while left := [run for run in left if len(run.tokens) < run.sequence.round_depth]:
            tokens = mx.concatenate([run.tokens[-1] for run in left])
            self._step(left, tokens, mx.concatenate([run.carried for run in left]), [1] * len(left))
        drafts = {id(run.sequence): run.joined() for run in runs}
        return [drafts.get(id(sequence)) for sequence in sequences]

    def _ready(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those that draft in this round; of the others the one that is least behind is brought nearer."""
        ready, room = [], CATCH_UP_ROWS
        for sequence in sorted(sequences, key=lambda one: one.pending_rows):
            if sequence.round_depth == 0:
                continue
            behind = max(0, sequence.pending_rows - sequence.round_depth - 1)
            if behind <= room:
                ready.append(sequence)
            elif room:
                self._bring_nearer(sequence, room)
            room = max(0, room - behind)
        return ready

    def _bring_nearer(self, sequence: Sequence, rows: int) -> None:
        """Run the head over the oldest slots that it has missed. They are committed by themselves: whatever becomes of
        the round, they are right."""
        pending = mx.concatenate(sequence.pending)
        first = len(sequence.tokens) - pending.shape[0]
        tokens = mx.array(sequence.tokens[first : first + rows], mx.int32)
        self._model.head(tokens, pending[:rows], [Segment(sequence.head, rows)])
        cache.commit(sequence.head, rows)
        cache.begin(sequence.head)
        sequence.pending = [pending[rows:]]
        # Nothing else in the round needs them, and unevaluated they would pile up to one long pass after all.
        settled = [array for layer in sequence.head for array in layer.arrays]
        mx.async_eval([*settled, *sequence.pending])  # type: ignore[no-untyped-call]

    def _catch_up(self, runs: list[_Run]) -> None:
        """Run the committed slots with true trunk hiddens; the last slot's output is the first draft, for free."""
        counts = [run.carried.shape[0] for run in runs]
        tokens = [token for run, count in zip(runs, counts, strict=True) for token in run.sequence.tokens[-count:]]
        self._step(runs, mx.array(tokens, mx.int32), mx.concatenate([run.carried for run in runs]), counts)

    def _step(self, runs: list[_Run], tokens: mx.array, carried: mx.array, counts: list[int]) -> None:
        """One pass of the head; its last row of each sequence gives that sequence's next draft."""
        segments = [Segment(run.sequence.head, count) for run, count in zip(runs, counts, strict=True)]
        hidden = self._model.head(tokens, carried, segments)
        ends = [end - 1 for end in itertools.accumulate(counts)]
        if len(ends) == tokens.shape[0]:
            newest = hidden.normed
        else:
            newest = hidden.normed[-1:] if len(ends) == 1 else hidden.normed[mx.array(ends)]
        logits = self._model.logits(newest)
        for run, end in zip(runs, ends, strict=True):
            run.carried = hidden.carried[end : end + 1]
        drawn = [draws.direct(self._model, run.sequence) and run.sequence.rule is Rule.COUPLING for run in runs]
        kinds = [
            None if direct else (run.sequence.sampling, run.sequence.rule)
            for run, direct in zip(runs, drawn, strict=True)
        ]
        for kind, rows in grouped(kinds).items():
            chosen, own = [runs[row] for row in rows], logits if len(rows) == len(runs) else logits[mx.array(rows)]
            if kind is None:
                _take(chosen, draws.draw(self._model, own, [_place(run) for run in chosen], Purpose.TARGET))
            else:
                _choose(chosen, own, *kind)
        # The device begins while the host builds what follows.
        mx.async_eval([run.tokens[-1] for run in runs])  # type: ignore[no-untyped-call]


def grouped(kinds: list[Kind]) -> dict[Kind, list[int]]:
    """Which places hold each kind, so that alike rows can be worked on together."""
    places: dict[Kind, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    return places


class _Run:
    """One sequence's drafts in the making; `carried` is what the head takes next, [rows, hidden size]."""

    def __init__(self, sequence: Sequence) -> None:
        if not sequence.pending:
            raise ValueError("a sequence that drafts keeps its hiddens")
        self.sequence = sequence
        self.carried = mx.concatenate(sequence.pending) if len(sequence.pending) > 1 else sequence.pending[0]
        self.tokens: list[mx.array] = []
        self.laws: list[Law] = []

    def joined(self) -> Draft:
        return Draft(mx.concatenate(self.tokens), sampling.joined(self.laws) if self.laws else None)


def _choose(runs: list[_Run], logits: mx.array, parameters: Sampling, rule: Rule) -> None:
    """The next draft of sequences that sample alike. logits: [len(runs), vocab size]."""
    parts = [
        (run.sequence.processors, slice(row, row + 1), mx.concatenate(run.tokens) if run.tokens else None)
        for row, run in enumerate(runs)
        if run.sequence.processors is not None
    ]
    law = sampling.transform(processed(logits, parts), parameters, exact=False)
    keys = noise.keys(run.sequence.seed for run in runs)
    positions = mx.array([_place(run)[1] for run in runs])
    _take(runs, sampling.choose(law, keys, positions, draft_purpose(rule)))
    if rule is Rule.REJECTION:
        for row, run in enumerate(runs):
            run.laws.append(law.take(mx.array([row])))


def _place(run: _Run) -> tuple[Sequence, int]:
    """Whose the next draft is, and its absolute position."""
    return run.sequence, len(run.sequence.tokens) + len(run.tokens)


def _take(runs: list[_Run], tokens: mx.array) -> None:
    """Note each run's next draft. tokens: int32 [len(runs)]."""
    for row, run in enumerate(runs):
        run.tokens.append(tokens if len(runs) == 1 else tokens[row : row + 1])


# (sequence, its absolute position) -> the token plain decoding would put there.
Oracle = Callable[[Sequence, int], int]


class ScriptedDrafter:
    """Drafts the plain continuation, each token kept with a set probability: acceptance to order.

    For tests and benchmarks. It needs to know the continuation, which only coupling fixes in advance; under rejection
    it is an arbitrary but honest draft law: a mixture of the oracle's token and a uniform one.

    Args:
        acceptance: probability per draft position that the oracle's token is drafted; the last value repeats.
        head: run this drafter too and throw its drafts away, so that a benchmark pays for it.
    """

    def __init__(
        self, oracle: Oracle, vocab_size: int, acceptance: tuple[float, ...], head: HeadDrafter | None = None
    ) -> None:
        self._oracle = oracle
        self._vocab_size = vocab_size
        self._acceptance = acceptance
        self._head = head

    def draft(self, sequences: list[Sequence]) -> list[Draft | None]:
        paid_for = self._head.draft(sequences) if self._head else None
        drafts = [self._scripted(sequence) if sequence.round_depth else None for sequence in sequences]
        if paid_for is None:
            return drafts
        # The scripted tokens depend on the head's, so that its passes are not optimised away.
        return [
            Draft(mx.depends(mine.tokens, [theirs.tokens]) if theirs else mine.tokens, mine.law) if mine else None
            for mine, theirs in zip(drafts, paid_for, strict=True)
        ]

    def _scripted(self, sequence: Sequence) -> Draft:
        depth, start = sequence.round_depth, len(sequence.tokens)
        rates = [self._acceptance[min(i, len(self._acceptance) - 1)] for i in range(depth)]
        kept = mx.array([[self._oracle(sequence, start + i)] for i in range(depth)])
        rate = mx.array(rates)[:, None]
        p = mx.broadcast_to((1 - rate) / max(self._vocab_size - 1, 1), (depth, self._vocab_size))
        law = Law(mx.log(mx.put_along_axis(p, kept, rate, axis=-1)))
        positions = mx.arange(start, start + depth)
        # Its own noise even under coupling: drafting with the target's would make a wrong draft right by luck.
        keys = noise.keys([sequence.seed] * depth)
        return Draft(sampling.choose(law, keys, positions, Purpose.DRAFT), law)
