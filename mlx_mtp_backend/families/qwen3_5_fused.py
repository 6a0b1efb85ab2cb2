"""Qwen3.5 through the GPU kernels: a decode or verify pass of few rows in about five launches a layer.

Takes over the weights of a stock model and replaces it whole. Passes of more rows than the kernels take (prefill) go
through stock products and attention on the same caches. Few-row passes are compiled once for each number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mtp_kernels import few_row_matmul as matmul_kernel
from mtp_kernels.few_row_matmul import variants
from mtp_kernels.launch import platform, version_of
from mtp_kernels.registry import Case, Registry, Run, Selection
from mtp_kernels.sampler.probe import case as sampler_case

from mlx_mtp_backend.api import LoadProgress, Norm
from mlx_mtp_backend.cache import LayerCache
from mlx_mtp_backend.families.base import Hidden, Segment, split_rows
from mlx_mtp_backend.families.qwen3_5 import Qwen35, decoder_rows
from mlx_mtp_backend.families.qwen3_5_fused_cache import FusedDeltaCache, FusedKVCache, OnDevice
from mlx_mtp_backend.families.qwen3_5_fused_layers import (
    Arrays,
    FusedAttention,
    FusedDelta,
    fused_layer,
)
from mlx_mtp_backend.families.qwen3_5_fused_products import Unsupported, product
from mlx_mtp_backend.host import evaluate

# Layers whose graph is built before the device is given them: it works on these while the host builds the next.
_SPAN = 16
_MOST_COMPILED = 256  # functions, each of one span for segments of certain rows
MAX_SEGMENT_ROWS = 8
MAX_PASS_ROWS = matmul_kernel.MAX_ROWS


class FusedQwen35(Qwen35):
    """A Qwen3.5 model whose few-row passes run through the kernels; see families.base.Model.

    Args:
        stock: the loaded model; its modules keep serving passes of many rows.
        layers: its trunk's layers; see `fused_layers`.
        selection: decides, kernel by kernel, whether it runs here.

    Raises:
        Unsupported: the kernels do not have this model's formats or shapes.
    """

    def __init__(self, stock: Qwen35, layers: list[FusedDelta | FusedAttention], selection: Selection) -> None:
        super().__init__(stock.text, stock.mtp, stock.seed_norm, stock.recycle_norm)
        model = stock.text.model
        self._dtype = model.norm.weight.dtype
        self.layers = layers
        output = model.embed_tokens if stock.text.args.tie_word_embeddings else stock.text.lm_head
        self._output = product(selection, [output], self._dtype)
        self._head_layers: list[FusedAttention] = []
        if stock.mtp is not None:
            self._fc = product(selection, [stock.mtp.fc], self._dtype)
            self._head_layers = [FusedAttention(layer, self._dtype, selection) for layer in stock.mtp.layers]
        # On Metal it has not been timed against stock operations.
        case = sampler_case(self.vocab_size, self._dtype)
        self.sampler = selection.optional(case) if platform() != "metal" else None
        self.most_rows, self.most_segment_rows = MAX_PASS_ROWS, MAX_SEGMENT_ROWS
        self.kernels = selection.versions()
        # References read positions back to the host, which a compiled function cannot.
        self._compilable = not selection.failed
        self._compiled: dict[tuple[str | int, tuple[int, ...]], Callable[..., Any]] = {}

    @property
    def falls_back(self) -> bool:
        """Whether a kernel failed its check, and MLX's own operations stand in for it."""
        return not self._compilable

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
        rows = tuple(segment.rows for segment in segments)
        states = [pass_states(segment) for segment in segments]
        x = tokens
        for first in range(0, len(self.layers), _SPAN):
            run = self._compiled_pass(first, partial(self._span, first), rows)
            x, after = run([own[first : first + _SPAN] for own in states], x)
            _take(segments, first, after)
            mx.async_eval(x)  # type: ignore[no-untyped-call]
        normed = self.text.model.norm(x)
        return Hidden(normed, normed if self.seed_norm is Norm.POST else x)

    def _many_rows(self, tokens: mx.array, segments: Sequence[Segment]) -> Hidden:
        """Prefill: stock operations, but for the recurrence, which off Metal they run row by row.

        Layers are sent to the device one ahead of what it works on: each needs several hundred megabytes meanwhile.
        """
        _settle(segments)
        x = self.text.model.embed_tokens(tokens)[None]
        before = x
        for index, (layer, stock) in enumerate(zip(self.layers, self.text.model.layers, strict=True)):
            if isinstance(layer, FusedDelta):
                x = x + layer.many_rows(stock, stock.input_layernorm(x), [s.caches[index] for s in segments], segments)
                x = x + stock.mlp(stock.post_attention_layernorm(x))
            else:
                x = decoder_rows(stock, x, segments, index)
            mx.async_eval(x)  # type: ignore[no-untyped-call]
            evaluate(before)
            before = x
        normed = self.text.model.norm(x)[0]
        return Hidden(normed, normed if self.seed_norm is Norm.POST else x[0])

    def head(self, tokens: mx.array, carried: mx.array, segments: Sequence[Segment]) -> Hidden:
        if not _few(segments):
            _settle(segments)
            return super().head(tokens, carried, segments)
        rows = tuple(segment.rows for segment in segments)
        states = [pass_states(segment) for segment in segments]
        # Every mixture of accepted drafts is a pass of its own; compiling each would take longer than the pass.
        run = self._compiled_pass("head", self._head_rows, rows) if len(rows) == 1 else partial(self._head_rows, rows)
        before, normed, after = run(states, tokens, carried)
        _take(segments, 0, after)
        return Hidden(normed, normed if self.recycle_norm is Norm.POST else before)

    def logits(self, normed: mx.array) -> mx.array:
        if normed.shape[0] > MAX_PASS_ROWS:
            return super().logits(normed)
        return self._output(normed)

    def _span(self, first: int, rows: tuple[int, ...], states: list[list[Arrays]], x: mx.array) -> Any:
        """Some layers over rows, or over tokens for the first of them."""
        if first == 0:
            x = self.text.model.embed_tokens(x)
        return _through(self.layers[first : first + _SPAN], x, states, rows)

    def _head_rows(self, rows: tuple[int, ...], states: list[list[Arrays]], tokens: mx.array, carried: mx.array) -> Any:
        assert self.mtp is not None
        embedded = self.mtp.pre_fc_norm_embedding(self.text.model.embed_tokens(tokens))
        x = self._fc(mx.concatenate([embedded, self.mtp.pre_fc_norm_hidden(carried)], axis=-1))
        x, after = _through(self._head_layers, x, states, rows)
        return x, self.mtp.norm(x), after

    def _compiled_pass(self, name: str | int, build: Callable[..., Any], rows: tuple[int, ...]) -> Callable[..., Any]:
        """The function of states and inputs for segments of these many rows."""
        if len(self._compiled) >= _MOST_COMPILED:
            self._compiled.clear()  # mixtures of fixed depths are without number
        if (name, rows) not in self._compiled:
            whole = partial(build, rows)
            self._compiled[name, rows] = mx.compile(whole) if self._compilable else whole
        return self._compiled[name, rows]


