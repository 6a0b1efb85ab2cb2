"""A llama-server that somebody else started: the real llama.cpp in a process of its own, with a key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.gguf_files import THINKING_TEMPLATE, Script, write_script_model
from support.llama_process import KEY, LlamaServer

from router.backends.llama_server import LlamaServerBackend
from router.catalog import read_catalog
from router.client import AsyncClient
from router.server import RouterServer
from router.settings import LlamaServerSettings, ModelSettings, ServerSettings, Settings

THOUGHT = ["<think>", "Let", " me", " ponder", "</think>", "\n", "The", " answer", " is", " 42", "."]


@pytest.fixture(scope="session")
def words_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thinks before it answers, and counts after "L"."""
    path = tmp_path_factory.mktemp("gguf") / "words.gguf"
    scripts = {"<|assistant|>": Script(THOUGHT), "L": Script([f" n{i}" for i in range(50)], repeat=True)}
    letters = "abcdef"
    choices = {"S": letters, **dict.fromkeys(letters, letters)}
    write_script_model(path, scripts, choices=choices, template=THINKING_TEMPLATE)
    return path


@pytest.fixture
def external(tmp_path: Path) -> Iterator[LlamaServer]:
    """One that may be harmed; it counts after "L" at a few milliseconds a token, so that there is time to."""
    path = tmp_path / "words.gguf"
    write_script_model(path, {"L": Script([f" n{i}" for i in range(50)], repeat=True)}, layers=2, feed_forward=4096)
    server = LlamaServer(path)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def shared(words_file: Path) -> Iterator[LlamaServer]:
    """One for all tests of a module that do it no harm."""
    server = LlamaServer(words_file)
    yield server
    server.kill()


MODELS = {
    "words": ModelSettings(llama_server="words"),
    "file": ModelSettings(llama_server="words.gguf"),
    "other": ModelSettings(llama_server="another-model"),
}

Connect = Callable[..., Any]


@pytest.fixture
async def connect(tmp_path: Path) -> AsyncIterator[Connect]:
    """Starts a router over a server's address; gives a client and the backend."""
    servers: list[RouterServer] = []
    clients: list[AsyncClient] = []

    async def start(url: str, **settings: Any) -> tuple[AsyncClient, LlamaServerBackend]:
        values = {"api_key": KEY, "check_interval": 0.2, **settings}
        backend = LlamaServerBackend("remote", LlamaServerSettings(url=url, **values))
        catalog = await read_catalog(Settings(models=MODELS), tmp_path / "none")
        server = RouterServer(ServerSettings(listen="127.0.0.1:0", drain_grace=0.0), catalog, {"remote": backend})
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
