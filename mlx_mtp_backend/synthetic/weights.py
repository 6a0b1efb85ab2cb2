"""Weights of synthetic checkpoints, by name (see `synthetic`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mlx_mtp_backend.families.layouts import PROJECTIONS, Spelling, qwen3_5_head, qwen3_5_moe_head
from mlx_mtp_backend.synthetic import text as synthetic_text

Weights = dict[str, np.ndarray]


def trunk_weights(text: dict[str, Any], rng: np.random.Generator) -> Weights:
    """A random trunk of this text config."""
    hidden, vocab_size = text["hidden_size"], text["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab_size, hidden),
    }
    for layer in range(text["num_hidden_layers"]):
        full = (layer + 1) % text["full_attention_interval"] == 0
        parts = _attention_shapes(text) if full else _delta_shapes(text)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return {name: random_weights(name, shape, rng) for name, shape in shapes.items()}


def _attention_shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix("layers.0."): shape
        for name, shape in head_shapes(text).items()
        if name.startswith("layers.0.")
    }


def _delta_shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads = text["hidden_size"], text["linear_num_value_heads"]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = heads * text["linear_value_head_dim"]
    rest = {name: shape for name, shape in _attention_shapes(text).items() if not name.startswith("self_attn.")}
    return rest | {
        "linear_attn.in_proj_qkv.weight": (2 * keys + values, hidden),
        "linear_attn.in_proj_z.weight": (values, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.conv1d.weight": (2 * keys + values, 1, text["linear_conv_kernel_dim"]),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.A_log": (heads,),
        "linear_attn.norm.weight": (text["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def respelled(head: Weights, spelling: Spelling) -> Weights:
    """A head with fused experts, with them in another spelling."""
    if spelling is Spelling.FUSED:
        return head
    plain, layer = dict(head), "layers.0.mlp."
    gate, up = np.split(plain.pop(f"{layer}experts.gate_up_proj"), 2, axis=1)
    for name, stack in zip(PROJECTIONS, (gate, up, plain.pop(f"{layer}experts.down_proj")), strict=True):
        if spelling is Spelling.STACKED:
            plain[f"{layer}switch_mlp.{name}.weight"] = stack
        else:
            plain |= {f"{layer}experts.{number}.{name}.weight": one for number, one in enumerate(stack)}
    return plain


def head_shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the head's tensors, as released."""
    return (qwen3_5_moe_head if "num_experts" in text else qwen3_5_head)(text)


def random_weights(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """One tensor, by its name of a scale that keeps logits lively and the state's memory long."""
    noise: np.ndarray = rng.standard_normal(shape)
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.1 * noise
    if name.endswith("dt_bias"):
        return noise - 2  # slow decay: the state remembers hundreds of tokens
    if name.endswith("A_log"):
        return 0.5 * noise - 1
    if len(shape) == 1:
        return 0.1 * noise  # every other vector is a zero-centred norm
    if name.endswith("conv1d.weight"):
        return noise
    gain = {"embed_tokens.weight": 1.0, "lm_head.weight": 2.5 / np.sqrt(shape[-1])}
    return noise * float(next((g for end, g in gain.items() if name.endswith(end)), 1.2 / np.sqrt(shape[-1])))


def make_pass_through(
    trunk: Weights, head: Weights, tokenizer: Tokenizer, acceptance: float, rng: np.random.Generator
) -> None:
    """Embed tokens as unit vectors, let every layer add nothing, and read the chain's row off by the output matrix."""
    vocab_size = len(trunk["lm_head.weight"])
    silent = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")
    for weights in (trunk, head):
        for name, value in weights.items():
            is_norm = value.ndim == 1 and "linear_attn" not in name
            if is_norm or name.endswith(silent):
                weights[name] = np.zeros_like(value)
    chain = synthetic_text.chain_logits(tokenizer, vocab_size)
    trunk["model.embed_tokens.weight"] = np.eye(vocab_size)
    trunk["lm_head.weight"] = chain.T / np.sqrt(vocab_size)  # a normed unit vector has length sqrt(V)
    mistaken = _mistaken_tokens(tokenizer, chain, 1 - acceptance, rng)
    belief = np.eye(vocab_size)
    belief[:, mistaken] = np.eye(vocab_size)[:, np.roll(mistaken, 1)]
    head["fc.weight"] = np.concatenate([belief, np.zeros_like(belief)], axis=1)


def _mistaken_tokens(tokenizer: Tokenizer, chain: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Tokens whose visits sum to about `share`; the head takes each of them for another one of them."""
    weight = synthetic_text.visits(chain, synthetic_text.start_token(tokenizer))
    order = rng.permutation(np.flatnonzero(weight > 0))
    chosen: list[int] = []
    total = 0.0
    for token in order:
        if total + weight[token] <= share:
            chosen.append(int(token))
            total += weight[token]
    return np.array(chosen if len(chosen) > 1 else [], dtype=int)
