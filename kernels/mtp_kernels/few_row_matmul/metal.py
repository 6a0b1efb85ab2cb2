"""The few-row matmul on Metal; unproved on a Mac, and run only after the registry's checks."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..launch import METAL_TYPES, metal_launch, source_text
from .reference import Matrix
from .variants import Variant, variant_for

_END = """
  float value = few_row::joined<NORM>(tile, lane);
"""
_JOIN_SPLITS = """
  threadgroup float shares[TILES][SPLITS][32];
  shares[simdgroup_index_in_threadgroup / SPLITS][split][lane] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (split != 0) return;
  for (int s = 1; s < SPLITS; ++s) value += shares[simdgroup_index_in_threadgroup / SPLITS][s][lane];
"""
_NORM = """
  const float square = simd_shuffle(value, ushort(min(ROWS * STREAMS + lane / STREAMS, 31)));
  value *= rsqrt(square * (1.0f / K) + EPS);
"""
_SWIGLU = """
  const float up = simd_shuffle(value, ushort(min(lane + OUTPUTS, 31)));
  value = few_row::silu(value) * up;
"""
_STORE = """
  const int m = lane / STREAMS, s = lane % STREAMS;
  if (m >= ROWS || s >= OUTPUTS || first + s > last) return;
  const int at = m * COLUMNS + column + s;
"""


def launch(
    x: mx.array,
    matrices: Sequence[Matrix],
    norm_weight: mx.array | None,
    eps: float,
    residual: mx.array | None,
    swiglu: bool,
    out_dtype: mx.Dtype,
) -> mx.array:
    """One launch for at most 8 rows; arguments are checked by the caller."""
    rows = x.shape[0]
    features = matrices[0].features if swiglu else sum(m.features for m in matrices)
    variant = variant_for(matrices, norm=norm_weight is not None, swiglu=swiglu, residual=residual is not None)
    outputs = variant.outputs(rows, norm=norm_weight is not None, swiglu=swiglu)
    tiles = [-(-m.features // outputs) for m in (matrices[:1] if swiglu else matrices)]
    names, arrays = ["x"], [x]
    for i, m in enumerate(matrices):
        names += [f"w{i}", f"s{i}", f"b{i}"] if m.scales is not None else [f"w{i}"]
        arrays += m.arrays()
    for name, array in (("norm_weight", norm_weight), ("residual", residual)):
        if array is not None:
            names.append(name)
            arrays.append(array)
    out = METAL_TYPES[out_dtype]
    body = "".join(
        [
            _constants(x, matrices, norm_weight is not None, eps, swiglu, features, variant, outputs),
            _products(matrices, swiglu, tiles, norm_weight is not None),
            _END,
            _JOIN_SPLITS if variant.splits > 1 else "",
            _NORM if norm_weight is not None else "",
            _SWIGLU if swiglu else "",
            _STORE,
            f"  y[at] = {out}(value{' + float(residual[at])' if residual is not None else ''});\n",
        ]
    )
    kernel = metal_launch("few_row_matmul", source_text(__file__, "kernel.metal"), body, tuple(names), ("y",))
    (y,) = kernel(
        inputs=arrays,
        output_shapes=[(rows, features)],
        output_dtypes=[out_dtype],
        grid=(sum(tiles) * variant.splits * 32, 1, 1),
        threadgroup=(variant.tiles * variant.splits * 32, 1, 1),
    )
    return y


def _constants(
    x: mx.array,
    matrices: Sequence[Matrix],
    norm: bool,
    eps: float,
    swiglu: bool,
    features: int,
    variant: Variant,
    outputs: int,
) -> str:
    rows, inputs = x.shape
    first = matrices[0]
    return f"""
  using T = {METAL_TYPES[x.dtype]};
  constexpr int BITS = {first.bits}, GROUP = {first.group_size or inputs}, K = {inputs}, COLUMNS = {features};
  constexpr int ROWS = {rows}, OUTPUTS = {outputs}, STREAMS = {outputs * (1 + swiglu)};
  constexpr int WORDS = {variant.words}, SPLITS = {variant.splits}, TILES = {variant.tiles};
  constexpr bool NORM = {str(norm).lower()}, PAIRS = {str(swiglu).lower()};
  constexpr float EPS = {eps!r}f;
  const int lane = thread_index_in_simdgroup;
  const int split = simdgroup_index_in_threadgroup % SPLITS;
  int number = int(threadgroup_position_in_grid.x) * TILES + simdgroup_index_in_threadgroup / SPLITS;
  int first = 0, last = -1, column = 0;  // first and last feature of the tile's matrix, first column of y
  few_row::Tile<ROWS, STREAMS> tile;
"""


def _products(matrices: Sequence[Matrix], swiglu: bool, tiles: Sequence[int], norm: bool) -> str:
    """Statements that fill the tile: of gate and up, or of the one matrix in which the tile lies."""
    weight = "norm_weight" if norm else "x"
    call = "few_row::multiply<T, BITS, GROUP, K, WORDS, SPLITS, NORM, PAIRS>"
    if swiglu:
        return f"""
  first = column = number * OUTPUTS, last = {matrices[0].features - 1};
  {call}(x, {weight}, {_matrix(0, matrices[0])}, {_matrix(1, matrices[1])}, first, last, split, lane, tile);
"""
    text, before, start = "", 0, 0
    for i, (m, count) in enumerate(zip(matrices, tiles, strict=True)):
        text += f"""
  if (number >= {before} && number < {before + count}) {{
    first = (number - {before}) * OUTPUTS, last = {m.features - 1}, column = {start} + first;
    {call}(x, {weight}, {_matrix(i, m)}, {_matrix(i, m)}, first, last, split, lane, tile);
  }}"""
        before, start = before + count, start + m.features
    return text


def _matrix(i: int, m: Matrix) -> str:
    if m.scales is None:  # two values make a word
        return f"few_row::matrix(reinterpret_cast<const device uint*>(w{i}), x, x)"
    return f"few_row::matrix(w{i}, s{i}, b{i})"
