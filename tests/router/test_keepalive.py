"""Pings through a long silence: the option that works, and the well-known one that does nothing."""

from __future__ import annotations

import asyncio

import grpc
from mtp_router.generate import v1
from support.scripted import FINISHED, ScriptedBackend

import router.server
from router.domain import Started
from router.server import channel_options
from router.settings import ServerSettings

SILENCE = 12.0  # seconds; under the useless option the connection is cut after about eight
PINGS = [
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
]
WORKING = "grpc.http2.min_ping_interval_without_data_ms"
USELESS = "grpc.http2.min_recv_ping_interval_without_data_ms"


async def outcome(start_server) -> str:  # type: ignore[no-untyped-def]
    """How a call fares whose client pings every 2 s through a silence, where the server allows a ping a second."""
    server, _ = await start_server(ScriptedBackend([Started(), SILENCE, FINISHED]), min_ping_interval=1.0)
    async with grpc.aio.insecure_channel(server.address, options=PINGS) as channel:
        request = v1.GenerateRequest(input=v1.GenerationInput(model="tiny", text="Hi"))
        try:
            await v1.GenerateServiceStub(channel).Generate(request, timeout=SILENCE + 10)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return "OK"


async def test_pings_through_a_silence_need_the_right_option(start_server, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    assert WORKING in dict(channel_options(ServerSettings()))
    ours = asyncio.create_task(outcome(start_server))
    await asyncio.sleep(0.5)  # the first server has its options by now

    def renamed(settings: ServerSettings) -> list[tuple[str, int]]:
        return [(USELESS if key == WORKING else key, value) for key, value in channel_options(settings)]

    monkeypatch.setattr(router.server, "channel_options", renamed)
    theirs = await outcome(start_server)
    assert "Too many pings" in theirs
    assert await ours == "OK"
