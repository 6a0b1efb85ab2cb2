"""The checks' inputs for the few-row experts."""

from __future__ import annotations

import mlx.core as mx

from ..registry import CHECK_ROWS, Case, Run
from . import VERSION, few_row_experts
from .reference import Experts, reference, stock


def case(experts: Experts, dtype: mx.Dtype) -> Case:
    """These experts; the checks read the weights given.

    Two rows choose the same experts, two share some, one has only ties to choose from, the others go their own ways.
    """
    keys = mx.random.split(mx.random.key(5), 3)

    def probe(run: Run, rows: int) -> list[mx.array]:
        # Small, so that the residual does not hide the experts; the norm makes up for it.
        x = mx.random.normal((CHECK_ROWS, experts.hidden), scale=0.02, key=keys[0]).astype(dtype)
        logits = mx.random.normal((CHECK_ROWS, experts.count + 1), key=keys[1])
        logits[3] = logits[1]
        logits[4] = mx.maximum(logits[1], logits[4])
        logits[6] = 0.5
        weight = (1 + 0.1 * mx.random.normal((experts.hidden,), key=keys[2])).astype(dtype)
        parts = [slice(i, i + rows) for i in range(0, CHECK_ROWS, rows)]
        return [mx.concatenate([run(x[part], logits[part], experts, weight) for part in parts])]

    return Case(
        kernel="few_row_experts",
        version=VERSION,
        shape=form(experts),
        dtype=dtype,
        launches={"cuda": few_row_experts, "metal": few_row_experts},
        reference=reference,
        fallback=stock,
        probe=probe,
        unproved=frozenset({"metal"}),
    )


def form(experts: Experts) -> str:
    """A block's shape as text."""
    formats = [
        f"{m.bits}b g{m.group_size}" for m in (experts.gate, experts.down, experts.shared_gate, experts.shared_down)
    ]
    share = "" if experts.normalised else " unnormalised"
    sizes = f"{experts.top} of {experts.count} {experts.hidden}x{experts.width}+{experts.shared_width}"
    return f"{sizes} {', '.join(dict.fromkeys(formats))}{share}"
