"""Matrix products of few rows through the kernels, over the weights of mlx-lm's modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.normalization import RMSNorm
from mtp_kernels import few_row_matmul as matmul_kernel
from mtp_kernels.few_row_matmul.probe import case as matmul_case
from mtp_kernels.registry import Selection


class Unsupported(Exception):
    """This model cannot run through the kernels; the text says why."""


def matrix_of(linear: Module) -> matmul_kernel.Matrix:
    """The weights of an mlx-lm linear layer or (quantised) embedding.

    Raises:
        Unsupported: a quantisation other than affine, or a bias.
    """
    if "bias" in linear:
        raise Unsupported("a projection has a bias")
    if "scales" not in linear:
        return matmul_kernel.Matrix(linear.weight)
    if getattr(linear, "mode", "affine") != "affine":
        raise Unsupported(f"quantisation mode {linear.mode}")
    return matmul_kernel.Matrix(linear.weight, linear.scales, linear.biases, linear.bits, linear.group_size)


@dataclass(frozen=True)
class Works:
    """What a layer's products count in, see `few_row_matmul`; None where that would not pay."""

    enter: mx.array | None = None
    leave: mx.array | None = None
    mlp_enter: mx.array | None = None
    mlp_leave: mx.array | None = None

    @classmethod
    def of_pass(cls, layers: int, rows: int) -> list[Works]:
        """For each layer of a pass of so many rows."""
        if rows > matmul_kernel.TILE_ROWS:  # where each product needs one
            made = matmul_kernel.counters(4 * layers)
            return [cls(*made[first : first + 4]) for first in range(0, 4 * layers, 4)]
        # On smaller products than the MLP's a counter costs the host as much as it saves the device, and a head's
        # pass, of one layer, took 1.1 ms more on an H100 when it had one.
        return [cls(mlp_enter=work) for work in (matmul_kernel.counters(layers) if layers > 1 else [None])]


@dataclass(frozen=True)
class Product:
    """One launch's weights, with what is fused around them."""

    matrices: Sequence[matmul_kernel.Matrix]
    run: Callable[..., mx.array]
    norm: mx.array | None = None
    eps: float = 1e-6
    swiglu: bool = False
    out_dtype: mx.Dtype | None = None

    def __call__(self, x: mx.array, residual: mx.array | None = None, work: mx.array | None = None) -> mx.array:
        fused = {"norm_weight": self.norm, "eps": self.eps, "residual": residual, "swiglu": self.swiglu}
        return self.run(x, self.matrices, **fused, out_dtype=self.out_dtype, work=work)


def product(
    selection: Selection,
    linears: Sequence[Module],
    dtype: mx.Dtype,
    norm: RMSNorm | None = None,
    *,
    swiglu: bool = False,
    residual: bool = False,
    out_dtype: mx.Dtype | None = None,
) -> Product:
    """A checked product over these layers' weights.

    Raises:
        Unsupported: the kernel does not have this format or shape.
    """
    matrices = [matrix_of(linear) for linear in linears]
    if reason := matmul_kernel.supported(matrices, dtype, swiglu=swiglu):
        raise Unsupported(reason)
    fusion = {"norm": norm is not None, "swiglu": swiglu, "residual": residual}
    run = selection.resolve(matmul_case(matrices, dtype, **fusion, out_dtype=out_dtype))
    weight, eps = (None, 1e-6) if norm is None else (norm.weight, norm.eps)
    return Product(matrices, run, weight, eps, swiglu, out_dtype)
