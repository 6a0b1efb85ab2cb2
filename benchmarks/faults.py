"""What the caller is told where a backend fails, fault by stage: `make faults`.

Each cell starts a router (in this process) over two doubles of an Ollama server (processes on loopback), brings one
request to a stage, lets the fault happen, and holds what it was told against the table below. Meanwhile another request
is answered by the other double; afterwards no task, file, place or line may be left over.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.ollama_process import Double  # noqa: E402

from router.backends import ollama_client  # noqa: E402
from router.backends.ollama import OllamaBackend  # noqa: E402
from router.catalog import read_catalog  # noqa: E402
from router.client import AsyncClient, RouterCallError  # noqa: E402
from router.lifecycle import Lifecycle  # noqa: E402
from router.server import RouterServer  # noqa: E402
from router.settings import ModelSettings, OllamaSettings, ServerSettings, Settings  # noqa: E402

STAGES = ("queued", "loading", "prefill", "decode")
FIRST_TOKEN, TOKEN = 1.2, 0.6  # seconds without a sign of life
LOAD, PREFILL, WORD = 0.4, 0.4, 0.03  # seconds that the double takes
PROMPT = [{"role": "user", "content": "count"}]
UNAVAILABLE, FAILED, STALLED, FULL = "BACKEND_UNAVAILABLE", "BACKEND_FAILED", "BACKEND_STALLED", "QUEUE_FULL"


@dataclass(frozen=True)
class Fault:
    """What happens, and what a caller is told who is before the first token, and after it.

    `early` and `late` set the double's faults; `act` does something to its process. "" stands for no fault: the answer
    goes on. `late_reason` None: it cannot happen then. `queued_reason` is for one who waits, where that differs.
    """

    early: dict[str, Any]
    early_reason: str
    late: dict[str, Any] | None
    late_reason: str | None
    act: Callable[[Double], None] = lambda double: None
    queued_reason: str | None = None


def breaks(how: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"die_after": 0, "how": how}, {"die_after": 1, "how": how}


def kill(double: Double) -> None:
    double.process.send_signal(signal.SIGKILL)


def stop(double: Double) -> None:
    double.process.send_signal(signal.SIGSTOP)


def refused(status: int, text: str, reason: str) -> Fault:
    # A status cannot follow a body: once tokens have come Ollama can only send a line that tells of an error.
    return Fault({"status": status, "error": text}, reason, {"die_after": 1, "how": "error"}, FAILED)


FAULTS = {
    "refuses connections": Fault({"closed": True}, "", {"closed": True}, "", queued_reason=UNAVAILABLE),
    "stalls before headers": Fault({"silent": True}, STALLED, None, None),
    "stalls mid-stream": Fault(*[breaks("stall")[1], STALLED] * 2),
    "resets": Fault(breaks("reset")[0], UNAVAILABLE, breaks("reset")[1], FAILED),
    "garbage line": Fault(breaks("garbage")[0], FAILED, breaks("garbage")[1], FAILED),
    "oversize line": Fault(breaks("endless")[0], FAILED, breaks("endless")[1], FAILED),
    "wrong model": Fault(*[{"other_model": True}, FAILED] * 2),
    "401": refused(401, "unauthorized", UNAVAILABLE),
    "429": refused(429, "too many requests", FULL),
    "503": refused(503, "server busy", FULL),
    "closes without final": Fault(breaks("quiet")[0], UNAVAILABLE, breaks("quiet")[1], FAILED),
    "SIGKILL": Fault({}, UNAVAILABLE, {}, FAILED, kill),
    "SIGSTOP": Fault({}, STALLED, {}, STALLED, stop),
}


@dataclass
class Outcome:
    """What a request came to."""

    reason: str
    text: str
    seconds: float


async def ask(client: AsyncClient, model: str, tokens: int, came: asyncio.Event | None = None) -> Outcome:
    """The whole of one answer."""
    began, text = time.monotonic(), ""
    answer = client.stream(model, messages=PROMPT, temperature=0.0, max_output_tokens=tokens, deadline=30)
    try:
        async for delta in answer:
            text += delta.text
            if came is not None:
                came.set()
    except RouterCallError as error:
        return Outcome(error.reason or error.code.name, text, time.monotonic() - began)
    return Outcome("", text, time.monotonic() - began)


@asynccontextmanager
async def service(
    doubles: dict[str, Double], **options: Any
) -> AsyncIterator[tuple[AsyncClient, dict[str, OllamaBackend]]]:
    """A router over the doubles, with a model for each, of the same name; `options` are the backends'."""
    lifecycle, shared = Lifecycle(), {"first_token_timeout": FIRST_TOKEN, "token_timeout": TOKEN, "check_interval": 0.2}
    configured = {
        name: OllamaSettings.model_validate({"host": double.address, **shared, **options})
        for name, double in doubles.items()
    }
    backends = {name: OllamaBackend(name, settings, lifecycle) for name, settings in configured.items()}
    models = {name: ModelSettings(ollama="smol", backend=name) for name in doubles}
    with tempfile.TemporaryDirectory() as folder:
        catalog = await read_catalog(Settings(models=models, backends=dict(configured)), Path(folder))
    settings = ServerSettings(listen="127.0.0.1:0", drain_grace=0.0)
    server = RouterServer(settings, catalog, dict(backends), lifecycle=lifecycle)
    await server.start()
    try:
        async with AsyncClient(server.address, retry=None) as client:
            yield client, backends
    finally:
        await server.drain()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


