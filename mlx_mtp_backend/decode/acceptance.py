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

from mlx_mtp_backend.api import Rule
from mlx_mtp_backend.decode import noise
from mlx_mtp_backend.decode.noise import Purpose
from mlx_mtp_backend.decode.sampling import Law, choose


@dataclass(frozen=True, slots=True)
class Outcome:
    """What each row says on its own.

    Attributes:
        stands: bool [R], whether the row's draft is kept.
        token: int32 [R], the token emitted if the sequence's round ends at this row.
    """

    stands: mx.array
    token: mx.array


def draft_purpose(rule: Rule) -> Purpose:
    """The noise a draft is drawn with: the target's own under coupling, an independent one under rejection."""
    return Purpose.TARGET if rule is Rule.COUPLING else Purpose.DRAFT


def couple(p: Law, drafts: mx.array, keys: mx.array, positions: mx.array) -> Outcome:
    """Coupling.

    Args:
        p: the target's law of R rows.
        drafts: int32 [R]; -1 where there is none.
        keys: uint32 [R, 2], each row's seed.
        positions: integers [R], absolute position of each row's token.
    """
    token = choose(p, keys, positions, Purpose.TARGET)
    return Outcome(token == drafts, token)


def reject(p: Law, q: Law, drafts: mx.array, vocab_size: int, keys: mx.array, positions: mx.array) -> Outcome:
    """Rejection sampling; `q` is the law that `drafts` were really drawn from. Arguments as in `couple`."""
    target, proposal = p.dense(vocab_size), q.dense(vocab_size)
    accept = noise.uniform(noise.bits(keys, positions, mx.zeros_like(drafts)[:, None], Purpose.ACCEPT))[:, 0]
    p_draft, q_draft = (mx.take_along_axis(law, drafts[:, None], axis=-1)[:, 0] for law in (target, proposal))
    stands = accept * mx.exp(q_draft) < mx.exp(p_draft)
    return Outcome(stands, choose(residual(target, proposal), keys, positions, Purpose.RESIDUAL))


def residual(target: mx.array, proposal: mx.array) -> Law:
    """The normalised max(p - q, 0) of dense log-laws [R, V]; p itself where rounding leaves nothing of it."""
    rest = mx.maximum(mx.exp(target) - mx.exp(proposal), 0)
    mass = mx.sum(rest, axis=-1, keepdims=True)
    return Law(mx.where(mass > 0, mx.log(rest) - mx.log(mass), target))


def judge(
    rule: Rule,
    p: Law,
    q: Law | None,
    drafts: mx.array,
    drafted: list[int],
    keys: mx.array,
    positions: mx.array,
    vocab_size: int,
) -> Outcome:
    """The verify rows of any number of sequences that share a rule.

    Args:
        p: the target's law, R rows: each sequence's drafts, then its bonus row that no draft speaks for.
        q: the law of each draft, a row for each of `drafted`. Coupling does not look at it.
        drafts: int32 [R], -1 in bonus rows.
        drafted: the rows that have a draft, ascending.
    """
    if rule is Rule.COUPLING or q is None:
        return couple(p, drafts, keys, positions)
    bonus = sorted(set(range(drafts.shape[0])) - set(drafted))
    mine, rest = mx.array(drafted), mx.array(bonus)
    judged = reject(p.take(mine), q, drafts[mine], vocab_size, keys[mine], positions[mine])
    token = choose(p.take(rest), keys[rest], positions[rest], Purpose.TARGET)
    back = mx.argsort(mx.concatenate([mine, rest]))
    stands = mx.concatenate([judged.stands, mx.zeros((len(bonus),), mx.bool_)])
    return Outcome(stands[back], mx.concatenate([judged.token, token])[back])


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
