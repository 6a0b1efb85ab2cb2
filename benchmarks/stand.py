"""A router in a process of its own, for benchmarks: scripted backends, the real server, figures over a pipe.

Run as `python -m benchmarks.stand OPTIONS`; it prints its address as one JSON line, serves until its standard input
ends, and prints what it measured of itself as another.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
from mtp_router.generate import v1

from mlx_mtp_backend import Engine, EngineProcess
from mlx_mtp_backend.synthetic import Recipe, write
from router import event_loop
from router.backends.mlx import MlxBackend
from router.catalog import Catalog, ModelEntry, read_catalog
from router.domain import (
    BackendKind,
    BackendState,
    BackendStatus,
    Capability,
    CapabilityFact,
    Delta,
    Drafting,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Loading,
    ModelFacts,
    ModelState,
    Offer,
    Started,
    TextPrompt,
    TokenCount,
    Usage,
)
from router.lifecycle import Lifecycle, Seat, nothing
from router.process import spare_the_collector
from router.scheduler import Terms
from router.server import RouterServer
from router.settings import MlxSettings, ModelSettings, ServerSettings, Settings

TICK = 0.005  # seconds between looks at the loop's delay


class Scripted:
    """Answers "RATE COUNT": that many deltas a second, that many in all; each says when it was made."""

    kind = BackendKind.LLAMA_CPP
    fields: frozenset[str] = frozenset()

    def __init__(self, name: str, parallel: int) -> None:
        self.name, self.parallel = name, parallel
        self._lifecycle = Lifecycle()
        self._seat = Seat(name, Terms(parallel, 1000, loads=False), nothing, nothing)

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def offer(self) -> Offer:
        return Offer(self.kind)

    def status(self) -> BackendStatus:
        running, waiting = self._lifecycle.counts(self.name)
        return BackendStatus(self.name, self.kind, BackendState.READY, active_requests=running, queued_requests=waiting)

    def on_status_change(self, listener: Callable[[BackendStatus], None]) -> None: ...

    def model_state(self, model: ModelEntry) -> ModelState:
        return ModelState.READY

    def drafting(self, model: ModelEntry) -> Drafting | None:
        return None

    async def describe(self, model: ModelEntry) -> ModelEntry:
        return model

    async def generate(self, model: ModelEntry, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        assert isinstance(request.prompt, TextPrompt)
        rate, count = request.prompt.text.split()
        ticket = self._lifecycle.enter(self._seat, request.priority)
        try:
            async for step in self._lifecycle.wait(ticket, None):
                yield step
            begin = time.monotonic()
            yield Started(1)
            for number in range(int(count)):
                await asyncio.sleep(begin + number / float(rate) - time.monotonic())
                yield Delta(f"@{time.monotonic_ns()} ", token_count=1)
            yield Finished(FinishReason.MAX_TOKENS, Usage(1, int(count)))
        finally:
            self._lifecycle.leave(ticket)

    async def count_tokens(self, model: ModelEntry, request: GenerationRequest) -> TokenCount:
        return TokenCount(1, model.context_length)

    async def preload(self, model: ModelEntry) -> AsyncGenerator[Loading, None]:
        yield Loading()

    async def unload(self, model: ModelEntry, *, force: bool) -> None: ...


def scripted_entry(name: str, backend: str) -> ModelEntry:
    """A model that the scripted backend answers for."""
    capabilities = {item: CapabilityFact(True, "scripted") for item in Capability}
    capabilities[Capability.MTP] = CapabilityFact(False, "scripted")
    facts = ModelFacts(context_length=2048, size_bytes=1, capabilities=capabilities)
    settings = ModelSettings(path=Path(f"/nowhere/{name}.gguf"), backend=backend)
    return ModelEntry(name, settings.path, settings, facts)


async def checkpoint_entry(folder: Path, layers: int, hidden: int) -> ModelEntry:
    """A synthetic checkpoint with a head, for the engine."""
    write(folder / "words", Recipe(kind="history", layers=layers, hidden=hidden))
    models = {"words": ModelSettings(path=folder / "words")}
    return (await read_catalog(Settings(models=models), folder / "none")).entries[0]


@asynccontextmanager
async def ticking(delays: list[float]) -> AsyncIterator[None]:
    """Notes how late the loop wakes a sleeper, seconds."""

    async def tick() -> None:
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(TICK)
            delays.append(time.perf_counter() - begin - TICK)

    task = asyncio.create_task(tick())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


class Bare(v1.GenerateServiceServicer):
    """The same streams from gRPC alone, to compare with: no router."""

    async def StreamGenerate(self, request: v1.StreamGenerateRequest, context: Any) -> None:  # type: ignore[override]
        rate, count = request.input.text.split()
        begin = time.monotonic()
        await context.write(v1.StreamGenerateResponse(started=v1.GenerationStarted()))
        for number in range(int(count)):
            await asyncio.sleep(begin + number / float(rate) - time.monotonic())
            delta = v1.GenerationDelta(text=f"@{time.monotonic_ns()} ", token_count=1)
            await context.write(v1.StreamGenerateResponse(delta=delta))
        await context.write(v1.StreamGenerateResponse(finished=v1.GenerationFinished()))


class BareServer:
    """As much of `RouterServer` as `serve` uses."""

    metrics_address = ""

    async def start(self) -> None:
        self._server = grpc.aio.server()
        v1.add_GenerateServiceServicer_to_server(Bare(), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def drain(self) -> None:
        await self._server.stop(0)


async def serve(arguments: argparse.Namespace) -> None:
    loop, delays = asyncio.get_running_loop(), []  # type: ignore[var-annotated]
    backends: dict[str, Any] = {"scripted": Scripted("scripted", arguments.parallel)}
    entries = [scripted_entry("scripted", "scripted")]
    with tempfile.TemporaryDirectory() as folder:
        if arguments.mlx:
            nice = 0 if arguments.thread else arguments.cpu_nice
            mlx = MlxSettings(allow_cpu=True, parallel=2, cpu_nice=nice)
            backends["mlx"] = MlxBackend("mlx", mlx, engine=Engine if arguments.thread else EngineProcess)
            entries.append(await checkpoint_entry(Path(folder), arguments.layers, arguments.hidden))
        settings = ServerSettings(listen="127.0.0.1:0", drain_grace=0.0, metrics_listen="127.0.0.1:0")
        server = BareServer() if arguments.bare else RouterServer(settings, Catalog(entries), backends)
        await server.start()
        print(json.dumps({"address": server.address, "metrics": server.metrics_address}), flush=True)
        spare_the_collector()
        before = psutil.Process().cpu_times()
        async with ticking(delays):
            await loop.run_in_executor(None, sys.stdin.read)
        after = psutil.Process().cpu_times()
        cpu = after.user + after.system - before.user - before.system
        print(json.dumps({"ticks": delays, "cpu": cpu}), flush=True)
        await server.drain()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parallel", type=int, default=1000)
    parser.add_argument("--mlx", action="store_true")
    parser.add_argument("--thread", action="store_true", help="with the engine on a thread of this process")
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--cpu-nice", type=int, default=MlxSettings().cpu_nice)
    parser.add_argument("--switch-interval", type=float)
    arguments = parser.parse_args()
    os.environ.setdefault("MTP_ROUTER_HOME", tempfile.gettempdir())
    if arguments.switch_interval:
        sys.setswitchinterval(arguments.switch_interval)
    event_loop.run(serve(arguments))


if __name__ == "__main__":
    main()
