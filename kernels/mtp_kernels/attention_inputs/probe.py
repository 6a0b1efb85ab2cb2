"""The checks' inputs for the attention inputs."""

from __future__ import annotations

import mlx.core as mx

from ..registry import CHECK_ROWS, Case, Run
from ..segments import Segments
from . import TAIL, VERSION, attention_inputs
from .reference import HEAD_DIM, AttentionShape, reference

_ONE = [(500, 511, CHECK_ROWS)]
"""Sequences of a pass: where the tail begins, where the rows do, how many."""
_SEVERAL = [(64, 120, 3), (0, 0, 1), (9_000, 9_001, CHECK_ROWS - 4)]


def case(shape: AttentionShape, dtype: mx.Dtype) -> Case:
    """This layer, for one sequence and for several; the checks read the norms given."""
    row_key, tail_key = mx.random.split(mx.random.key(2))

    def pass_of(run: Run, rows: int, sequences: list[tuple[int, int, int]]) -> list[mx.array]:
        """Queries and tails of all sequences in one pass, or of each alone in passes of so many rows."""
        projected = mx.random.normal((CHECK_ROWS, shape.width), key=row_key).astype(dtype)
        tail_shape = (len(sequences), 2, shape.kv_heads, TAIL, HEAD_DIM)
        tails = list(mx.random.normal(tail_shape, key=tail_key).astype(dtype))
        segments = Segments.of(tuple(count for _, _, count in sequences))
        if rows == CHECK_ROWS:
            positions = [mx.array([base, first, 0], dtype=mx.int32) for base, first, _ in sequences]
            queries, tails = run(projected, tails, positions, segments, shape)
            return [queries, *tails]
        parts = []
        for own, ((base, first, count), part) in enumerate(zip(sequences, segments.slices, strict=True)):
            for at in range(0, count, rows):
                some = projected[part][at : at + rows]
                position = mx.array([base, first + at, 0], dtype=mx.int32)
                q, (tails[own],) = run(some, [tails[own]], [position], Segments.of((some.shape[0],)), shape)
                parts.append(q)
        return [mx.concatenate(parts), *tails]

    return Case(
        kernel="attention_inputs",
        version=VERSION,
        shape=f"{shape.heads} heads {shape.kv_heads} KV heads rotary {shape.rotary} theta {shape.theta}",
        dtype=dtype,
        launches={"cuda": attention_inputs, "metal": attention_inputs},
        reference=reference,
        fallback=reference,
        probe=lambda run, rows: pass_of(run, rows, _ONE) + pass_of(run, rows, _SEVERAL),
        unproved=frozenset({"metal"}),
    )
