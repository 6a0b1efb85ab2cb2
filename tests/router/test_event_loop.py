from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from router import process
from router.event_loop import EventLoop
from router.settings import Settings

STREAMS, MESSAGES = 30, 25
TURN = 0.001  # seconds that a turn of the busy loop takes


async def _answer(request: bytes, context: object) -> AsyncIterator[bytes]:
    for number in range(MESSAGES):
        yield b"%d" % number


async def _most_wakeups(found: list[socket.socket]) -> int:
    """Many streams at once on a loop with much else to do. The most of gRPC's bytes that waited to be read."""
    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(_answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", {"Call": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    loop, busy, most = asyncio.get_running_loop(), True, 0

    def work() -> None:
        nonlocal most
        time.sleep(TURN)
        most = max(most, _waiting(found[0]))
        if busy:
            loop.call_soon(work)

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_stream("/test.Test/Call")

        async def read() -> list[bytes]:
            return [message async for message in call(b"", timeout=60)]

        work()
        try:
            answers = await asyncio.gather(*(read() for _ in range(STREAMS)))
        finally:
            busy = False
    await server.stop(0)
    assert answers == [[b"%d" % number for number in range(MESSAGES)]] * STREAMS
    return most


def _waiting(wakeups: socket.socket) -> int:
    try:
        return len(wakeups.recv(1 << 16, socket.MSG_PEEK))
    except BlockingIOError:
        return 0


def _piled_up_on(base: type[asyncio.SelectorEventLoop]) -> int:
    found: list[socket.socket] = []

    class Watched(base):  # type: ignore[misc, valid-type]
        def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
            if isinstance(fd, socket.socket):
                found.append(fd)
            super().add_reader(fd, callback, *args)

    with asyncio.Runner(loop_factory=Watched) as runner:
        return runner.run(_most_wakeups(found))


def test_the_bytes_that_wake_the_loop_do_not_pile_up_as_grpc_would_have_them() -> None:
    """Once this fails for what gRPC does by itself, router/event_loop.py can go."""
    assert 2 * _piled_up_on(EventLoop) < _piled_up_on(asyncio.SelectorEventLoop)


def test_the_service_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = []

    async def run(*arguments: Any, **more: Any) -> None:
        loops.append(type(asyncio.get_running_loop()))

    monkeypatch.setattr(process, "run", run)
    assert process.serve(Settings(), Settings) == 0
    assert loops == [EventLoop]


def test_other_readers_are_left_alone() -> None:
    async def read() -> bytes:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        with ours, theirs:
            heard: asyncio.Future[bytes] = loop.create_future()
            loop.add_reader(ours, lambda: heard.set_result(ours.recv(100)))
            theirs.send(b"three")
            told = await heard
            loop.remove_reader(ours)
            return told

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        assert runner.run(read()) == b"three"
