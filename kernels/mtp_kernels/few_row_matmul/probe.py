"""The checks' inputs for the few-row matmul."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..launch import platform
from ..registry import CHECK_ROWS, Case, Run
from . import VERSION, counters, few_row_matmul
from .reference import Matrix, reference, stock
from .variants import form, variant_for


def case(
    matrices: Sequence[Matrix],
    dtype: mx.Dtype,
    *,
    norm: bool = False,
    swiglu: bool = False,
    residual: bool = False,
    out_dtype: mx.Dtype | None = None,
) -> Case:
    """These weights with this fusion; the checks read the weights given.

    Eight rows take their tiles from a counter, fewer have fixed ones.
    """
    first = matrices[0]
    features = first.features if swiglu else sum(m.features for m in matrices)
    x_key, norm_key, residual_key = mx.random.split(mx.random.key(0), 3)

    def probe(run: Run, rows: int) -> list[mx.array]:
        x = mx.random.normal((CHECK_ROWS, first.inputs), key=x_key).astype(dtype)
        weight = (1 + 0.1 * mx.random.normal((first.inputs,), key=norm_key)).astype(dtype) if norm else None
        added = mx.random.normal((CHECK_ROWS, features), key=residual_key).astype(dtype) if residual else None
        passes = [
            run(
                x[i : i + rows],
                matrices,
                norm_weight=weight,
                residual=None if added is None else added[i : i + rows],
                swiglu=swiglu,
                out_dtype=out_dtype,
                work=counters(1)[0] if rows == CHECK_ROWS else None,
            )
            for i in range(0, CHECK_ROWS, rows)
        ]
        return [mx.concatenate(passes)]

    fusion = {"norm": norm, "swiglu": swiglu, "residual": residual}
    variant = f"-{variant_for(matrices, **fusion)}" if platform() == "metal" else ""
    return Case(
        kernel="few_row_matmul",
        version=VERSION + variant,
        shape=form(matrices, **fusion) + (f" to {out_dtype}".replace("mlx.core.", "") if out_dtype else ""),
        dtype=dtype,
        launches={"cuda": few_row_matmul, "metal": few_row_matmul},
        reference=reference,
        fallback=stock,
        probe=probe,
        unproved=frozenset({"metal"}),
    )
