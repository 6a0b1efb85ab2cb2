"""Loads Qwen3.5 checkpoints: the trunk through mlx-lm, the head from wherever it lies."""

from __future__ import annotations

import statistics
from collections.abc import Generator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.quantized import quantize
from mlx_lm.models.qwen3_5 import Model as StockModel
from mlx_lm.models.qwen3_5 import ModelArgs, TextModel, TextModelArgs
from mlx_lm.utils import load_model
from mtp_kernels.registry import Registry

from mlx_mtp_backend.api import LoadOptions, LoadProgress, Norm
from mlx_mtp_backend.checkpoint_files import CheckpointFiles, find_tensors, read_config
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.families.base import Model
from mlx_mtp_backend.families.layouts import head_name, qwen3_5_head
from mlx_mtp_backend.families.qwen3_5 import MTPHead, Qwen35
from mlx_mtp_backend.families.qwen3_5_fused import fused_or_stock
from mlx_mtp_backend.host import number

# Norms whose weights lie near 0 when stored zero-centred and near 1 when not; q and k norms wander from both.
_TELLING_NORMS = ("norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")


class TrunkOnly(StockModel):
    """mlx-lm's model, told which tensors are a head's; a head file without prefixes would otherwise fail the load."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        trunk = {name: value for name, value in weights.items() if head_name(name, bare=True) is None}
        sanitized: dict[str, mx.array] = super().sanitize(trunk)  # type: ignore[no-untyped-call]
        return sanitized


def load(path: Path, options: LoadOptions, dtype: mx.Dtype | None) -> Generator[LoadProgress, None, Qwen35]:
    """See families.base.Driver."""
    files = find_tensors(path, options.head_path)
    yield LoadProgress("open", 0.0)
    text, config = _open_trunk(path)
    head = _open_head(text.args, files, config, dtype) if files.head else None
    for module in (text, head):
        if module is not None and dtype is not None:
            module.set_dtype(dtype)
    slices = [text.model.embed_tokens, *text.model.layers, text.model.norm, *([head] if head else [])]
    if not text.args.tie_word_embeddings:
        slices.append(text.lm_head)
    for done, module in enumerate(slices, 1):
        mx.eval(module.parameters())
        yield LoadProgress("weights", done / len(slices))
    return Qwen35(text, head, options.seed_norm or Norm.POST, options.recycle_norm or Norm.POST)


def accelerate(model: Model, registry: Registry) -> Generator[LoadProgress, None, tuple[Model, str | None]]:
    """See families.base.Driver."""
    assert isinstance(model, Qwen35)
    return (yield from fused_or_stock(model, registry))


def _open_trunk(path: Path) -> tuple[TextModel, dict[str, object]]:
    read_config(path)  # refuses checkpoints that bring code, before mlx-lm sees them
    try:
        model, config = load_model(path, lazy=True, get_model_classes=lambda config: (TrunkOnly, ModelArgs))
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, f"{path.name}: {str(error)[:300]}") from error
    return model.language_model, config


def _open_head(
    args: TextModelArgs, files: CheckpointFiles, config: dict[str, object], dtype: mx.Dtype | None
) -> MTPHead:
    weights: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in files.head.values()}):
        loaded: Any = mx.load(str(files.head_folder / file))
        weights |= {short: loaded[t.name] for short, t in files.head.items() if t.file == file}
    if missing := sorted(qwen3_5_head(vars(args)).keys() - weights.keys()):
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, f"the head lacks {', '.join(missing)}")
    if stored_zero_centred(weights):
        weights = {name: _shifted(w, dtype) if w.ndim == 1 else w for name, w in weights.items()}
    head = MTPHead(args)
    quantization = config.get("quantization")
    if isinstance(quantization, dict) and any(name.endswith(".scales") for name in weights):
        quantize(
            head,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=lambda name, _: f"{name}.scales" in weights,
        )
    try:
        head.load_weights(list(weights.items()))
    except ValueError as error:
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, f"head: {str(error)[:300]}") from error
    head.eval()
    return head


def _shifted(weight: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """In fp32, as near 1 a half float drops most of what a weight near 0 says."""
    return (weight.astype(mx.float32) + 1).astype(dtype or weight.dtype)


def stored_zero_centred(weights: dict[str, mx.array]) -> bool:
    """Whether the head's norms still lack their 1.

    mlx-lm infers this for the trunk from an un-transposed convolution, which a head does not have; so look at the
    values themselves.
    """
    means = [number(mx.mean(weights[name].astype(mx.float32))) for name in _TELLING_NORMS]
    return statistics.median(means) < 0.5
