"""Qwen3.5 through the GPU kernels: a decode or verify pass of few rows in about five launches a layer.

Takes over the weights of a stock model and replaces it whole. Passes of more rows than the kernels take (prefill) go
through the stock model on the same caches. Few-row passes are compiled once for each number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.normalization import RMSNorm
from mlx.nn.layers.positional_encoding import RoPE
from mlx_lm.models.qwen3_5 import DecoderLayer, GatedDeltaNet
from mlx_lm.models.qwen3_next import Qwen3NextAttention
from mtp_kernels import attention_inputs as inputs_kernel
from mtp_kernels import few_row_attention as attention_kernel
from mtp_kernels import few_row_matmul as matmul_kernel
from mtp_kernels import gated_delta as delta_kernel
from mtp_kernels.attention_inputs.probe import case as inputs_case
from mtp_kernels.few_row_attention.probe import case as attention_case
from mtp_kernels.few_row_matmul.probe import case as matmul_case
from mtp_kernels.gated_delta.probe import case as delta_case
from mtp_kernels.launch import platform
from mtp_kernels.registry import Registry

from mlx_mtp_backend.api import Norm
from mlx_mtp_backend.cache import LayerCache
from mlx_mtp_backend.families.base import Hidden, Segment, split_rows
from mlx_mtp_backend.families.qwen3_5 import Qwen35, decoder_rows
from mlx_mtp_backend.families.qwen3_5_fused_cache import FusedDeltaCache, FusedKVCache

MAX_SEGMENT_ROWS = 8
MAX_PASS_ROWS = matmul_kernel.MAX_ROWS

# What a layer's cache gives a pass and takes back from it.
Arrays = list[mx.array]


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
class Product:
    """One launch's weights, with what is fused around them."""

    matrices: Sequence[matmul_kernel.Matrix]
    run: Callable[..., mx.array]
    norm: mx.array | None = None
    eps: float = 1e-6
    swiglu: bool = False

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        return self.run(x, self.matrices, norm_weight=self.norm, eps=self.eps, residual=residual, swiglu=self.swiglu)


def product(
    registry: Registry,
    linears: Sequence[Module],
    dtype: mx.Dtype,
    norm: RMSNorm | None = None,
    *,
    swiglu: bool = False,
    residual: bool = False,
) -> Product:
    """A checked product over these layers' weights.

    Raises:
        Unsupported: the kernel does not have this format or shape.
    """
    matrices = [matrix_of(linear) for linear in linears]
    if reason := matmul_kernel.supported(matrices, dtype, swiglu=swiglu):
        raise Unsupported(reason)
    case = matmul_case(matrices, dtype, norm=norm is not None, swiglu=swiglu, residual=residual)
    run = registry.resolve(case)
    if norm is None:
        return Product(matrices, run, swiglu=swiglu)
    return Product(matrices, run, norm.weight, norm.eps, swiglu)


class FusedMLP:
    """RMSNorm, gate, up and SwiGLU in one launch, down and the residual in another."""

    def __init__(self, layer: DecoderLayer, dtype: mx.Dtype, registry: Registry) -> None:
        mlp = layer.mlp
        if not hasattr(mlp, "gate_proj"):
            raise Unsupported("a mixture of experts")
        self.enter = product(registry, [mlp.gate_proj, mlp.up_proj], dtype, layer.post_attention_layernorm, swiglu=True)
        self.leave = product(registry, [mlp.down_proj], dtype, residual=True)

    def __call__(self, x: mx.array) -> mx.array:
        return self.leave(self.enter(x), residual=x)


