"""What mlx-lm's converter makes of a checkpoint, and the head beside it, which the converter drops."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlx_mtp_backend.api import LoadOptions
from mlx_mtp_backend.families import qwen3_5_load


def convert(original: Path, folder: Path, *, bits: int = 4, group_size: int = 32, head: bool = True) -> Path:
    """A quantised checkpoint in `folder`, made if need be; routers in 8 bits by groups of 64, as mlx-lm has them."""
    folder.mkdir(exist_ok=True)
    model, config = load_model(original)
    model, config = quantize_model(model, config, group_size, bits)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(original / name, folder / name)
    if head:
        mx.save_safetensors(str(folder / "mtp.safetensors"), _head(original, bits, group_size))
    return folder


def _head(original: Path, bits: int, group_size: int) -> dict[str, mx.array]:
    steps = qwen3_5_load.load(original, LoadOptions(), mx.float32)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            head = done.value.mtp
            break

    def stored(path: str, module: nn.Module) -> Any:
        router = path.endswith(("mlp.gate", "shared_expert_gate"))
        return hasattr(module, "to_quantized") and ({"bits": 8, "group_size": 64} if router else True)

    nn.quantize(head, group_size, bits, class_predicate=stored)
    return {f"mtp.{name}": value for name, value in tree_flatten(head.parameters())}
