"""What the few-row experts compute, in plain MLX operations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..few_row_matmul import Matrix
from ..few_row_matmul import stock as matmul_stock


@dataclass(frozen=True)
class Experts:
    """The weights of a mixture-of-experts block: E routed experts and one that every row uses.

    Attributes:
        gate, up: `[E * width, hidden]`, one expert's rows after the other's.
        down: `[E * hidden, width]`.
        shared_gate, shared_up: `[shared width, hidden]`.
        shared_down: `[hidden, shared width]`.
        count: E.
        top: experts of a row.
        normalised: whether a row's weights are divided by their sum.
    """

    gate: Matrix
    up: Matrix
    down: Matrix
    shared_gate: Matrix
    shared_up: Matrix
    shared_down: Matrix
    count: int
    top: int
    normalised: bool = True

    @property
    def hidden(self) -> int:
        """Size of a row."""
        return self.gate.inputs

    @property
    def width(self) -> int:
        """Features between an expert's projections."""
        return self.down.inputs

    @property
    def shared_width(self) -> int:
        """The same of the shared expert."""
        return self.shared_down.inputs

    @property
    def routed(self) -> tuple[Matrix, Matrix, Matrix]:
        """Gate, up and down of the routed experts."""
        return self.gate, self.up, self.down

    @property
    def shared(self) -> tuple[Matrix, Matrix, Matrix]:
        """Gate, up and down of the shared expert."""
        return self.shared_gate, self.shared_up, self.shared_down


def choose(logits: mx.array, experts: Experts) -> tuple[mx.array, mx.array]:
    """Each row's experts, the best first and the lowest of equals first, and what each and the shared one weigh.

    A softmax over all experts in float32, of which the best keep their share or share the whole (arXiv 2401.04088).

    Returns:
        `[M, top]` int32 and `[M, top + 1]` float32.
    """
    own = logits[:, : experts.count].astype(mx.float32)
    ids = mx.arange(experts.count)
    left, chosen = own, []
    for _ in range(experts.top):
        chosen.append(mx.min(mx.where(left == mx.max(left, axis=-1, keepdims=True), ids, experts.count), axis=-1))
        left = mx.where(ids == chosen[-1][:, None], -mx.inf, left)
    picked = mx.stack(chosen, axis=-1).astype(mx.int32)
    weights = mx.take_along_axis(mx.softmax(own, axis=-1, precise=True), picked, axis=-1)
    if experts.normalised:
        weights = weights / mx.sum(weights, axis=-1, keepdims=True)
    return picked, mx.concatenate([weights, mx.sigmoid(logits[:, experts.count :].astype(mx.float32))], axis=-1)


def reference(x: mx.array, logits: mx.array, experts: Experts, norm_weight: mx.array, eps: float = 1e-6) -> mx.array:
    """The definition of right for `few_row_experts`, computed in float32.

    Shapes and arguments as there. What one launch leaves for another, normed rows and the products of SwiGLU, is
    rounded to x's dtype.
    """
    wide = x.astype(mx.float32)
    normed = mx.fast.rms_norm(wide, norm_weight.astype(mx.float32), eps).astype(x.dtype)
    chosen, weights = choose(logits, experts)
    rows = []
    for row in range(x.shape[0]):
        h = normed[row : row + 1].astype(mx.float32)
        out = wide[row : row + 1]
        own = _mlp(h, _expert_weights(experts, chosen[row]), x.dtype)  # [top, 1, hidden]
        out = out + mx.sum(weights[row, :-1, None, None] * own, axis=0)
        shared = _mlp(h, [m.unpacked(mx.float32) for m in experts.shared], x.dtype)
        rows.append(out + weights[row, -1] * shared)
    return mx.concatenate(rows).astype(x.dtype)


def _mlp(h: mx.array, weights: list[mx.array], dtype: mx.Dtype) -> mx.array:
    gate, up, down = (w.swapaxes(-1, -2) for w in weights)
    projected = h @ gate
    activated = (projected * mx.sigmoid(projected) * (h @ up)).astype(dtype)
    return activated.astype(mx.float32) @ down


def _expert_weights(experts: Experts, chosen: mx.array) -> list[mx.array]:
    sizes = (experts.width, experts.width, experts.hidden)
    return [_unpacked(m, size, chosen) for m, size in zip(experts.routed, sizes, strict=True)]


def _unpacked(matrix: Matrix, rows: int, chosen: mx.array) -> mx.array:
    """[top, rows, inputs] in float32, of the experts chosen."""
    own = (a[chosen].reshape(-1, a.shape[-1]) for a in _by_expert(matrix, rows))
    arrays: dict[str, Any] = dict(zip(("weight", "scales", "biases"), own, strict=False))
    return replace(matrix, **arrays).unpacked(mx.float32).reshape(-1, rows, matrix.inputs)


def _by_expert(matrix: Matrix, rows: int) -> list[mx.array]:
    return [a.reshape(-1, rows, a.shape[-1]) for a in matrix.arrays()]


def stock(x: mx.array, logits: mx.array, experts: Experts, norm_weight: mx.array, eps: float = 1e-6) -> mx.array:
    """The same from MLX's own operations in x's dtype: what runs where the kernel does not."""
    h = mx.fast.rms_norm(x, norm_weight, eps)
    chosen, weights = choose(logits, experts)
    rows = mx.expand_dims(h, (-2, -3))
    gate, up = (_gathered(rows, m, experts.width, chosen) for m in (experts.gate, experts.up))
    own = _gathered(gate * mx.sigmoid(gate) * up, experts.down, experts.hidden, chosen).squeeze(-2)
    activated = matmul_stock(h, [experts.shared_gate, experts.shared_up], swiglu=True)
    shared = matmul_stock(activated, [experts.shared_down])
    out = mx.sum(own.astype(mx.float32) * weights[:, :-1, None], axis=1) + weights[:, -1:] * shared
    return (x + out).astype(x.dtype)


def _gathered(x: mx.array, matrix: Matrix, size: int, chosen: mx.array) -> mx.array:
    """[M, top, 1, size]: each row's product with each of its experts."""
    if matrix.scales is None:
        return mx.gather_mm(x, _by_expert(matrix, size)[0].swapaxes(-1, -2), rhs_indices=chosen)
    weight, scales, biases = _by_expert(matrix, size)
    return mx.gather_qmm(
        x, weight, scales, biases, rhs_indices=chosen, transpose=True, group_size=matrix.group_size, bits=matrix.bits
    )