class FusedDelta:
    """A Gated DeltaNet layer in three launches, and its MLP."""

    def __init__(self, layer: DecoderLayer, dtype: mx.Dtype, registry: Registry) -> None:
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
        self.enter = product(registry, projections, dtype, layer.input_layernorm)
        self.run = registry.resolve(delta_case(self.weights, dtype))
        self.leave = product(registry, [net.out_proj], dtype, residual=True)
        self.mlp = FusedMLP(layer, dtype, registry)

    def __call__(self, x: mx.array, states: Sequence[Arrays], parts: Sequence[slice]) -> tuple[mx.array, list[Arrays]]:
        projected = self.enter(x)
        outputs, after = [], []
        for (recurrent, window, pending, keep), part in zip(states, parts, strict=True):
            fresh = projected if len(parts) == 1 else projected[part]
            state = delta_kernel.DeltaState(recurrent, window, pending)
            y, recurrent, window = self.run(fresh, state, keep, self.weights)
            outputs.append(y)
            after.append([recurrent, window, fresh])
        return self.mlp(self.leave(_joined(outputs), residual=x)), after

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

    def __init__(self, layer: DecoderLayer, dtype: mx.Dtype, registry: Registry) -> None:
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
        self.enter = product(registry, [net.q_proj, net.k_proj, net.v_proj], dtype, layer.input_layernorm)
        self.prepare = registry.resolve(inputs_case(self.shape, dtype))
        self.attend = registry.resolve(attention_case(self.shape.heads, self.shape.kv_heads, dtype))
        self.leave = product(registry, [net.o_proj], dtype, residual=True)
        self.mlp = FusedMLP(layer, dtype, registry)

    def __call__(self, x: mx.array, states: Sequence[Arrays], parts: Sequence[slice]) -> tuple[mx.array, list[Arrays]]:
        projected = self.enter(x)
        outputs, after = [], []
        for (keys, values, tail, position), part in zip(states, parts, strict=True):
            own = projected if len(parts) == 1 else projected[part]
            queries, tail = self.prepare(own, tail, position, self.shape)
            outputs.append(self.attend(queries, keys, values, tail, position, own))
            after.append([tail])
        return self.mlp(self.leave(_joined(outputs), residual=x)), after


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)


def fused_layer(layer: DecoderLayer, dtype: mx.Dtype, registry: Registry) -> FusedDelta | FusedAttention:
    """The layer through the kernels.

    Raises:
        Unsupported: it cannot be.
    """
    return (FusedDelta if layer.is_linear else FusedAttention)(layer, dtype, registry)


