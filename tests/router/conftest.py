from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest
from support.scripted import ScriptedBackend, catalog

from router.catalog import Catalog
from router.refresh import Reader
from router.server import RouterServer
from router.settings import ServerSettings

StartServer = Callable[..., Any]


@pytest.fixture
async def start_server() -> AsyncIterator[StartServer]:
    """Starts real servers on free ports; `await start_server(backend, models, **settings)` gives (server, channel).

    `others` are backends beside the first, and `reader` what the server refreshes its models by.
    """
    servers: list[RouterServer] = []
    channels: list[grpc.aio.Channel] = []

    async def start(
        backend: ScriptedBackend | None = None,
        models: Catalog | None = None,
        others: Sequence[ScriptedBackend] = (),
        reader: Reader | None = None,
        **settings: Any,
    ) -> tuple[RouterServer, grpc.aio.Channel]:
        backends = [backend or ScriptedBackend(), *others]
        settings = {"listen": "127.0.0.1:0", "drain_grace": 0.0, **settings}
        by_name = {item.name: item for item in backends}
        server = RouterServer(ServerSettings(**settings), models or catalog(), by_name, reader)
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
