"""Rewrites a synthetic mixture of experts as Qwen3-Next stores one: the same numbers by other names and orders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp_backend.families.layouts import PROJECTIONS, Spelling
from mlx_mtp_backend.synthetic import Recipe, write

Tensors = dict[str, np.ndarray]


def write_next(folder: Path, recipe: Recipe) -> Path:
    """A checkpoint of `recipe`, whose experts are one by one and whose wrapper is left out."""
    plain = {f: getattr(recipe, f) for f in recipe.__dataclass_fields__} | {"wrapper": False, "spelling": Spelling.EACH}
    source = write(folder / "source", Recipe(**plain))
    config = json.loads((source / "config.json").read_text())
    tensors: Tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= {name: np.array(value.astype(mx.float32)) for name, value in mx.load(str(file)).items()}
    target = folder / "next"
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, target / name)
    shutil.rmtree(source)
    (target / "config.json").write_text(json.dumps(_config(config)))
    fused = {name: mx.array(value).astype(mx.bfloat16) for name, value in _fused(tensors, config).items()}
    mx.save_safetensors(str(target / "model.safetensors"), fused)
    return target


def _config(config: dict[str, Any]) -> dict[str, Any]:
    """Flat, the rotary settings beside the rest, and no word of a head."""
    rope = config.pop("rope_parameters")
    config.pop("mtp_num_hidden_layers")
    return config | {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "intermediate_size": 96,
    }


def _fused(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    size, value_size = config["linear_key_head_dim"], config["linear_value_head_dim"]
    group, out = values // keys, dict(tensors)
    for layer in range(config["num_hidden_layers"]):
        mlp, delta = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.linear_attn.in_proj_"
        gate, up = np.split(out.pop(f"{mlp}experts.gate_up_proj"), 2, axis=1)
        for name, stack in zip(PROJECTIONS, (gate, up, out.pop(f"{mlp}experts.down_proj")), strict=True):
            out |= {f"{mlp}experts.{number}.{name}.weight": one for number, one in enumerate(stack)}
        if f"{delta}qkv.weight" not in out:
            continue
        q, k, v = np.split(out.pop(f"{delta}qkv.weight"), [keys * size, 2 * keys * size])
        z, b, a = (out.pop(f"{delta}{part}.weight") for part in ("z", "b", "a"))
        rows: list[np.ndarray] = []
        for head in range(keys):  # its query, its key, its values, its output gates
            own = slice(head * size, (head + 1) * size)
            theirs = slice(head * group * value_size, (head + 1) * group * value_size)
            rows += [q[own], k[own], v[theirs], z[theirs]]
        out[f"{delta}qkvz.weight"] = np.concatenate(rows)
        pairs = [part[head * group : (head + 1) * group] for head in range(keys) for part in (b, a)]
        out[f"{delta}ba.weight"] = np.concatenate(pairs)
    return out
