"""Checkpoints whose linear layers are stored as other tools than MLX store them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

Tensors = dict[str, mx.array]
Store = Callable[[mx.array], Tensors]  # from a weight [outputs, inputs] to what is kept of it, by ends of names
GROUP = 32
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where AutoAWQ puts eight values of 4 bits


def stored(
    original: Path, folder: Path, store: Store, config: dict[str, Any] | None = None, *, head: bool = False
) -> Path:
    """A copy with the trunk's projections, and the head's if asked, stored anew; bytes that `store` gives are FP8.

    Args:
        config: its `quantization_config`.
    """
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(original / name, folder / name)
    settings = json.loads((original / "config.json").read_text())
    label = {} if config is None else {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(settings | label))
    tensors: Tensors = {}
    for file in sorted(original.glob("model-*.safetensors")):
        for name, value in mx.load(str(file)).items():
            if name.endswith("_proj.weight") and (head or not name.startswith("mtp.")):
                stem = name.removesuffix("weight")
                tensors |= {stem + end: part for end, part in store(value.astype(mx.float32)).items()}
            else:
                tensors[name] = value
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    relabel(folder / "model.safetensors")
    return folder


def relabel(file: Path, dtype: str = "F8_E4M3") -> None:
    """Has the header call bytes FP8, which MLX writes as what they are to it."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, tensor in header.items():
        if name != "__metadata__" and tensor["dtype"] == "U8":
            tensor["dtype"] = dtype
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def awq(weight: mx.array) -> Tensors:
    """As AutoAWQ packs: 4 bits in groups along the inputs, eight outputs to a number, zero points beside."""
    outputs, inputs = weight.shape
    groups = weight.reshape(outputs, inputs // GROUP, GROUP)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scales = mx.maximum((high - low) / 15, 1e-6)
    zeros = mx.clip(mx.round(-low / scales), 0, 15)
    values = mx.clip(mx.round(groups / scales + zeros), 0, 15).reshape(outputs, inputs)
    return {
        "qweight": _eight_in_one(values.T),
        "qzeros": _eight_in_one(zeros[..., 0].T),
        "scales": scales[..., 0].T.astype(mx.float16),
    }


def _eight_in_one(values: mx.array) -> mx.array:
    rows, columns = values.shape
    eights = values.astype(mx.uint32).reshape(rows, columns // 8, 8)
    return sum(eights[..., place] << (4 * turn) for place, turn in enumerate(AWQ_ORDER)).astype(mx.int32)


def _ones(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return mx.ones(shape, dtype)


def _gptq(w: mx.array) -> Tensors:
    (outputs, inputs), groups = w.shape, w.shape[1] // GROUP
    return {
        "qweight": _ones(inputs // 8, outputs, dtype=mx.int32),
        "qzeros": _ones(groups, outputs // 8, dtype=mx.int32),
        "scales": _ones(groups, outputs, dtype=mx.float16),
    }


def _packed(w: mx.array, bits: int, dtype: mx.Dtype) -> mx.array:
    return _ones(w.shape[0], w.shape[1] * bits // (8 * dtype.size), dtype=dtype)


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def fp8(weight: mx.array) -> Tensors:
    """As released FP8 checkpoints: e4m3, and a scale for each block of 128 x 128."""
    return {"weight": mx.to_fp8(weight), "weight_scale_inv": _ones(*(-(-side // 128) for side in weight.shape))}


# What the engine does not read: how it is stored, the config's word, and the end of a name that shows it.
FOREIGN: dict[str, tuple[Store, dict[str, Any] | None, str]] = {
    "fp8": (fp8, FP8_CONFIG, ".weight (F8_E4M3)"),
    "fp8 without a label or scales": (lambda w: {"weight": mx.to_fp8(w)}, None, ".weight (F8_E4M3)"),
    "compressed-tensors float-quantized": (
        lambda w: {"weight": mx.to_fp8(w), "weight_scale": _ones(w.shape[0], 1), "input_scale": _ones(1)},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        ".weight (F8_E4M3)",
    ),
    "compressed-tensors pack-quantized": (
        lambda w: {
            "weight_packed": _packed(w, 4, mx.int32),
            "weight_scale": _ones(w.shape[0], w.shape[1] // GROUP),
            "weight_shape": mx.array(w.shape),
        },
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        ".weight_packed (I32)",
    ),
    "modelopt": (
        lambda w: {
            "weight": _packed(w, 4, mx.uint8),
            "weight_scale": _ones(w.shape[0], w.shape[1] // 16, dtype=mx.uint8),
            "weight_scale_2": _ones(1),
        },
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        ".weight (F8_E4M3)",
    ),
    "gptq": (
        lambda w: _gptq(w) | {"g_idx": mx.arange(w.shape[1]) // GROUP},
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP},
        ".g_idx (I32)",
    ),
    "gptq without an order": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}, ".qweight (I32)"),
    "awq of 8 bits": (
        lambda w: awq(w) | {"qweight": _ones(w.shape[1], w.shape[0] // 4, dtype=mx.int32)},
        AWQ_CONFIG | {"bits": 8},
        ".qweight (I32)",
    ),
    "awq without a label": (awq, None, ".qweight (I32)"),
    "bitsandbytes": (
        lambda w: {"weight": w.astype(mx.int8), "SCB": _ones(w.shape[0], dtype=mx.float32)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        ".weight (I8)",
    ),
}
