"""One cell of the fault matrix: a request is brought to a stage, a fault happens, and what came of it is held against
what was expected. The lanes are in `faults_ollama`, `faults_llama` and `faults_mlx`."""

from __future__ import annotations

import asyncio
import gc
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from router.backends.base import Backend  # noqa: E402
from router.catalog import read_catalog  # noqa: E402
from router.client import AsyncClient, RouterCallError  # noqa: E402
from router.lifecycle import Lifecycle  # noqa: E402
from router.server import RouterServer  # noqa: E402
from router.settings import ModelSettings, ServerSettings, Settings  # noqa: E402

STAGES = ("queued", "loading", "prefill", "decode")
PROMPT = [{"role": "user", "content": "count"}]
NEIGHBOUR, VICTIM = 100, 200  # tokens of the answers beside, and of the one that the fault hits
UNAVAILABLE, FAILED, STALLED = "BACKEND_UNAVAILABLE", "BACKEND_FAILED", "BACKEND_STALLED"
FULL, LOAD_FAILED, ANSWERED = "QUEUE_FULL", "MODEL_LOAD_FAILED", ""


@dataclass
class Asked:
    """A request, how far it is ("queue", "load", "prefill", "decode"), and what it came to ("" for a whole answer)."""

    model: str
    tokens: int
    fields: Mapping[str, Any] = field(default_factory=lambda: {"messages": PROMPT})
    stage: str = ""
    text: str = ""
    told: int = 0  # tokens of a whole answer
    reason: str | None = None

    async def through(self, client: AsyncClient) -> Asked:
        """To its end."""
        fields = {"temperature": 0.0, "max_output_tokens": self.tokens, "deadline": 30, **self.fields}
        answer = client.stream(self.model, include_progress=True, **fields)
        try:
            async for event in answer.events():
                if event.WhichOneof("event") == "progress":
                    self.stage = str(event.progress.WhichOneof("stage"))
                elif event.WhichOneof("event") == "delta":
                    self.stage = "decode"
                    self.text += event.delta.text
                elif event.WhichOneof("event") == "finished":
                    self.told = event.finished.usage.output_tokens
        except RouterCallError as error:
            self.reason = error.reason or error.code.name
        else:
            self.reason = ANSWERED
        return self


class Scene(Protocol):
    """A router with a model "sick" whose backend will fail, and others."""

    client: AsyncClient
    beside: Mapping[str, Mapping[str, Any]]  # models that must not notice, with the fields of a request
    victim: Mapping[str, Any]  # fields of the request that the fault hits
    comes_back: bool  # whether "sick" answers again once the fault is over

    async def prepare(self, stage: str) -> None:
        """Before the victim asks: everything that a request to that stage needs, and the fault itself does not."""

    async def ahead(self) -> Callable[[], None]:
        """Takes the place that the victim will wait for. Returns what gives it back."""
        ...

    async def reached(self, stage: str, victim: Asked) -> bool:
        """Whether the victim is at the stage."""
        ...

    async def happen(self, stage: str) -> None:
        """The fault comes about."""

    async def heal(self) -> None:
        """The fault is over; nothing of "sick" stays loaded."""

    def left_over(self) -> str:
        """What is still there that should not be."""
        ...


@dataclass(frozen=True)
class Lane:
    """A kind of backend.

    Attributes:
        expected: what the victim is told, by fault and stage; a stage that is not there cannot have the fault.
        scene: a fresh one for a fault.
    """

    name: str
    expected: Mapping[str, Mapping[str, str]]
    scene: Callable[[str], AbstractAsyncContextManager[Scene]]


@asynccontextmanager
async def router(
    backends: Mapping[str, Backend],
    models: Mapping[str, ModelSettings],
    lifecycle: Lifecycle,
    configured: Mapping[str, Any] | None = None,
) -> AsyncIterator[AsyncClient]:
    """A router over the backends, and a client of it that retries nothing; `configured` where models name a backend."""
    options = {} if configured is None else {"backends": dict(configured)}
    with tempfile.TemporaryDirectory() as folder:
        catalog = await read_catalog(Settings(models=dict(models), **options), Path(folder))
    settings = ServerSettings(listen="127.0.0.1:0", drain_grace=0.0)
    server = RouterServer(settings, catalog, dict(backends), lifecycle=lifecycle)
    await server.start()
    try:
        async with AsyncClient(server.address, retry=None) as client:
            yield client
    finally:
        await server.drain()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


def busy(backends: Mapping[str, Backend]) -> str:
    """Backends that still count requests."""
    statuses = {name: backend.status() for name, backend in backends.items()}
    names = [name for name, status in statuses.items() if status.active_requests or status.queued_requests]
    return f"requests in {', '.join(names)}" if names else ""


def children() -> int:
    """Processes that this one has started."""
    return len(psutil.Process().children(recursive=True))


async def cell(lane: Lane, fault: str, stage: str) -> tuple[str, str]:
    """What the victim was told, and what is wrong with that."""
    expected = lane.expected[fault].get(stage)
    if expected is None:
        return "-", ""
    problems: list[str] = []
    async with lane.scene(fault) as scene:
        for model, fields in scene.beside.items():
            await Asked(model, 1, fields).through(scene.client)
        before = len(asyncio.all_tasks()), children()
        await scene.prepare(stage)
        requests = [Asked(model, NEIGHBOUR, fields) for model, fields in scene.beside.items()]
        neighbours = [asyncio.create_task(request.through(scene.client)) for request in requests]
        give_back = await scene.ahead() if stage == "queued" else lambda: None
        victim = Asked("sick", VICTIM, scene.victim)
        task = asyncio.create_task(victim.through(scene.client))

        async def reached() -> bool:
            return task.done() or await scene.reached(stage, victim)

        await until(reached)
        if task.done():
            problems.append("it ended before the fault")
        await scene.happen(stage)
        give_back()
        await task
        if victim.reason != expected:
            problems.append(f"expected {expected or 'an answer'}")
        if victim.reason not in (ANSWERED, STALLED) and bool(victim.text) != (stage == "decode"):
            problems.append(f"text {victim.text!r}")
        for beside in await asyncio.gather(*neighbours):
            if beside.reason or beside.told != NEIGHBOUR:
                problems.append(f"{beside.model} got {beside.reason or f'{beside.told} tokens'}")
        problems += await _afterwards(scene, before)
    return victim.reason or "answered", "; ".join(problems)


async def _afterwards(scene: Scene, before: tuple[int, int]) -> list[str]:
    """What is wrong once the fault is over."""
    problems = []
    if scene.comes_back:

        async def answered() -> bool:
            return (await Asked("sick", 3, scene.victim).through(scene.client)).reason == ANSWERED

        await scene.heal()
        try:
            await until(answered, 20)
        except TimeoutError:
            problems.append("it does not come back")
    await scene.heal()

    async def clean() -> bool:
        gc.collect()
        return not scene.left_over() and len(asyncio.all_tasks()) <= before[0] + 1 and children() <= before[1]

    try:
        await until(clean, 5)
    except TimeoutError:
        left = len(asyncio.all_tasks()) - before[0], children() - before[1]
        problems.append(f"left over: {scene.left_over()}, {left[0]} tasks, {left[1]} processes")
    return problems
