"""What the few-row attention computes, in plain MLX operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..launch import host_ints
from ..segments import Segments

HEAD_DIM = 256


@dataclass(frozen=True)
class Context:
    """What the rows of one sequence attend to.

    Attributes:
        keys, values: `[1, kv_heads, C, 256]`; positions below position[0] are read from them. A kernel takes their
            `first_row` as well and reads on from there.
        tail: `[2, kv_heads, 64, 256]`, keys and values from position[0] on, the new rows' included.
        position: three int32: first position in the tail, position of the first row, C. May still be uncomputed.
        bound: no row lies at this position or beyond, by which launches are sized; None: as buffer and tail allow.
    """

    keys: mx.array
    values: mx.array
    tail: mx.array
    position: mx.array
    bound: int | None = None

    @property
    def positions(self) -> int:
        """How many positions there may be."""
        return self.keys.shape[2] + self.tail.shape[2] if self.bound is None else self.bound


def first_row(buffer: mx.array) -> mx.array:
    """The first row of keys or values, `[1, 1, 1, 256]`, in the buffer's own memory.

    Its shape does not change when a buffer grows, so that a compiled function need not either. Being contiguous it is
    given to a kernel as it lies, with the rest of the buffer behind it. While it lives, MLX does not write the buffer
    in place.
    """
    return buffer[:, :1, :1]


def reference(queries: mx.array, contexts: Sequence[Context], segments: Segments, projected: mx.array) -> mx.array:
    """The definition of right for `few_row_attention`; reads positions back to the host."""
    own = zip(segments.slices, contexts, strict=True)
    return mx.concatenate([_alone(queries[part], context, projected[part]) for part, context in own])


def _alone(queries: mx.array, context: Context, projected: mx.array) -> mx.array:
    base, first, _ = host_ints(context.position)
    keys, values, tail = context.keys, context.values, context.tail
    rows, heads, _ = queries.shape
    used = first - base + rows
    k = mx.concatenate([keys[0, :, :base], tail[0, :, :used]], axis=1).astype(mx.float32)
    v = mx.concatenate([values[0, :, :base], tail[1, :, :used]], axis=1).astype(mx.float32)
    q = queries.astype(mx.float32).transpose(1, 0, 2).reshape(k.shape[0], -1, rows, HEAD_DIM)
    scores = (q @ k[:, None].transpose(0, 1, 3, 2)) * HEAD_DIM**-0.5
    late = mx.arange(first + rows)[None, :] > first + mx.arange(rows)[:, None]
    weights = mx.softmax(mx.where(late, -mx.inf, scores), axis=-1)
    out = (weights @ v[:, None]).reshape(heads, rows, HEAD_DIM).transpose(1, 0, 2)
    gate = projected[:, : heads * 2 * HEAD_DIM].astype(mx.float32).reshape(rows, heads, 2, HEAD_DIM)[:, :, 1]
    return (out * mx.sigmoid(gate)).reshape(rows, -1).astype(queries.dtype)
