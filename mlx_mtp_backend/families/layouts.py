"""Which tensors make up each family's head, by name and shape. No MLX here: inspection must stay light."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

# A head's tensors, after this prefix, in checkpoints that hold the trunk too.
HEAD_PREFIX = "mtp."
WRAPPERS = ("model.language_model.", "language_model.", "model.")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MAX_EXPERTS = 4096  # of a layer; the largest released layers have 512

Shape = tuple[int, ...]


class Spelling(enum.Enum):
    """How a checkpoint names a layer's experts, behind `mlp.`."""

    FUSED = "experts.gate_up_proj and experts.down_proj, all experts in one tensor, gate before up"
    EACH = "experts.{number}.{projection}.weight"
    STACKED = "switch_mlp.{projection}.weight, as mlx-lm keeps them"


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """What a family's driver needs to find.

    Attributes:
        driver: module that is a families.base.Driver, imported only when a model is loaded.
        sizes: keys of the text config, each a positive number, on which the head's shapes rest.
        tensors: from the text config and the names found, each tensor of the head (name without prefix) and its
            unquantised shape.
        experts: whether its layers are mixtures of experts.
    """

    driver: str
    sizes: tuple[str, ...]
    tensors: Callable[[dict[str, Any], Collection[str]], dict[str, Shape]]
    experts: bool = False


def qwen3_5_head(config: dict[str, Any], found: Collection[str] = ()) -> dict[str, Shape]:
    """Qwen3.5: fifteen tensors, a full-attention decoder layer between a fusing projection and a final norm."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    return _around_mlp(config, {f"{name}.weight": shape for name, shape in _mlp(hidden, width).items()})


def qwen3_5_moe_head(config: dict[str, Any], found: Collection[str] = ()) -> dict[str, Shape]:
    """Qwen3.5 MoE: the same around routed experts, in the spelling of the names `found`, and a shared expert."""
    hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    shared = _mlp(hidden, config["shared_expert_intermediate_size"])
    routed: dict[str, Shape]
    match spelling(found):
        case Spelling.FUSED:
            routed = {
                "experts.gate_up_proj": (experts, 2 * width, hidden),
                "experts.down_proj": (experts, hidden, width),
            }
        case Spelling.EACH:
            routed = {
                f"experts.{number}.{name}.weight": shape
                for number in range(experts)
                for name, shape in _mlp(hidden, width).items()
            }
        case Spelling.STACKED:
            routed = {f"switch_mlp.{n}.weight": (experts, *shape) for n, shape in _mlp(hidden, width).items()}
    return _around_mlp(
        config,
        {
            "gate.weight": (experts, hidden),
            **routed,
            **{f"shared_expert.{name}.weight": shape for name, shape in shared.items()},
            "shared_expert_gate.weight": (1, hidden),
        },
    )


def spelling(names: Collection[str]) -> Spelling:
    """How a head's experts are spelled, by a name of one; as released where there is none."""
    for name in names:
        if ".mlp.switch_mlp." in name:
            return Spelling.STACKED
        if re.search(r"\.mlp\.experts\.\d", name):
            return Spelling.EACH
    return Spelling.FUSED


def _mlp(hidden: int, width: int) -> dict[str, Shape]:
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}


def _around_mlp(config: dict[str, Any], mlp: dict[str, Shape]) -> dict[str, Shape]:
    hidden = config["hidden_size"]
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
    layer = "layers.0."
    return {
        "fc.weight": (hidden, 2 * hidden),
        "pre_fc_norm_embedding.weight": (hidden,),
        "pre_fc_norm_hidden.weight": (hidden,),
        "norm.weight": (hidden,),
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}post_attention_layernorm.weight": (hidden,),
        **{f"{layer}self_attn.{name}.weight": shape for name, shape in attention.items()},
        **{f"{layer}mlp.{name}": shape for name, shape in mlp.items()},
    }


_ATTENTION_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads")
_MOE_SIZES = ("moe_intermediate_size", "shared_expert_intermediate_size")
_QWEN3_5 = "mlx_mtp_backend.families.qwen3_5_load"
_DENSE = HeadLayout(_QWEN3_5, (*_ATTENTION_SIZES, "intermediate_size"), qwen3_5_head)
_MOE = HeadLayout(_QWEN3_5, (*_ATTENTION_SIZES, *_MOE_SIZES), qwen3_5_moe_head, experts=True)
# The second of each pair is the text-only spelling of the same architecture.
LAYOUTS = {"qwen3_5": _DENSE, "qwen3_5_text": _DENSE, "qwen3_5_moe": _MOE, "qwen3_5_moe_text": _MOE}
LAYOUTS["qwen3_next"] = _MOE  # of one shape with it: its trunk is stored otherwise, not its head


def layout_of(family: str, text: dict[str, Any]) -> HeadLayout | None:
    """The layout of a model type; None for one without a driver.

    A config of the dense type that counts experts is one of theirs, as it is for mlx-lm.
    """
    layout = LAYOUTS.get(family)
    return _MOE if layout is _DENSE and text.get("num_experts") else layout


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
