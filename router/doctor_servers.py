"""Asks the servers that others started, for `doctor`: do they answer, and have they the models wanted of them?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from router.backends.base import Backend
from router.backends.llama_server import LlamaServerBackend
from router.backends.ollama import OllamaBackend
from router.catalog import Catalog, ModelEntry
from router.domain import BackendState, BackendStatus, RouterError
from router.policy import choose_route
from router.settings import LlamaServerSettings, OllamaSettings, Settings

PATIENCE = 15.0  # seconds that a server has to answer


@dataclass(frozen=True, slots=True)
class ServerReport:
    """Health of one server, the models that are wanted there, and why some cannot be served."""

    status: BackendStatus
    models: tuple[str, ...] = ()
    problems: dict[str, str] = field(default_factory=dict)


async def ask_servers(settings: Settings, catalog: Catalog) -> tuple[list[ServerReport], dict[str, str]]:
    """A report for each server; and, by model, why no server is there for it."""
    servers: dict[str, Backend] = {}
    for name, backend in sorted(settings.backends.items()):
        if isinstance(backend, OllamaSettings):
            servers[name] = OllamaBackend(name, backend)
        elif isinstance(backend, LlamaServerSettings):
            servers[name] = LlamaServerBackend(name, backend)
    offers = {name: server.offer() for name, server in servers.items()}
    wanted: dict[str, list[ModelEntry]] = {name: [] for name in servers}
    homeless = {}
    for entry in catalog.entries:
        if entry.path is None:
            try:
                wanted[choose_route(entry.name, entry, offers)[0].backend].append(entry)
            except RouterError as error:
                homeless[entry.name] = error.message
    reports = await asyncio.gather(*(_ask(server, wanted[name]) for name, server in servers.items()))
    return list(reports), homeless


async def _ask(server: Backend, models: Iterable[ModelEntry]) -> ServerReport:
    looked = asyncio.Event()
    server.on_status_change(lambda _: looked.set())
    await server.start()
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(looked.wait(), PATIENCE)
        problems = {}
        if server.status().state is BackendState.READY:
            for model in models:
                try:
                    await server.describe(model)
                except RouterError as error:
                    problems[model.name] = error.message
        return ServerReport(server.status(), tuple(model.name for model in models), problems)
    finally:
        await server.close()
