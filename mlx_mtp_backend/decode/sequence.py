"""One sequence as the rounds see it."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from mlx_mtp_backend import cache
from mlx_mtp_backend.api import MAX_DEPTH, Rule, Sampling
from mlx_mtp_backend.cache import LayerCache
from mlx_mtp_backend.decode.depth import Acceptance
from mlx_mtp_backend.decode.processors import Processors
from mlx_mtp_backend.families.base import Model

_JOINED = 64  # rounds without drafts whose hiddens become one array, so that a long reply does not keep thousands


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, caches and counters of one request.

    Between rounds: the trunk has seen `tokens[:-1]`, the newest token has not been run; the head has seen the slots
    whose trunk hiddens are not in `pending`.

    Attributes:
        tokens: prompt and committed tokens.
        limit: the length at which the sequence must stop.
        depth: drafts a round; of the next one, where `acceptance` is given.
        most_depth: drafts that the next pass has room for.
        acceptance: how likely its drafts are kept; None where the depth is fixed.
        boundaries: lengths of the prompt up to which others are likely to share it.
        cached: prompt tokens that the prefix cache held.
        pending: trunk hiddens, [rows, hidden size] each, of the last slots, which the head still has to run. Slot p
            pairs hidden p with token p + 1.
        depths: rounds by the number of drafts.
        processors: what the request does to its logits; None for nothing.
        logprobs: log-probabilities to tell, as in GenerateParams.
        drafted, accepted: verified and accepted drafts per draft position.
    """

    tokens: list[int]
    prompt_length: int
    limit: int
    sampling: Sampling
    seed: int
    rule: Rule
    depth: int
    trunk: list[LayerCache]
    head: list[LayerCache]
    most_depth: int = MAX_DEPTH
    acceptance: Acceptance | None = None
    boundaries: tuple[int, ...] = ()
    prefilled: int = 0
    cached: int = 0
    pending: list[mx.array] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    processors: Processors | None = None
    logprobs: int | None = None
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def prefilling(self) -> bool:
        return self.prefilled < self.prompt_length

    @property
    def round_depth(self) -> int:
        """Drafts for the next round: no more than could be committed beside the round's own token."""
        return max(0, min(self.depth, self.most_depth, self.limit - len(self.tokens) - 1)) if self.head else 0

    @property
    def rounds(self) -> int:
        return sum(self.depths)

    @property
    def pending_rows(self) -> int:
        return sum(hiddens.shape[0] for hiddens in self.pending)

    @property
    def caches(self) -> list[LayerCache]:
        return [*self.trunk, *self.head]

    def begin(self) -> None:
        cache.begin(self.caches)

    def abort(self) -> None:
        cache.abort(self.caches)

    def keep_pending(self, carried: mx.array) -> None:
        """Note trunk hiddens [m, hidden size] of newly committed slots for the head."""
        if not self.head:
            return
        self.pending.append(carried)
        if len(self.pending) >= _JOINED and self.pending[-_JOINED].shape[0] < _JOINED:
            joined = mx.concatenate(self.pending[-_JOINED:])
            mx.async_eval(joined)  # type: ignore[no-untyped-call]  # else it keeps every pass whole that it is made of
            self.pending[-_JOINED:] = [joined]

    def count(self, drafted: int, accepted: int) -> None:
        self.depths += [0] * (drafted + 1 - len(self.depths))
        self.depths[drafted] += 1
        grow = drafted - len(self.drafted)
        if grow > 0:
            self.drafted += [0] * grow
            self.accepted += [0] * grow
        for position in range(drafted):
            self.drafted[position] += 1
            self.accepted[position] += position < accepted


def start(
    model: Model,
    prompt: tuple[int, ...],
    *,
    sampling: Sampling,
    seed: int,
    rule: Rule,
    depth: int,
    limit: int,
    acceptance: Acceptance | None = None,
    boundaries: tuple[int, ...] = (),
) -> Sequence:
    """A sequence that nothing has been run for. Without drafts ever to make, the head is left out for good."""
    head = model.head_caches() if depth > 0 or acceptance is not None else []
    trunk = model.trunk_caches()
    return Sequence(
        list(prompt),
        len(prompt),
        limit,
        sampling,
        seed,
        rule,
        depth,
        trunk,
        head,
        acceptance=acceptance,
        boundaries=boundaries,
    )
