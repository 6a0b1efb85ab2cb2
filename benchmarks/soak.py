"""Thousands of short requests with cancels, slow readers and a backend that keeps dying: `make soak`.

The router runs in a process of its own (see soak_server) over a double of an Ollama server, which is killed and started
again on the same port. Nothing may be left over there, and its memory may not grow: the slope of the resident size over
the requests after the warm-up. gRPC grows by itself where calls are cancelled (grpc/grpc#43360: what a batch of
operations holds is only freed where it succeeds), so the same requests first go to a gRPC server without a router, for
comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.ollama_process import Double  # noqa: E402

from benchmarks.soak_server import MODEL  # noqa: E402
from router.client import AsyncClient, RouterCallError  # noqa: E402

MESSAGES = [{"role": "user", "content": "one two three four five six seven eight"}]
EXPECTED = MESSAGES[0]["content"] + " "
WORDS = len(EXPECTED.split())
PACE = 100  # words a second, as of a model: what comes all at once is being written when a caller leaves
BARE = f"{PACE} {WORDS}"  # the same of a server without a router
CUT = "CUT SHORT WITHOUT AN ERROR"
MAX_SLOPE = 50.0  # bytes a request
SAMPLES = 40  # looks at memory
WARM_UP = 0.25  # share of the requests before the slope is taken
COUNTS = ("tasks", "files", "requests", "children")


def slope(points: list[tuple[int, int]]) -> float:
    """Least squares, bytes a request."""
    n, sx, sy = len(points), sum(x for x, _ in points), sum(y for _, y in points)
    sxx, sxy = sum(x * x for x, _ in points), sum(x * y for x, y in points)
    return (n * sxy - sx * sy) / (n * sxx - sx * sx)


def paced(port: int = 0) -> Double:
    """A double that sends a word at a time."""
    double = Double(port)
    double.fail(slow=1 / PACE)
    return double


class Server:
    """The process that is asked.

    Args:
        ollama: address of the double behind its router; None for gRPC alone.
    """

    def __init__(self, ollama: str | None) -> None:
        command = [sys.executable, "-m", "benchmarks.soak_server", *([ollama] if ollama else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.address = str(self._line()["address"])
        self._asking = asyncio.Lock()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def _ask(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._line()

    async def held(self) -> dict[str, Any]:
        """What it holds, see soak_server."""
        async with self._asking:
            return await asyncio.to_thread(self._ask)

    def end(self) -> None:
        """Ends it in order; raises where it does not."""
        self.process.communicate("", timeout=60)


class Soak:
    """The requests, and what came of them.

    Args:
        double: is killed now and then; None: nothing is.
    """

    def __init__(
        self, client: AsyncClient, server: Server, double: Double | None, arguments: argparse.Namespace
    ) -> None:
        self.client = client
        self.server = server
        self.double = double
        self.arguments = arguments
        self.chooser = random.Random(7)
        self.came: Counter[str] = Counter()
        self.sent = 0
        self.memory: list[tuple[int, int]] = []
        self._at_kill = asyncio.Lock()

    async def worker(self) -> None:
        while self.sent < self.arguments.requests:
            self.sent += 1
            number = self.sent
            if self.double is not None and number % self.arguments.kill_every == 0:
                await self.kill(self.double)
            draw = self.chooser.random()
            slow = self.arguments.cancelled + self.arguments.slow
            kind = "cancelled" if draw < self.arguments.cancelled else "slow" if draw < slow else "read"
            await self.one(kind)
            if number % max(1, self.arguments.requests // SAMPLES) == 0:
                self.memory.append((number, int((await self.server.held())["memory"])))

    async def one(self, kind: str) -> None:
        fields: dict[str, Any] = {"messages": MESSAGES} if self.double is not None else {"prompt": BARE}
        answer = self.client.stream(MODEL, temperature=0.0, deadline=30, **fields)
        text = ""
        try:
            if kind == "cancelled" and self.chooser.random() < 0.5:
                await asyncio.sleep(self.chooser.uniform(0, 0.01))
            else:
                async for delta in answer:
                    text += delta.text
                    if kind == "cancelled":
                        break
                    if kind == "slow":
                        await asyncio.sleep(0.02)
        except RouterCallError as error:
            self.came[error.reason or error.code.name] += 1
            await asyncio.sleep(min(error.retry_after or 0.0, 0.3))  # as the router asks, if not for as long
            return
        finally:
            answer.close()
        if kind == "cancelled":
            self.came["cancelled"] += 1
        else:
            whole = len(text.split()) == WORDS if self.double is None else text == EXPECTED
            self.came["whole" if whole else CUT] += 1

    async def all(self) -> None:
        """Every request."""
        await asyncio.gather(*(self.worker() for _ in range(self.arguments.at_once)))

    def slope(self) -> float:
        """Bytes a request after the warm-up."""
        return slope([point for point in self.memory if point[0] >= WARM_UP * self.arguments.requests])

    async def kill(self, double: Double) -> None:
        """SIGKILL, and another double in its place."""
        async with self._at_kill:
            port = int(double.address.rpartition(":")[2])
            await asyncio.to_thread(double.kill)
            self.double = await asyncio.to_thread(paced, port)
            self.came["kills"] += 1


async def grpc_alone(arguments: argparse.Namespace) -> float:
    """Bytes that gRPC grows by a request."""
    server = Server(None)
    async with AsyncClient(server.address) as client:
        soak = Soak(client, server, None, arguments)
        await soak.all()
    server.end()
    print(f"gRPC alone: {soak.slope():.1f} bytes a request; {dict(soak.came)}", flush=True)
    return soak.slope()


async def through_router(arguments: argparse.Namespace) -> tuple[Soak, dict[str, Any], dict[str, Any]]:
    """The requests, and what the router held before and after them."""
    server = Server((double := paced()).address)
    async with AsyncClient(server.address, retry=None) as client:
        soak = Soak(client, server, double, arguments)
        for _ in range(20):
            await soak.one("read")
        looks = []
        for _ in range(20):  # the watch over the double asks it now and then
            await asyncio.sleep(0.1)
            looks.append(await server.held())
        before = {name: max(look[name] for look in looks) for name in COUNTS}
        await soak.all()
        after = await server.held()
        for _ in range(100):
            if not grown(before, after):
                break
            await asyncio.sleep(0.1)
            after = await server.held()
    server.end()
    assert soak.double is not None
    soak.double.kill()
    return soak, before, after


def grown(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return any(after[name] > before[name] for name in COUNTS)


async def run(arguments: argparse.Namespace) -> int:
    grpc_grows, began = await grpc_alone(arguments), time.monotonic()
    soak, before, after = await through_router(arguments)
    grows = soak.slope()
    halves = [slope(part) for part in (soak.memory[: len(soak.memory) // 2], soak.memory[len(soak.memory) // 2 :])]
    print(f"{arguments.requests} requests, {arguments.at_once} at once, in {time.monotonic() - began:.0f} s")
    for name, count in sorted(soak.came.items()):
        print(f"  {name:<30}{count:>8}")
    for name in COUNTS:
        print(f"  {name:<30}{before[name]:>8} -> {after[name]}")
    print(f"  {'memory after warm-up':<30}{grows:>8.1f} bytes a request (limit {MAX_SLOPE:g})")
    print(f"  {'first half, second half':<30}{halves[0]:>8.1f}, {halves[1]:.1f}")
    print(f"  {'of it the router':<30}{grows - grpc_grows:>8.1f} bytes a request")
    leaked = grown(before, after)
    if leaked:
        print(f"  connections: {after['connections']}")
    return 1 if leaked or grows >= MAX_SLOPE or soak.came[CUT] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--cancelled", type=float, default=0.30, help="share of requests")
    parser.add_argument("--slow", type=float, default=0.05, help="share of requests")
    parser.add_argument("--kill-every", type=int, default=500)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    return asyncio.run(run(arguments))


if __name__ == "__main__":
    sys.exit(main())
