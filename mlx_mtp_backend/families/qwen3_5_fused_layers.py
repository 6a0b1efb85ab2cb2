"""Qwen3.5's layers through the GPU kernels: weights taken from mlx-lm's modules, about five launches a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx.nn.layers.positional_encoding import RoPE
from mlx_lm.models.qwen3_5 import DecoderLayer, GatedDeltaNet
from mlx_lm.models.qwen3_next import Qwen3NextAttention
from mtp_kernels import attention_inputs as inputs_kernel
from mtp_kernels import few_row_attention as attention_kernel
from mtp_kernels import gated_delta as delta_kernel
from mtp_kernels.attention_inputs.probe import case as inputs_case
from mtp_kernels.few_row_attention.probe import case as attention_case
from mtp_kernels.gated_delta.probe import case as delta_case
from mtp_kernels.registry import Selection
from mtp_kernels.segments import Segments

from mlx_mtp_backend.families.qwen3_5_fused_cache import DeltaArrays
from mlx_mtp_backend.families.qwen3_5_fused_mlp import fused_mlp
from mlx_mtp_backend.families.qwen3_5_fused_products import Unsupported, Works, product

Settle = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Fixed:
    """What a compiled pass is compiled for.

    Attributes:
        segments: which rows are whose.
        bound: no row lies at this position or beyond.
    """

    segments: Segments
    bound: int


@dataclass(frozen=True)
class Where:
    """What layers of a pass share.

    Attributes:
        fixed: what does not change from pass to pass.
        positions: of each sequence [3] int32, where its tails and where its new rows begin, and rows of its buffers.
        keep: [S] int32, how many rows of each sequence's last pass count; None where no layer is recurrent.
    """

    fixed: Fixed
    positions: list[mx.array]
    keep: mx.array | None


class FusedDelta:
    """A Gated DeltaNet layer in three launches, and its MLP."""

    def __init__(self, layer: DecoderLayer, dtype: mx.Dtype, selection: Selection) -> None:
        net: GatedDeltaNet = layer.linear_attn
        self.weights = delta_kernel.DeltaWeights(
            conv=net.conv1d.weight.reshape(net.conv_dim, -1),
            a_log=net.A_log.astype(mx.float32),
            dt_bias=net.dt_bias.astype(dtype),
            norm=net.norm.weight,
            key_heads=net.num_k_heads,
            value_heads=net.num_v_heads,
            eps=net.norm.eps,
        )
        if net.head_k_dim != delta_kernel.HEAD_DIM or net.head_v_dim != delta_kernel.HEAD_DIM:
            raise Unsupported(f"Gated DeltaNet heads of {net.head_k_dim} and {net.head_v_dim}")
        if reason := delta_kernel.supported(self.weights, dtype):
            raise Unsupported(reason)
        mx.eval(self.weights.conv, self.weights.a_log, self.weights.dt_bias)
        projections = [net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a]
        self.enter = product(selection, projections, dtype, layer.input_layernorm)
        self.run = selection.resolve(delta_case(self.weights, dtype))
        self.leave = product(selection, [net.out_proj], dtype, residual=True)
        self.mlp = fused_mlp(layer, dtype, selection)

    def __call__(self, x: mx.array, state: DeltaArrays, where: Where, works: Works) -> tuple[mx.array, DeltaArrays]:
        assert where.keep is not None
        before = delta_kernel.DeltaState(*state)
        y, after = self.run(self.enter(x, work=works.enter), before, where.keep, self.weights, where.fixed.segments)
        return self.mlp(self.leave(y, residual=x, work=works.leave), works), [after.recurrent, after.window, after.tape]

    def settle(self, rows: mx.array, before: DeltaArrays, keep: mx.array) -> tuple[mx.array, DeltaArrays]:
        """Runs any number of projection rows of one sequence into its state: output rows, and that state."""
        segments = Segments.of((rows.shape[0],))
        y, after = self.run(rows, delta_kernel.DeltaState(*before), keep, self.weights, segments, settle=True)
        return y, [after.recurrent, after.window, after.tape]

    def many_rows(self, stock: DecoderLayer, x: mx.array, runs: Sequence[Settle], parts: Sequence[slice]) -> mx.array:
        """The layer without its MLP over normed rows [1, N, hidden], its recurrence in one launch a sequence."""
        net: GatedDeltaNet = stock.linear_attn
        projected = mx.concatenate([net.in_proj_qkv(x), net.in_proj_z(x), net.in_proj_b(x), net.in_proj_a(x)], axis=-1)
        rows = projected.squeeze(0)
        outputs = mx.concatenate([run(rows[part]) for run, part in zip(runs, parts, strict=True)])
        mixed: mx.array = net.out_proj(mx.expand_dims(outputs, 0))
        return mixed


class FusedAttention:
    """A gated full-attention layer in five launches, and its MLP."""

    def __init__(self, layer: DecoderLayer, dtype: mx.Dtype, selection: Selection) -> None:
        net: Qwen3NextAttention = layer.self_attn
        if type(net.rope) is not RoPE:
            raise Unsupported(f"rotary embedding {type(net.rope).__name__}")
        self.shape = inputs_kernel.AttentionShape(
            heads=net.num_attention_heads,
            kv_heads=net.num_key_value_heads,
            q_norm=net.q_norm.weight,
            k_norm=net.k_norm.weight,
            eps=net.q_norm.eps,
            rotary=net.rope.dims,
            theta=net.rope.base,
        )
        reason = inputs_kernel.supported(self.shape, dtype) or attention_kernel.supported(
            self.shape.heads, self.shape.kv_heads, net.head_dim, dtype
        )
        if reason:
            raise Unsupported(reason)
        self.enter = product(selection, [net.q_proj, net.k_proj, net.v_proj], dtype, layer.input_layernorm)
        self.prepare = selection.resolve(inputs_case(self.shape, dtype))
        self.attend = selection.resolve(attention_case(self.shape.heads, self.shape.kv_heads, dtype))
        self.leave = product(selection, [net.o_proj], dtype, residual=True)
        self.mlp = fused_mlp(layer, dtype, selection)

    def __call__(
        self, x: mx.array, contexts: Sequence[list[mx.array]], where: Where, works: Works
    ) -> tuple[mx.array, list[mx.array]]:
        projected = self.enter(x, work=works.enter)
        before = [tail for _, _, tail in contexts]
        queries, tails = self.prepare(projected, before, where.positions, where.fixed.segments, self.shape)
        seen = [
            attention_kernel.Context(keys, values, tail, position, where.fixed.bound)
            for (keys, values, _), tail, position in zip(contexts, tails, where.positions, strict=True)
        ]
        attended = self.attend(queries, seen, where.fixed.segments, projected)
        return self.mlp(self.leave(attended, residual=x, work=works.leave), works), tails


def fused_layer(layer: DecoderLayer, dtype: mx.Dtype, selection: Selection) -> FusedDelta | FusedAttention:
    """The layer through the kernels.

    Raises:
        Unsupported: it cannot be.
    """
    return (FusedDelta if layer.is_linear else FusedAttention)(layer, dtype, selection)
