"""The checks' inputs for few-row attention."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from ..attention_inputs import TAIL
from ..launch import stands_in
from ..registry import CHECK_ROWS, Case, Run
from ..segments import Segments
from . import VERSION, Context, few_row_attention, first_row
from .reference import HEAD_DIM, reference

BASE = 250
Sequences = list[tuple[int, int, int]]
"""Sequences of a pass: where the tail begins, where the rows do, how many."""


def case(heads: int, kv_heads: int, dtype: mx.Dtype, base: int = BASE) -> Case:
    """A layer of these many heads, at contexts that cross splits and the border between buffer and tail.

    `base` is where the tail of one sequence of eight rows begins, and that of the longest of several.
    """
    keys_of = mx.random.split(mx.random.key(3), 5)
    one = [(base, base + 37, CHECK_ROWS)]
    several = [(70, 126, 3), (0, 0, 1), (base, base + 1, CHECK_ROWS - 4)]

    def pass_of(run: Run, rows: int, sequences: Sequences) -> mx.array:
        """Rows of all sequences in one pass, or of each alone in passes of so many rows."""
        capacity = base + 70
        shapes = [
            (CHECK_ROWS, heads, HEAD_DIM),
            (len(sequences), 1, kv_heads, capacity, HEAD_DIM),
            (len(sequences), 1, kv_heads, capacity, HEAD_DIM),
            (len(sequences), 2, kv_heads, TAIL, HEAD_DIM),
            (CHECK_ROWS, 2 * (heads + kv_heads) * HEAD_DIM),
        ]
        q, k, v, tail, projected = (
            mx.random.normal(s, key=key).astype(dtype) for s, key in zip(shapes, keys_of, strict=True)
        )

        def context(own: int, at: int) -> Context:
            tail_base, first, _ = sequences[own]
            keys, values = k[own], v[own]
            if run is few_row_attention and not stands_in():  # as a model gives them
                keys, values = first_row(keys), first_row(values)
            position = mx.array([tail_base, first + at, capacity], dtype=mx.int32)
            return Context(keys, values, tail[own], position, capacity + TAIL)

        segments = Segments.of(tuple(count for _, _, count in sequences))
        if rows == CHECK_ROWS:
            return cast(mx.array, run(q, [context(own, 0) for own in range(len(sequences))], segments, projected))
        outputs = []
        for own, part in enumerate(segments.slices):
            for at in range(part.start, part.stop, rows):
                some = slice(at, min(at + rows, part.stop))
                alone = Segments.of((some.stop - some.start,))
                outputs.append(run(q[some], [context(own, at - part.start)], alone, projected[some]))
        return mx.concatenate(outputs)

    return Case(
        kernel="few_row_attention",
        version=VERSION,
        shape=f"{heads} heads {kv_heads} KV heads" + (f" from {base}" if base != BASE else ""),
        dtype=dtype,
        launches={"cuda": few_row_attention, "metal": few_row_attention},
        reference=reference,
        fallback=reference,
        probe=lambda run, rows: [pass_of(run, rows, one), pass_of(run, rows, several)],
        unproved=frozenset({"metal"}),
    )
