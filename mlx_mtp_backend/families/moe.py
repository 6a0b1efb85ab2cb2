"""Mixtures of experts as Qwen wires them: their tensors in one spelling, and passes over rows of several sequences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.qwen3_next import Qwen3NextSparseMoeBlock
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.families.base import Segment

Weights = Mapping[str, mx.array]

# A sequence with more rows than this in a pass is being prefilled, or its head catches up: no verify pass has as many.
_MANY_ROWS = 32
_FUSED = ".mlp.experts.gate_up_proj"
_FUSED_DOWN = ".mlp.experts.down_proj"
_EACH = re.compile(r"(.+\.mlp\.)experts\.(0|[1-9]\d{0,5})\.((?:gate|up|down)_proj\.(?:weight|scales|biases))")


def stacked(weights: Weights, count: int) -> dict[str, mx.array]:
    """The weights with every layer's experts under the names that mlx-lm has for them, whatever their spelling.

    Args:
        weights: of a trunk or a head.
        count: experts that each layer must have.

    Returns:
        `switch_mlp.{gate,up,down}_proj.weight` [count, rows, columns] in place of fused tensors or one for each
        expert; all else as it was. Nothing is evaluated.

    Raises:
        EngineError: WEIGHTS_MISMATCH for an expert that is missing or one too many, or of another shape.
    """
    plain: dict[str, mx.array] = {}
    each: dict[str, dict[int, mx.array]] = {}
    for name, weight in weights.items():
        if name.endswith(_FUSED):
            plain |= _halves(name, weight)
        elif name.endswith(_FUSED_DOWN):
            plain[f"{name.removesuffix(_FUSED_DOWN)}.mlp.switch_mlp.down_proj.weight"] = weight
        elif match := _EACH.fullmatch(name):
            each.setdefault(f"{match[1]}switch_mlp.{match[3]}", {})[int(match[2])] = weight
        else:
            plain[name] = weight
    return plain | {name: _stack(name, experts, count) for name, experts in each.items()}


def _halves(name: str, fused: mx.array) -> dict[str, mx.array]:
    if fused.ndim != 3 or fused.shape[1] % 2:
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, f"{name} has shape {list(fused.shape)}")
    prefix, half = f"{name.removesuffix(_FUSED)}.mlp.switch_mlp", fused.shape[1] // 2
    gate, up = fused[:, :half], fused[:, half:]
    # Views would be copied by every pass of kernels that want their inputs in one piece.
    return {f"{prefix}.gate_proj.weight": mx.contiguous(gate), f"{prefix}.up_proj.weight": mx.contiguous(up)}


def _stack(name: str, experts: dict[int, mx.array], count: int) -> mx.array:
    if missing := sorted(set(range(count)) - experts.keys()):
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, f"{name} lacks expert {missing[0]} of {count}")
    if surplus := sorted(experts.keys() - set(range(count))):
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, f"{name} has expert {surplus[0]}, of {count}")
    if len(shapes := {weight.shape for weight in experts.values()}) > 1:
        raise EngineError(ErrorReason.WEIGHTS_MISMATCH, f"{name}: experts of shapes {sorted(shapes)[:2]}")
    return mx.stack([experts[number] for number in range(count)])


def moe_rows(block: Qwen3NextSparseMoeBlock, x: mx.array, segments: Sequence[Segment]) -> mx.array:
    """Each row through its experts, by weights that sum to one, and through the shared expert behind its own gate.

    A row's result rests on that row alone: mlx-lm's sorting of many rows by expert, for which a GPU has other products,
    is left to passes that have a sequence to themselves.

    Args:
        x: [1, N, hidden].
    """
    gates = mx.softmax(block.gate(x), axis=-1, precise=True)
    chosen = mx.argpartition(gates, kth=-block.top_k, axis=-1)[..., -block.top_k :]
    scores = mx.take_along_axis(gates, chosen, axis=-1)
    if block.norm_topk_prob:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    many = max(segment.rows for segment in segments) > _MANY_ROWS
    routed = block.switch_mlp(x, chosen) if many else _unsorted(block.switch_mlp, x, chosen)
    shared = mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    mixed = (routed * scores[..., None]).sum(axis=-2) + shared
    return mixed.astype(x.dtype)


def _unsorted(experts: SwitchGLU, x: mx.array, chosen: mx.array) -> mx.array:
    """[1, N, hidden] by experts [1, N, k] to [1, N, k, hidden]."""
    x = mx.expand_dims(x, (-2, -3))
    activated = experts.activation(experts.up_proj(x, chosen), experts.gate_proj(x, chosen))
    output: mx.array = experts.down_proj(activated, chosen).squeeze(-2)
    return output


def half_float_experts(module: Module) -> list[SwitchLinear]:
    """Experts that are neither quantised nor in fp32, which MLX multiplies on a GPU only."""
    parts: list[tuple[str, Module]] = module.named_modules()  # type: ignore[no-untyped-call]
    return [part for _, part in parts if isinstance(part, SwitchLinear) and part.weight.dtype != mx.float32]
