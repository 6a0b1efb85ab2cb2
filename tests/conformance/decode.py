"""Runs sequences through the real rounds, without the engine's thread around them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from collections.abc import Sequence as Many
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import numpy as np
from mtp_kernels.registry import Registry

from mlx_mtp_backend.api import LoadOptions, Rule, Sampling
from mlx_mtp_backend.cache import DeltaCache, KVCache, LayerCache
from mlx_mtp_backend.decode import rounds, sequence
from mlx_mtp_backend.decode.drafters import Drafter, HeadDrafter, ScriptedDrafter
from mlx_mtp_backend.decode.processors import Processors
from mlx_mtp_backend.decode.sequence import Sequence
from mlx_mtp_backend.families import qwen3_5_load
from mlx_mtp_backend.families.base import Model
from mlx_mtp_backend.families.qwen3_5_fused_cache import FusedKVCache

CHUNK = 16

Result = TypeVar("Result")


def result(steps: Generator[object, None, Result]) -> Result:
    """Run a sliced piece of work to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def load(path: Path) -> Model:
    """In fp32 on a CPU; on a GPU in bfloat16, through the kernels."""
    on_gpu = mx.default_device().type == mx.gpu
    stock = result(qwen3_5_load.load(path, LoadOptions(), mx.bfloat16 if on_gpu else mx.float32))
    model, stock_because = result(qwen3_5_load.accelerate(stock, Registry()))
    assert (stock_because is None) == on_gpu, stock_because
    return model


def start(
    model: Model, prompt: Many[int], new: int, *, sampling: Sampling, seed: int, rule: Rule, depth: int
) -> Sequence:
    limit = len(prompt) + new
    return sequence.start(model, tuple(prompt), sampling=sampling, seed=seed, rule=rule, depth=depth, limit=limit)


# The logits processors of a request whose prompt these tokens are.
Processing = Callable[[Many[int]], Processors | None]


def prefill(model: Model, one: Sequence, chunk: int = CHUNK) -> None:
    while one.prefilling:
        rounds.prefill_chunk(model, one, chunk)


def finish(model: Model, drafter: Drafter, running: list[Sequence]) -> None:
    """Rounds over all of them together until each has reached its limit."""
    while left := [one for one in running if len(one.tokens) < one.limit]:
        rounds.run_round(model, drafter, left)


def generate(
    model: Model,
    prompts: Many[Many[int]],
    new: int,
    drafter: Drafter,
    *,
    sampling: Sampling,
    depth: int,
    seed: int = 11,
    rule: Rule = Rule.COUPLING,
    processing: Processing = lambda _: None,
) -> list[Sequence]:
    running = [
        start(model, prompt, new, sampling=sampling, seed=seed + i, rule=rule, depth=depth)
        for i, prompt in enumerate(prompts)
    ]
    for one in running:
        one.processors = processing(one.tokens)
        prefill(model, one)
    finish(model, drafter, running)
    return running


def scripted(model: Model, plain: Many[Sequence], acceptance: float, head: bool = False) -> ScriptedDrafter:
    """A drafter that knows the plain continuation of each prompt."""
    known = {tuple(one.tokens[: one.prompt_length]): one.tokens for one in plain}

    def oracle(one: Sequence, position: int) -> int:
        tokens = known[tuple(one.tokens[: one.prompt_length])]
        return tokens[min(position, len(tokens) - 1)]

    return ScriptedDrafter(oracle, model.vocab_size, (acceptance,), HeadDrafter(model) if head else None)


def fork(one: Sequence, seed: int) -> Sequence:
    """A copy that shares the caches' arrays and may go another way."""
    twin = copy.copy(one)
    twin.tokens, twin.drafted, twin.accepted = list(one.tokens), [], []
    twin.trunk, twin.head = [_twin(c) for c in one.trunk], [_twin(c) for c in one.head]
    twin.seed = seed
    return twin


def _twin(kept: LayerCache) -> LayerCache:
    twin = copy.copy(kept)
    if isinstance(twin, FusedKVCache):
        twin.long = [copy.copy(long) for long in twin.long]
    return twin


def contents(caches: list[LayerCache]) -> dict[str, np.ndarray]:
    """What the caches hold, by name: only rows before the offset count."""
    held: dict[str, np.ndarray] = {}
    for layer, kept in enumerate(caches):
        if isinstance(kept, FusedKVCache):
            for place, array in enumerate(kept.rows(0, kept.offset)):
                held[f"{layer}.{place}"] = np.array(array.astype(mx.float32))
            held[f"{layer}.offset"] = np.array(kept.offset)
        elif isinstance(kept, KVCache):
            for kind, array in zip(("keys", "values"), kept.arrays, strict=False):
                held[f"{layer}.{kind}"] = np.array(array[:, :, : kept.offset])
            held[f"{layer}.offset"] = np.array(kept.offset)
        elif isinstance(kept, DeltaCache):
            for kind, state in (("conv", kept.conv), ("state", kept.state)):
                if state is not None:
                    held[f"{layer}.{kind}"] = np.array(state)
    return held


def differing(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> list[str]:
    """Names whose bits differ."""
    names = left.keys() | right.keys()
    return sorted(n for n in names if n not in left or n not in right or left[n].tobytes() != right[n].tobytes())
