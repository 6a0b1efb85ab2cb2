"""Which models are configured, what each can do, and the evidence for it. Reads file headers, never weights."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from router.discovery import discover
from router.domain import ErrorReason, ModelFacts, ModelFormat, RouterError
from router.facts import read_facts, unasked_facts
from router.settings import ModelSettings, SamplingSettings, Settings

MAX_NAMED, MAX_SHOWN = 32, 128  # known names, and characters of an unknown one, in an error: its size is bounded
DEFAULT_CONTEXT = 8192  # what a model gets unless its settings say more: caches are paid for in full


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A configured model: its settings, and what its files show.

    `path` is None for a model that another server keeps; `gguf` is the same model as a GGUF file, where the settings
    name one beside a checkpoint.
    """

    name: str
    path: Path | None
    settings: ModelSettings
    facts: ModelFacts
    sampling: SamplingSettings = field(default_factory=lambda: SamplingSettings())
    gguf: ModelEntry | None = None

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names that it answers to."""
        return self.settings.aliases

    @property
    def files(self) -> Path:
        """Its file or folder, where it has one."""
        assert self.path is not None
        return self.path

    @property
    def source(self) -> str:
        """Name of its file or folder, or the name by which a server keeps it."""
        return self.path.name if self.path is not None else self.settings.kept_as

    @property
    def context_length(self) -> int:
        """Tokens of context to serve it with: the setting, else DEFAULT_CONTEXT; at most what it was trained for.

        A llama-server was started with its own.
        """
        if self.facts.format is ModelFormat.LLAMA_SERVER and self.facts.context_length:
            return self.facts.context_length
        wanted = self.settings.context_length or DEFAULT_CONTEXT
        return min(wanted, self.facts.context_length or wanted)


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
        names = list(self._names)[:MAX_NAMED]
        more = f" and {len(self._names) - MAX_NAMED} more" if len(self._names) > MAX_NAMED else ""
        known = (", ".join(names) + more) or "none; `mtp-router pull smollm2` fetches one"
        shown = name[:MAX_SHOWN]
        raise RouterError(
            ErrorReason.MODEL_NOT_FOUND,
            f"no model named {shown!r}; known models: {known}",
            metadata={"model": shown, "known_models": ",".join(names)},
        )


async def read_catalog(settings: Settings, pulled: Path) -> Catalog:
    """Reads the headers of every configured model, and of every one that is discovered (see `discover`).

    A file that cannot be read becomes an entry whose `facts.problem` says why: it is listed, and refused when asked
    for.

    Args:
        pulled: folder of fetched models.
    """
    found = await discover(settings, pulled)
    models = {**found, **settings.models}
    return await asyncio.to_thread(
        lambda: Catalog(build_entry(name, model, settings.sampling) for name, model in models.items())
    )


def build_catalog(settings: Settings, pulled: Path) -> Catalog:
    """As `read_catalog`, where no event loop runs."""
    return asyncio.run(read_catalog(settings, pulled))


def build_entry(name: str, model: ModelSettings, sampling: SamplingSettings) -> ModelEntry:
    """The entry of one model; `sampling` holds the defaults that its own settings override."""
    merged = sampling.model_copy(update=model.sampling.model_dump(exclude_none=True))
    if model.path is None:
        kept = ModelFormat.OLLAMA if model.ollama else ModelFormat.LLAMA_SERVER
        return ModelEntry(name, None, model, unasked_facts(model.kept_as, kept), merged)
    gguf = ModelEntry(name, model.gguf, model, read_facts(model.gguf), merged) if model.gguf else None
    return ModelEntry(name, model.path, model, read_facts(model.path, model.head_path), merged, gguf)
