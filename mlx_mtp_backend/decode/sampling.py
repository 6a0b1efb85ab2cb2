"""From logits to the law a token is drawn from, and the draw itself.

Transforms run in llama.cpp's default order: top-k, then top-p and min-p on what is left (at temperature 1),
temperature last. Ties fall to the lowest token id. A row's result depends on that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp_backend.api import Sampling
from mlx_mtp_backend.decode import noise
from mlx_mtp_backend.host import flags

# A nucleus is looked for among this many candidates; a row whose nucleus is wider is sorted whole.
NUCLEUS_WIDTH = 1024


@dataclass(frozen=True, slots=True)
class Law:
    """One categorical law per row.

    Attributes:
        logp: float32 [R, M], normalised; -inf where a token is excluded.
        ids: int32 [R, M], the token of each column, ascending in a row; None where column i is token i.
    """

    logp: mx.array
    ids: mx.array | None = None

    def take(self, rows: mx.array) -> Law:
        return Law(self.logp[rows], None if self.ids is None else self.ids[rows])

    def dense(self, vocab_size: int) -> mx.array:
        """The same log-probabilities with column i for token i: float32 [R, vocab_size]."""
        if self.ids is None:
            return self.logp
        nothing = mx.full((self.logp.shape[0], vocab_size), -math.inf)
        return mx.put_along_axis(nothing, self.ids, self.logp, axis=-1)


def joined(laws: Sequence[Law]) -> Law:
    """The rows of several laws of one form, one after another."""
    ids = [law.ids for law in laws if law.ids is not None]
    return Law(mx.concatenate([law.logp for law in laws]), mx.concatenate(ids) if ids else None)


def transform(logits: mx.array, sampling: Sampling, *, exact: bool = True) -> Law:
    """The law of each row under the request's parameters.

    Args:
        logits: [R, V], any float type.
        exact: False cuts a nucleus wider than NUCLEUS_WIDTH there and never waits for the device: good enough for a
            draft, whose law may be any as long as it is the one drawn from.
    """
    logits = logits.astype(mx.float32)
    if sampling.greedy:
        best = mx.argmax(logits, axis=-1, keepdims=True).astype(mx.int32)
        return Law(mx.zeros(best.shape), best)
    if sampling.top_k == 0 and sampling.top_p == 1:
        return Law(_temper(logits, sampling))
    vocab_size = logits.shape[-1]
    width = min(sampling.top_k or NUCLEUS_WIDTH, vocab_size)
    law, covered = _truncate(logits, sampling, width)
    if not exact or width == vocab_size or sampling.top_k:
        return law
    rows = flags(covered)
    return law if all(rows) else _widen(logits, sampling, rows)


def choose(law: Law, keys: mx.array, positions: mx.array, purpose: noise.Purpose) -> mx.array:
    """Draw one token per row by an exponential race: the smallest E / p wins, with law p.

    Args:
        keys: uint32 [R, 2], each row's seed; see noise.keys.
        positions: integers [R], the absolute position each row's token will have.

    Returns:
        int32 [R].
    """
    if law.ids is not None and law.ids.shape[-1] == 1:
        return law.ids[:, 0]
    if law.ids is None:
        draws = noise.row_bits(keys, positions, law.logp.shape[-1], purpose)
    else:
        draws = noise.bits(keys, positions, law.ids, purpose)
    winner = mx.argmin(noise.log_exponential(draws) - law.logp, axis=-1, keepdims=True)
    return (winner if law.ids is None else mx.take_along_axis(law.ids, winner, axis=-1))[:, 0].astype(mx.int32)


def candidates(logits: mx.array, width: int) -> mx.array:
    """The `width` likeliest tokens of each row, likeliest first, ties by lowest id: int32 [R, width].

    Logits are mapped to integers that order the same way, with the id below: every key differs, so partition and sort
    need no tie rule of their own.
    """
    pattern = (logits + 0.0).view(mx.uint32)  # + 0.0 makes -0.0 equal to 0.0
    falling = mx.where(pattern >> 31 == 1, pattern, ~pattern ^ 0x80000000)
    keys = (falling.astype(mx.uint64) << 32) | mx.arange(logits.shape[-1]).astype(mx.uint64)
    if width < logits.shape[-1]:
        keys = mx.partition(keys, width - 1, axis=-1)[:, :width]
    return (mx.sort(keys, axis=-1) & 0xFFFFFFFF).astype(mx.int32)


def _temper(logits: mx.array, sampling: Sampling) -> mx.array:
    if sampling.min_p > 0:
        floor = mx.max(logits, axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits = mx.where(logits >= floor, logits, -math.inf)
    tempered = logits / sampling.temperature
    return tempered - mx.logsumexp(tempered, axis=-1, keepdims=True)


def _truncate(logits: mx.array, sampling: Sampling, width: int) -> tuple[Law, mx.array]:
    ids = candidates(logits, width)
    kept = mx.take_along_axis(logits, ids, axis=-1)
    mass = mx.logsumexp(kept if sampling.top_k else logits, axis=-1, keepdims=True)
    p = mx.exp(kept - mass)
    before = mx.cumsum(p, axis=-1, inclusive=False)
    covered = before[:, -1] + p[:, -1] >= sampling.top_p
    if sampling.top_p < 1:
        kept = mx.where(before < sampling.top_p, kept, -math.inf)
    order = mx.argsort(ids, axis=-1)
    logp = mx.take_along_axis(_temper(kept, sampling), order, axis=-1)
    return Law(logp, mx.take_along_axis(ids, order, axis=-1)), covered


def _widen(logits: mx.array, sampling: Sampling, covered: list[bool]) -> Law:
    """Each row at the width that it alone needs, so that no row's sums depend on its neighbours."""
    vocab_size = logits.shape[-1]
    widths = [NUCLEUS_WIDTH if row_covered else vocab_size for row_covered in covered]
    laws = [_truncate(logits[r : r + 1], sampling, width)[0] for r, width in enumerate(widths)]
    return Law(mx.concatenate([law.dense(vocab_size) for law in laws]))
