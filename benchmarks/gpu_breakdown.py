"""Where the time of a plain step goes: each kind of launch alone, as a chain over the model's own weights."""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import mlx.core as mx
from mtp_kernels import few_row_experts
from mtp_kernels.few_row_attention import Context
from mtp_kernels.few_row_matmul import TILE_ROWS, counters
from mtp_kernels.gated_delta import DeltaState
from mtp_kernels.segments import Segments

from benchmarks.gpu_rounds import Prefilled
from mlx_mtp_backend.cache import begin, commit
from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.families.qwen3_5_fused import FusedQwen35
from mlx_mtp_backend.families.qwen3_5_fused_layers import FusedAttention, FusedDelta
from mlx_mtp_backend.families.qwen3_5_fused_mlp import FusedExperts
from mlx_mtp_backend.families.qwen3_5_fused_pass import Layout, give
from mlx_mtp_backend.families.qwen3_5_fused_products import Product

_QUEUED = 12  # chains
# Nodes of MLX's graph that launch nothing.
_VIEWS = {
    "Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze", "Transpose", "Slice", "Broadcast", "Split", "AsStrided",
}  # fmt: skip


def breakdown(model: FusedQwen35, sequence: Prefilled, rows: int = 1) -> dict[str, float]:
    """Microseconds a step by kind of launch; chains run alone, so their sum need not equal the step."""
    start = sequence.carried[:1] * mx.ones((rows, 1), sequence.carried.dtype)
    own, segments = [Segment(sequence.trunk, rows)], Segments.of((rows,))
    given = give(own, model.layers, Layout.of(own), whole=model.falls_back)
    (keep,), (position,) = given.where
    deltas = [(la, s) for la, s in zip(model.layers, given.states, strict=True) if isinstance(la, FusedDelta)]
    attentions = [(la, s) for la, s in zip(model.layers, given.states, strict=True) if isinstance(la, FusedAttention)]

    def products(x: mx.array, pick: Callable[[FusedDelta | FusedAttention], Product]) -> mx.array:
        """A chain of one product a layer, tied by one column: what that adds is one small copy a layer."""
        for layer, work in zip(model.layers, counters(len(model.layers)), strict=True):
            product = pick(layer)
            own = mx.contiguous(mx.broadcast_to(x[:, :1], (rows, product.matrices[0].inputs)))
            x = product(own, work=work if product.swiglu or rows > TILE_ROWS else None)
        return x

    mixtures = [layer.mlp for layer in model.layers if isinstance(layer.mlp, FusedExperts)]
    # Random weights choose about as many distinct experts for any rows.
    logits = [mx.concatenate([router(start) for router in mixture.routers], axis=-1) for mixture in mixtures]
    entered = [
        few_row_experts.enter(start, own, mixture.experts, mixture.norm, mixture.eps)
        for own, mixture in zip(logits, mixtures, strict=True)
    ]
    mx.eval(logits, entered)

    def routers(x: mx.array) -> mx.array:
        """Tied by one column, as are the experts' first launches."""
        first = x
        for mixture in mixtures:
            for router in mixture.routers:
                x = first + router(x)[:, :1].astype(x.dtype) * 0
        return x

    def entering(x: mx.array) -> mx.array:
        first = x
        for own, mixture in zip(logits, mixtures, strict=True):
            x = first + few_row_experts.enter(x, own, mixture.experts, mixture.norm, mixture.eps)[1][:, :1] * 0
        return x

    def leaving(x: mx.array) -> mx.array:
        for given, mixture in zip(entered, mixtures, strict=True):
            x = few_row_experts.leave(x, mixture.experts, *given)
        return x

    def recurrence(x: mx.array) -> mx.array:
        for layer, state in deltas:
            fresh = mx.zeros((rows, layer.weights.width), x.dtype) + x[:, :1]
            x, _ = layer.run(fresh, DeltaState(*state), keep, layer.weights, segments)
        return x

    def attention(x: mx.array) -> mx.array:
        for layer, ((keys, values, tail),) in attentions:
            own = mx.zeros((rows, layer.shape.width), x.dtype) + x[:, :1]
            queries, (tail,) = layer.prepare(own, [tail], [position], segments, layer.shape)
            x = layer.attend(queries, [Context(keys, values, tail, position, given.bound)], segments, own)
        return x

    if mixtures:
        feed_forward = {"router": routers, "experts' gate, up, SwiGLU": entering, "experts' down": leaving}
    else:
        feed_forward = {
            "gate, up, SwiGLU": lambda x: products(x, lambda layer: layer.mlp.enter),
            "down": lambda x: products(x, lambda layer: layer.mlp.leave),
        }
    chains = {
        "projections in": lambda x: products(x, lambda layer: layer.enter),
        "projections out": lambda x: products(x, lambda layer: layer.leave),
        **feed_forward,
        "Gated DeltaNet": recurrence,
        "attention": attention,
        "output matrix": model.logits,
    }
    return {name: _microseconds(mx.compile(chain), start) for name, chain in chains.items()}


def launches(model: FusedQwen35, sequence: Prefilled) -> dict[str, int]:
    """Nodes that launch something, in the graph of a plain step and of a verify pass of four rows."""
    counts = {}
    for name, rows in (("plain step", 1), ("verify of 4 rows", 4)):
        begin(sequence.trunk)
        with mock.patch.object(mx, "async_eval"):  # what was given to the device is no longer in the graph
            hidden = model.trunk(mx.broadcast_to(sequence.following, (rows,)), [Segment(sequence.trunk, rows)])
        token = mx.argmax(model.logits(hidden.normed), axis=-1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.dot"
            mx.export_to_dot(str(path), token)
            nodes = re.findall(r'label ="(\w+)", shape=rectangle', path.read_text(encoding="utf-8"))
        counts[name] = sum(node not in _VIEWS for node in nodes)
        mx.eval(token)
        commit(sequence.trunk, rows)
    return counts


def _microseconds(chain: Callable[[mx.array], mx.array], start: mx.array, repeats: int = 5) -> float:
    """Of one chain, several queued each on the one before: what the host needs for the first does not count."""

    def queued() -> None:
        x = start
        for _ in range(_QUEUED):
            x = start + chain(x)[:, :1] * 0
            mx.async_eval(x)
        mx.eval(x)

    queued()
    times = []
    for _ in range(repeats):
        mx.synchronize()
        started = time.perf_counter()
        queued()
        times.append((time.perf_counter() - started) / _QUEUED)
    return statistics.median(times) * 1e6
