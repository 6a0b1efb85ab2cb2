"""Takes over a catalog that was read anew, without a restart and without disturbing what is in use."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from router.backends.base import Backend
from router.catalog import Catalog, ModelEntry, read_catalog, warn_of
from router.dispatch import Dispatcher
from router.domain import ErrorReason, ModelState, RouterError
from router.settings import LlamaCppSettings, Settings, describe_problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refreshed:
    """Names of models: new ones, gone ones, changed ones, and those that changed but stay as they are: in use.

    `needs_restart` names tables of the settings that have changed but are read at a start only.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """What the settings say now: the models, backends that were not there before, and what a restart would change."""

    catalog: Catalog
    backends: Mapping[str, Backend]
    needs_restart: tuple[str, ...] = ()


class Reader:
    """Reads the settings again, and what they lead to.

    Args:
        settings: as the server started with them.
        load: reads them again.
        pulled: folder of fetched models.
        build: makes the backends of some settings for a catalog.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings],
        pulled: Path,
        build: Callable[[Settings, Catalog], Mapping[str, Backend]],
    ) -> None:
        self._started = settings
        self._backends = dict(settings.backends)  # as they run
        self._load = load
        self._pulled = pulled
        self._build = build

    async def read(self, dispatcher: Dispatcher) -> Reading:
        """Reads. Raises RouterError SETTINGS_INVALID."""
        try:
            settings = await asyncio.to_thread(self._load)
        except (OSError, ValueError) as error:  # of TOML and pydantic too
            logger.error("everything stays as it was: %s", describe_problem(error))
            where = "the server's log says why, and `mtp-router config` where it reads the same file"
            raise RouterError(
                ErrorReason.SETTINGS_INVALID,
                f"the settings cannot be read, so that everything stays as it was; {where}",
            ) from None
        catalog = await read_catalog(settings, self._pulled, dispatcher.catalog)
        # A second llama_cpp would take models over that the first one has in memory.
        new = {
            name: backend
            for name, backend in settings.backends.items()
            if name not in dispatcher.backends and not isinstance(backend, LlamaCppSettings)
        }
        self._backends |= new
        outdated = [
            f"backends.{name}"
            for name in sorted(self._backends.keys() | settings.backends.keys())
            if self._backends.get(name) != settings.backends.get(name)
        ]
        tables = ("server", "scheduler", "resilience")
        outdated += [table for table in tables if getattr(settings, table) != getattr(self._started, table)]
        backends = self._build(settings.model_copy(update={"backends": new}), catalog)
        return Reading(catalog, backends, tuple(outdated))


async def refresh(dispatcher: Dispatcher, read: Catalog, needs_restart: tuple[str, ...] = ()) -> Refreshed:
    """Serves `read` from now on.

    A model whose files or way to be loaded have changed, or that is gone, is first dropped from memory. One that is in
    use is not: it stays as it was until it is refreshed again.
    """
    before = {entry.name: entry for entry in dispatcher.catalog.entries}
    after = {entry.name: entry for entry in read.entries}
    added: list[str] = []
    removed: list[str] = []
    changed: list[str] = []
    kept: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if old is not None and (new is None or not new.loads_as(old)) and not await _let_go(dispatcher, old):
            kept.append(name)
            continue
        # At once after it was let go, so that no request loads it again as it was.
        dispatcher.catalog = dispatcher.catalog.replacing(name, new)
        (added if old is None else removed if new is None else changed).append(name)
    done = Refreshed(tuple(added), tuple(removed), tuple(changed), tuple(kept), needs_restart)
    logger.info("refreshed: %s", done)
    warn_of(dispatcher.catalog.resolve(name) for name in (*added, *changed))
    return done


async def _let_go(dispatcher: Dispatcher, entry: ModelEntry) -> bool:
    """Drops a model from memory, in each of its formats and wherever it may be; False where it is in use.

    What would answer now is not all: a GGUF file answers while the engine for the checkpoint beside it is down.
    """
    formats = [item for item in (entry, entry.gguf) if item is not None and item.path is not None]
    lanes = [
        (item, backend)
        for item in formats
        for backend in dispatcher.backends.values()
        if backend.offer().serves is item.facts.format
    ]
    if any(backend.model_state(item) is ModelState.LOADING for item, backend in lanes):
        return False
    for item, backend in lanes:
        try:
            await backend.unload(item, force=False)
        except RouterError as error:
            logger.info("%s stays as it is: %s", entry.name, error)
            return False
    # A request that came meanwhile may have begun to load it.
    return all(backend.model_state(item) in (ModelState.COLD, ModelState.FAILED) for item, backend in lanes)