class FusedQwen35(Qwen35):
    """A Qwen3.5 model whose few-row passes run through the kernels; see families.base.Model.

    Args:
        stock: the loaded model; its modules keep serving passes of many rows.
        registry: decides, kernel by kernel, whether it runs here.

    Raises:
        Unsupported: the kernels do not have this model's formats or shapes.
    """

    def __init__(self, stock: Qwen35, registry: Registry) -> None:
        super().__init__(stock.text, stock.mtp, stock.seed_norm, stock.recycle_norm)
        model = stock.text.model
        self._dtype = model.norm.weight.dtype
        build = partial(fused_layer, dtype=self._dtype, registry=registry)
        self.layers: list[FusedDelta | FusedAttention] = [build(layer) for layer in model.layers]
        output = model.embed_tokens if stock.text.args.tie_word_embeddings else stock.text.lm_head
        self._output = product(registry, [output], self._dtype)
        self._head_layers: list[FusedAttention] = []
        if stock.mtp is not None:
            self._fc = product(registry, [stock.mtp.fc], self._dtype)
            self._head_layers = [FusedAttention(layer, self._dtype, registry) for layer in stock.mtp.layers]
        # References read positions back to the host, which a compiled function cannot.
        self._compilable = registry.fallbacks == 0
        self._compiled: dict[tuple[str, tuple[int, ...]], Callable[..., Any]] = {}

    def trunk_caches(self) -> list[LayerCache]:
        return [
            FusedDeltaCache(layer.weights, layer.run, self._dtype)
            if isinstance(layer, FusedDelta)
            else FusedKVCache(layer.shape.kv_heads, self._dtype)
            for layer in self.layers
        ]

    def head_caches(self) -> list[LayerCache]:
        return [FusedKVCache(layer.shape.kv_heads, self._dtype) for layer in self._head_layers]

    def trunk(self, tokens: mx.array, segments: Sequence[Segment]) -> Hidden:
        if not _few(segments):
            return self._many_rows(tokens, segments)
        before, normed = self._pass("trunk", self._trunk_rows, segments, tokens)
        return Hidden(normed, normed if self.seed_norm is Norm.POST else before)

    def _many_rows(self, tokens: mx.array, segments: Sequence[Segment]) -> Hidden:
        """Prefill: stock operations, but for the recurrence, which off Metal they run row by row."""
        _settle(segments)
        x = self.text.model.embed_tokens(tokens)[None]
        for index, (layer, stock) in enumerate(zip(self.layers, self.text.model.layers, strict=True)):
            if isinstance(layer, FusedDelta):
                x = x + layer.many_rows(stock, stock.input_layernorm(x), [s.caches[index] for s in segments], segments)
                x = x + stock.mlp(stock.post_attention_layernorm(x))
            else:
                x = decoder_rows(stock, x, segments, index)
        normed = self.text.model.norm(x)[0]
        return Hidden(normed, normed if self.seed_norm is Norm.POST else x[0])

    def head(self, tokens: mx.array, carried: mx.array, segments: Sequence[Segment]) -> Hidden:
        if not _few(segments):
            _settle(segments)
            return super().head(tokens, carried, segments)
        before, normed = self._pass("head", self._head_rows, segments, tokens, carried)
        return Hidden(normed, normed if self.recycle_norm is Norm.POST else before)

    def logits(self, normed: mx.array) -> mx.array:
        if normed.shape[0] > MAX_PASS_ROWS:
            return super().logits(normed)
        return self._output(normed)

    def _trunk_rows(self, rows: tuple[int, ...], states: list[list[Arrays]], tokens: mx.array) -> Any:
        x = self.text.model.embed_tokens(tokens)
        x, after = _through(self.layers, x, states, rows)
        return x, self.text.model.norm(x), after

    def _head_rows(self, rows: tuple[int, ...], states: list[list[Arrays]], tokens: mx.array, carried: mx.array) -> Any:
        assert self.mtp is not None
        embedded = self.mtp.pre_fc_norm_embedding(self.text.model.embed_tokens(tokens))
        x = self._fc(mx.concatenate([embedded, self.mtp.pre_fc_norm_hidden(carried)], axis=-1))
        x, after = _through(self._head_layers, x, states, rows)
        return x, self.mtp.norm(x), after

    def _pass(
        self, name: str, build: Callable[..., Any], segments: Sequence[Segment], *inputs: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Runs a compiled pass on the segments' caches: its rows before and after the final norm."""
        rows = tuple(segment.rows for segment in segments)
        if (name, rows) not in self._compiled:
            whole = partial(build, rows)
            self._compiled[name, rows] = mx.compile(whole) if self._compilable else whole
        states = [pass_states(segment) for segment in segments]
        before, normed, after = self._compiled[name, rows](states, *inputs)
        for index, segment in enumerate(segments):
            for cache, layer in zip(segment.caches, after, strict=True):
                assert isinstance(cache, FusedDeltaCache | FusedKVCache)
                cache.take(layer[index], segment.rows)
        return before, normed


def fused_or_stock(stock: Qwen35, registry: Registry) -> tuple[Qwen35, str | None]:
    """The model through the kernels, or the stock model and why it stays."""
    if platform() == "cpu":
        return stock, "no GPU"
    try:
        return FusedQwen35(stock, registry), None
    except Unsupported as reason:
        return stock, str(reason)


def _through(
    layers: Sequence[FusedDelta | FusedAttention], x: mx.array, states: list[list[Arrays]], rows: tuple[int, ...]
) -> tuple[mx.array, list[list[Arrays]]]:
    """Rows through layers; states are [segment][layer], what comes back is [layer][segment]."""
    parts = split_rows([Segment((), count) for count in rows])
    after = []
    for index, layer in enumerate(layers):
        x, changed = layer(x, [segment[index] for segment in states], parts)
        after.append(changed)
    return x, after


def pass_states(segment: Segment) -> list[Arrays]:
    """What each layer's cache gives the pass; layers share the small arrays that say where they are."""
    shared: dict[tuple[int, ...], mx.array] = {}  # ids are safe as keys: the caches hold the arrays

    def on_device(*numbers: int | mx.array) -> mx.array:
        key = tuple(n if isinstance(n, int) else id(n) for n in numbers)
        if key not in shared:
            first, *rest = numbers
            if isinstance(first, int):
                shared[key] = mx.array(numbers, dtype=mx.int32)
            else:  # a kept count as it is, or a position and the rows kept since
                shared[key] = first + mx.array([0, 1], dtype=mx.int32) * rest[0] if rest else first
        return shared[key]

    states = []
    for cache in segment.caches:
        assert isinstance(cache, FusedDeltaCache | FusedKVCache)
        states.append(cache.give(segment.rows, on_device))
    return states


def _few(segments: Sequence[Segment]) -> bool:
    """Whether the kernels take this pass."""
    return sum(s.rows for s in segments) <= MAX_PASS_ROWS and all(s.rows <= MAX_SEGMENT_ROWS for s in segments)


def _settle(segments: Sequence[Segment]) -> None:
    """Moves tails into the long buffers, which stock attention reads."""
    for segment in segments:
        for cache in segment.caches:
            if isinstance(cache, FusedKVCache):
                cache.settle()
