"""The checks' inputs for Gated DeltaNet."""

from __future__ import annotations

import mlx.core as mx

from ..registry import CHECK_ROWS, Case, Run
from . import VERSION, gated_delta
from .reference import HEAD_DIM, DeltaState, DeltaWeights, reference


def case(weights: DeltaWeights, dtype: mx.Dtype) -> Case:
    """This layer; the checks read the weights given."""
    fresh_key, state_key, window_key = mx.random.split(mx.random.key(1), 3)

    def probe(run: Run, rows: int) -> list[mx.array]:
        fresh = mx.random.normal((CHECK_ROWS, weights.width), key=fresh_key).astype(dtype)
        recurrent = 0.1 * mx.random.normal((weights.value_heads, HEAD_DIM, HEAD_DIM), key=state_key)
        window = mx.random.normal((3, weights.channels), key=window_key).astype(dtype)
        pending, kept, outputs = fresh[:1], 0, []
        for i in range(0, CHECK_ROWS, rows):
            state, keep = DeltaState(recurrent, window, pending), mx.array([kept], dtype=mx.int32)
            y, recurrent, window = run(fresh[i : i + rows], state, keep, weights)
            outputs.append(y)
            pending, kept = fresh[i : i + rows], min(rows, CHECK_ROWS - i)
        # One more pass settles the last rows and 32 more, so that the states can be compared.
        state, keep = DeltaState(recurrent, window, pending), mx.array([kept], dtype=mx.int32)
        y, recurrent, window = run(mx.concatenate([fresh] * 4), state, keep, weights, settle=True)
        return [mx.concatenate([*outputs, y]), recurrent, window]

    return Case(
        kernel="gated_delta",
        version=VERSION,
        shape=f"{weights.value_heads} value heads {weights.key_heads} key heads eps {weights.eps}",
        dtype=dtype,
        launches={"cuda": gated_delta, "metal": gated_delta},
        reference=reference,
        fallback=reference,
        probe=probe,
        unproved=frozenset({"metal"}),
    )
