"""Loads Qwen3.5 and Qwen3-Next checkpoints: the trunk through mlx-lm, the head from wherever it lies."""

from __future__ import annotations

import statistics
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize
from mlx_lm.models.qwen3_5 import DecoderLayer, ModelArgs, TextModel, TextModelArgs
from mlx_lm.models.qwen3_5 import Model as StockModel
from mlx_lm.models.qwen3_next import Qwen3NextSparseMoeBlock
from mlx_lm.utils import infer_quant_config, load_model
from mtp_kernels.registry import Registry

from mlx_mtp_backend.api import LoadOptions, LoadProgress, Norm
from mlx_mtp_backend.checkpoint.files import CheckpointFiles, find_tensors, read_config, text_config
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.families.base import Model
from mlx_mtp_backend.families.layouts import head_name, qwen3_5_head, qwen3_5_moe_head
from mlx_mtp_backend.families.moe import half_float_experts, stacked
from mlx_mtp_backend.families.qwen3_5 import MTPHead, Qwen35
from mlx_mtp_backend.families.qwen3_5_fused import fused_or_stock
from mlx_mtp_backend.families.qwen3_next import MODEL_TYPE, as_qwen3_5, split_projections
from mlx_mtp_backend.host import number

# Norms whose weights lie near 0 when stored zero-centred and near 1 when not; q and k norms wander from both.
_TELLING_NORMS = ("norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")


# What mlx-lm and MLX raise over a config or weights that do not fit each other.
_MISFITS = (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError, FileNotFoundError)


class TrunkOnly(StockModel):
    """mlx-lm's model, told which tensors are a head's, as one without prefixes would otherwise fail the load, and how
    experts may be spelled."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        trunk = {name: value for name, value in weights.items() if head_name(name, bare=True) is None}
        args: TextModelArgs = self.language_model.args
        trunk = split_projections(trunk, args)
        if args.num_experts:
            trunk = stacked(trunk, args.num_experts)
        sanitized: dict[str, mx.array] = super().sanitize(trunk)  # type: ignore[no-untyped-call]
        return sanitized


def load(path: Path, options: LoadOptions, dtype: mx.Dtype | None) -> Generator[LoadProgress, None, Qwen35]:
    """See families.base.Driver."""
    files = find_tensors(path, options.head_path)
    yield LoadProgress("open", 0.0)
    text = _open_trunk(path)
    head = _open_head(text.args, files, dtype) if files.head else None
    for module in (text, head):
        if module is not None and dtype is not None:
            module.set_dtype(dtype)
    if mx.default_device().type == mx.cpu:
        _multipliable(path, text, head)
    slices = [*_slices(text), *(_layer_slices(head.layers[0]) if head else []), *([head] if head else [])]
    for done, part in enumerate(slices, 1):
        mx.eval(part.parameters())  # type: ignore[no-untyped-call]
        yield LoadProgress("weights", done / len(slices))
    return Qwen35(text, head, options.seed_norm or Norm.POST, options.recycle_norm or Norm.POST)


def accelerate(model: Model, registry: Registry) -> Generator[LoadProgress, None, tuple[Model, str | None]]:
    """See families.base.Driver."""
    assert isinstance(model, Qwen35)
    return (yield from fused_or_stock(model, registry))


def _slices(text: TextModel) -> Iterator[Module]:
    yield text.model.embed_tokens
    for layer in text.model.layers:
        yield from _layer_slices(layer)
    yield text.model.norm
    if not text.args.tie_word_embeddings:
        yield text.lm_head


def _layer_slices(layer: DecoderLayer) -> Iterator[Module]:
    """Parts before the whole: of a large model a layer's experts alone are gigabytes."""
    if isinstance(layer.mlp, Qwen3NextSparseMoeBlock):
        experts = layer.mlp.switch_mlp
        yield from (experts.gate_proj, experts.up_proj, experts.down_proj)
    yield layer


def _multipliable(path: Path, text: TextModel, head: MTPHead | None) -> None:
    """Sees to it that a CPU can multiply by the experts, which MLX cannot in half floats; a head's few are widened."""
    if half_float_experts(text):
        detail = "on a CPU, MLX multiplies by experts in fp32, for which the memory is too small, or quantised"
        raise EngineError(ErrorReason.FAMILY_UNSUPPORTED, f"{path.name}: {detail}; quantise them")
    for experts in half_float_experts(head) if head is not None else []:
        experts.set_dtype(mx.float32)


def _open_trunk(path: Path) -> TextModel:
    config = read_config(path)  # refuses checkpoints that bring code, before mlx-lm sees them
    try:
        other = config.get("model_type") == MODEL_TYPE
        changes = {"text_config": as_qwen3_5(text_config(config))} if other else {}
        model, _ = load_model(
            path, lazy=True, model_config=changes, get_model_classes=lambda config: (TrunkOnly, ModelArgs)
        )
    except _MISFITS as error:
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, f"{path.name}: {str(error)[:300]}") from error
    text: TextModel = model.language_model
    return text


def _open_head(args: TextModelArgs, files: CheckpointFiles, dtype: mx.Dtype | None) -> MTPHead:
    weights: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in files.head.values()}):
        loaded: Any = mx.load(str(files.head_folder / file))
        weights |= {short: loaded[t.name] for short, t in files.head.items() if t.file == file}
    wanted = (qwen3_5_moe_head if args.num_experts else qwen3_5_head)(vars(args), weights)
    if missing := sorted(wanted.keys() - weights.keys()):
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, f"the head lacks {', '.join(missing[:8])}")
    if args.num_experts:
        weights = stacked(weights, args.num_experts)
    if stored_zero_centred(weights):
        weights = {name: _shifted(w, dtype) if w.ndim == 1 else w for name, w in weights.items()}
    try:
        head = MTPHead(args)
        quantize(head, class_predicate=lambda name, module: _stored(name, module, weights))
        head.load_weights(list(weights.items()))
    except _MISFITS as error:
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, f"head: {str(error)[:300]}") from error
    head.eval()
    return head


def _stored(name: str, module: Module, weights: dict[str, mx.array]) -> dict[str, Any] | bool:
    """How a module's weights were quantised, read off their shapes: bits may differ from module to module."""
    quantised = hasattr(module, "to_quantized") and f"{name}.scales" in weights
    return infer_quant_config(name, module, weights) if quantised else False


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
