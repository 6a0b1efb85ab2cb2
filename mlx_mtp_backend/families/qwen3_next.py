"""Qwen3-Next as Qwen3.5 MoE: the same layers, the Gated DeltaNet's projections fused, the rotary settings elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models.qwen3_5 import TextModelArgs

from mlx_mtp_backend.errors import EngineError, ErrorReason

MODEL_TYPE = "qwen3_next"
_ROPE = ("rope_theta", "partial_rotary_factor")
_QKVZ, _BA = ".linear_attn.in_proj_qkvz.", ".linear_attn.in_proj_ba."


def as_qwen3_5(text: Mapping[str, Any]) -> dict[str, Any]:
    """A Qwen3-Next text config as Qwen3.5 would say it.

    Raises:
        EngineError: FAMILY_UNSUPPORTED for one that has dense layers among those of experts.
    """
    if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
        raise EngineError(ErrorReason.FAMILY_UNSUPPORTED, "Qwen3-Next with dense layers among those of experts")
    said = {"norm_topk_prob": False, **text}  # what each family leaves out means something else
    if not text.get("rope_parameters"):
        scaling = text.get("rope_scaling") or {"type": "default"}
        said["rope_parameters"] = {**scaling, **{key: text[key] for key in _ROPE if key in text}}
    return said


def split_projections(weights: Mapping[str, mx.array], args: TextModelArgs) -> dict[str, mx.array]:
    """The weights with each Gated DeltaNet's fused projections apart, as Qwen3.5 stores them; all else as it was.

    Rows are only put in another order, so that each keeps its bits, quantised or not. For every key head,
    `in_proj_qkvz` has its query, its key, the values and then the output gates of its value heads; `in_proj_ba`, b and
    then a of these.

    Raises:
        EngineError: WEIGHTS_MISMATCH.
    """
    keys, size, value_size = args.linear_num_key_heads, args.linear_key_head_dim, args.linear_value_head_dim
    group = args.linear_num_value_heads // keys  # value heads of a key head
    apart: dict[str, mx.array] = {}
    for name, weight in weights.items():
        if _QKVZ in name:
            q, k, v, z = _parts(name, weight, keys, [size, size, group * value_size, group * value_size])
            apart[name.replace("in_proj_qkvz", "in_proj_qkv")] = mx.concatenate([q, k, v])
            apart[name.replace("in_proj_qkvz", "in_proj_z")] = z
        elif _BA in name:
            b, a = _parts(name, weight, keys, [group, group])
            apart |= {name.replace("in_proj_ba", "in_proj_b"): b, name.replace("in_proj_ba", "in_proj_a"): a}
        else:
            apart[name] = weight
    return apart


def _parts(name: str, weight: mx.array, heads: int, rows: list[int]) -> list[mx.array]:
    """These many rows of every head, head after head: each [heads * rows, columns]."""
    if weight.ndim != 2 or weight.shape[0] != heads * sum(rows):
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, f"{name} has shape {list(weight.shape)}")
    ends = [sum(rows[: end + 1]) for end in range(len(rows) - 1)]
    parts = mx.split(weight.reshape(heads, sum(rows), -1), ends, axis=1)
    return [part.reshape(-1, weight.shape[1]) for part in parts]
