"""The fault matrix's llama.cpp lane: real child processes, killed, stopped, or behind a proxy that spoils answers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.fault_cells import (
    ANSWERED,
    FAILED,
    LOAD_FAILED,
    STAGES,
    STALLED,
    UNAVAILABLE,
    Asked,
    Lane,
    busy,
    router,
)
from router.backends.llama_cpp import LlamaCppBackend
from router.backends.llama_runner import SUSPECT_TIMEOUT
from router.client import AsyncClient, RouterCallError
from router.lifecycle import Lifecycle
from router.settings import LlamaCppSettings, ModelSettings

from support.gguf_files import Script, write_script_model  # isort: skip

COUNTING = Script([f" n{i}" for i in range(50)], repeat=True)  # "L" counts for ever
COUNT = {"prompt": "L"}
PREFILL = 2000  # tokens of a prompt that takes a while
SETTINGS = {
    "threads": 1,
    "batch_tokens": 64,
    "parallel": 1,
    "load_timeout": 10.0,
    "first_token_timeout": 3.0,
    "token_timeout": 2.0,
}
MODELS = {"sick": 16384, "well": 4096}  # contexts

HEAD_ENDS = b"\r\n\r\n"

SPOILS = ("garbage line", "oversize line", "resets", "closes without final")
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGABRT": signal.SIGABRT, "SIGSTOP": signal.SIGSTOP}
# Who waits, or is before the first token, is sent to the next child: the router tries again.
_DIES = {"queued": ANSWERED, "loading": LOAD_FAILED, "prefill": ANSWERED, "decode": FAILED}
_LOST = {"queued": UNAVAILABLE, "prefill": UNAVAILABLE, "decode": FAILED}
_SPOILT = {"queued": FAILED, "prefill": FAILED, "decode": FAILED}
EXPECTED: dict[str, dict[str, str]] = {
    "refuses to start": {"loading": LOAD_FAILED},
    "SIGKILL": _DIES,
    "SIGABRT": _DIES,
    "SIGSTOP": {"queued": ANSWERED, "loading": LOAD_FAILED, "prefill": STALLED, "decode": STALLED},
    "garbage line": _SPOILT,
    "oversize line": _SPOILT,
    "resets": _LOST,
    "closes without final": _LOST,
}


class Proxy:
    """Stands before a child and passes everything on; once `spoil` is set, answers to POST go wrong so."""

    def __init__(self, child: str) -> None:
        self._host, _, port = child.rpartition("//")[2].rpartition(":")
        self._port = int(port)
        self.spoil = ""
        self._spoilt = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Its address."""
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = None
        try:
            first = await reader.read(65536)
            to_child = await asyncio.open_connection(self._host, self._port)
            upstream = to_child[1]
            upstream.write(first)
            sending = asyncio.create_task(_pass(reader, upstream))
            try:
                await self._answer(to_child[0], writer, spoils=first.startswith(b"POST"))
            finally:
                sending.cancel()
        except OSError:
            pass
        finally:
            for stream in (writer, upstream):
                if stream is not None:
                    stream.close()

    async def _answer(self, child: asyncio.StreamReader, writer: asyncio.StreamWriter, *, spoils: bool) -> None:
        answers = False
        while data := await child.read(65536):
            if spoils and self.spoil:
                if not answers:
                    writer.write(data[: data.index(HEAD_ENDS) + len(HEAD_ENDS)])
                await SPOILERS[self.spoil](writer)
                return
            answers = True
            writer.write(data)
            await writer.drain()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)


async def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
    with contextlib.suppress(OSError):
        await writer.drain()


async def _garbage(writer: asyncio.StreamWriter) -> None:
    await _chunk(writer, b"data: {this is no JSON\n\n")


async def _oversize(writer: asyncio.StreamWriter) -> None:
    await _chunk(writer, b"data: ")
    for _ in range(40):
        await _chunk(writer, b"x" * 2**20)


async def _reset(writer: asyncio.StreamWriter) -> None:
    handle = writer.get_extra_info("socket")
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _quiet(writer: asyncio.StreamWriter) -> None:
    writer.write(b"0\r\n\r\n")


