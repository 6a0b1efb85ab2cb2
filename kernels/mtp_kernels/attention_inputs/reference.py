"""What the attention-inputs kernel computes, in plain MLX operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..launch import host_ints
from ..segments import Segments


@dataclass(frozen=True)
class AttentionShape:
    """One gated attention layer's dimensions and norms.

    Attributes:
        heads: query heads; a projection row holds, per head, 256 query then 256 gate columns.
        kv_heads: key heads, then as many value heads, after the queries.
        q_norm: `[256]`.
        k_norm: `[256]`.
        eps: of both norms.
        rotary: dimensions that rotate, the first of each head.
        theta: base of the rotary frequencies.
    """

    heads: int
    kv_heads: int
    q_norm: mx.array
    k_norm: mx.array
    eps: float
    rotary: int
    theta: float

    @property
    def width(self) -> int:
        """Columns of a projection row: q and gate per head, then k, then v."""
        return (2 * self.heads + 2 * self.kv_heads) * HEAD_DIM


HEAD_DIM = 256


def rotate(x: mx.array, first: mx.array, rotary: int, theta: float) -> mx.array:
    """Rotary embedding (arXiv 2104.09864) of `[M, heads, 256]` at positions first, first + 1, ...

    Pairs are (i, i + rotary / 2), the angle is position * theta ** (-2i / rotary).
    """
    half = rotary // 2
    frequency = mx.exp(mx.arange(half, dtype=mx.float32) * (-math.log(theta) / half))
    angle = (first + mx.arange(x.shape[0])).astype(mx.float32)[:, None, None] * frequency
    cosine, sine = mx.cos(angle), mx.sin(angle)
    a, b, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
    return mx.concatenate([a * cosine - b * sine, a * sine + b * cosine, rest], axis=-1)


def reference(
    projected: mx.array,
    tails: Sequence[mx.array],
    positions: Sequence[mx.array],
    segments: Segments,
    shape: AttentionShape,
) -> tuple[mx.array, list[mx.array]]:
    """The definition of right for `attention_inputs`; reads `positions` back to the host."""
    return one_by_one(_alone, projected, tails, positions, segments, shape)


def one_by_one(
    alone: Callable[[mx.array, mx.array, mx.array, AttentionShape], tuple[mx.array, mx.array]],
    projected: mx.array,
    tails: Sequence[mx.array],
    positions: Sequence[mx.array],
    segments: Segments,
    shape: AttentionShape,
) -> tuple[mx.array, list[mx.array]]:
    """What `attention_inputs` returns, from what `alone` does with the rows, tail and position of one sequence."""
    own = zip(segments.slices, tails, positions, strict=True)
    results = [alone(projected[part], tail, position, shape) for part, tail, position in own]
    return mx.concatenate([queries for queries, _ in results]), [after for _, after in results]


def _alone(projected: mx.array, tail: mx.array, position: mx.array, shape: AttentionShape) -> tuple[mx.array, mx.array]:
    base, first, _ = host_ints(position)
    rows = projected.shape[0]
    wide = projected.astype(mx.float32)
    split = shape.heads * 2 * HEAD_DIM
    q = wide[:, :split].reshape(rows, shape.heads, 2, HEAD_DIM)[:, :, 0]
    kv = wide[:, split:].reshape(rows, 2, shape.kv_heads, HEAD_DIM)
    q = mx.fast.rms_norm(q, shape.q_norm.astype(mx.float32), shape.eps)
    k = mx.fast.rms_norm(kv[:, 0], shape.k_norm.astype(mx.float32), shape.eps)
    q, k = (rotate(t, position[1], shape.rotary, shape.theta) for t in (q, k))
    new = mx.stack([k, kv[:, 1]]).transpose(0, 2, 1, 3).astype(tail.dtype)
    used = first - base
    tail = mx.concatenate([tail[:, :, :used], new, tail[:, :, used + rows :]], axis=2)
    return q.astype(projected.dtype), tail
