"""Gated grouped-query attention of few rows over a KV cache, row-invariant, in two launches.

The first reduces splits of the context at fixed positions, the second joins a row's splits in order and applies the
output gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from ..attention_inputs import TAIL
from ..launch import CUDA_TYPES, cuda_launch, platform, source_text, version_of
from ..segments import Segments, launch_size, numbered, of_sequence, padded
from . import metal
from .reference import HEAD_DIM, Context, first_row, reference

__all__ = [
    "MAX_QUERIES",
    "VERSION",
    "Context",
    "check",
    "few_row_attention",
    "first_row",
    "reference",
    "supported",
]

MAX_QUERIES = 64
"""Most rows of a sequence times query heads per KV head in one pass."""
_TILES = (1, 3, 6, 8)
"""Numbers of tiles of 8 columns (rows times query heads per KV head) that the kernel is compiled for."""
_NEAR, _FAR = 1024, 4096
_SHORT, _MIDDLE, _LONG = 64, 128, 256
"""Positions of a split that begins below the first border, below the second, and beyond, as in the kernel."""
_TILE = 64
_RING_FEW, _RING_MANY, _FEW_TILES = 3, 2, 3
"""Tiles of positions in shared memory at once: more of them where there are few tiles of columns."""
_OF_CONTEXT = ("keys", "values", "tail", "position")
_THREADS = 128
_JOIN_THREADS, _JOIN_DIM = 512, 128
VERSION = version_of(*(source_text(__file__, name) for name in ("kernel.cu", "kernel.metal", "metal.py")))


def supported(heads: int, kv_heads: int, head_dim: int, dtype: mx.Dtype) -> str | None:
    """None when the CUDA kernel can take this layer, else the reason why not."""
    if dtype not in (mx.bfloat16, mx.float16):
        return f"dtype {dtype} is neither bfloat16 nor float16"
    if head_dim != HEAD_DIM:
        return f"heads of {head_dim}: only {HEAD_DIM} is built"
    if heads % kv_heads or heads // kv_heads > 8:
        return f"{heads} query heads over {kv_heads} KV heads: at most 8 share one"
    return None


def check(queries: mx.array, contexts: Sequence[Context], segments: Segments, projected: mx.array) -> None:
    """Raises ValueError when shapes or dtypes do not fit together."""
    if not contexts or len(contexts) != len(segments.counts):
        raise ValueError(f"{len(contexts)} contexts for {len(segments.counts)} sequences")
    if queries.ndim != 3 or queries.shape[0] != sum(segments.counts) or queries.shape[2] != HEAD_DIM:
        raise ValueError(f"queries are {queries.shape}, expected [{sum(segments.counts)}, heads, {HEAD_DIM}]")
    rows, heads, _ = queries.shape
    kv_heads = contexts[0].tail.shape[1]
    if projected.shape != (rows, 2 * (heads + kv_heads) * HEAD_DIM) or projected.dtype != queries.dtype:
        raise ValueError(f"projected is {projected.shape} {projected.dtype}")
    for context, count in zip(contexts, segments.counts, strict=True):
        _check_context(context, kv_heads, queries.dtype)
        if not 1 <= count * (heads // kv_heads) <= MAX_QUERIES:
            raise ValueError(f"{count} rows of {heads // kv_heads} heads per KV head exceed {MAX_QUERIES}")


def _check_context(context: Context, kv_heads: int, dtype: mx.Dtype) -> None:
    keys, values, tail = context.keys, context.values, context.tail
    whole = (1, kv_heads, keys.shape[2], HEAD_DIM)
    if keys.shape not in (whole, (1, 1, 1, HEAD_DIM)) or keys.shape != values.shape:
        raise ValueError(f"keys are {keys.shape} and values {values.shape}, expected [1, {kv_heads}, C, {HEAD_DIM}]")
    if keys.shape != whole and context.bound is None:
        raise ValueError("a bound of the positions must be given where keys and values are first rows")
    if tail.shape != (2, kv_heads, TAIL, HEAD_DIM):
        raise ValueError(f"tail is {tail.shape}, expected {(2, kv_heads, TAIL, HEAD_DIM)}")
    if any(a.dtype != dtype for a in (keys, values, tail)):
        raise ValueError(f"keys, values and tail must be {dtype} like the queries")
    if context.position.shape != (3,) or context.position.dtype != mx.int32:
        raise ValueError("position must be three int32")


def few_row_attention(
    queries: mx.array, contexts: Sequence[Context], segments: Segments, projected: mx.array
) -> mx.array:
    """Causal attention of each sequence's newest rows, gated.

    Args:
        queries: `[N, heads, 256]`, normed and rotated; the scale 256 ** -0.5 is applied here.
        contexts: of each sequence; all have the same KV heads.
        segments: which rows are whose.
        projected: the layer's projection rows, which hold the gates (see `attention_inputs`).

    Returns:
        `[N, heads * 256]`, each head times the sigmoid of its gate.

    Raises:
        ValueError: shapes or dtypes that do not fit together or that the kernel does not have.
    """
    check(queries, contexts, segments, projected)
    reason = supported(queries.shape[1], contexts[0].tail.shape[1], queries.shape[2], queries.dtype)
    if reason:
        raise ValueError(reason)
    if platform() == "metal":
        return metal.launch(queries, contexts, segments, projected)
    return mx.concatenate(
        [
            _launch(queries[some.rows], contexts[some.own], some.segments, projected[some.rows])
            for some in segments.launches()
        ]
    )


def _launch(queries: mx.array, contexts: Sequence[Context], segments: Segments, projected: mx.array) -> mx.array:
    """The two launches for sequences that one takes; spare inputs of its size repeat those of the first."""
    rows, heads, _ = queries.shape
    kv_heads = contexts[0].tail.shape[1]
    group, size = heads // kv_heads, launch_size(len(contexts))
    splits = _split_of(max(context.positions for context in contexts) - 1) + 1
    tiles = next(most for most in _TILES if most * 8 >= max(segments.counts) * group)
    kind, scale = CUDA_TYPES[queries.dtype], HEAD_DIM**-0.5 * math.log2(math.e)
    keys, values, tail, position = (of_sequence(name, size) for name in _OF_CONTEXT)
    positions = padded([context.position for context in contexts], size)
    partial = cuda_launch(
        "few_row_attention",
        __file__,
        f"""
  extern __shared__ __align__(128) unsigned char smem[];
  const int sequence = blockIdx.y, row = starts[sequence];
  few_row_attention::partial<{kind}, {group}, {TAIL}, {tiles}>(queries, {keys}, {values}, {tail}, {position}, parts,
      reinterpret_cast<float2*>(stats), row, starts[sequence + 1] - row, queries_shape[0], {kv_heads},
      ({position})[2], {scale!r}f, smem);
