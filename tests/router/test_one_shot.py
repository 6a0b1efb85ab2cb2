"""Connections to engines: one for each request, closed whatever becomes of it."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from router.backends.llama_stream import new_client
from router.backends.ollama_client import new_client as ollama_client
from router.backends.one_shot import OneShot
from router.settings import OllamaSettings

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LINE = b'{"model":"m","response":"x","done":false}\n'
STEPS = 40  # of the event loop, from the request to the first pieces of its answer


class Server:
    """Answers every request with a stream that does not end."""

    def __init__(self) -> None:
        self.connections: set[asyncio.StreamWriter] = set()
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        try:
            await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            writer.write(HEAD + b"%x\r\n%s\r\n" % (len(LINE), LINE))
            while await reader.read(1024):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.connections.discard(writer)
            writer.close()

    async def left(self) -> int:
        """Connections that do not close in a while."""
        for _ in range(50):
            if not self.connections:
                break
            await asyncio.sleep(0.002)
        return len(self.connections)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Server, str]]:
    server = Server()
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listening:
        yield server, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


async def ask_ollama(address: str) -> None:
    client = ollama_client(OllamaSettings(host=address))
    async for _ in await client.generate(model="m", prompt="x", stream=True):
        pass


async def ask_llama(address: str) -> None:
    async with new_client().stream("POST", address, json={}) as response:
        async for _ in response.aiter_raw():
            pass


@pytest.mark.parametrize("ask", [ask_ollama, ask_llama])
async def test_a_request_that_is_cancelled_at_any_step_leaves_no_connection(ask):
    async with serving() as (server, address):
        gc.collect()
        gc.disable()  # what only the collector would close stays open for long in a server
        try:
            left = {}
            for step in range(STEPS):
                task = asyncio.create_task(ask(address))
                for _ in range(step):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait({task})
                if await server.left():
                    left[step] = server.connections.pop().close()
        finally:
            gc.enable()
        assert not left
        assert server.requests  # the later steps came as far as that


async def test_the_connection_ends_with_the_response_and_with_the_client():
    transport = OneShot(httpx.create_ssl_context(verify=False))
    async with serving() as (server, address), httpx.AsyncClient(transport=transport) as client:
        async with client.stream("GET", address) as response:
            await anext(response.aiter_raw())
            assert transport.open == len(server.connections) == 1
        assert transport.open == await server.left() == 0
        request = client.build_request("GET", address)
        await client.send(request, stream=True)
        await client.aclose()
        assert transport.open == await server.left() == 0


async def test_a_connection_that_cannot_be_made_is_forgotten():
    transport = OneShot(httpx.create_ssl_context(verify=False))
    async with httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("http://127.0.0.1:1")
    assert transport.open == 0
