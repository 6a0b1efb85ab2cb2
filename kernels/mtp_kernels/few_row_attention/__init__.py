"""Gated grouped-query attention of few rows over a KV cache, row-invariant, in two launches.

The first reduces fixed splits of 64 positions, the second joins a row's splits in order and applies the output gate.
"""

from __future__ import annotations

import mlx.core as mx

from ..attention_inputs import TAIL
from ..launch import CUDA_TYPES, cuda_launch, platform, source_text, version_of
from . import metal
from .reference import HEAD_DIM, reference

__all__ = ["MAX_QUERIES", "VERSION", "check", "few_row_attention", "reference", "supported"]

MAX_QUERIES = 64
"""Most rows times query heads per KV head in one pass."""
_SPLIT = 64
_THREADS = 256
_JOIN_THREADS = 1024
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


def check(queries: mx.array, keys: mx.array, values: mx.array, tail: mx.array, projected: mx.array) -> None:
    """Raises ValueError when shapes or dtypes do not fit together."""
    if queries.ndim != 3 or queries.shape[2] != HEAD_DIM:
        raise ValueError(f"queries are {queries.shape}, expected [M, heads, {HEAD_DIM}]")
    rows, heads, _ = queries.shape
    if keys.ndim != 4 or keys.shape[0] != 1 or keys.shape[3] != HEAD_DIM or keys.shape != values.shape:
        raise ValueError(f"keys are {keys.shape} and values {values.shape}, expected [1, kv_heads, C, {HEAD_DIM}]")
    if tail.shape != (2, keys.shape[1], TAIL, HEAD_DIM):
        raise ValueError(f"tail is {tail.shape}, expected {(2, keys.shape[1], TAIL, HEAD_DIM)}")
    if rows * (heads // keys.shape[1]) > MAX_QUERIES:
        raise ValueError(f"{rows} rows of {heads // keys.shape[1]} heads per KV head exceed {MAX_QUERIES}")
    if projected.shape != (rows, 2 * (heads + keys.shape[1]) * HEAD_DIM):
        raise ValueError(f"projected is {projected.shape}")
    if any(a.dtype != queries.dtype for a in (keys, values, tail, projected)):
        raise ValueError(f"keys, values, tail and projected must be {queries.dtype} like the queries")


def few_row_attention(
    queries: mx.array, keys: mx.array, values: mx.array, tail: mx.array, position: mx.array, projected: mx.array
) -> mx.array:
    """Causal attention of the newest rows, gated.

    Args:
        queries: `[M, heads, 256]`, normed and rotated; the scale 256 ** -0.5 is applied here.
        keys, values: `[1, kv_heads, C, 256]`; positions below position[0] are read from them.
        tail: `[2, kv_heads, 64, 256]`, keys and values from position[0] on, the new rows' included.
        position: two int32: first position in the tail, position of the first row.
        projected: the layer's projection rows, which hold the gates (see `attention_inputs`).

    Returns:
        `[M, heads * 256]`, each head times the sigmoid of its gate.

    Raises:
        ValueError: shapes or dtypes that do not fit together or that the kernel does not have.
    """
    check(queries, keys, values, tail, projected)
    rows, heads, _ = queries.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    reason = supported(heads, kv_heads, queries.shape[2], queries.dtype)
    if reason:
        raise ValueError(reason)
    if platform() == "metal":
        return metal.launch(queries, keys, values, tail, position, projected)
    group = heads // kv_heads
    splits = (capacity + TAIL - 1) // _SPLIT + 1
    kind = CUDA_TYPES[queries.dtype]
    scale = HEAD_DIM**-0.5
    partial = cuda_launch(
        "few_row_attention",
        __file__,
        f"""
  extern __shared__ __align__(16) float smem[];
  few_row_attention::partial<{kind}, {group}, {TAIL}>(queries, keys, values, tail, position, parts,
      reinterpret_cast<float2*>(stats), queries_shape[0], {kv_heads}, keys_shape[2], {scale!r}f, smem);
""",
        ("queries", "keys", "values", "tail", "position"),
        ("parts", "stats"),
        shared_memory=MAX_QUERIES * (HEAD_DIM + _SPLIT) * 4,
    )
    parts, stats = partial(
        inputs=[queries, keys, values, tail, position],
        output_shapes=[(splits, kv_heads, rows * group, HEAD_DIM), (splits, kv_heads, rows * group, 2)],
        output_dtypes=[mx.float32, mx.float32],
        grid=(splits * _THREADS, kv_heads, 1),
        threadgroup=(_THREADS, 1, 1),
    )
    join = cuda_launch(
        "few_row_attention_join",
        __file__,
        f"""
  few_row_attention::join<{kind}, {group}>(parts, reinterpret_cast<const float2*>(stats), projected, position, y,
      projected_shape[0], {kv_heads});
""",
        ("parts", "stats", "projected", "position"),
        ("y",),
    )
    (y,) = join(
        inputs=[parts, stats, projected, position],
        output_shapes=[(rows, heads * HEAD_DIM)],
        output_dtypes=[queries.dtype],
        grid=(rows * heads * _JOIN_THREADS, 1, 1),
        threadgroup=(_JOIN_THREADS, 1, 1),
    )
    return y
