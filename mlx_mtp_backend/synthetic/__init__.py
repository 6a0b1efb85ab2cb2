"""Writes small Qwen3.5 checkpoints in the released layout, for tests, benchmarks and the demo.

    python -m mlx_mtp_backend.synthetic OUT --kind pass-through --acceptance 0.85

Names, shard index, zero-centred norms and the un-transposed convolution are those of a released checkpoint. Two kinds:

* pass-through: the layers compute and then add nothing, so the logits depend on the last token alone: a chain of words
  (see synthetic/text.py). Its head predicts the same chain, except after a chosen share of tokens. It shows speed and
  alignment and gives readable output; it can prove nothing about caches, and it does not read its prompt.
* history: random weights, logits depend on every token before. It speaks nonsense, and a cache that is wrong anywhere
  changes it: exactness is proved on this kind.

Either with dense layers or, given a number of experts, with mixtures of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp_backend.families.layouts import Spelling
from mlx_mtp_backend.synthetic import text as synthetic_text
from mlx_mtp_backend.synthetic.weights import (
    Weights,
    head_shapes,
    make_pass_through,
    random_weights,
    respelled,
    trunk_weights,
)

HEAD_PLACES = ("shards", "side", "folder", "none")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One synthetic checkpoint.

    Attributes:
        kind: "pass-through" or "history".
        acceptance: pass-through only: the share of visited tokens after which the head is right.
        hidden: history only; a pass-through's hidden size is its vocabulary.
        wrapper: the multimodal wrapper's names and a vision tensor, as the released files have them.
        head: where the head's tensors go: in the shards, mtp.safetensors, mtp/, or nowhere.
        interval: every how many layers one has full attention.
        head_dim, linear_dim: size of attention and Gated DeltaNet heads; 256 and 128 are what the GPU kernels take.
        width: of the MLP, or of the shared expert; routed experts have a third of it.
        experts: routed experts of every layer, 0 for dense layers; a token goes to `top_k` of them.
        spelling: of the head's experts; the trunk's are fused, as released.
    """

    kind: str = "history"
    acceptance: float = 0.85
    layers: int = 4
    hidden: int = 64
    width: int = 96
    interval: int = 2
    head_dim: int = 16
    linear_dim: int = 16
    wrapper: bool = True
    tied: bool = False
    head: str = "shards"
    context: int = 4096
    seed: int = 0
    experts: int = 0
    top_k: int = 2
    spelling: Spelling = Spelling.FUSED

    def __post_init__(self) -> None:
        if self.kind not in ("pass-through", "history") or self.head not in HEAD_PLACES:
            raise ValueError("kind must be pass-through or history, head one of " + ", ".join(HEAD_PLACES))
        if not 0 <= self.acceptance <= 1:
            raise ValueError("acceptance must be in [0, 1]")
        if self.tied and self.kind == "pass-through":
            raise ValueError("a pass-through chain needs a head of its own; tied is for history")
        if self.experts and not 0 < self.top_k <= self.experts:
            raise ValueError("a token goes to at least one expert and at most all of them")


def write(folder: Path, recipe: Recipe) -> Path:
    """Write the checkpoint into `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = synthetic_text.build_tokenizer(704)
    vocab_size = -(-tokenizer.get_vocab_size() // 64) * 64
    text = _text_config(recipe, vocab_size)
    rng = np.random.default_rng(recipe.seed)
    trunk = trunk_weights(text, rng)
    head = {name: random_weights(name, shape, rng) for name, shape in head_shapes(text).items()}
    if recipe.kind == "pass-through":
        make_pass_through(trunk, head, tokenizer, recipe.acceptance, rng)
    if recipe.tied:
        del trunk["lm_head.weight"]
    if recipe.experts:
        head = respelled(head, recipe.spelling)
    _save(folder, recipe, text, trunk, head)
    synthetic_text.save_tokenizer(tokenizer, folder)
    return folder


def _text_config(recipe: Recipe, vocab_size: int) -> dict[str, Any]:
    mlp: dict[str, Any] = {"intermediate_size": recipe.width}
    if recipe.experts:
        mlp = {
            "num_experts": recipe.experts,
            "num_experts_per_tok": recipe.top_k,
            "moe_intermediate_size": recipe.width // 3,
            "shared_expert_intermediate_size": recipe.width,
        }
    return {
        "model_type": f"{_family(recipe)}_text",
        "vocab_size": vocab_size,
        "hidden_size": vocab_size if recipe.kind == "pass-through" else recipe.hidden,
        **mlp,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": recipe.head_dim,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": recipe.linear_dim,
        "linear_value_head_dim": recipe.linear_dim,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": recipe.interval,
        "max_position_embeddings": recipe.context,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": recipe.tied,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
    }


def _save(folder: Path, recipe: Recipe, text: dict[str, Any], trunk: Weights, head: Weights) -> None:
    renamed = {_released_name(name, recipe.wrapper): value for name, value in trunk.items()}
    names = sorted(renamed)
    half = len(names) // 2
    shards = [{name: renamed[name] for name in part} for part in (names[:half], names[half:])]
    prefixed = {f"mtp.{name}": value for name, value in head.items()}
    if recipe.head == "shards":
        shards.append(prefixed)
    elif recipe.head == "side":
        _write_tensors(folder / "mtp.safetensors", prefixed)
    elif recipe.head == "folder":
        (folder / "mtp").mkdir(exist_ok=True)
        _write_tensors(folder / "mtp" / "model.safetensors", head)
    if recipe.wrapper:
        shards[0]["model.visual.patch_embed.proj.weight"] = np.zeros((8, 3, 2, 2, 2))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(_config(recipe, text), indent=1))


def _released_name(name: str, wrapper: bool) -> str:
    return name.replace("model.", "model.language_model.", 1) if wrapper and name.startswith("model.") else name


def _write_tensors(file: Path, tensors: Weights) -> None:
    arrays = {name: mx.array(value.astype(np.float32)).astype(mx.bfloat16) for name, value in tensors.items()}
    mx.save_safetensors(str(file), arrays, metadata={"format": "pt"})


def _family(recipe: Recipe) -> str:
    return "qwen3_5_moe" if recipe.experts else "qwen3_5"


def _config(recipe: Recipe, text: dict[str, Any]) -> dict[str, Any]:
    family, name = _family(recipe), "Qwen3_5Moe" if recipe.experts else "Qwen3_5"
    if not recipe.wrapper:
        return text | {"model_type": family, "architectures": [f"{name}ForCausalLM"], "dtype": "bfloat16"}
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": family,
        "text_config": text | {"dtype": "bfloat16"},
        "tie_word_embeddings": recipe.tied,
        "vision_config": {"model_type": family, "depth": 0},
    }
