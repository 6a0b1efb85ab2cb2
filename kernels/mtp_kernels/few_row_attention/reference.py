"""What the few-row attention computes, in plain MLX operations."""

from __future__ import annotations

import mlx.core as mx

from ..launch import host_ints

HEAD_DIM = 256


def reference(
    queries: mx.array, keys: mx.array, values: mx.array, tail: mx.array, position: mx.array, projected: mx.array
) -> mx.array:
    """The definition of right for `few_row_attention`; reads `position` back to the host."""
    base, first = host_ints(position)
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