""",
        ("queries", "starts", *(name for part in _OF_CONTEXT for name in numbered(part, size))),
        ("parts", "stats"),
        shared_memory=_shared_bytes(tiles),
        threads=_THREADS,
    )
    parts, stats = partial(
        inputs=[
            queries,
            segments.starts,
            *(array for part in _OF_CONTEXT for array in padded([getattr(c, part) for c in contexts], size)),
        ],
        output_shapes=[(splits, kv_heads, rows * group, HEAD_DIM), (splits, kv_heads, rows * group, 2)],
        output_dtypes=[mx.float32, mx.float32],
        grid=(splits * kv_heads * _THREADS, len(contexts), 1),
        threadgroup=(_THREADS, 1, 1),
    )
    join = cuda_launch(
        "few_row_attention_join",
        __file__,
        f"""
  const int m = blockIdx.x / {heads * HEAD_DIM // _JOIN_DIM};
  int sequence = 0;
  while (sequence < {size - 1} && m >= starts[sequence + 1]) ++sequence;
  few_row_attention::join<{kind}, {group}>(parts, reinterpret_cast<const float2*>(stats), projected, y,
      ({position})[1] + m - (sequence ? starts[sequence] : 0), projected_shape[0], {kv_heads});
""",
        ("parts", "stats", "projected", "starts", *numbered("position", size)),
        ("y",),
        threads=_JOIN_THREADS,
    )
    (y,) = join(
        inputs=[parts, stats, projected, segments.starts, *positions],
        output_shapes=[(rows, heads * HEAD_DIM)],
        output_dtypes=[queries.dtype],
        grid=(rows * heads * HEAD_DIM // _JOIN_DIM * _JOIN_THREADS, 1, 1),
        threadgroup=(_JOIN_THREADS, 1, 1),
    )
    return y


def _split_of(position: int) -> int:
    """The split that a position lies in, as in the kernel."""
    if position < _NEAR:
        return position // _SHORT
    if position < _FAR:
        return _NEAR // _SHORT + (position - _NEAR) // _MIDDLE
    return _NEAR // _SHORT + (_FAR - _NEAR) // _MIDDLE + (position - _FAR) // _LONG


def _shared_bytes(tiles: int) -> int:
    """Shared memory of a block: queries, a ring of tiles, weights, and what warps tell each other."""
    columns, ring = tiles * 8, _RING_FEW if tiles <= _FEW_TILES else _RING_MANY
    return (columns * (HEAD_DIM + _TILE) + ring * _TILE * HEAD_DIM) * 2 + (_THREADS // 32 + 1) * columns * 4
