"""Per-head RMSNorm and rotary embedding of few rows, and the KV cache's tail with the new rows in it, in one launch.

The tail is a small buffer for the newest positions. Writing it anew costs little, so a pass adds rows without touching
the long buffer, and dropping rows is a matter of the next pass's position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from ..launch import CUDA_TYPES, cuda_launch, platform, source_text, version_of
from ..segments import Segments, launch_size, numbered, of_sequence, padded
from . import metal
from .reference import HEAD_DIM, AttentionShape, reference, rotate

__all__ = [
    "HEAD_DIM",
    "TAIL",
    "VERSION",
    "AttentionShape",
    "attention_inputs",
    "check",
    "reference",
    "rotate",
    "supported",
]

TAIL = 64
"""Positions that a tail holds."""
_WARPS = 8
VERSION = version_of(*(source_text(__file__, name) for name in ("kernel.cu", "kernel.metal", "metal.py")))


def supported(shape: AttentionShape, dtype: mx.Dtype) -> str | None:
    """None when the CUDA kernel can take this layer, else the reason why not."""
    if dtype not in (mx.bfloat16, mx.float16):
        return f"dtype {dtype} is neither bfloat16 nor float16"
    if shape.heads % shape.kv_heads:
        return f"{shape.heads} query heads over {shape.kv_heads} KV heads"
    if shape.q_norm.shape != (HEAD_DIM,) or shape.k_norm.shape != (HEAD_DIM,):
        return f"heads of {shape.q_norm.shape[0]}: only {HEAD_DIM} is built"
    if shape.rotary not in (32, 64, 128, 256):
        return f"{shape.rotary} rotary dimensions: only 32, 64, 128 and 256 are built"
    return None


def check(
    projected: mx.array,
    tails: Sequence[mx.array],
    positions: Sequence[mx.array],
    segments: Segments,
    shape: AttentionShape,
) -> None:
    """Raises ValueError when shapes or dtypes do not fit together."""
    if not len(tails) == len(positions) == len(segments.counts):
        raise ValueError(f"{len(tails)} tails and {len(positions)} positions for {len(segments.counts)} sequences")
    if not all(1 <= count <= TAIL for count in segments.counts):
        raise ValueError(f"sequences of {segments.counts} rows: each has 1 to {TAIL}")
    if projected.shape != (sum(segments.counts), shape.width):
        raise ValueError(f"projected is {projected.shape}, expected {(sum(segments.counts), shape.width)}")
    for tail, position in zip(tails, positions, strict=True):
        if tail.shape != (2, shape.kv_heads, TAIL, HEAD_DIM) or tail.dtype != projected.dtype:
            raise ValueError(f"tail is {tail.shape} {tail.dtype}, expected {(2, shape.kv_heads, TAIL, HEAD_DIM)}")
        if position.shape != (3,) or position.dtype != mx.int32:
            raise ValueError("position must be three int32")


def attention_inputs(
    projected: mx.array,
    tails: Sequence[mx.array],
    positions: Sequence[mx.array],
    segments: Segments,
    shape: AttentionShape,
) -> tuple[mx.array, list[mx.array]]:
    """Prepares few rows of a gated attention layer.

    Args:
        projected: `[N, width]` projections of all sequences: q and gate per head, k, v.
        tails: of each sequence `[2, kv_heads, 64, 256]`, keys then values of positions position[0] onwards.
        positions: of each three int32: the first position in its tail, that of its first new row, and one that is
            `few_row_attention`'s. The caller keeps position[1] + rows - position[0] <= 64. May still be uncomputed.
        segments: which rows are whose.
        shape: the layer.

    Returns:
        Queries `[N, heads, 256]`, and each tail with its new rows' keys and values.

    Raises:
        ValueError: shapes or dtypes that do not fit together or that the kernel does not have.
    """
    check(projected, tails, positions, segments, shape)
    reason = supported(shape, projected.dtype)
    if reason:
        raise ValueError(reason)
    if platform() == "metal":
        return metal.launch(projected, tails, positions, segments, shape)
    queries, after = [], []
    for some in segments.launches():
        own, new_tails = _launch(projected[some.rows], tails[some.own], positions[some.own], some.segments, shape)
        queries.append(own)
        after += new_tails
    return mx.concatenate(queries), after


def _launch(
    projected: mx.array,
    tails: Sequence[mx.array],
    positions: Sequence[mx.array],
    segments: Segments,
    shape: AttentionShape,
) -> tuple[mx.array, list[mx.array]]:
    """One launch for sequences that it takes; spare inputs of its size repeat the first, spare outputs hold nothing."""
    count = len(tails)
    size = launch_size(count)
    tail, position, tail_out = (of_sequence(name, size) for name in ("tail", "position", "tail_out"))
    kernel = cuda_launch(
        "attention_inputs",
        __file__,
        f"""
  const int sequence = blockIdx.y, row = starts[sequence];
  attention_inputs::run<{CUDA_TYPES[projected.dtype]}, {shape.rotary}, {TAIL}>(projected, {tail}, {position}, q_weight,
      k_weight, queries, {tail_out}, row, starts[sequence + 1] - row, {shape.heads}, {shape.kv_heads}, {shape.eps!r}f,
      {math.log2(shape.theta)!r}f);
""",
        ("projected", "q_weight", "k_weight", "starts", *numbered("tail", size), *numbered("position", size)),
        ("queries", *numbered("tail_out", size)),
    )
    spare = size - count
    items = max(segments.counts) * (shape.heads + 2 * shape.kv_heads) + 2 * shape.kv_heads * TAIL
    queries, *after = kernel(
        inputs=[projected, shape.q_norm, shape.k_norm, segments.starts, *padded(tails, size), *padded(positions, size)],
        output_shapes=[(projected.shape[0], shape.heads, HEAD_DIM), *[tails[0].shape] * count, *[(1,)] * spare],
        output_dtypes=[projected.dtype] * (1 + size),
        grid=(-(-items // _WARPS) * _WARPS * 32, count, 1),
        threadgroup=(_WARPS * 32, 1, 1),
    )
    return queries, after[:count]
