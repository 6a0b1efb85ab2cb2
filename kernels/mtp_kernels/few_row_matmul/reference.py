"""What the few-row matmul computes, in plain MLX operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of N output features over K inputs.

    Attributes:
        weight: `[N, K * bits / 32]` uint32, MLX's affine packing, or `[N, K]` in the activations' dtype (dense).
        scales: `[N, K / group_size]` in the activations' dtype; None when dense.
        biases: as `scales`.
        bits: 4 or 8; 16 when dense.
        group_size: 32, 64 or 128; 0 when dense.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int = 16
    group_size: int = 0

    @property
    def features(self) -> int:
        """N."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """K."""
        width = int(self.weight.shape[1])
        return width if self.bits == 16 else width * 32 // self.bits

    def arrays(self) -> list[mx.array]:
        """The arrays a launch reads."""
        return [a for a in (self.weight, self.scales, self.biases) if a is not None]

    def unpacked(self, dtype: mx.Dtype | None = None, rows: slice = slice(None)) -> mx.array:
        """These rows as `[rows, K]`, in the dtype of the scales or dense weights unless told."""
        if self.scales is None or self.biases is None:
            return self.weight[rows] if dtype is None else self.weight[rows].astype(dtype)
        scales, biases = (a[rows] if dtype is None else a[rows].astype(dtype) for a in (self.scales, self.biases))
        return mx.dequantize(self.weight[rows], scales, biases, group_size=self.group_size, bits=self.bits)


_CHUNK = 16_384


def _stock(x: mx.array, matrix: Matrix) -> mx.array:
    """x @ W.T with MLX's own quantised product, in x's dtype."""
    if matrix.scales is None or matrix.biases is None:
        return x @ matrix.weight.astype(x.dtype).T
    return mx.quantized_matmul(
        x,
        matrix.weight,
        scales=matrix.scales.astype(x.dtype),
        biases=matrix.biases.astype(x.dtype),
        transpose=True,
        group_size=matrix.group_size,
        bits=matrix.bits,
    )


def _dequantized(x: mx.array, matrix: Matrix) -> mx.array:
    """x @ W.T with W dequantised into x's dtype, some rows at a time to bound memory."""
    parts = []
    for first in range(0, matrix.features, _CHUNK):
        parts.append(x @ matrix.unpacked(x.dtype, slice(first, first + _CHUNK)).T)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def reference(
    x: mx.array,
    matrices: Sequence[Matrix],
    *,
    norm_weight: mx.array | None = None,
    eps: float = 1e-6,
    residual: mx.array | None = None,
    swiglu: bool = False,
    out_dtype: mx.Dtype | None = None,
    work: mx.array | None = None,
) -> mx.array:
    """The definition of right for `few_row_matmul`, computed in float32.

    Shapes and arguments as there; `work` is not looked at. RMSNorm is that of arXiv 1910.07467, SwiGLU that of
    arXiv 2002.05202.
    """
    wide = [None if a is None else a.astype(mx.float32) for a in (norm_weight, residual)]
    out = _fused(_dequantized, x.astype(mx.float32), matrices, wide[0], eps, wide[1], swiglu)
    return out.astype(out_dtype or x.dtype)


def stock(
    x: mx.array,
    matrices: Sequence[Matrix],
    *,
    norm_weight: mx.array | None = None,
    eps: float = 1e-6,
    residual: mx.array | None = None,
    swiglu: bool = False,
    out_dtype: mx.Dtype | None = None,
    work: mx.array | None = None,
) -> mx.array:
    """The same from MLX's own operations in x's dtype: what runs where the kernel does not."""
    out = _fused(_stock, x, matrices, norm_weight, eps, residual, swiglu)
    return out.astype(out_dtype or x.dtype)


def _fused(
    multiply: Callable[[mx.array, Matrix], mx.array],
    x: mx.array,
    matrices: Sequence[Matrix],
    norm_weight: mx.array | None,
    eps: float,
    residual: mx.array | None,
    swiglu: bool,
) -> mx.array:
    if norm_weight is not None:
        x = mx.fast.rms_norm(x, norm_weight, eps)
    if swiglu:
        gate, up = (multiply(x, m) for m in matrices)
        out = gate * mx.sigmoid(gate) * up
    else:
        parts = [multiply(x, m) for m in matrices]
        out = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
    if residual is not None:
        out = out + residual
    return out
