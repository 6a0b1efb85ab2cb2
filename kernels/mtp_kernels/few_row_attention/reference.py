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
        keys, values: `[1, kv_heads, C, 256]`; positions below position[0] are read from them.
        tail: `[2, kv_heads, 64, 256]`, keys and values from position[0] on, the new rows' included.
        position: two int32: first position in the tail, position of the first row. May still be uncomputed.
    """

    keys: mx.array
    values: mx.array
    tail: mx.array
    position: mx.array


def reference(queries: mx.array, contexts: Sequence[Context], segments: Segments, projected: mx.array) -> mx.array:
    """The definition of right for `few_row_attention`; reads positions back to the host."""
    own = zip(segments.slices, contexts, strict=True)
    return mx.concatenate([_alone(queries[part], context, projected[part]) for part, context in own])


def _alone(queries: mx.array, context: Context, projected: mx.array) -> mx.array:
    base, first = host_ints(context.position)
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
