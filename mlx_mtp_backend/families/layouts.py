"""Which tensors make up each family's head, by name and shape. No MLX here: inspection must stay light."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A head's tensors, after this prefix, in checkpoints that hold the trunk too.
HEAD_PREFIX = "mtp."
WRAPPERS = ("model.language_model.", "language_model.", "model.")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """What a family's driver needs to find.

    Attributes:
        driver: module that is a families.base.Driver, imported only when a model is loaded.
        tensors: from the text config, each tensor of the head (name without prefix) and its unquantised shape.
    """

    driver: str
    tensors: Callable[[dict[str, Any]], dict[str, Shape]]


def qwen3_5_head(config: dict[str, Any]) -> dict[str, Shape]:
    """Qwen3.5: fifteen tensors, a full-attention decoder layer between a fusing projection and a final norm."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    attention: dict[str, Shape] = {
        "q_proj": (2 * heads * size, hidden),
        "k_proj": (kv_heads * size, hidden),
        "v_proj": (kv_heads * size, hidden),
        "o_proj": (hidden, heads * size),
        "q_norm": (size,),
        "k_norm": (size,),
    }
    mlp: dict[str, Shape] = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    layer = "layers.0."
    return {
        "fc.weight": (hidden, 2 * hidden),
        "pre_fc_norm_embedding.weight": (hidden,),
        "pre_fc_norm_hidden.weight": (hidden,),
        "norm.weight": (hidden,),
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}post_attention_layernorm.weight": (hidden,),
        **{f"{layer}self_attn.{name}.weight": shape for name, shape in attention.items()},
        **{f"{layer}mlp.{name}.weight": shape for name, shape in mlp.items()},
    }


LAYOUTS = {"qwen3_5": HeadLayout("mlx_mtp_backend.families.qwen3_5_load", qwen3_5_head)}
# The text-only spelling of the same architecture.
LAYOUTS["qwen3_5_text"] = LAYOUTS["qwen3_5"]


def head_name(name: str, *, bare: bool) -> str | None:
    """A checkpoint's tensor name without wrapper and head prefix; None if it is not the head's.

    Args:
        bare: the file holds a head and nothing else, so names may lack the prefix.
    """
    for wrapper in WRAPPERS:
        if name.startswith(wrapper + HEAD_PREFIX):
            return name[len(wrapper + HEAD_PREFIX) :]
    if name.startswith(HEAD_PREFIX):
        return name[len(HEAD_PREFIX) :]
    return name if bare and name.startswith(("fc.", "layers.0.", "norm.", "pre_fc_norm")) else None
