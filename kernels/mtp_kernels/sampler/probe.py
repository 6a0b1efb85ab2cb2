"""The checks' inputs for the sampler."""

from __future__ import annotations

import mlx.core as mx

from ..registry import CHECK_ROWS, Case, Run
from . import VERSION, row_words, sample
from .reference import reference

_DRAWS = 4
# (temperature, top-k, top-p, min-p) of each row.
_LAWS = [
    (0.6, 0, 0.95, 0.0),
    (0.6, 20, 0.95, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.8, 0, 0.9, 0.02),
    (1.3, 700, 1.0, 0.0),
    (0.7, 3, 0.5, 0.0),
    (1.0, 1, 1.0, 0.0),
    (0.6, 0, 0.999, 0.0),
]


def case(vocab_size: int, dtype: mx.Dtype) -> Case:
    """Rows of this length: peaked and flat ones, one of few values, one all equal, one with most tokens excluded."""
    keys = mx.random.split(mx.random.key(4), 2)

    def rows_of() -> mx.array:
        spread = mx.array([6.0, 6.0, 1.0, 2.0, 3.0, 1.0, 6.0, 4.0])[:, None]
        rows = mx.random.normal((CHECK_ROWS, vocab_size), key=keys[0]) * spread
        rows[3] = mx.round(rows[3])
        rows[5] = 2.5
        rows[7] = mx.where(mx.random.uniform(shape=(vocab_size,), key=keys[1]) < 0.3, rows[7], -mx.inf)
        return rows.astype(dtype)

    def probe(run: Run, rows: int) -> list[mx.array]:
        logits, tokens = rows_of(), []
        for draw in range(_DRAWS):
            words = [row_words(draw << 33 | row, 17 * row + draw, draw % 4, *law) for row, law in enumerate(_LAWS)]
            parameters = mx.array(words, mx.uint32)
            parts = [slice(i, i + rows) for i in range(0, CHECK_ROWS, rows)]
            tokens.append(mx.concatenate([run(logits[part], parameters[part]) for part in parts]))
        return [mx.stack(tokens, axis=1)]

    return Case(
        kernel="sampler",
        version=VERSION,
        shape=f"{vocab_size} tokens",
        dtype=dtype,
        launches={"cuda": sample, "metal": sample},
        reference=reference,
        fallback=reference,
        probe=probe,
        unproved=frozenset({"metal"}),
    )
