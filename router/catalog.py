"""Which models are configured, what each can do, and the evidence for it. Reads file headers, never weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from router.domain import Capability, CapabilityFact, ErrorReason, ModelFacts, RouterError
from router.gguf import GgufError, GgufHeader, read_gguf_header
from router.settings import ModelSettings, SamplingSettings, Settings

DEFAULT_CONTEXT = 8192  # what a model gets unless its settings say more: caches are paid for in full

THINKING_SWITCH = "enable_thinking"  # the variable by which chat templates switch thinking


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A configured model: its settings, and what its files show."""

    name: str
    path: Path
    settings: ModelSettings
    facts: ModelFacts
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names that it answers to."""
        return self.settings.aliases

    @property
    def context_length(self) -> int:
        """Tokens of context to serve it with: the setting, else the model's own up to DEFAULT_CONTEXT."""
        own = self.facts.context_length or DEFAULT_CONTEXT
        return self.settings.context_length or min(own, DEFAULT_CONTEXT)


class Catalog:
    """The configured models, by name and alias."""

    def __init__(self, entries: Iterable[ModelEntry]) -> None:
        self._entries = {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}
        self._names: dict[str, str] = {name: name for name in self._entries}
        for entry in self._entries.values():
            self._names.update(dict.fromkeys(entry.aliases, entry.name))

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """Every model, by name."""
        return tuple(self._entries.values())

    def resolve(self, name: str) -> ModelEntry:
        """The model of that name or alias. Raises RouterError MODEL_NOT_FOUND, naming the known ones."""
        if name in self._names:
            return self._entries[self._names[name]]
        known = ", ".join(self._names) or "none; `mtp-router pull smollm2` fetches one"
        raise RouterError(
            ErrorReason.MODEL_NOT_FOUND,
            f"no model named {name!r}; known models: {known}",
            metadata={"model": name, "known_models": ",".join(self._names)},
        )


def build_catalog(settings: Settings, pulled: Path) -> Catalog:
    """Reads the header of every configured model and of every GGUF file in `pulled`.

    A pulled file is served under its stem unless the settings already use that name. A file that cannot be read
    becomes an entry whose `facts.problem` says why: it is listed, and refused when asked for.
    """
    models: dict[str, ModelSettings] = dict(settings.models)
    taken = {alias for model in models.values() for alias in model.aliases} | set(models)
    for file in sorted(pulled.glob("*.gguf")):
        if file.stem not in taken:
            models[file.stem] = ModelSettings(path=file)
    return Catalog(
        ModelEntry(name, model.path, model, read_facts(model.path), _merge(settings.sampling, model.sampling))
        for name, model in models.items()
    )


def _merge(base: SamplingSettings, override: SamplingSettings) -> SamplingSettings:
    return base.model_copy(update=override.model_dump(exclude_none=True))


def read_facts(path: Path) -> ModelFacts:
    """What the file at `path` shows of itself."""
    try:
        header = read_gguf_header(path)
    except FileNotFoundError:
        return ModelFacts(problem=f"{path.name} does not exist")
    except OSError as error:
        return ModelFacts(problem=f"{path.name} cannot be read: {error.strerror}")
    except GgufError as error:
        return ModelFacts(problem=f"{path.name} is not a usable GGUF file: {error}")
    return ModelFacts(
        architecture=header.architecture,
        quantization=header.quantization,
        context_length=header.context_length,
        size_bytes=header.file_bytes,
        capabilities=_gguf_capabilities(header),
        reasoning_switch=THINKING_SWITCH in header.chat_template,
    )


def _gguf_capabilities(header: GgufHeader) -> Mapping[Capability, CapabilityFact]:
    template = header.chat_template
    return {
        Capability.CHAT: CapabilityFact(
            bool(template), f"tokenizer.chat_template {'present' if template else 'absent'}"
        ),
        Capability.MTP: _mtp_fact(header),
        Capability.REASONING: _reasoning_fact(template),
        Capability.TOOLS: CapabilityFact(False, "not passed through by the llama.cpp backend yet"),
        Capability.JSON_SCHEMA: CapabilityFact(True, "llama.cpp turns JSON Schema into a grammar"),
        Capability.LOGPROBS: CapabilityFact(True, "llama.cpp returns them per token"),
        Capability.COUNT_TOKENS: CapabilityFact(True, "llama.cpp tokenizes without generating"),
        Capability.TOKEN_PROMPT: CapabilityFact(True, "llama.cpp takes token ids"),
    }


def _mtp_fact(header: GgufHeader) -> CapabilityFact:
    key, heads, tensor = f"{header.architecture}.nextn_predict_layers", header.mtp_layers, header.mtp_tensor
    if not heads:
        return CapabilityFact(False, f"no {key} in the file's metadata")
    if tensor is None:
        return CapabilityFact(False, f"{key} = {heads} is declared, but no nextn.eh_proj tensor is in the file")
    return CapabilityFact(True, f"{key} = {heads} and tensor {tensor}")


def _reasoning_fact(template: str) -> CapabilityFact:
    if THINKING_SWITCH in template:
        return CapabilityFact(True, f"the chat template reads {THINKING_SWITCH}")
    if "<think>" in template:
        return CapabilityFact(True, f"the chat template writes <think> and has no {THINKING_SWITCH} switch")
    return CapabilityFact(False, "the chat template knows no thinking")
