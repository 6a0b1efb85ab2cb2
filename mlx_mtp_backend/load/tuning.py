"""Whether a model's step through the kernels beats stock operations on this Mac, and how its products are best cut up.

Everything is measured in the whole step of the real model: kernels that win alone often lose between others.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
from mtp_kernels import tuning as kernel_tuning
from mtp_kernels.few_row_matmul import variants
from mtp_kernels.few_row_matmul.variants import CANDIDATES, Variant
from mtp_kernels.launch import platform
from mtp_kernels.registry import Registry, device_name
from mtp_kernels.tuning import Seconds

from mlx_mtp_backend.api import LoadOptions
from mlx_mtp_backend.cache import LayerCache, abort, begin, commit
from mlx_mtp_backend.checkpoint import inspect_checkpoint
from mlx_mtp_backend.families.base import Driver, Model, Segment
from mlx_mtp_backend.families.qwen3_5 import Qwen35
from mlx_mtp_backend.families.qwen3_5_fused import fused, model_key, products
from mlx_mtp_backend.families.qwen3_5_fused_products import Unsupported

ROWS = (1, 2, 4)
"""Rows of the steps that trials time: plain decoding and verify passes."""
CHUNK = 256
"""Rows of a prompt's chunk, timed besides before anything is saved: no variant changes it, but the kernels do."""
CONTEXT = 128
REPEATS = 7


class TuningRefused(Exception):
    """Nothing can be tuned here; the text says why."""


@dataclass(frozen=True)
class Tuned:
    """What was measured, seconds of a step by its rows, and what came of it.

    Attributes:
        best: fastest variants by product, and their seconds measured again at the end; None where the kernels failed
            their checks.
        saved: whether the kernels won and the file was written.
        trials: models timed.
    """

    model: str
    device: str
    products: tuple[str, ...]
    stock: Seconds
    best: kernel_tuning.Result | None
    saved: bool
    trials: int


def tune(
    path: Path,
    kernel_checks: Path,
    *,
    head_path: Path | None = None,
    candidates: tuple[Variant, ...] = CANDIDATES,
    measure: Callable[[Model, Sequence[int]], Seconds] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Tuned:
    """Tries the candidates on the checkpoint in folder `path`; saves beside `kernel_checks`, and only what wins.

    Args:
        measure: seconds of a model's steps of so many rows; `step_seconds` when None.
        on_progress: called with what is being done.

    Raises:
        TuningRefused: no Metal, or a model that the kernels do not take.
        EngineError: a checkpoint that cannot be loaded.
    """
    if platform() != "metal":
        raise TuningRefused(f"this is {device_name()} without Metal: there is nothing to choose, nothing was measured")
    tell, timed = on_progress or (lambda _: None), measure or step_seconds
    tell("loading")
    stock = load(path, head_path)
    try:
        shapes = products(stock)
    except Unsupported as reason:
        raise TuningRefused(f"the kernels do not take this model: {reason}") from reason
    registry = Registry(kernel_checks)
    trials = 0

    def trial(chosen: Mapping[str, Variant], rows: Sequence[int] = ROWS) -> Seconds | None:
        nonlocal trials
        trials += 1
        tell(f"trial {trials} of at most {2 + len(shapes) * len(candidates)}")
        variants.use(chosen)
        model = fused(stock, registry)
        return timed(model, rows) if not model.falls_back else None

    try:
        best = kernel_tuning.search(shapes, candidates, trial)
        # Again, one after the other: the machine may have become hot, or busy, since the trial.
        again = trial(best.variants, (*ROWS, CHUNK)) if best else None
        stock_seconds = timed(stock, (*ROWS, CHUNK))
    finally:
        variants.use(registry.tuning.variants)
    best = kernel_tuning.Result(best.variants, again) if best and again else None
    won = best is not None and kernel_tuning.wins(best.seconds, stock_seconds)
    if best and won:
        registry.tuning.save(shapes, model_key(shapes), best, stock_seconds)
    return Tuned(path.resolve().name, device_name(), tuple(shapes), stock_seconds, best, won, trials)


def load(path: Path, head_path: Path | None = None) -> Qwen35:
    """The checkpoint on stock operations. Raises as `tune` does."""
    report = inspect_checkpoint(path, head_path)
    if report.trunk_driver is None:
        raise TuningRefused(f"no driver for model type {report.family!r}")
    driver = cast(Driver, importlib.import_module(report.trunk_driver))
    steps = driver.load(path, LoadOptions(head_path=head_path), None)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            if not isinstance(done.value, Qwen35):
                raise TuningRefused(f"the kernels do not take models of type {report.family!r}") from None
            return done.value


def step_seconds(model: Model, steps: Sequence[int]) -> dict[int, float]:
    """Median seconds of steps of so many rows, logits included, behind CONTEXT tokens."""
    caches = model.trunk_caches()
    begin(caches)
    model.trunk(_tokens(model, CONTEXT), [Segment(caches, CONTEXT)])
    commit(caches, CONTEXT)
    return {rows: statistics.median(_step(model, rows, caches)) for rows in steps}


def _step(model: Model, rows: int, caches: list[LayerCache]) -> list[float]:
    """Seconds of REPEATS steps that leave the caches as they were, after two that compile."""
    taken, tokens = [], _tokens(model, rows)
    for _ in range(2 + REPEATS):
        begin(caches)
        started = time.perf_counter()
        hidden = model.trunk(tokens, [Segment(caches, rows)])
        mx.eval(model.logits(hidden.normed[-8:]))
        taken.append(time.perf_counter() - started)
        abort(caches)
    return taken[2:]


def _tokens(model: Model, count: int) -> mx.array:
    return (mx.arange(count) % model.vocab_size).astype(mx.int32)
