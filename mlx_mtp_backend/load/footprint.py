"""How much memory a token of context takes, from a config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ELEMENT_BYTES = 2  # caches hold 16-bit floats
MAX_NUMBER = 2**40  # no size in a config reaches this
_ATTENTION = ("full_attention", "attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, slots=True)
class CacheFootprint:
    """Bytes that one token of context takes in the caches, and the formula with its numbers.

    Layers whose state does not grow with the context, such as Gated DeltaNet, are left out; a sliding window counts as
    if it held everything, so that the figure is an upper bound.
    """

    bytes_per_token: int
    formula: str


def positive(config: Mapping[str, Any], key: str) -> int | None:
    """A whole number above 0 and of a sensible size, None for anything else."""
    value = config.get(key)
    return value if type(value) is int and 0 < value < MAX_NUMBER else None


def cache_footprint(text: Mapping[str, Any], head_layers: int) -> CacheFootprint | None:
    """The caches of the model that a text config describes; None where the config does not tell enough.

    Args:
        head_layers: attention layers of its multi-token-prediction head.
    """
    attention = _attention_layers(text)
    if attention is None:
        return None
    layers = attention + head_layers
    what = f"{attention} attention layers" + (f" and {head_layers} of the head" if head_layers else "")
    rank = positive(text, "kv_lora_rank")
    if rank is not None:  # multi-head latent attention keeps one compressed row
        width = rank + (positive(text, "qk_rope_head_dim") or 0)
        return CacheFootprint(layers * width * ELEMENT_BYTES, f"{what} x {width} latent x {ELEMENT_BYTES} bytes")
    heads = positive(text, "num_attention_heads")
    kv_heads = positive(text, "num_key_value_heads") or heads
    hidden = positive(text, "hidden_size")
    size = positive(text, "head_dim") or (hidden // heads if hidden and heads else None)
    if kv_heads is None or size is None:
        return None
    return CacheFootprint(
        layers * 2 * kv_heads * size * ELEMENT_BYTES,
        f"{what} x 2 (keys, values) x {kv_heads} heads x {size} x {ELEMENT_BYTES} bytes",
    )


def _attention_layers(text: Mapping[str, Any]) -> int | None:
    layers = positive(text, "num_hidden_layers")
    if layers is None:
        return None
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return sum(kind in _ATTENTION for kind in kinds if isinstance(kind, str))
    interval = positive(text, "full_attention_interval")
    return layers // interval if interval else layers
