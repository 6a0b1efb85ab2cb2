"""The server that `make soak` asks: a router over one Ollama server, or gRPC alone, in a process of its own.

Run as `python -m benchmarks.soak_server [OLLAMA_URL]`; it prints its address, then for every line on its standard input
what the process holds, both as a line of JSON, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.stand import BareServer
from router import event_loop
from router.backends.ollama import OllamaBackend
from router.catalog import read_catalog
from router.lifecycle import Lifecycle
from router.server import RouterServer
from router.settings import ModelSettings, OllamaSettings, ServerSettings, Settings

MODEL = "sick"


def resident() -> int:
    """Bytes in memory, without what the allocator keeps for later where it can be told to give that back (glibc)."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def held(backend: OllamaBackend | None) -> dict[str, Any]:
    """What must not grow, and what may explain it."""
    memory, process = resident(), psutil.Process()
    told: dict[str, Any] = {
        "memory": memory,
        "tasks": len(asyncio.all_tasks()),
        "files": len(os.listdir("/dev/fd")),
        "children": len(process.children()),
        "connections": sorted(f"{item.status} to {item.raddr}" for item in process.net_connections()),
    }
    if backend is not None:
        status = backend.status()
        told["requests"] = status.active_requests + status.queued_requests
    return told


@asynccontextmanager
async def server(ollama: str | None) -> AsyncIterator[tuple[str, OllamaBackend | None]]:
    """Its address, and the backend of a router."""
    if ollama is None:
        bare = BareServer()
        await bare.start()
        yield bare.address, None
        await bare.drain()
        return
    lifecycle = Lifecycle()
    options = OllamaSettings(
        host=ollama, first_token_timeout=2.0, token_timeout=1.5, check_interval=0.2, parallel=8, max_queued=1000
    )
    backend = OllamaBackend(MODEL, options, lifecycle)
    models: dict[str, Any] = {MODEL: ModelSettings(ollama="smol", backend=MODEL)}
    settings = Settings(models=models, backends={MODEL: options})
    with tempfile.TemporaryDirectory() as folder:
        catalog = await read_catalog(settings, Path(folder))
    listening = ServerSettings(listen="127.0.0.1:0", drain_grace=0.0)
    router = RouterServer(listening, catalog, {MODEL: backend}, lifecycle=lifecycle)
    await router.start()
    yield router.address, backend
    await router.drain()


async def serve(ollama: str | None) -> None:
    loop = asyncio.get_running_loop()
    async with server(ollama) as (address, backend):
        print(json.dumps({"address": address}), flush=True)
        while await loop.run_in_executor(None, sys.stdin.readline):
            print(json.dumps(held(backend)), flush=True)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    event_loop.run(serve(sys.argv[1] if len(sys.argv) > 1 else None))
