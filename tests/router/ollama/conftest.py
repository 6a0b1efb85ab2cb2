"""The Ollama backend over a double of its server, which runs as a process of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ollama_process import Double

from router.backends.ollama import OllamaBackend
from router.catalog import read_catalog
from router.client import AsyncClient
from router.server import RouterServer
from router.settings import ModelSettings, OllamaSettings, ServerSettings, Settings


@pytest.fixture
def double() -> Iterator[Double]:
    running = Double()
    yield running
    running.kill()


MODELS: dict[str, dict[str, Any]] = {
    "smol": {"ollama": "smol"},
    "thinker": {"ollama": "thinker:8b", "aliases": ["wise"]},
    "drafter": {"ollama": "drafter", "draft_depth": 2},
    "plain-drafter": {"ollama": "drafter", "speculation": "off"},
    "small": {"ollama": "smol", "context_length": 16},
    "absent": {"ollama": "never/pulled"},
}

Connect = Callable[..., Any]


@pytest.fixture
async def connect(double: Double, tmp_path: Path) -> AsyncIterator[Connect]:
    """Starts a router over the double; `await connect(**settings)` gives a client and the backend."""
    servers: list[RouterServer] = []
    clients: list[AsyncClient] = []

    async def start(host: str | None = None, **settings: Any) -> tuple[AsyncClient, OllamaBackend]:
        configured = OllamaSettings(host=host or double.address, **{"check_interval": 0.2, **settings})
        backend = OllamaBackend("ollama", configured)
        models = {name: ModelSettings.model_validate(model) for name, model in MODELS.items()}
        catalog = await read_catalog(Settings(models=models), tmp_path / "none")
        server = RouterServer(ServerSettings(listen="127.0.0.1:0", drain_grace=0.0), catalog, {"ollama": backend})
        await server.start()
        servers.append(server)
        client = AsyncClient(server.address, retry=None)
        clients.append(await client.__aenter__())
        return client, backend

    yield start
    for client in clients:
        await client.__aexit__(None, None, None)
    for server in servers:
        await server.drain()
