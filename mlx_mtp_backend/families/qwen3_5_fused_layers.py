"""Qwen3.5's layers through the GPU kernels: weights taken from mlx-lm's modules, about five launches a layer."""

from __future__ import annotations

from collections.abc import Sequence

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

from mlx_mtp_backend.cache import LayerCache
from mlx_mtp_backend.families.base import Segment, split_rows
from mlx_mtp_backend.families.qwen3_5_fused_cache import FusedDeltaCache
from mlx_mtp_backend.families.qwen3_5_fused_mlp import fused_mlp
from mlx_mtp_backend.families.qwen3_5_fused_products import Unsupported, product

# What a layer's cache gives a pass and takes back from it.
Arrays = list[mx.array]


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

    def __call__(
        self, x: mx.array, states: Sequence[Arrays], parts: Sequence[slice], work: mx.array | None
    ) -> tuple[mx.array, list[Arrays]]:
        projected = self.enter(x)
        outputs, after = [], []
        for (recurrent, window, pending, keep), part in zip(states, parts, strict=True):
            fresh = projected if len(parts) == 1 else projected[part]
            state = delta_kernel.DeltaState(recurrent, window, pending)
            y, recurrent, window = self.run(fresh, state, keep, self.weights)
            outputs.append(y)
            after.append([recurrent, window, fresh])
        return self.mlp(self.leave(_joined(outputs), residual=x), work), after

    def many_rows(
        self, stock: DecoderLayer, x: mx.array, caches: Sequence[LayerCache], segments: Sequence[Segment]
    ) -> mx.array:
        """The layer without its MLP over normed rows [1, N, hidden], its recurrence in one launch a sequence."""
        net: GatedDeltaNet = stock.linear_attn
        parts = [net.in_proj_qkv(x), net.in_proj_z(x), net.in_proj_b(x), net.in_proj_a(x)]
        projected = mx.concatenate(parts, axis=-1).squeeze(0)
        outputs = []
        for cache, part in zip(caches, split_rows(segments), strict=True):
            assert isinstance(cache, FusedDeltaCache)
            outputs.append(cache.run_many(projected[part]))
        mixed: mx.array = net.out_proj(mx.expand_dims(_joined(outputs), 0))
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
        self, x: mx.array, states: Sequence[Arrays], parts: Sequence[slice], work: mx.array | None
    ) -> tuple[mx.array, list[Arrays]]:
        projected = self.enter(x)
        outputs, after = [], []
        for (keys, values, tail, position), part in zip(states, parts, strict=True):
            own = projected if len(parts) == 1 else projected[part]
            queries, tail = self.prepare(own, tail, position, self.shape)
            outputs.append(self.attend(queries, keys, values, tail, position, own))
            after.append([tail])
        return self.mlp(self.leave(_joined(outputs), residual=x), work), after


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)


def fused_layer(layer: DecoderLayer, dtype: mx.Dtype, selection: Selection) -> FusedDelta | FusedAttention:
    """The layer through the kernels.

    Raises:
        Unsupported: it cannot be.
    """
    return (FusedDelta if layer.is_linear else FusedAttention)(layer, dtype, selection)
