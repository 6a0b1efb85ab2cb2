"""The checks' inputs for Gated DeltaNet."""

from __future__ import annotations

from dataclasses import fields

import mlx.core as mx

from ..registry import CHECK_ROWS, Case, Run
from ..segments import Segments
from . import TAPE, VERSION, gated_delta
from .reference import HEAD_DIM, DeltaState, DeltaWeights, reference

_OTHERS = ((0, 1), (3, 5), (TAPE, TAPE))
"""Sequences beside the one whose rows are cut up: rows kept of the last pass, and rows of this one."""


def case(weights: DeltaWeights, dtype: mx.Dtype) -> Case:
    """This layer; the checks read the weights given."""
    keys = mx.random.split(mx.random.key(1), 4)
    count = 1 + len(_OTHERS)
    rows = mx.random.normal((count, CHECK_ROWS, weights.width), key=keys[0]).astype(dtype)
    start = DeltaState(
        0.1 * mx.random.normal((count, weights.value_heads, HEAD_DIM, HEAD_DIM), key=keys[1]),
        mx.random.normal((count, 3, weights.channels), key=keys[2]).astype(dtype),
        mx.random.normal((count, TAPE, weights.width), key=keys[3]).astype(dtype),
    )

    def one(run: Run, cut: int) -> list[mx.array]:
        """The first sequence in passes of so many rows, then one that settles the last rows and 32 more."""
        state, kept, outputs = _of(start, 0), 0, []
        for i in range(0, CHECK_ROWS, cut):
            fresh = rows[0, i : i + cut]
            y, state = run(fresh, state, _ints(kept), weights, Segments.of((fresh.shape[0],)))
            outputs.append(y)
            kept = fresh.shape[0]
        more = mx.concatenate([rows[0]] * 4)
        y, state = run(more, state, _ints(kept), weights, Segments.of((more.shape[0],)), settle=True)
        return [mx.concatenate([*outputs, y]), state.recurrent, state.window]

    def others(run: Run, *, together: bool) -> list[mx.array]:
        """The other sequences, of different lengths, in one launch or each in its own."""
        groups = [range(len(_OTHERS))] if together else [range(i, i + 1) for i in range(len(_OTHERS))]
        outputs: list[list[mx.array]] = [[], [], [], []]
        for group in groups:
            fresh = [rows[1 + i, : _OTHERS[i][1]] for i in group]
            state = _of(start, 1 + group[0], 1 + group[-1])
            segments = Segments.of(tuple(own.shape[0] for own in fresh))
            y, after = run(mx.concatenate(fresh), state, _ints(*(_OTHERS[i][0] for i in group)), weights, segments)
            tapes = [tape[:own] for tape, own in zip(after.tape, segments.counts, strict=True)]
            for name, value in zip(outputs, (y, after.recurrent, after.window, mx.concatenate(tapes)), strict=True):
                name.append(value)
        return [mx.concatenate(parts) for parts in outputs]

    return Case(
        kernel="gated_delta",
        version=VERSION,
        shape=f"{weights.value_heads} value heads {weights.key_heads} key heads eps {weights.eps}",
        dtype=dtype,
        launches={"cuda": gated_delta, "metal": gated_delta},
        reference=reference,
        fallback=reference,
        probe=lambda run, cut: one(run, cut) + others(run, together=cut == CHECK_ROWS),
        unproved=frozenset({"metal"}),
    )


def _of(state: DeltaState, first: int, last: int | None = None) -> DeltaState:
    """The sequences from `first` to `last`, or `first` alone."""
    end = 1 + (first if last is None else last)
    return DeltaState(*(getattr(state, field.name)[first:end] for field in fields(state)))


def _ints(*values: int) -> mx.array:
    return mx.array(values, dtype=mx.int32)
