"""Matrix product for the few rows of a decode or verify pass, with RMSNorm, residual and SwiGLU fused.

Row-invariant: a row of the result has the same bits whatever rows share the call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from ..launch import CUDA_TYPES, SHARED_MEMORY_BYTES, cuda_launch, multiprocessors, platform, source_text, version_of
from . import metal
from .plan import TILE_FEATURES, TILE_ROWS, launches, plan, wide_plan
from .reference import Matrix, reference, stock

__all__ = [
    "COUNTERS",
    "MAX_ROWS",
    "TILE_ROWS",
    "VERSION",
    "Matrix",
    "counters",
    "few_row_matmul",
    "reference",
    "stock",
    "supported",
]

MAX_ROWS = 32
COUNTERS = 1024
"""Words of `work`: enough for a layer's products of more than 8 rows."""
_distinct = itertools.cycle(range(1, 4096))
COMMON = ("tensor_core.cuh", "few_row_matmul/shared.cuh")
_SOURCES = ("../tensor_core.cuh", "shared.cuh", "kernel.cu", "wide.cu", "plan.py", "kernel.metal", "metal.py")
VERSION = version_of(*(source_text(__file__, name) for name in _SOURCES))


def supported(matrices: Sequence[Matrix], dtype: mx.Dtype, *, swiglu: bool = False) -> str | None:
    """None when the CUDA kernel can take these matrices, else the reason why not."""
    first = matrices[0]
    if dtype not in (mx.bfloat16, mx.float16):
        return f"dtype {dtype} is neither bfloat16 nor float16"
    if first.bits not in (4, 8, 16):
        return f"{first.bits} bits: only 4, 8 and dense 16 are built"
    if first.bits != 16 and first.group_size not in (32, 64, 128):
        return f"group size {first.group_size}: only 32, 64 and 128 are built"
    if any((m.bits, m.group_size, m.inputs) != (first.bits, first.group_size, first.inputs) for m in matrices):
        return "the matrices differ in bits, group size or inputs"
    if first.inputs % max(128, 2 * first.group_size):
        return f"{first.inputs} inputs are no multiple of {max(128, 2 * first.group_size)}"
    if swiglu and (len(matrices) != 2 or matrices[0].features != matrices[1].features):
        return "SwiGLU takes a gate and an up matrix of one shape"
    return None


def counters(count: int) -> Sequence[mx.array]:
    """`work` for so many products of one pass, from a single launch; never to be kept for another pass."""
    parts = mx.split(_zeros(count * COUNTERS), [COUNTERS * i for i in range(1, count + 1)])
    return cast(Sequence[mx.array], parts)[:count]


def _zeros(size: int) -> mx.array:
    """At least so many zeros, which mx.compile takes for no others: it would make one array of two of one size."""
    return mx.zeros((size + next(_distinct),), mx.uint32)


