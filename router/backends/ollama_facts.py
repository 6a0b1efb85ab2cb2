"""What an Ollama server says of a model, as facts with evidence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ollama import ShowResponse

from router.domain import Capability, CapabilityFact, HeadFacts, ModelFacts, ModelFormat
from router.gguf_header import gguf_cache_bytes

MAX_TEXT = 400  # characters of evidence

Facts = dict[Capability, CapabilityFact]


def read_show(tag: str, shown: ShowResponse, size_bytes: int | None) -> ModelFacts:
    """Facts out of an answer of /api/show.

    Args:
        size_bytes: of the model's files, from the list of tags.
    """
    info: Mapping[str, Any] = shown.modelinfo or {}
    architecture = _architecture(shown, info)
    listed = frozenset(shown.capabilities or ())
    context = info.get(f"{architecture}.context_length")
    quantization = shown.details.quantization_level if shown.details else None
    return ModelFacts(
        format=ModelFormat.OLLAMA,
        architecture=architecture[:MAX_TEXT],
        quantization=(quantization or "")[:MAX_TEXT],
        context_length=context if isinstance(context, int) and context > 0 else None,
        size_bytes=size_bytes,
        cache_bytes=gguf_cache_bytes(info),
        head=_head_facts(shown, info),
        capabilities=_capabilities(tag[:MAX_TEXT], listed, shown, info),
        reasoning_switch="thinking" in listed,
    )


def own_stops(shown: ShowResponse) -> tuple[str, ...]:
    """The stop sequences of the model's own, which a request's would replace."""
    found = re.findall(r'^stop\s+"((?:[^"\\]|\\.)*)"\s*$', shown.parameters or "", flags=re.MULTILINE)
    return tuple(text.replace('\\"', '"').replace("\\n", "\n").replace("\\\\", "\\") for text in found)


def _capabilities(tag: str, listed: frozenset[str], shown: ShowResponse, info: Mapping[str, Any]) -> Facts:
    says = f"Ollama lists {', '.join(sorted(listed)) or 'no capability'} for {tag}"
    return {
        Capability.CHAT: CapabilityFact("completion" in listed, says),
        Capability.MTP: _head(shown, info),
        Capability.REASONING: CapabilityFact("thinking" in listed, says),
        Capability.TOOLS: CapabilityFact("tools" in listed, says),
        Capability.JSON_SCHEMA: CapabilityFact(True, "Ollama turns JSON Schema into a grammar"),
        Capability.LOGPROBS: CapabilityFact(True, "Ollama returns them by token text, without token ids"),
        Capability.COUNT_TOKENS: CapabilityFact(False, "Ollama cannot count tokens without generating"),
        Capability.TOKEN_PROMPT: CapabilityFact(False, "Ollama takes no token ids"),
    }


def _head_facts(shown: ShowResponse, info: Mapping[str, Any]) -> HeadFacts | None:
    """What the metadata declares; Ollama does not tell of the tensors, nor anything of models on its own MLX engine."""
    heads = info.get(f"{_architecture(shown, info)}.nextn_predict_layers")
    if isinstance(heads, int) and heads > 0:
        return HeadFacts(heads, present=None, driver="Ollama")
    return None if _on_mlx(shown) else HeadFacts(0, present=False)


def _on_mlx(shown: ShowResponse) -> bool:
    return shown.details is not None and shown.details.format not in (None, "", "gguf")


def _head(shown: ShowResponse, info: Mapping[str, Any]) -> CapabilityFact:
    key = f"{_architecture(shown, info)}.nextn_predict_layers"
    heads = info.get(key)
    if isinstance(heads, int) and heads > 0:
        return CapabilityFact(True, f"{key} = {heads} in what Ollama shows of the model")
    if _on_mlx(shown):
        return CapabilityFact(None, "Ollama's own MLX engine runs it, which drafts where it can and does not tell")
    return CapabilityFact(False, f"no {key} in what Ollama shows of the model")


def _architecture(shown: ShowResponse, info: Mapping[str, Any]) -> str:
    return str(info.get("general.architecture") or (shown.details and shown.details.family) or "")