def fused_layers(stock: Qwen35, selection: Selection) -> Generator[float, None, list[FusedDelta | FusedAttention]]:
    """The trunk's layers through the kernels, one a step; yields the share that is done.

    Raises:
        Unsupported: the kernels do not have this model's formats or shapes.
    """
    dtype, layers = stock.text.model.norm.weight.dtype, []
    for layer in stock.text.model.layers:
        layers.append(fused_layer(layer, dtype, selection))
        yield len(layers) / len(stock.text.model.layers)
    return layers


def fused(stock: Qwen35, registry: Registry) -> FusedQwen35:
    """The whole model through the kernels, or their fallbacks. Raises Unsupported."""
    selection = Selection(registry)
    steps = fused_layers(stock, selection)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return FusedQwen35(stock, done.value, selection)


class _Listing(Selection):
    """Chooses and checks nothing: lists the cases that a model asks for."""

    def __init__(self) -> None:
        super().__init__(Registry())
        self.cases: list[Case] = []

    def resolve(self, case: Case) -> Run:
        self.cases.append(case)
        return case.fallback


def products(stock: Qwen35) -> list[str]:
    """The distinct matrix products of a model's step, as few_row_matmul names them. Raises Unsupported."""
    listing = _Listing()
    FusedQwen35(
        stock, [fused_layer(n, stock.text.model.norm.weight.dtype, listing) for n in stock.text.model.layers], listing
    )
    return list(dict.fromkeys(case.shape for case in listing.cases if case.kernel == "few_row_matmul"))


def model_key(shapes: Sequence[str]) -> str:
    """Names models whose steps are made of the same products."""
    return version_of(*shapes)


def fused_or_stock(stock: Qwen35, registry: Registry) -> Generator[LoadProgress, None, tuple[Qwen35, str | None]]:
    """The model through the kernels, or the stock model and why it stays.

    One kernel that failed its check keeps the whole stock model: fallbacks read positions back to the
    host, which is slower than stock.
    """
    if platform() == "cpu":
        return stock, "no GPU: the step through the kernels is for CUDA and Metal"
    selection = Selection(registry)
    try:
        if platform() == "metal":
            if not registry.tuning.won(model_key(products(stock))):
                return stock, "the kernels are not known to be faster on this Mac; mtp-router tune measures them"
            variants.use(registry.tuning.variants)
        steps = fused_layers(stock, selection)
        while True:
            try:
                yield LoadProgress("kernels", next(steps))
            except StopIteration as done:
                model = FusedQwen35(stock, done.value, selection)
                break
    except Unsupported as reason:
        return stock, str(reason)
    if selection.failed:
        first = selection.failed[0]
        return stock, f"kernel {first.kernel} ({first.shape}): {first.reason}"
    return model, None


def _through(
    layers: Sequence[FusedDelta | FusedAttention], x: mx.array, states: list[list[Arrays]], rows: tuple[int, ...]
) -> tuple[mx.array, list[list[Arrays]]]:
    """Rows through layers; states are [segment][layer], what comes back is [layer][segment]."""
    parts = split_rows([Segment((), count) for count in rows])
    after = []
    # A head's pass, of one layer, took 1.1 ms more on an H100 when it had a counter.
    works = matmul_kernel.counters(len(layers)) if len(layers) > 1 else [None]
    for index, (layer, work) in enumerate(zip(layers, works, strict=True)):
        x, changed = layer(x, [segment[index] for segment in states], parts, work)
        after.append(changed)
    return x, after


def _take(segments: Sequence[Segment], first: int, after: list[list[Arrays]]) -> None:
    """Gives caches, from layer `first` on, what a pass left: [layer][segment]."""
    for index, segment in enumerate(segments):
        for cache, layer in zip(segment.caches[first : first + len(after)], after, strict=True):
            assert isinstance(cache, FusedDeltaCache | FusedKVCache)
            cache.take(layer[index], segment.rows)


def pass_states(segment: Segment) -> list[Arrays]:
    """What each layer's cache gives the pass; layers share the small arrays that say where they are."""
    on_device = OnDevice()
    states = []
    for cache in segment.caches:
        assert isinstance(cache, FusedDeltaCache | FusedKVCache)
        states.append(cache.give(segment.rows, on_device))
    if on_device.apart:
        mx.async_eval(on_device.apart)  # type: ignore[no-untyped-call]
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
