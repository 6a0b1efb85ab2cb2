"""Rounds at the depth that pays: chosen before each, measured after it."""

from __future__ import annotations

import logging

from mlx_mtp_backend.decode import rounds
from mlx_mtp_backend.decode.depth import MAX_DEPTH, DepthController, Drafted
from mlx_mtp_backend.decode.drafters import Drafter
from mlx_mtp_backend.decode.rounds import Committed, Round
from mlx_mtp_backend.decode.sequence import Sequence
from mlx_mtp_backend.families.base import Model

log = logging.getLogger(__name__)


def paced_round(model: Model, drafter: Drafter, depths: DepthController, sequences: list[Sequence]) -> Round:
    """One round, see rounds.run_round. Sequences whose depth is not fixed get the one that promises most now."""
    _share(model, sequences)
    _assign(depths, sequences)
    before = [one.pending_rows for one in sequences]
    done = rounds.run_round(model, drafter, sequences)
    try:
        _learn(depths, sequences, done, before)
    except Exception:  # its tokens are committed: whatever is learned from it, they must be delivered
        log.exception("nothing was learned from a round")
    return done


def _learn(depths: DepthController, sequences: list[Sequence], done: Round, before: list[int]) -> None:
    """Tell the controller how a round went; `before` are the rows that each head had still to run then."""
    caught_up = sum(
        _caught_up(one, committed, pending)
        for one, committed, pending in zip(sequences, done.committed, before, strict=True)
    )
    fates = [
        Drafted(one.acceptance, committed.drafted, max(len(committed.tokens) - 1, 0))
        for one, committed in zip(sequences, done.committed, strict=True)
    ]
    depths.observe(fates, done.seconds, caught_up=caught_up)


def _caught_up(one: Sequence, committed: Committed, pending: int) -> int:
    """Rows that the head ran in a round beyond those that a round of this depth leaves.

    Args:
        pending: rows that it had still to run before.
    """
    ran = pending + len(committed.tokens) - one.pending_rows if one.head else 0
    return max(0, ran - (1 + committed.drafted if committed.drafted else 0))


def _share(model: Model, sequences: list[Sequence]) -> None:
    """No sequence drafts more than the pass has rows for: beyond them a row's bits would depend on its neighbours."""
    if model.most_rows is not None and model.most_segment_rows is not None:
        most = min(model.most_segment_rows, model.most_rows // len(sequences)) - 1
        for one in sequences:
            one.most_depth = max(0, most)


def _assign(depths: DepthController, sequences: list[Sequence]) -> None:
    adaptive = [(one, one.acceptance) for one in sequences if one.acceptance is not None]
    if not adaptive:
        return
    fixed = [one for one in sequences if one.acceptance is None]
    rows = sum(1 + one.round_depth for one in fixed)
    missed = sum(max(0, one.pending_rows - MAX_DEPTH - 1) for one, _ in adaptive)
    left = sum(one.limit - len(one.tokens) for one, _ in adaptive) // len(adaptive)
    depth = depths.choose([acceptance for _, acceptance in adaptive], len(fixed), rows, missed, left)
    for one, _ in adaptive:
        one.depth = depth
