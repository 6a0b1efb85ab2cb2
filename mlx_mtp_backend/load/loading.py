"""From a folder to a model that may serve: inspected, loaded in slices, checked."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
from mtp_kernels.registry import Registry

from mlx_mtp_backend.api import LoadOptions, LoadProgress, Rule, WiringPolicy
from mlx_mtp_backend.checkpoint import CheckpointReport, MTPStatus, inspect_checkpoint
from mlx_mtp_backend.decode.depth import FIRST_GUESS, DepthController
from mlx_mtp_backend.decode.drafters import Drafter, HeadDrafter
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.families.base import Driver, Model
from mlx_mtp_backend.language.text import ModelText, load_text
from mlx_mtp_backend.load import numerics, wiring
from mlx_mtp_backend.load.calibration import DepthMemory, calibrate
from mlx_mtp_backend.load.device import memory_bytes
from mlx_mtp_backend.models import ENOUGH, LoadedModel, WiringReport

log = logging.getLogger(__name__)

# Share of the machine's memory that weights widened to fp32 may take on a CPU.
_WIDEN_LIMIT = 0.5
_MIN_WIRING_TOKENS = 16
# Time of a round under rejection over one that the sampler's kernel draws: three drafts, 27B shape, H100.
_REJECTION_COST = 1.4


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """A loaded model with what only the MLX thread may touch."""

    info: LoadedModel
    model: Model
    drafter: Drafter | None
    depths: DepthController
    options: LoadOptions


def load(
    name: str, path: Path, options: LoadOptions, registry: Registry, memory: DepthMemory
) -> Generator[LoadProgress, None, Resident]:
    """Load one checkpoint, a slice at a time; the model is the return value.

    Args:
        registry: decides which kernels run on this device.
        memory: what rounds cost before.

    Raises:
        EngineError: what inspection raises, FAMILY_UNSUPPORTED, STORAGE_UNSUPPORTED, WEIGHTS_MISMATCH, or HEAD_MISWIRED
            under WiringPolicy.REFUSE.
    """
    started = time.monotonic()
    report = inspect_checkpoint(path, options.head_path)
    _check_supported(report, options)
    text = load_text(path)
    dtype = _dtype(report)
    driver = cast(Driver, importlib.import_module(str(report.trunk_driver)))
    model = yield from driver.load(path, options, dtype)
    model, stock_because = yield from driver.accelerate(model, registry)
    if stock_because is not None:
        log.info("%s runs on stock operations: %s", name, stock_because)
    replay, reason = yield from numerics.replay_class(model)
    wired = yield from _check_wiring(name, model, text, options)
    rule = unseeded_rule(options, wired, drawn=model.sampler is not None)
    depths = DepthController(model.most_rows, first_guess(wired, rule))
    drafter = HeadDrafter(model) if model.has_head else None
    print_of_bits = numerics.fingerprint(model, dtype, options.prefill_chunk)
    adaptive = drafter if options.depth is None else None
    if adaptive is not None and not memory.recall(path, report.identity, print_of_bits, depths):
        yield from calibrate(model, adaptive, depths)
    info = LoadedModel(
        name=name,
        path=path,
        report=report,
        text=text,
        context_length=report.context_length or 0,
        vocab_size=model.vocab_size,
        has_head=model.has_head,
        depth=options.depth if model.has_head else 0,
        weight_bytes=model.weight_bytes,
        kernels=model.kernels,
        stock_because=stock_because,
        kernel_checks=registry.choices,
        load_seconds=time.monotonic() - started,
        replay=replay,
        replay_reason=reason,
        fingerprint=print_of_bits,
        unseeded_rule=rule,
        wiring=wired,
    )
    return Resident(info, model, drafter, depths, options)


def _check_supported(report: CheckpointReport, options: LoadOptions) -> None:
    if report.trunk_driver is None:
        raise EngineError(ErrorReason.FAMILY_UNSUPPORTED, f"no driver for model type {report.family!r}")
    if report.refusal is not None:
        raise EngineError(ErrorReason.STORAGE_UNSUPPORTED, report.refusal)
    if report.context_length is None:
        raise EngineError(ErrorReason.CHECKPOINT_UNREADABLE, "config.json gives no max_position_embeddings")
    if report.mtp.status is MTPStatus.INCOMPLETE:
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, f"the head has no usable {', '.join(report.mtp.missing[:4])}")
    if options.head_path is not None and report.mtp.status is not MTPStatus.PRESENT:
        raise EngineError(ErrorReason.HEAD_MISSING, f"{options.head_path.name} holds no head", field="head_path")


def _dtype(report: CheckpointReport) -> mx.Dtype | None:
    """A CPU computes in fp32 where that fits: half floats are converted there for every operation."""
    if mx.default_device().type == mx.gpu:
        return None
    return mx.float32 if 2 * report.weight_bytes < _WIDEN_LIMIT * memory_bytes() else None


def _check_wiring(
    name: str, model: Model, text: ModelText | None, options: LoadOptions
) -> Generator[LoadProgress, None, WiringReport | None]:
    if options.wiring is WiringPolicy.OFF or not model.has_head or text is None:
        return None
    tokens = text.encode(wiring.TEXT)
    if len(tokens) < _MIN_WIRING_TOKENS or max(tokens) >= model.vocab_size:
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, "the tokenizer does not belong to these weights")
    report = yield from wiring.check(model, tokens)
    if not report.healthy and options.wiring is WiringPolicy.REFUSE:
        raise EngineError(ErrorReason.HEAD_MISWIRED, report.summary())
    if report.warning:
        log.warning("%s: %s", name, report.warning)
    return report


def first_guess(report: WiringReport | None, rule: Rule) -> float:
    """Of a first draft's chance to be kept: less than usual where the check kept fewer."""
    if report is None or report.positions < ENOUGH:
        return FIRST_GUESS
    return min(FIRST_GUESS, report.rules[rule])


def unseeded_rule(options: LoadOptions, report: WiringReport | None, *, drawn: bool) -> Rule:
    """The rule that promises more tokens a second.

    Args:
        report: tells what share of drafts each rule keeps.
        drawn: whether the sampler's kernel draws, which coupling alone can use.
    """
    if options.unseeded_rule is not None:
        return options.unseeded_rule
    if report is None:
        return Rule.COUPLING if drawn else Rule.REJECTION
    rejection, coupling = (sum(report.rules[rule] ** n for n in range(4)) for rule in (Rule.REJECTION, Rule.COUPLING))
    return Rule.REJECTION if rejection >= coupling * (_REJECTION_COST if drawn else 1.0) else Rule.COUPLING
