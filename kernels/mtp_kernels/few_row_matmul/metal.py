"""The few-row matmul on Metal; unproved, and run only after the registry's checks."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..launch import METAL_TYPES, metal_launch, source_text
from .reference import Matrix


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
    rows, inputs = x.shape
    names, arrays = ["x"], [x]
    for i, m in enumerate(matrices):
        names += [f"w{i}", f"s{i}", f"b{i}"] if m.scales is not None else [f"w{i}"]
        arrays += m.arrays()
    for name, array in (("norm_weight", norm_weight), ("residual", residual)):
        if array is not None:
            names.append(name)
            arrays.append(array)
    features = matrices[0].features if swiglu else sum(m.features for m in matrices)
    kind = METAL_TYPES[x.dtype]
    chosen = "gate and up" if swiglu else "its matrix"
    body = f"""
  const uint lane = thread_index_in_simdgroup;
  const int feature = int(thread_position_in_grid.x / 32);
  int row = feature;  // of {chosen}
{_products(matrices, kind, rows, inputs, norm_weight is not None, swiglu)}
  for (int m = 0; m < {rows}; ++m) {{
    float value = few_row::tree(sums[m]);
    {_norm(norm_weight is not None, inputs, eps, "value")}
    {_up(swiglu, norm_weight is not None, inputs, eps)}
    if (lane == 0) {{
      {"value += float(residual[m * " + str(features) + " + feature]);" if residual is not None else ""}
      y[m * {features} + feature] = {METAL_TYPES[out_dtype]}(value);
    }}
  }}
"""
    kernel = metal_launch("few_row_matmul", source_text(__file__, "kernel.metal"), body, tuple(names), ("y",))
    (y,) = kernel(
        inputs=arrays,
        output_shapes=[(rows, features)],
        output_dtypes=[out_dtype],
        grid=(features * 32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    return y


def _products(matrices: Sequence[Matrix], kind: str, rows: int, inputs: int, norm: bool, swiglu: bool) -> str:
    """Statements that fill `sums` (and `ups`): of the one matrix that holds the feature, or of gate and up."""
    text = f"  float sums[{rows}] = {{}}, squares[{rows}] = {{}};"
    if swiglu:
        text += f" float ups[{rows}] = {{}}, unused[{rows}] = {{}};"
        text += _call(0, matrices[0], kind, rows, inputs, norm, "sums, squares")
        return text + _call(1, matrices[1], kind, rows, inputs, norm, "ups, unused")
    for i, m in enumerate(matrices):
        call = _call(i, m, kind, rows, inputs, norm, "sums, squares")
        text += f"\n  if (row >= 0 && row < {m.features}) {{{call}\n    row = -1;\n  }} else row -= {m.features};"
    return text


def _call(i: int, m: Matrix, kind: str, rows: int, inputs: int, norm: bool, outputs: str) -> str:
    weight = "norm_weight" if norm else "x"
    flag = str(norm).lower()
    if m.bits == 16:
        start = f"few_row::multiply_dense<{kind}, {rows}, {flag}>(x, {weight}, w{i} + size_t(row) * {inputs}"
    else:
        groups, words = inputs // m.group_size, inputs * m.bits // 32
        start = (
            f"few_row::multiply<{kind}, {m.bits}, {m.group_size}, {rows}, {flag}>(x, {weight}, "
            f"w{i} + size_t(row) * {words}, s{i} + size_t(row) * {groups}, b{i} + size_t(row) * {groups}"
        )
    return f"\n    {start}, {inputs}, lane, {outputs});"


def _norm(norm: bool, inputs: int, eps: float, name: str) -> str:
    return f"{name} *= rsqrt(few_row::tree(squares[m]) / {inputs} + {eps!r}f);" if norm else ""


def _up(swiglu: bool, norm: bool, inputs: int, eps: float) -> str:
    if not swiglu:
        return ""
    return f"float up = few_row::tree(ups[m]); {_norm(norm, inputs, eps, 'up')} value = few_row::silu(value) * up;"
