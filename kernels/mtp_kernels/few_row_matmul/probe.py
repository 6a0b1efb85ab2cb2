"""The checks' inputs for the few-row matmul."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..launch import platform
from ..registry import CHECK_ROWS, Case, Run
from . import MAX_ROWS, VERSION, counters, few_row_matmul
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

    Passes of 8 rows, and off Metal of 16 and 32, of which each is a launch of its own kind, take their tiles from a
    counter; passes of other sizes go through the most rows without one.
    """
    first = matrices[0]
    features = first.features if swiglu else sum(m.features for m in matrices)
    x_key, norm_key, residual_key = mx.random.split(mx.random.key(0), 3)
    together = (CHECK_ROWS,) if platform() == "metal" else (CHECK_ROWS, 2 * CHECK_ROWS, MAX_ROWS)

    def probe(run: Run, rows: int) -> list[mx.array]:
        most = together[-1]
        x = mx.random.normal((most, first.inputs), key=x_key).astype(dtype)
        weight = (1 + 0.1 * mx.random.normal((first.inputs,), key=norm_key)).astype(dtype) if norm else None
        added = mx.random.normal((most, features), key=residual_key).astype(dtype) if residual else None

        def one_pass(begin: int, end: int, work: mx.array | None = None) -> mx.array:
            y: mx.array = run(
                x[begin:end],
                matrices,
                norm_weight=weight,
                residual=None if added is None else added[begin:end],
                swiglu=swiglu,
                out_dtype=out_dtype,
                work=work,
            )
            return y

        if rows == CHECK_ROWS:
            return [one_pass(0, count, counters(1)[0]) for count in together]
        fewer = mx.concatenate([one_pass(i, min(i + rows, most)) for i in range(0, most, rows)])
        return [fewer[:count] for count in together]

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
