from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from support.scripted import ScriptedBackend, catalog

from router.catalog import Catalog
from router.server import RouterServer
from router.settings import ServerSettings

StartServer = Callable[..., Any]


@pytest.fixture
async def start_server() -> AsyncIterator[StartServer]:
    """Starts real servers on free ports; `await start_server(backend, models, **settings)` gives (server, channel)."""
    servers: list[RouterServer] = []
    channels: list[grpc.aio.Channel] = []

    async def start(
        backend: ScriptedBackend | None = None, models: Catalog | None = None, **settings: Any
    ) -> tuple[RouterServer, grpc.aio.Channel]:
        backend = backend or ScriptedBackend()
        settings = {"listen": "127.0.0.1:0", "drain_grace": 0.0, **settings}
        server = RouterServer(ServerSettings(**settings), models or catalog(), {backend.name: backend})
        await server.start()
        servers.append(server)
        channel = grpc.aio.insecure_channel(server.address)
        channels.append(channel)
        return server, channel

    yield start
    for channel in channels:
        await channel.close()
    for server in servers:
        await server.drain()
