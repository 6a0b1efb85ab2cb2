"""Qwen3.5 / 3.6 / 3.8, dense or of experts: a hybrid trunk (Gated DeltaNet and gated full attention) with one recurrent
MTP head.

The modules and their weights are mlx-lm's; the passes are ours, because they need hidden states out, rows of several
sequences in one array, and caches that can take rows back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.nn.layers.activations import silu
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import RMSNorm
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.gated_delta import gated_delta_update, normalize_qk
from mlx_lm.models.qwen3_5 import DecoderLayer, GatedDeltaNet, TextModel, TextModelArgs
from mlx_lm.models.qwen3_next import Qwen3NextAttention, Qwen3NextSparseMoeBlock

from mlx_mtp_backend.api import Norm
from mlx_mtp_backend.cache import DeltaCache, KVCache, LayerCache
from mlx_mtp_backend.cache.delta import Tape
from mlx_mtp_backend.families.base import Hidden, Model, Segment, split_rows
from mlx_mtp_backend.families.moe import moe_rows


class MTPHead(Module):
    """The head's weights, under their released names: fc([norm_e(E[x]), norm_h(h)]), one decoder layer, a norm."""

    def __init__(self, args: TextModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        size, eps = args.hidden_size, args.rms_norm_eps
        self.pre_fc_norm_embedding = RMSNorm(size, eps=eps)
        self.pre_fc_norm_hidden = RMSNorm(size, eps=eps)
        self.fc = Linear(2 * size, size, bias=False)
        # This index makes it a full-attention layer, which the head's always is.
        self.layers = [DecoderLayer(args, layer_idx=args.full_attention_interval - 1)]
        self.norm = RMSNorm(size, eps=eps)


class Qwen35:
    """A loaded Qwen3.5 model; see families.base.Model.

    Args:
        text: mlx-lm's text model.
        head: None for a checkpoint without one.
        seed_norm: which trunk hidden seeds the head; released heads were trained on the post-norm one.
        recycle_norm: which of its own outputs the head is fed again.
    """

    def __init__(
        self,
        text: TextModel,
        head: MTPHead | None,
        seed_norm: Norm = Norm.POST,
        recycle_norm: Norm = Norm.POST,
    ) -> None:
        self.text = text
        self.mtp = head
        self.seed_norm, self.recycle_norm = seed_norm, recycle_norm
        self.vocab_size: int = text.args.vocab_size
        self.hidden_size: int = text.args.hidden_size
        self.has_head = head is not None
        self.most_rows: int | None = None
        self.most_segment_rows: int | None = None
        self.kernels = "none"
        self.sampler: Callable[[mx.array, mx.array], mx.array] | None = None

    @property
    def weight_bytes(self) -> int:
        modules: list[Any] = [self.text] if self.mtp is None else [self.text, self.mtp]
        weights: Any = [pair for module in modules for pair in tree_flatten(module.parameters())]
        return sum(array.nbytes for _, array in weights)

    def trunk_caches(self) -> list[LayerCache]:
        return [
            DeltaCache(layer.linear_attn.conv_kernel_size - 1, partial(replay_delta, layer.linear_attn))
            if layer.is_linear
            else KVCache()
            for layer in self.text.model.layers
        ]

    def head_caches(self) -> list[LayerCache]:
        return [] if self.mtp is None else [KVCache() for _ in self.mtp.layers]

    def trunk(self, tokens: mx.array, segments: Sequence[Segment]) -> Hidden:
        x = self.text.model.embed_tokens(tokens)[None]
        for index, layer in enumerate(self.text.model.layers):
            x = self._decoder(layer, x, segments, index)
        normed = self.text.model.norm(x)
        return _hidden(x, normed, self.seed_norm)

    def head(self, tokens: mx.array, carried: mx.array, segments: Sequence[Segment]) -> Hidden:
        if self.mtp is None:
            raise ValueError("this checkpoint has no head")
        embedded = self.mtp.pre_fc_norm_embedding(self.text.model.embed_tokens(tokens))
        x = self.mtp.fc(mx.concatenate([embedded, self.mtp.pre_fc_norm_hidden(carried)], axis=-1))[None]
        for index, layer in enumerate(self.mtp.layers):
            x = self._decoder(layer, x, segments, index)
        return _hidden(x, self.mtp.norm(x), self.recycle_norm)

    def _decoder(self, layer: DecoderLayer, x: mx.array, segments: Sequence[Segment], index: int) -> mx.array:
        return self.feed_forward(layer, mixed_rows(layer, x, segments, index), segments)

    def feed_forward(self, layer: DecoderLayer, x: mx.array, segments: Sequence[Segment]) -> mx.array:
        """A decoder layer's second half over flat rows [1, N, hidden]."""
        normed = layer.post_attention_layernorm(x)
        if isinstance(layer.mlp, Qwen3NextSparseMoeBlock):
            return x + moe_rows(layer.mlp, normed, segments)
        return x + layer.mlp(normed)

    def alternatives(self) -> dict[str, Model]:
        """The same weights wired as they should not be: each is a mistake that costs acceptance, never correctness."""
        if self.mtp is None:
            return {}
        other = Norm.PRE if self.seed_norm is Norm.POST else Norm.POST
        variant = partial(Qwen35, self.text, seed_norm=self.seed_norm, recycle_norm=self.recycle_norm)
        wrong: dict[str, Model] = {
            f"{other.value}-norm seed": Qwen35(self.text, self.mtp, other, self.recycle_norm),
            "hidden before embedding": variant(_edited(self.mtp, _halves_swapped)),
            "norms one higher": variant(_edited(self.mtp, lambda _, w: w + 1 if w.ndim == 1 else w)),
            "norms one lower": variant(_edited(self.mtp, lambda _, w: w - 1 if w.ndim == 1 else w)),
        }
        if self.text.args.num_experts:
            wrong["experts' gate and up swapped"] = variant(_experts_swapped(self.mtp))
        return wrong

    def logits(self, normed: mx.array) -> mx.array:
        tied = self.text.args.tie_word_embeddings
        read: Callable[[mx.array], mx.array] = self.text.model.embed_tokens.as_linear if tied else self.text.lm_head
        return read(normed)


def _edited(head: MTPHead, change: Callable[[str, mx.array], mx.array]) -> MTPHead:
    """A copy of the head that shares the weights which `change`, given name and weight, leaves alone."""
    edited = copy.deepcopy(head)
    weights: Any = head.parameters()  # type: ignore[no-untyped-call]
    edited.update(tree_map_with_path(change, weights))
    return edited


def _experts_swapped(head: MTPHead) -> MTPHead:
    """A copy whose experts' gate and up projections have changed places; it shares all weights."""
    edited = _edited(head, lambda _, w: w)
    for layer in edited.layers:
        experts = layer.mlp.switch_mlp
        experts.gate_proj, experts.up_proj = experts.up_proj, experts.gate_proj
    return edited


def _halves_swapped(name: str, weight: mx.array) -> mx.array:
    if not name.startswith("fc."):
        return weight
    first, second = mx.split(weight, 2, axis=-1)
    return mx.concatenate([second, first], axis=-1)


def _hidden(before: mx.array, normed: mx.array, carried: Norm) -> Hidden:
    return Hidden(normed[0], (normed if carried is Norm.POST else before)[0])


def mixed_rows(layer: DecoderLayer, x: mx.array, segments: Sequence[Segment], index: int) -> mx.array:
    """A decoder layer's first half over flat rows [1, N, hidden]; `index` is its place in each segment's caches."""
    normed = layer.input_layernorm(x)
    caches = [segment.caches[index] for segment in segments]
    if layer.is_linear:
        mixed = delta_rows(layer.linear_attn, normed, caches, split_rows(segments))
    else:
        mixed = attention_rows(layer.self_attn, normed, caches, split_rows(segments))
    return x + mixed


def attention_rows(
    layer: Qwen3NextAttention, x: mx.array, caches: Sequence[LayerCache], slices: Sequence[slice]
) -> mx.array:
    """Gated grouped-query attention with partial rotary embedding; positions are the caches' offsets."""
    rows = x.shape[1]
    queries, gate = mx.split(layer.q_proj(x).reshape(1, rows, layer.num_attention_heads, -1), 2, axis=-1)
    kv_shape = (1, rows, layer.num_key_value_heads, -1)
    queries = layer.q_norm(queries).transpose(0, 2, 1, 3)
    keys = layer.k_norm(layer.k_proj(x).reshape(kv_shape)).transpose(0, 2, 1, 3)
    values = layer.v_proj(x).reshape(kv_shape).transpose(0, 2, 1, 3)
    outputs = []
    for cache, part in zip(caches, slices, strict=True):
        assert isinstance(cache, KVCache)
        own = layer.rope(queries[:, :, part], offset=cache.offset)
        own_keys = layer.rope(keys[:, :, part], offset=cache.offset)
        all_keys, all_values = cache.append(own_keys, values[:, :, part])
        mask = "causal" if own.shape[2] > 1 else None
        outputs.append(mx.fast.scaled_dot_product_attention(own, all_keys, all_values, scale=layer.scale, mask=mask))
    attended = mx.concatenate(outputs, axis=2).transpose(0, 2, 1, 3).reshape(1, rows, -1)
    output: mx.array = layer.o_proj(attended * mx.sigmoid(gate.reshape(1, rows, -1)))
    return output


def delta_rows(layer: GatedDeltaNet, x: mx.array, caches: Sequence[LayerCache], slices: Sequence[slice]) -> mx.array:
    """Gated DeltaNet (arXiv 2412.06464): short convolution, then the gated delta rule, one sequence at a time."""
    rows = x.shape[1]
    qkv, a, b = layer.in_proj_qkv(x), layer.in_proj_a(x), layer.in_proj_b(x)
    outputs = []
    for cache, part in zip(caches, slices, strict=True):
        assert isinstance(cache, DeltaCache)
        window = cache.conv
        if window is None:
            window = mx.zeros((1, layer.conv_kernel_size - 1, layer.conv_dim), dtype=x.dtype)
        conv_input = mx.concatenate([window, qkv[:, part]], axis=1)
        recurrence = (*_convolved(layer, conv_input), a[:, part], b[:, part])
        mixed, state = _recur(layer, recurrence, cache.state)
        cache.advance(Tape(conv_input, recurrence), state)
        outputs.append(mixed)
    z = layer.in_proj_z(x).reshape(1, rows, layer.num_v_heads, layer.head_v_dim)
    output: mx.array = layer.out_proj(layer.norm(mx.concatenate(outputs, axis=1), z).reshape(1, rows, -1))
    return output


def replay_delta(layer: GatedDeltaNet, recurrence: tuple[mx.array, ...], state: mx.array | None) -> mx.array:
    """The state after running taped rows from `state`: the same operations in the same order, so the same bits."""
    return _recur(layer, recurrence, state)[1]


def _convolved(layer: GatedDeltaNet, conv_input: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    out = silu(layer.conv1d(conv_input))
    shapes = [(layer.num_k_heads, layer.head_k_dim)] * 2 + [(layer.num_v_heads, layer.head_v_dim)]
    parts = mx.split(out, [layer.key_dim, 2 * layer.key_dim], axis=-1)
    q, k, v = (part.reshape(1, out.shape[1], *shape) for part, shape in zip(parts, shapes, strict=True))
    q, k = normalize_qk(q, k, inv_scale=layer.head_k_dim**-0.5, eps=1e-6)
    return q, k, v


def _recur(layer: GatedDeltaNet, recurrence: tuple[mx.array, ...], state: mx.array | None) -> tuple[mx.array, mx.array]:
    q, k, v, a, b = recurrence
    output, after = gated_delta_update(q, k, v, a, b, layer.A_log, layer.dt_bias, state)
    return output, after
