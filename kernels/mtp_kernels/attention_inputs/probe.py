"""The checks' inputs for the attention inputs."""

from __future__ import annotations

import mlx.core as mx

from ..registry import CHECK_ROWS, Case, Run
from . import TAIL, VERSION, attention_inputs
from .reference import HEAD_DIM, AttentionShape, reference

_BASE, _FIRST = 500, 511


def case(shape: AttentionShape, dtype: mx.Dtype) -> Case:
    """This layer; the checks read the norms given."""
    row_key, tail_key = mx.random.split(mx.random.key(2))

    def probe(run: Run, rows: int) -> list[mx.array]:
        projected = mx.random.normal((CHECK_ROWS, shape.width), key=row_key).astype(dtype)
        tail = mx.random.normal((2, shape.kv_heads, TAIL, HEAD_DIM), key=tail_key).astype(dtype)
        queries = []
        for i in range(0, CHECK_ROWS, rows):
            q, tail = run(projected[i : i + rows], tail, mx.array([_BASE, _FIRST + i], dtype=mx.int32), shape)
            queries.append(q)
        return [mx.concatenate(queries), tail]

    return Case(
        kernel="attention_inputs",
        version=VERSION,
        shape=f"{shape.heads} heads {shape.kv_heads} KV heads rotary {shape.rotary} theta {shape.theta}",
        dtype=dtype,
        launches={"cuda": attention_inputs, "metal": attention_inputs},
        reference=reference,
        fallback=reference,
        probe=probe,
        unproved=frozenset({"metal"}),
    )
