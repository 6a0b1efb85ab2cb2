"""Which models are configured, what each can do, and the evidence for it. Reads file headers, never weights."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from router.discovery import discover
from router.domain import ErrorReason, ModelFacts, ModelFormat, RouterError
from router.facts import read_facts, unasked_facts
from router.settings import ModelSettings, SamplingSettings, Settings

logger = logging.getLogger(__name__)

MAX_NAMED, MAX_SHOWN = 32, 128  # known names, and characters of an unknown one, in an error: its size is bounded
HEAD_ADVICE = "head_path can name the original checkpoint's folder, see docs/models.md"
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

    def memory_bytes(self, parallel: int) -> int | None:
        """Estimate of what it takes once loaded: its files, and full caches for `parallel` requests."""
        size, cache = self.facts.size_bytes, self.facts.cache_bytes
        return None if size is None or cache is None else size + parallel * self.context_length * cache

    def loads_as(self, other: ModelEntry) -> bool:
        """Whether what is in memory for one is right for the other: they differ in names and defaults at most."""
        return _as_loaded(self) == _as_loaded(other)

    @property
    def lacks_head(self) -> bool:
        """Whether it is a checkpoint that declares a prediction head, wants it, and has none in its files."""
        facts, wanted = self.facts, self.settings.speculation == "auto"
        if facts.format is not ModelFormat.CHECKPOINT or facts.head is None or facts.problem:
            return False
        return wanted and facts.head.declared_layers > 0 and not facts.head.present


def _as_loaded(entry: ModelEntry) -> ModelEntry:
    plain = entry.settings.model_copy(update={"aliases": (), "fallbacks": (), "sampling": SamplingSettings()})
    gguf = None if entry.gguf is None else _as_loaded(entry.gguf)
    return replace(entry, settings=plain, sampling=SamplingSettings(), gguf=gguf)


class Catalog:
    """The configured models, by name and alias. Where a name is also somebody's alias, the name wins."""

    def __init__(self, entries: Iterable[ModelEntry]) -> None:
        self._entries = {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}
        self._names: dict[str, str] = {name: name for name in self._entries}
        for entry in self._entries.values():
            for alias in entry.aliases:
                self._names.setdefault(alias, entry.name)

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """Every model, by name."""
        return tuple(self._entries.values())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def fallbacks(self, entry: ModelEntry) -> list[str]:
        """The models that may answer in its place, each once; a name that stands for no model stays."""
        names = dict.fromkeys(self._names.get(name, name) for name in entry.settings.fallbacks)
        names.pop(entry.name, None)
        return list(names)

    def replacing(self, name: str, entry: ModelEntry | None) -> Catalog:
        """The same but for one model; None: without it."""
        others = [item for item in self._entries.values() if item.name != name]
        return Catalog(others if entry is None else [*others, entry])

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


async def read_catalog(settings: Settings, pulled: Path, before: Catalog | None = None) -> Catalog:
    """Reads the headers of every configured model, and of every one that is discovered (see `discover`).

    A file that cannot be read becomes an entry whose `facts.problem` says why: it is listed, and refused when asked
    for.

    Args:
        pulled: folder of fetched models.
        before: the catalog that this one takes the place of; models at a server that does not answer now stay.
    """
    known = {} if before is None else {entry.name: entry.settings for entry in before.entries}
    found = await discover(settings, pulled, known)
    models = {**found, **settings.models}
    catalog = await asyncio.to_thread(
        lambda: Catalog(build_entry(name, model, settings.sampling) for name, model in models.items())
    )
    for entry in catalog.entries:
        for name in entry.settings.fallbacks:
            if name not in catalog:
                logger.warning("models.%s.fallbacks: there is no model %r", entry.name, name)
    return catalog


def warn_of(entries: Iterable[ModelEntry]) -> None:
    """Says in the log which models cannot be served, and which are slower than they could be."""
    for entry in entries:
        if entry.facts.problem:
            logger.warning("%s cannot be served: %s", entry.name, entry.facts.problem)
        elif entry.lacks_head:
            logger.warning("%s declares a prediction head that its files lack: %s", entry.name, HEAD_ADVICE)


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