async def happen(double: Double, fault: Fault, stage: str, base: dict[str, Any]) -> None:
    """The fault comes about now."""
    late = stage == "decode"
    wanted = fault.late if late else fault.early
    if fault.act is not Fault.__dataclass_fields__["act"].default:
        fault.act(double)
    elif wanted is not None:
        await asyncio.to_thread(double.fail, **{**base, **wanted})


async def bring(client: AsyncClient, backend: OllamaBackend, double: Double, fault: Fault, stage: str) -> Outcome:
    """One request, brought to the stage, and what it came to once the fault had come about."""
    base: dict[str, Any] = {"slow": WORD}
    if stage == "loading":
        base["load_seconds"] = LOAD
    elif stage != "queued":
        await ask(client, "sick", 1)  # it is loaded
        base["prefill_seconds"] = PREFILL
    await asyncio.to_thread(double.fail, **base)
    ahead = None
    if stage == "queued":
        ahead = client.stream("sick", messages=PROMPT, temperature=0.0, max_output_tokens=10_000)
        await anext(aiter(ahead))
    await asyncio.to_thread(double.tell, stage="")
    came = asyncio.Event()
    victim = asyncio.create_task(ask(client, "sick", 60, came))

    async def there() -> bool:
        if stage == "queued":
            return backend.status().queued_requests == 1
        if stage == "decode":
            return came.is_set()
        reached = await asyncio.to_thread(double.tell)
        return str(reached["stage"]) == ("load" if stage == "loading" else "prefill")

    await until(there)
    await happen(double, fault, stage, base)
    if ahead is not None:
        ahead.close()
    return await victim


def left_over(backends: dict[str, OllamaBackend]) -> str:
    """What is still there that should not be."""
    counts = {name: backend.status() for name, backend in backends.items()}
    busy = [name for name, status in counts.items() if status.active_requests or status.queued_requests]
    return f"requests in {', '.join(busy)}" if busy else ""


async def cell(name: str, stage: str) -> tuple[str, str]:
    """What the caller was told, and what is wrong with that."""
    fault = FAULTS[name]
    expected = fault.late_reason if stage == "decode" else fault.early_reason
    if stage == "queued" and fault.queued_reason is not None:
        expected = fault.queued_reason
    if expected is None:
        return "-", ""
    doubles = {"sick": Double(), "well": Double()}
    problems = []
    try:
        async with service(doubles) as (client, backends):
            await ask(client, "well", 1)
            tasks = len(asyncio.all_tasks())
            await asyncio.to_thread(doubles["well"].fail, slow=0.01)
            neighbour = asyncio.create_task(ask(client, "well", 100))
            outcome = await bring(client, backends["sick"], doubles["sick"], fault, stage)
            beside = await neighbour
            if outcome.reason != expected:
                problems.append(f"expected {expected or 'an answer'}")
            if (stage == "decode") != bool(outcome.text) and outcome.reason not in ("", STALLED):
                problems.append(f"text {outcome.text!r}")
            if beside.reason or len(beside.text.split()) != 100:
                problems.append(f"the neighbour got {beside.reason or 'another text'}")

            async def clean() -> bool:
                gc.collect()
                return not left_over(backends) and len(asyncio.all_tasks()) <= tasks + 1

            try:
                await until(clean, 5)
            except TimeoutError:
                problems.append(f"left over: {left_over(backends)}, {len(asyncio.all_tasks()) - tasks} tasks")
    finally:
        for double in doubles.values():
            double.process.send_signal(signal.SIGCONT)
            double.kill()
    return outcome.reason or "answered", "; ".join(problems)


async def all_cells(only: str | None) -> int:
    wrong, began = 0, time.monotonic()
    await cell("resets", "decode")  # imports and pools are there from now on
    gc.collect()
    files, tasks = len(os.listdir("/dev/fd")), len(asyncio.all_tasks())
    print(f"{'fault':<24}" + "".join(f"{stage:<22}" for stage in STAGES))
    for name in FAULTS:
        if only is not None and only not in name:
            continue
        row, remarks = [], []
        for stage in STAGES:
            told, problem = await cell(name, stage)
            row.append(f"{told}{' !' if problem else ''}")
            if problem:
                remarks.append(f"    {name}, {stage}: {problem}")
        wrong += len(remarks)
        print(f"{name:<24}" + "".join(f"{item:<22}" for item in row), *remarks, sep="\n" if remarks else "", flush=True)
    left = 0, 0
    for _ in range(100):  # gRPC closes its sockets when it comes to it
        gc.collect()
        left = len(os.listdir("/dev/fd")) - files, len(asyncio.all_tasks()) - tasks
        if left[0] <= 0 and not left[1]:
            break
        await asyncio.sleep(0.1)
    print(f"{wrong} cells are wrong; left over at the end: {left[0]} files, {left[1]} tasks; "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return 1 if wrong or left[0] > 0 or left[1] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="faults whose name holds this")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    ollama_client.MAX_LINE_BYTES = 2**20  # an endless line is given up sooner
    return asyncio.run(all_cells(arguments.only))


if __name__ == "__main__":
    sys.exit(main())
