"""Qwen3.5 through the GPU kernels: a decode or verify pass of few rows in about five launches a layer.

Takes over the weights of a stock model and replaces it whole. Passes of more rows than the kernels take (prefill) go
through stock products and attention on the same caches. Few-row passes are compiled once for each number of sequences
and rows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.qwen3_5 import DecoderLayer
from mtp_kernels.few_row_matmul import variants
from mtp_kernels.launch import platform, stands_in, version_of
from mtp_kernels.registry import Case, Registry, Run, Selection
from mtp_kernels.sampler.probe import case as sampler_case
from mtp_kernels.segments import Segments

from mlx_mtp_backend.api import LoadProgress, Norm
from mlx_mtp_backend.cache import LayerCache
from mlx_mtp_backend.families.base import Hidden, Segment, split_rows
from mlx_mtp_backend.families.qwen3_5 import Qwen35, mixed_rows
from mlx_mtp_backend.families.qwen3_5_fused_cache import FusedDeltaCache, FusedKVCache
from mlx_mtp_backend.families.qwen3_5_fused_layers import (
    Fixed,
    FusedAttention,
    FusedDelta,
    Where,
    fused_layer,
)
from mlx_mtp_backend.families.qwen3_5_fused_mlp import FusedExperts
from mlx_mtp_backend.families.qwen3_5_fused_pass import (
    MAX_PASS_ROWS,
    MAX_SEGMENT_ROWS,
    Given,
    Layout,
    delta_cache,
    give,
    stock_attention,
    take,
)
from mlx_mtp_backend.families.qwen3_5_fused_products import Unsupported, Works, product
from mlx_mtp_backend.host import evaluate

# Layers whose graph is built before the device is given them: it works on these while the host builds the next.
_SPAN = 16
_MOST_COMPILED = 256  # functions, each of one span for so many sequences of certain rows and sizes


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
        self._deltas = [layer for layer in layers if isinstance(layer, FusedDelta)]
        self._attentions = [layer for layer in layers if isinstance(layer, FusedAttention)]
        output = model.embed_tokens if stock.text.args.tie_word_embeddings else stock.text.lm_head
        self._output = product(selection, [output], self._dtype)
        self._head_layers: list[FusedAttention] = []
        if stock.mtp is not None:
            self._fc = product(selection, [stock.mtp.fc], self._dtype)
            self._head_layers = [FusedAttention(layer, self._dtype, selection) for layer in stock.mtp.layers]
        # On Metal mlx-lm's own product of many rows needs no compiling.
        own = [*layers, *self._head_layers] if platform() == "cuda" else []
        stocks = [*model.layers, *(stock.mtp.layers if stock.mtp else [])]
        pairs = zip(stocks, own, strict=False)
        self._experts = {id(twin): layer.mlp for twin, layer in pairs if isinstance(layer.mlp, FusedExperts)}
        # On Metal it has not been timed against stock operations.
        case = sampler_case(self.vocab_size, self._dtype)
        self.sampler = selection.optional(case) if platform() != "metal" else None
        self.most_rows, self.most_segment_rows = MAX_PASS_ROWS, MAX_SEGMENT_ROWS
        self.kernels = selection.versions()
        self.falls_back = bool(selection.failed)
        # References and what stands in for Metal read values on the host, which a compiled function cannot.
        self._compilable = not self.falls_back and not stands_in()
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def trunk_caches(self) -> list[LayerCache]:
        return [FusedDeltaCache(self._deltas, self._dtype), self._kv_cache(self._attentions)]

    def head_caches(self) -> list[LayerCache]:
        return [self._kv_cache(self._head_layers)] if self._head_layers else []

    def _kv_cache(self, layers: list[FusedAttention]) -> FusedKVCache:
        return FusedKVCache(len(layers), layers[0].shape.kv_heads if layers else 0, self._dtype)

    def trunk(self, tokens: mx.array, segments: Sequence[Segment]) -> Hidden:
        if not _few(segments):
            return self._many_rows(tokens, segments)
        layout = Layout.of(segments)
        given = self._give(segments, self.layers, layout)
        x, after = layout.spread(tokens), []
        for first in range(0, len(self.layers), _SPAN):
            run = self._pass(first, partial(self._span, first), layout, given)
            x, left = run(given.states[first : first + _SPAN], given.where, x)
            after += left
            mx.async_eval(x)  # type: ignore[no-untyped-call]
        take(segments, self.layers, after)
        x = layout.gathered(x)
        normed = self.text.model.norm(x)
        return Hidden(normed, normed if self.seed_norm is Norm.POST else x)

    def _many_rows(self, tokens: mx.array, segments: Sequence[Segment]) -> Hidden:
        """Prefill: stock operations, but for the recurrence, which off Metal they run row by row.

        Layers are sent to the device one ahead of what it works on: each needs several hundred megabytes meanwhile.
        """
        parts = split_rows(segments)
        x = self.text.model.embed_tokens(tokens)[None]
        deltas = [delta_cache(segment) for segment in segments]
        with stock_attention(segments) as plain:
            before, delta, attention = x, 0, 0
            for layer, stock in zip(self.layers, self.text.model.layers, strict=True):
                if isinstance(layer, FusedDelta):
                    runs = [partial(cache.run_many, delta) for cache in deltas]
                    x = x + layer.many_rows(stock, stock.input_layernorm(x), runs, parts)
                    delta += 1
                else:
                    x = mixed_rows(stock, x, plain, attention)
                    attention += 1
                x = self.feed_forward(stock, x, segments)
                mx.async_eval(x)  # type: ignore[no-untyped-call]
                evaluate(before)
                before = x
        normed = self.text.model.norm(x)[0]
        return Hidden(normed, normed if self.seed_norm is Norm.POST else x[0])

    def head(self, tokens: mx.array, carried: mx.array, segments: Sequence[Segment]) -> Hidden:
        if not _few(segments):
            with stock_attention(segments) as plain:
                return super().head(tokens, carried, plain)
        layout = Layout.of(segments)
        given = self._give(segments, self._head_layers, layout)
        run = self._pass("head", self._head_rows, layout, given)
        before, normed, after = run(given.states, given.where, layout.spread(tokens), layout.spread(carried))
        take(segments, self._head_layers, after)
        normed = layout.gathered(normed)
        return Hidden(normed, normed if self.recycle_norm is Norm.POST else layout.gathered(before))

    def feed_forward(self, layer: DecoderLayer, x: mx.array, segments: Sequence[Segment]) -> mx.array:
        experts = self._experts.get(id(layer))
        if experts is None:
            return super().feed_forward(layer, x, segments)
        # How many rows a sequence has decides how they are multiplied: never those of its neighbours.
        return mx.concatenate([experts.many_rows(x[0, part]) for part in split_rows(segments)])[None]

    def logits(self, normed: mx.array) -> mx.array:
        if normed.shape[0] > MAX_PASS_ROWS:
            return super().logits(normed)
        return self._output(normed)

    def _give(
        self, segments: Sequence[Segment], layers: Sequence[FusedDelta | FusedAttention], layout: Layout
    ) -> Given:
        """What a pass reads. Kernels read buffers on from their first rows, references need the whole."""
        return give(segments, layers, layout, whole=not self._compilable)

    def _span(
        self, first: int, fixed: Fixed, states: list[Any], where: list[list[mx.array]], x: mx.array
    ) -> tuple[mx.array, list[Any]]:
        """Some layers over rows, or over tokens for the first of them."""
        if first == 0:
            x = self.text.model.embed_tokens(x)
        return _through(self.layers[first : first + _SPAN], x, states, fixed, where)

    def _head_rows(
        self,
        fixed: Fixed,
        states: list[Any],
        where: list[list[mx.array]],
        tokens: mx.array,
        carried: mx.array,
    ) -> Any:
        assert self.mtp is not None
        embedded = self.mtp.pre_fc_norm_embedding(self.text.model.embed_tokens(tokens))
        x = self._fc(mx.concatenate([embedded, self.mtp.pre_fc_norm_hidden(carried)], axis=-1))
        x, after = _through(self._head_layers, x, states, fixed, where)
        return x, self.mtp.norm(x), after

    def _pass(self, name: str | int, build: Callable[..., Any], layout: Layout, given: Given) -> Callable[..., Any]:
        """The function of states and inputs for such a pass, compiled if it is likely to come again.

        Whose rows they are and how long their contexts does not matter to it, but for the bound of the longest. Those
        functions of longest ago are forgotten.
        """
        if not (self._compilable and layout.alike):
            return partial(build, Fixed(Segments.of(layout.launched), given.bound))
        key = (name, layout.launched, given.bound)
        made = self._compiled.pop(key, None)
        if made is None:
            if len(self._compiled) >= _MOST_COMPILED:
                del self._compiled[next(iter(self._compiled))]
            segments = Segments.of(layout.launched)
            mx.eval(segments.starts)
            made = mx.compile(partial(build, Fixed(segments, given.bound)))
        self._compiled[key] = made
        return made


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
    layers: Sequence[FusedDelta | FusedAttention],
    x: mx.array,
    states: list[Any],
    fixed: Fixed,
    where: list[list[mx.array]],
) -> tuple[mx.array, list[Any]]:
    """Rows through layers; see qwen3_5_fused_pass.Given."""
    keep, positions = where
    shared = Where(fixed, positions, keep[0] if keep else None)
    after = []
    for layer, state, works in zip(layers, states, Works.of_pass(len(layers), x.shape[0]), strict=True):
        x, left = layer(x, state, shared, works)
        after.append(left)
    return x, after


def _few(segments: Sequence[Segment]) -> bool:
    """Whether the kernels take this pass."""
    return sum(s.rows for s in segments) <= MAX_PASS_ROWS and all(s.rows <= MAX_SEGMENT_ROWS for s in segments)
