"""Models of the true Qwen3.5 shapes with random 4-bit weights, made on the device.

No projection is skipped. Packed weights are random bits; scales make every projection keep its input's size, so that
activations stay in range through all layers; embeddings are of size one, so that greedy tokens depend on the context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3_5 import TextModel, TextModelArgs

from mlx_mtp_backend.families.qwen3_5 import MTPHead, Qwen35

GROUP_SIZE, BITS = 64, 4
_ROPE = {"type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25}


@dataclass(frozen=True)
class Shape:
    """A released model's dimensions; where it has experts, `intermediate` is the width of one."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    value_heads: int
    tied: bool
    experts: int = 0
    top: int = 0
    shared_intermediate: int = 0

    def args(self) -> TextModelArgs:
        """mlx-lm's arguments for this shape."""
        return TextModelArgs(
            model_type="qwen3_5_text",
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=256,
            vocab_size=248_320,
            linear_num_value_heads=self.value_heads,
            linear_num_key_heads=16,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            tie_word_embeddings=self.tied,
            num_experts=self.experts,
            num_experts_per_tok=self.top,
            moe_intermediate_size=self.intermediate,
            shared_expert_intermediate_size=self.shared_intermediate,
            rope_parameters=dict(_ROPE),
        )


SHAPES = {
    "27b": Shape("27b", 5120, 17408, 64, 24, 4, 48, tied=False),
    "4b": Shape("4b", 2560, 9216, 32, 16, 4, 32, tied=True),
    "35b-a3b": Shape("35b-a3b", 2048, 512, 40, 16, 2, 32, tied=False, experts=256, top=8, shared_intermediate=512),
}


def build(shape: Shape, *, head: bool = True, seed: int = 0) -> Qwen35:
    """A model with a head (unless told otherwise), evaluated."""
    mx.random.seed(seed)
    args = shape.args()
    text = TextModel(args)
    mtp = MTPHead(args) if head else None
    for module in (text, mtp):
        if module is not None:
            _fill(module, text.quant_predicate)
    return Qwen35(text, mtp)


def sharpen(model: Qwen35, factor: float) -> Qwen35:
    """Multiplies the logits, which have a standard deviation of one, so that laws are as peaked as those of text."""
    if model.text.args.tie_word_embeddings:
        raise ValueError("the output matrix is also the embedding")
    output = model.text.lm_head
    output.scales, output.biases = output.scales * factor, output.biases * factor
    mx.eval(output.parameters())
    return model


def weight_bytes(model: Qwen35, *, head: bool = False) -> int:
    """Bytes that one trunk step with logits must read: everything but the embedding rows it does not look up, and
    of experts those of one row."""
    arrays = dict(tree_flatten(model.text.parameters()))
    args = model.text.args
    if not args.tie_word_embeddings:
        arrays = {name: array for name, array in arrays.items() if "embed_tokens" not in name}
    share = args.num_experts_per_tok / args.num_experts if args.num_experts else 0.0
    total = sum(round(array.nbytes * (share if "switch_mlp" in name else 1)) for name, array in arrays.items())
    if head and model.mtp is not None:
        total += sum(array.nbytes for _, array in tree_flatten(model.mtp.parameters()))
    return total


def _fill(module: nn.Module, predicate: Callable[[str, nn.Module], Any] | None) -> None:
    module.set_dtype(mx.bfloat16)
    nn.quantize(module, group_size=GROUP_SIZE, bits=BITS, class_predicate=predicate and _quantisable(predicate))
    for _, part in module.named_modules():
        if "scales" not in part:
            continue
        inputs, levels = part.weight.shape[-1] * 32 // part.bits, 1 << part.bits
        # Two halves: randint draws through float32, which leaves the low bits of a wider range empty.
        high, low = (mx.random.randint(0, 1 << 16, part.weight.shape).astype(mx.uint32) for _ in range(2))
        part.weight = high * 65_536 + low
        middle, deviation = (levels - 1) / 2, ((levels**2 - 1) / 12) ** 0.5  # of the packed values
        spread = mx.random.uniform(0.8, 1.2, part.scales.shape)
        size = 1.0 if isinstance(part, nn.QuantizedEmbedding) else inputs**-0.5
        part.scales = (spread * size / deviation).astype(mx.bfloat16)
        part.biases = (-middle * part.scales.astype(mx.float32)).astype(mx.bfloat16)
        mx.eval(part.parameters())
    mx.eval(module.parameters())


def _quantisable(predicate: Callable[[str, nn.Module], Any]) -> Callable[[str, nn.Module], Any]:
    return lambda path, part: hasattr(part, "to_quantized") and predicate(path, part)
