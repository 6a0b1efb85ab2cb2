"""The two exact rules: which drafts stand, and which token follows the last that does.

Both are pure functions of logits' laws and counter-based noise. Under either, every emitted token follows the target's
law p, whatever the drafts were.

* Coupling (Daliri, Musco, Suresh 2024, arXiv 2408.07978): the target's token is drawn by a race whose noise depends on
  (seed, position, token) only, and a draft stands when it is that token. Drafts change the speed and nothing else.
* Rejection (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318): a draft x ~ q stands with
  probability min(1, p(x) / q(x)); otherwise the token is drawn from the normalised max(p - q, 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp_backend import noise
from mlx_mtp_backend.api import Rule
from mlx_mtp_backend.noise import Stream
from mlx_mtp_backend.sampling import Law, choose


@dataclass(frozen=True, slots=True)
class Outcome:
    """What each row says on its own.

    Attributes:
        stands: bool [R], whether the row's draft is kept.
        token: int32 [R], the token emitted if the sequence's round ends at this row.
    """

    stands: mx.array
    token: mx.array


def draft_stream(rule: Rule) -> Stream:
    """The noise a draft is drawn with: the target's own under coupling, an independent one under rejection."""
    return Stream.TARGET if rule is Rule.COUPLING else Stream.DRAFT


def couple(p: Law, drafts: mx.array, seed: int, positions: mx.array) -> Outcome:
    """Coupling.

    Args:
        p: the target's law of R rows.
        drafts: int32 [R].
        positions: integers [R], absolute position of each row's token.
    """
    token = choose(p, seed, positions, Stream.TARGET)
    return Outcome(token == drafts, token)


def reject(p: Law, q: Law, drafts: mx.array, vocab_size: int, seed: int, positions: mx.array) -> Outcome:
    """Rejection sampling; `q` is the law that `drafts` were really drawn from. Arguments as in `couple`."""
    target, proposal = p.dense(vocab_size), q.dense(vocab_size)
    accept = noise.uniform(noise.bits(seed, positions, mx.zeros_like(drafts)[:, None], Stream.ACCEPT))[:, 0]
    p_draft, q_draft = (mx.take_along_axis(law, drafts[:, None], axis=-1)[:, 0] for law in (target, proposal))
    stands = accept * mx.exp(q_draft) < mx.exp(p_draft)
    return Outcome(stands, choose(residual(target, proposal), seed, positions, Stream.RESIDUAL))


def residual(target: mx.array, proposal: mx.array) -> Law:
    """The normalised max(p - q, 0) of dense log-laws [R, V]; p itself where rounding leaves nothing of it."""
    rest = mx.maximum(mx.exp(target) - mx.exp(proposal), 0)
    mass = mx.sum(rest, axis=-1, keepdims=True)
    return Law(mx.where(mass > 0, mx.log(rest) - mx.log(mass), target))


def judge(
    rule: Rule, p: Law, q: Law | None, drafts: mx.array, vocab_size: int, seed: int, positions: mx.array
) -> Outcome:
    """One sequence's verify rows: D drafts, then the bonus row that no draft speaks for.

    Args:
        p: the target's law of D + 1 rows.
        q: the law of each draft, D rows; None where there are none. Coupling does not look at it.
        drafts: int32 [D].
        positions: integers [D + 1].
    """
    depth = drafts.shape[0]
    if rule is Rule.COUPLING or q is None:
        return couple(p, mx.concatenate([drafts, mx.array([-1], drafts.dtype)]), seed, positions)
    judged = reject(p.rows(0, depth), q, drafts, vocab_size, seed, positions[:depth])
    bonus = choose(p.rows(depth, depth + 1), seed, positions[depth:], Stream.TARGET)
    return Outcome(mx.concatenate([judged.stands, mx.array([False])]), mx.concatenate([judged.token, bonus]))


def committed(drafts: Sequence[int], stands: Sequence[bool], tokens: Sequence[int]) -> list[int]:
    """The tokens a round commits: the drafts up to the first that falls, then that row's own token.

    Args:
        drafts: D tokens.
        stands, tokens: Outcome of the D + 1 rows.
    """
    accepted = 0
    while accepted < len(drafts) and stands[accepted]:
        accepted += 1
    return [*drafts[:accepted], tokens[accepted]]