def few_row_matmul(
    x: mx.array,
    matrices: Sequence[Matrix],
    *,
    norm_weight: mx.array | None = None,
    eps: float = 1e-6,
    residual: mx.array | None = None,
    swiglu: bool = False,
    out_dtype: mx.Dtype | None = None,
    work: mx.array | None = None,
) -> mx.array:
    """Product of few rows with one or more weight matrices in one launch; on Metal in one per 8 rows.

    On CUDA, too, there are several where so many rows do not fit into shared memory: more than 16 of some 5,000 inputs
    with weights of 8 or 16 bits.

    Args:
        x: `[M, K]` bfloat16 or float16, 1 <= M <= 32.
        matrices: each `[N_i, K]`, alike in bits and group size; their outputs are concatenated.
        norm_weight: `[K]`; when given, x is RMS-normalised with it first (arXiv 1910.07467).
        eps: added to the mean square.
        residual: `[M, N]` added to the product.
        swiglu: the two matrices are gate and up, and the result is silu(gate) * up (arXiv 2002.05202).
        out_dtype: dtype of the result; x's when None.
        work: `[COUNTERS]` uint32, zero, for this call alone (see `counters`): blocks then take tiles of output
            features from it as they get free, and count it up in place. Without it each has fixed ones. Launches for
            more than 8 rows also count in it which blocks are done; if it is missing or too short they make their own.
            Changes no bits.

    Returns:
        `[M, N]`, N the sum of N_i, or N_0 with `swiglu`.

    Raises:
        ValueError: a shape, dtype or combination that the kernel does not have.
    """
    _check(x, matrices, norm_weight, residual, swiglu)
    first = matrices[0]
    sizes: tuple[int, ...] = (x.shape[0],)
    if platform() == "metal":
        sizes = (TILE_ROWS,) * -(-x.shape[0] // TILE_ROWS)
    elif x.shape[0] > TILE_ROWS:
        sizes = launches(
            x.shape[0], first.inputs, first.bits, first.group_size, swiglu=swiglu, norm=norm_weight is not None
        )
    if len(sizes) == 1:
        return _launch(x, matrices, norm_weight, eps, residual, swiglu, out_dtype or x.dtype, work)
    parts, begin = [], 0
    for size in sizes:
        rows = slice(begin, begin + size)
        added = None if residual is None else residual[rows]
        count = work if begin == 0 else None
        parts.append(_launch(x[rows], matrices, norm_weight, eps, added, swiglu, out_dtype or x.dtype, count))
        begin += size
    return mx.concatenate(parts, axis=0)


def _check(
    x: mx.array, matrices: Sequence[Matrix], norm_weight: mx.array | None, residual: mx.array | None, swiglu: bool
) -> None:
    if not matrices:
        raise ValueError("no matrix given")
    if x.ndim != 2 or not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(f"x is {x.shape}, expected [1..{MAX_ROWS}, K]")
    if x.shape[1] != matrices[0].inputs:
        raise ValueError(f"x has {x.shape[1]} columns, the matrices take {matrices[0].inputs}")
    reason = supported(matrices, x.dtype, swiglu=swiglu)
    if reason:
        raise ValueError(reason)
    if swiglu and residual is not None:
        raise ValueError("SwiGLU with a residual is not built")
    features = matrices[0].features if swiglu else sum(m.features for m in matrices)
    if residual is not None and residual.shape != (x.shape[0], features):
        raise ValueError(f"residual is {residual.shape}, expected {(x.shape[0], features)}")
    if norm_weight is not None and norm_weight.shape != (x.shape[1],):
        raise ValueError(f"norm_weight is {norm_weight.shape}, expected {(x.shape[1],)}")
    given = [a for m in matrices for a in (m.scales, m.biases) if a is not None]
    given += [m.weight for m in matrices if m.bits == 16]
    given += [a for a in (norm_weight, residual) if a is not None]
    if any(a.dtype != x.dtype for a in given):
        raise ValueError(f"scales, biases, dense weights, norm and residual must be {x.dtype} like x")


def _launch(
    x: mx.array,
    matrices: Sequence[Matrix],
    norm_weight: mx.array | None,
    eps: float,
    residual: mx.array | None,
    swiglu: bool,
    out_dtype: mx.Dtype,
    work: mx.array | None,
) -> mx.array:
    if platform() == "metal":
        return metal.launch(x, matrices, norm_weight, eps, residual, swiglu, out_dtype)
    rows, inputs = x.shape
    first, norm = matrices[0], norm_weight is not None
    form = (rows, inputs, first.bits, first.group_size)
    how = plan(*form, swiglu=swiglu, norm=norm) if rows <= TILE_ROWS else wide_plan(*form, swiglu=swiglu, norm=norm)
    assert how is not None
    tiles = how.tiles(sum(-(-m.features // TILE_FEATURES) for m in (matrices[:1] if swiglu else matrices)))
    branches = how.branches(tiles, inputs)
    if how.shares > 1 and (work is None or work.size < how.shares + tiles):
        work = _zeros(how.shares + tiles)
    names, arrays, rows_of = ["x"], [x], []
    for i, m in enumerate(matrices):
        names += [f"w{i}", f"s{i}", f"b{i}"] if m.scales is not None else [f"w{i}"]
        arrays += m.arrays()
        scales = f"(Bytes)s{i}, (Bytes)b{i}" if m.scales is not None else "nullptr, nullptr"
        rows_of.append(f"{{(Bytes)w{i}, {scales}, w{i}_shape[0]}}")
    for name, array in (("norm_weight", norm_weight), ("residual", residual), ("work", work)):
        if array is not None:
            names.append(name)
            arrays.append(array)
    kind, epilogue = CUDA_TYPES[x.dtype], 2 if swiglu else int(residual is not None)
    left = ["const_cast<unsigned*>(work)" if work is not None else "nullptr", *(["branches"] if branches else [])]
    body = f"""
  extern __shared__ __align__(128) unsigned char smem[];
  using Bytes = const unsigned char*;
  const few_row::Matrix matrices[{len(matrices)}] = {{{", ".join(rows_of)}}};
  few_row::{how.template}<{kind}, {CUDA_TYPES[out_dtype]}, {first.bits}, {first.group_size or 64}, {len(matrices)},
                  {how.arguments}, {_bool(norm)}, {epilogue}, {how.scale_bytes}>(
      x, {"norm_weight" if norm else f"({kind}*)nullptr"},
      {"residual" if residual is not None else f"({kind}*)nullptr"}, matrices, y, x_shape[0], x_shape[1],
      {eps!r}f, smem).run({", ".join(left)});
"""
    outputs = ("y", "branches") if branches else ("y",)
    kernel = cuda_launch(
        "few_row_matmul", __file__, body, tuple(names), outputs, SHARED_MEMORY_BYTES, how.threads, COMMON, how.source
    )
    features = first.features if swiglu else sum(m.features for m in matrices)
    blocks = how.shares * min(max(1, multiprocessors() // how.shares), tiles)
    return kernel(
        inputs=arrays,
        output_shapes=[(rows, features), (branches,)][: len(outputs)],
        output_dtypes=[out_dtype, mx.float32][: len(outputs)],
        grid=(blocks * how.threads, 1, 1),
        threadgroup=(how.threads, 1, 1),
    )[0]


def _bool(value: bool) -> str:
    return "true" if value else "false"
