"""The experts over the many rows of a prompt, from MLX's operations: each projection in full, then one product of all
rows in their experts' order.

MLX's product of sorted rows by packed experts compiles for about a minute on CUDA; this one for about two seconds.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..few_row_matmul import Matrix
from .reference import Experts, choose


def many_row_experts(
    h: mx.array, logits: mx.array, experts: Experts, wait: Callable[[mx.array], None] = mx.eval
) -> mx.array:
    """The experts' weighted answers to normed rows, without residual.

    A projection in full takes `2 * E * width * hidden` bytes; the device is given one while it works on another.

    Args:
        h: `[N, hidden]`.
        logits: `[N, E + 1]` float32: of each expert, and of the shared one's gate.
        experts: the weights, of h's dtype where they are not packed.
        wait: for an array that the device was given.

    Returns:
        `[N, hidden]`, as `few_row_experts` has it but for x.
    """
    chosen, weights = choose(logits, experts)
    chosen = chosen.flatten()
    order = mx.argsort(chosen)
    expert = chosen[order]

    def product(rows: mx.array, matrix: Matrix) -> mx.array:
        whole = matrix.unpacked().reshape(experts.count, -1, matrix.inputs).swapaxes(-1, -2)
        y = mx.gather_mm(mx.expand_dims(rows, 1), whole, rhs_indices=expert, sorted_indices=True).squeeze(1)
        mx.async_eval(y)  # type: ignore[no-untyped-call]
        return y

    rows = h[order // experts.top]
    gate = product(rows, experts.gate)
    up = product(rows, experts.up)
    wait(gate)
    down = product(gate * mx.sigmoid(gate) * up, experts.down)
    wait(up)
    own = down[mx.argsort(order)].reshape(h.shape[0], experts.top, -1)
    mixed = mx.sum(own.astype(mx.float32) * weights[:, :-1, None], axis=1)
    return (mixed + weights[:, -1:] * _shared(h, experts)).astype(h.dtype)


def router_logits(h: mx.array, gates: list[Matrix]) -> mx.array:
    """`[N, features of all gates]` float32 of rows `[N, hidden]`."""
    wide = h.astype(mx.float32)
    return mx.concatenate([wide @ gate.unpacked(mx.float32).swapaxes(-1, -2) for gate in gates], axis=-1)


def _shared(h: mx.array, experts: Experts) -> mx.array:
    gate, up, down = (matrix.unpacked().swapaxes(-1, -2) for matrix in experts.shared)
    projected = h @ gate
    return (projected * mx.sigmoid(projected) * (h @ up)) @ down