SPOILERS = dict(zip(SPOILS, (_garbage, _oversize, _reset, _quiet), strict=True))


class LlamaScene:
    """See `Scene`."""

    beside: Mapping[str, Mapping[str, Any]] = {"well": COUNT}
    comes_back = True

    def __init__(self, client: AsyncClient, backend: LlamaCppBackend, folder: Path, fault: str) -> None:
        self.client = client
        self._backend = backend
        self._file = folder / "sick.gguf"
        self._fault = fault
        self._others: set[int] = set()
        self._proxy: Proxy | None = None
        self.victim: Mapping[str, Any] = COUNT

    async def prepare(self, stage: str) -> None:
        """Loaded, but for the stage that loads, and behind the proxy where that is to spoil the answer."""
        self._others = _processes()
        if stage == "prefill":
            self.victim = {"prompt": "L" * PREFILL}
        if self._fault == "refuses to start":
            self._file.write_bytes(self._file.read_bytes()[:1000])
        if stage == "loading":
            return
        await Asked("sick", 1, COUNT).through(self.client)
        if self._fault in SPOILS:
            child = self._child()
            self._proxy = Proxy(child.address)
            child.address = await self._proxy.start()

    async def ahead(self) -> Callable[[], None]:
        """An answer that does not end."""
        answer = self.client.stream("sick", prompt="L", temperature=0.0, max_output_tokens=10_000)
        await anext(aiter(answer))
        return answer.close

    async def reached(self, stage: str, victim: Asked) -> bool:
        """As the router tells."""
        if stage == "loading":
            return victim.stage == "load" and (self._fault not in SIGNALS or bool(_processes() - self._others))
        return victim.stage == {"queued": "queue"}.get(stage, stage)

    async def happen(self, stage: str) -> None:
        """To the child, or to what it sends from now on."""
        if self._fault in SIGNALS:
            (process,) = _processes() - self._others if stage == "loading" else {self._child().pid}
            os.kill(process, SIGNALS[self._fault])
        elif self._proxy is not None:
            self._proxy.spoil = self._fault
        if stage == "queued":
            # The one in front notices, and has the child looked at.
            await asyncio.sleep(SETTINGS["token_timeout"] + 2 * SUSPECT_TIMEOUT)

    async def heal(self) -> None:
        """A whole file again, no proxy, nothing loaded."""
        if self._fault == "refuses to start":
            _write(self._file)
        with contextlib.suppress(RouterCallError):
            await self.client.unload("sick", force=True)
        if self._proxy is not None:
            await self._proxy.close()
            self._proxy = None

    def left_over(self) -> str:
        """Requests."""
        return busy({"llama.cpp": self._backend})

    def _child(self) -> Any:
        known = self._backend._models["sick"].runner.child
        assert known is not None
        return known


def _processes() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


@functools.cache
def _model() -> Path:
    """A model of some milliseconds a token."""
    path = Path(tempfile.mkdtemp(prefix="faults")) / "slow.gguf"
    write_script_model(path, {"L": COUNTING}, context=16384, layers=2, feed_forward=4096)
    return path


def _write(path: Path) -> None:
    shutil.copyfile(_model(), path)


@asynccontextmanager
async def scene(fault: str) -> AsyncIterator[LlamaScene]:
    """A router with two models of llama.cpp."""
    lifecycle = Lifecycle()
    backend = LlamaCppBackend("llama", LlamaCppSettings.model_validate(SETTINGS), lifecycle)
    with tempfile.TemporaryDirectory() as name:
        folder, models = Path(name), {}
        for model, context in MODELS.items():
            _write(folder / f"{model}.gguf")
            models[model] = ModelSettings(path=folder / f"{model}.gguf", context_length=context)
        async with router({"llama": backend}, models, lifecycle) as client:
            yield LlamaScene(client, backend, folder, fault)


LANE = Lane("llama.cpp", EXPECTED, scene)
assert all(set(stages) <= set(STAGES) for stages in EXPECTED.values())
