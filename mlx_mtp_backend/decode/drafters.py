"""Where drafts come from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import mlx.core as mx

from mlx_mtp_backend import cache
from mlx_mtp_backend.api import Rule, Sampling
from mlx_mtp_backend.decode import draws, noise, sampling
from mlx_mtp_backend.decode.acceptance import draft_purpose
from mlx_mtp_backend.decode.noise import Purpose
from mlx_mtp_backend.decode.processors import processed
from mlx_mtp_backend.decode.sampling import Law
from mlx_mtp_backend.decode.sequence import Sequence
from mlx_mtp_backend.families.base import Model, Segment

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
            self._draft(runs)
        drafts = {id(run.sequence): run.draft for run in runs}
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

    def _draft(self, runs: list[_Run]) -> None:
        """Step by step, each for all that want one more; rows of several sequences stay one array throughout."""
        newest, carried = self._catch_up(runs)
        steps, left = [newest], runs
        while going := [run for run in left if len(run.tokens) < run.sequence.round_depth]:
            if len(going) < len(left):
                rows = mx.array([row for row, run in enumerate(left) if run in going])
                newest, carried = newest[rows], carried[rows]
            left = going
            newest, carried = self._step(left, newest, carried, [1] * len(left))
            steps.append(newest)
        alike = len(left) == len(runs)
        table = mx.stack(steps, axis=1) if alike else None
        for row, run in enumerate(runs):
            tokens = mx.concatenate(run.tokens) if table is None else table[row]
            run.draft = Draft(tokens, sampling.joined(run.laws) if run.laws else None)

    def _catch_up(self, runs: list[_Run]) -> tuple[mx.array, mx.array]:
        """Run the committed slots with true trunk hiddens; the last slot's output is the first draft, for free."""
        counts = [run.carried.shape[0] for run in runs]
        tokens = [token for run, count in zip(runs, counts, strict=True) for token in run.sequence.tokens[-count:]]
        carried = runs[0].carried if len(runs) == 1 else mx.concatenate([run.carried for run in runs])
        return self._step(runs, mx.array(tokens, mx.int32), carried, counts)

    def _step(
        self, runs: list[_Run], tokens: mx.array, carried: mx.array, counts: list[int]
    ) -> tuple[mx.array, mx.array]:
        """One pass of the head; its last row of each sequence gives that sequence's next draft.

        Returns:
            the drafts, int32 [len(runs)], and what the head takes with them, [len(runs), hidden size].
        """
        segments = [Segment(run.sequence.head, count) for run, count in zip(runs, counts, strict=True)]
        hidden = self._model.head(tokens, carried, segments)
        normed, carried = hidden.normed, hidden.carried
        if len(runs) < tokens.shape[0]:
            normed, carried = _last(normed, counts), _last(carried, counts)
        logits = self._model.logits(normed)
        drawn = [draws.direct(self._model, run.sequence) and run.sequence.rule is Rule.COUPLING for run in runs]
        kinds = [
            None if direct else (run.sequence.sampling, run.sequence.rule)
            for run, direct in zip(runs, drawn, strict=True)
        ]
        groups = grouped(kinds)
        chosen = []
        for kind, rows in groups.items():
            own, some = [runs[row] for row in rows], logits if len(groups) == 1 else logits[mx.array(rows)]
            if kind is None:
                chosen.append(draws.draw(self._model, some, [_place(run) for run in own], Purpose.TARGET))
            else:
                chosen.append(_choose(own, some, *kind))
        drafts = reordered(chosen, groups)
        for row, run in enumerate(runs):
            run.tokens.append(drafts[row : row + 1])
        mx.async_eval(drafts)  # type: ignore[no-untyped-call]  # the device begins while the host builds what follows
        return drafts, carried


def grouped(kinds: list[Kind]) -> dict[Kind, list[int]]:
    """Which places hold each kind, so that alike rows can be worked on together."""
    places: dict[Kind, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    return places


def reordered(parts: list[mx.array], groups: dict[Kind, list[int]]) -> mx.array:
    """Joins what was worked out group by group, a row for each place, in the order of the places."""
    if len(parts) == 1:
        return parts[0]
    order = list(itertools.chain.from_iterable(groups.values()))
    return mx.concatenate(parts)[mx.array(sorted(range(len(order)), key=order.__getitem__))]


def _last(rows: mx.array, counts: list[int]) -> mx.array:
    """The last of each sequence's rows."""
    return rows[-1:] if len(counts) == 1 else rows[mx.array([end - 1 for end in itertools.accumulate(counts)])]


class _Run:
    """One sequence's drafts in the making; `carried` is what the head takes first, [rows, hidden size]."""

    def __init__(self, sequence: Sequence) -> None:
        if not sequence.pending:
            raise ValueError("a sequence that drafts keeps its hiddens")
        self.sequence = sequence
        self.carried = mx.concatenate(sequence.pending) if len(sequence.pending) > 1 else sequence.pending[0]
        self.tokens: list[mx.array] = []
        self.laws: list[Law] = []
        self.draft: Draft | None = None


def _choose(runs: list[_Run], logits: mx.array, parameters: Sampling, rule: Rule) -> mx.array:
    """The next draft of sequences that sample alike, int32 [len(runs)]. logits: [len(runs), vocab size]."""
    parts = [
        (run.sequence.processors, slice(row, row + 1), mx.concatenate(run.tokens) if run.tokens else None)
        for row, run in enumerate(runs)
        if run.sequence.processors is not None
    ]
    law = sampling.transform(processed(logits, parts), parameters, exact=False)
    keys = noise.keys(run.sequence.seed for run in runs)
    positions = mx.array([_place(run)[1] for run in runs])
    if rule is Rule.REJECTION:
        for row, run in enumerate(runs):
            run.laws.append(law.take(mx.array([row])))
    return sampling.choose(law, keys, positions, draft_purpose(rule))


def _place(run: _Run) -> tuple[Sequence, int]:
    """Whose the next draft is, and its absolute position."""
    return run.sequence, len(run.sequence.tokens) + len(run.tokens)


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
