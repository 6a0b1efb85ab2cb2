"""Where drafts come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_mtp_backend import sampling
from mlx_mtp_backend.acceptance import draft_stream
from mlx_mtp_backend.families.base import Model, Segment
from mlx_mtp_backend.noise import Stream
from mlx_mtp_backend.sampling import Law
from mlx_mtp_backend.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Draft:
    """One sequence's drafts of a round: tokens int32 [D] and the law that each was really drawn from, D rows."""

    tokens: mx.array
    law: Law


class Drafter(Protocol):
    def draft(self, sequences: list[Sequence]) -> list[Draft | None]:
        """Draft `round_depth` tokens for each sequence, None where that is 0.

        Head caches are inside a transaction: the rows of a sequence's pending slots come first, others after them.
        """


class HeadDrafter:
    """The model's own head, run on its own output for the later drafts."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def draft(self, sequences: list[Sequence]) -> list[Draft | None]:
        drafting = [sequence for sequence in sequences if sequence.round_depth > 0]
        steps: dict[int, list[tuple[mx.array, Law]]] = {id(sequence): [] for sequence in drafting}
        carried, tokens = self._catch_up(drafting, steps)
        depth = 1
        while drafting := [sequence for sequence in drafting if sequence.round_depth > depth]:
            rows = [tokens[id(sequence)] for sequence in drafting]
            hidden = mx.concatenate([carried[id(sequence)] for sequence in drafting])
            carried, tokens = self._step(drafting, mx.concatenate(rows), hidden, [1] * len(rows), steps)
            depth += 1
        return [_joined(steps[id(sequence)]) if id(sequence) in steps else None for sequence in sequences]

    def _catch_up(
        self, drafting: list[Sequence], steps: dict[int, list[tuple[mx.array, Law]]]
    ) -> tuple[dict[int, mx.array], dict[int, mx.array]]:
        """Run the committed slots with true trunk hiddens; the last slot's output is the first draft, for free."""
        if not drafting:
            return {}, {}
        pending = [sequence.pending for sequence in drafting]
        hidden = [rows for rows in pending if rows is not None]
        assert len(hidden) == len(drafting), "a sequence that drafts keeps its hiddens"
        counts = [rows.shape[0] for rows in hidden]
        tokens = [token for s, count in zip(drafting, counts, strict=True) for token in s.tokens[-count:]]
        return self._step(drafting, mx.array(tokens, mx.int32), mx.concatenate(hidden), counts, steps)

    def _step(
        self,
        drafting: list[Sequence],
        tokens: mx.array,
        carried: mx.array,
        counts: list[int],
        steps: dict[int, list[tuple[mx.array, Law]]],
    ) -> tuple[dict[int, mx.array], dict[int, mx.array]]:
        """One pass of the head; its last row of each sequence gives that sequence's next draft."""
        segments = [Segment(s.head, count) for s, count in zip(drafting, counts, strict=True)]
        hidden = self._model.head(tokens, carried, segments)
        ends = mx.cumsum(mx.array(counts)) - 1
        logits = self._model.logits(hidden.normed[ends])
        carried_on, drafted = {}, {}
        for row, sequence in enumerate(drafting):
            position = len(sequence.tokens) + len(steps[id(sequence)])
            law = sampling.transform(logits[row : row + 1], sequence.sampling, exact=False)
            stream = draft_stream(sequence.rule)
            token = sampling.choose(law, sequence.seed, mx.array([position]), stream)
            steps[id(sequence)].append((token, law))
            end = ends[row : row + 1]
            carried_on[id(sequence)], drafted[id(sequence)] = hidden.carried[end], token
        return carried_on, drafted


def _joined(steps: list[tuple[mx.array, Law]]) -> Draft:
    tokens = mx.concatenate([token for token, _ in steps])
    ids = [law.ids for _, law in steps]
    logp = mx.concatenate([law.logp for _, law in steps])
    return Draft(tokens, Law(logp, None if ids[0] is None else mx.concatenate([i for i in ids if i is not None])))


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
        return Draft(sampling.choose(law, sequence.seed, positions, Stream.DRAFT), law)
