"""The checks' inputs for few-row attention."""

from __future__ import annotations

import mlx.core as mx

from ..attention_inputs import TAIL
from ..registry import CHECK_ROWS, Case, Run
from . import VERSION, few_row_attention
from .reference import HEAD_DIM, reference

BASE = 250


def case(heads: int, kv_heads: int, dtype: mx.Dtype, base: int = BASE) -> Case:
    """A layer of these many heads, at a context that crosses splits and the border between buffer and tail.

    `base` is where the tail begins.
    """
    first, capacity = base + 37, base + 70
    keys_of = mx.random.split(mx.random.key(3), 5)

    def probe(run: Run, rows: int) -> list[mx.array]:
        shapes = [
            (CHECK_ROWS, heads, HEAD_DIM),
            (1, kv_heads, capacity, HEAD_DIM),
            (1, kv_heads, capacity, HEAD_DIM),
            (2, kv_heads, TAIL, HEAD_DIM),
            (CHECK_ROWS, 2 * (heads + kv_heads) * HEAD_DIM),
        ]
        q, k, v, tail, projected = (
            mx.random.normal(s, key=key).astype(dtype) for s, key in zip(shapes, keys_of, strict=True)
        )
        outputs = [
            run(q[i : i + rows], k, v, tail, mx.array([base, first + i], dtype=mx.int32), projected[i : i + rows])
            for i in range(0, CHECK_ROWS, rows)
        ]
        return [mx.concatenate(outputs)]

    return Case(
        kernel="few_row_attention",
        version=VERSION,
        shape=f"{heads} heads {kv_heads} KV heads" + (f" from {base}" if base != BASE else ""),
        dtype=dtype,
        launches={"cuda": few_row_attention, "metal": few_row_attention},
        reference=reference,
        fallback=reference,
        probe=probe,
        unproved=frozenset({"metal"}),
    )
