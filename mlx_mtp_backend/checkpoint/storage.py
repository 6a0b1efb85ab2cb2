"""How a checkpoint's weights are stored, and whether the engine reads them so.

What the config says is a label. What counts are names, dtypes and shapes in the files' headers: some conversions still
carry their original's label, and FP8 weights may have none. Read are floats, what MLX quantises (affine, mxfp4, mxfp8
and nvfp4: packed into 32 bits, scales beside it), and of a trunk what AutoAWQ packs 4 bits wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_mtp_backend.checkpoint.safetensors_header import TensorInfo
from mlx_mtp_backend.load.footprint import positive

ADVICE = (
    "convert the unquantised original with mlx_lm.convert, or take an MLX quantisation of it, "
    "and for a head that it lacks name the unquantised original by head_path"
)
MAX_NAME = 80
_FLOATS = ("BF16", "F16", "F32")
# mlx-lm drops them before it looks at anything.
_VISION = ("vision_tower", "model.visual")
# What other tools keep beside a weight: scales, zero points, shapes, permutations.
_BESIDE = (".weight_", ".weight.")
_BESIDE_ENDS = ("_scale", "_scale_inv", ".g_idx", ".SCB")
_AWQ_PARTS = (".qweight", ".qzeros")
_AWQ_MODES = ("awq", "gptq")  # mlx-lm unpacks both labels alike, as AutoAWQ packs
_AWQ_VALUES = 8  # of 4 bits in one I32


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are stored by the config's word; `source` is the key that says so."""

    mode: str
    bits: int | None
    group_size: int | None
    source: str


def quantization(config: Mapping[str, Any], text: Mapping[str, Any]) -> Quantization | None:
    """What a config says of how weights are stored, MLX's own key before that of other tools.

    Args:
        text: the language model's part of it.
    """
    for source in ("quantization", "quantization_config"):
        entry = config.get(source) or text.get(source)
        if isinstance(entry, dict):
            mode = str(entry.get("mode") or entry.get("quant_method") or "affine")
            kind = entry.get("format")  # compressed-tensors is a container of several
            label = f"{mode} {kind}" if isinstance(kind, str) and kind else mode
            return Quantization(label, positive(entry, "bits"), positive(entry, "group_size"), source)
    return None


def unread(tensors: Mapping[str, TensorInfo], stored: Quantization | None = None) -> list[TensorInfo]:
    """Tensors that the engine does not read, those that hold weights first.

    Args:
        tensors: of a trunk, or of a head, by name.
        stored: what the config says of a trunk. A head that AutoAWQ packed is not read.
    """
    awq = stored is not None and stored.mode in _AWQ_MODES
    found = [tensor for name, tensor in tensors.items() if not _is_read(name, tensor, tensors, awq=awq)]
    return sorted(found, key=lambda tensor: (tensor.dtype in _FLOATS, tensor.name))


def refusal(found: Iterable[TensorInfo], stored: Quantization | None) -> str | None:
    """Why a trunk with these unread tensors cannot be loaded, and what to do; None where there are none."""
    unread_ones = list(found)
    if not unread_ones:
        return None
    first = unread_ones[0]
    said = f"{stored.mode[:MAX_NAME]} by config.json, " if stored else ""
    example = f"{len(unread_ones)} tensors such as {first.name[:MAX_NAME]} ({first.dtype})"
    return f"its weights are stored in a way that the engine does not read ({said}{example}); {ADVICE}"


def _is_read(name: str, tensor: TensorInfo, tensors: Mapping[str, TensorInfo], *, awq: bool) -> bool:
    if tensor.name.startswith(_VISION):
        return True
    if tensor.dtype.startswith(("F8", "F4")):
        return False
    if name.endswith(_AWQ_PARTS):
        return awq and _packed_as_awq(name, tensors)
    if name.endswith(".weight"):
        packed = tensor.dtype == "U32" and f"{name.removesuffix('weight')}scales" in tensors
        return tensor.dtype in _FLOATS or packed
    return not name.endswith(_BESIDE_ENDS) and not any(part in name for part in _BESIDE)


def _packed_as_awq(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """AutoAWQ packs the outputs, GPTQ the inputs: against the scales [groups, outputs] a row is an eighth as long."""
    scales = tensors.get(f"{name.rpartition('.')[0]}.scales")
    packed = tensors[name].shape
    return scales is not None and len(packed) == 2 == len(scales.shape) and packed[1] * _AWQ_VALUES == scales.shape[1]
