"""Thousands of short requests with cancels, slow readers and a backend that keeps dying: `make soak`.

The router runs in this process over a double of an Ollama server, which is killed and started again on the same port.
Nothing may be left over, and memory may not grow: the slope of the resident size over the requests after the warm-up.
gRPC grows by itself where calls are cancelled, so the same requests first go to a gRPC server without a router, in a
process of its own, which is measured alike; what the router adds is the difference, and the limit is for that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.ollama_process import Double  # noqa: E402

from benchmarks.faults_ollama import service  # noqa: E402
from benchmarks.stand import BareServer  # noqa: E402
from router.backends.ollama import OllamaBackend  # noqa: E402
from router.client import AsyncClient, RouterCallError  # noqa: E402

MESSAGES = [{"role": "user", "content": "one two three four five six seven eight"}]
EXPECTED = MESSAGES[0]["content"] + " "
WORDS = len(EXPECTED.split())
BARE = f"500 {WORDS}"  # words a second, and words, of a server without a router
CUT = "CUT SHORT WITHOUT AN ERROR"
MAX_SLOPE = 50.0  # bytes a request
SAMPLES = 40  # looks at memory
WARM_UP = 0.25  # share of the requests before the slope is taken


def slope(points: list[tuple[int, int]]) -> float:
    """Least squares, bytes a request."""
    n, sx, sy = len(points), sum(x for x, _ in points), sum(y for _, y in points)
    sxx, sxy = sum(x * x for x, _ in points), sum(x * y for x, y in points)
    return (n * sxy - sx * sy) / (n * sxx - sx * sx)


def resident() -> int:
    """Bytes in memory, without what the allocator keeps for later where it can be told to give that back (glibc)."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


class Soak:
    """The requests, and what came of them.

    Args:
        double: is killed now and then; None: nothing is.
    """

    def __init__(self, client: AsyncClient, double: Double | None, arguments: argparse.Namespace) -> None:
        self.client = client
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
                self.memory.append((number, resident()))

    async def one(self, kind: str) -> None:
        fields: dict[str, Any] = {"messages": MESSAGES} if self.double is not None else {"prompt": BARE}
        answer = self.client.stream("sick", temperature=0.0, deadline=30, **fields)
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
            self.double = await asyncio.to_thread(Double, port)
            self.came["kills"] += 1


def counts(backend: OllamaBackend) -> dict[str, int]:
    gc.collect()
    status = backend.status()
    return {
        "tasks": len(asyncio.all_tasks()),
        "files": len(os.listdir("/dev/fd")),
        "requests": status.active_requests + status.queued_requests,
        "children": len(psutil.Process().children()),
    }


async def alone(arguments: argparse.Namespace) -> None:
    """The same from gRPC without a router; prints the slope."""
    server = BareServer()
    await server.start()
    async with AsyncClient(server.address) as client:
        soak = Soak(client, None, arguments)
        await soak.all()
    await server.drain()
    print(json.dumps({"slope": soak.slope(), "came": soak.came}), flush=True)


def grpc_alone(arguments: argparse.Namespace) -> float:
    """Bytes that gRPC grows by a request."""
    command = [sys.executable, "-m", "benchmarks.soak", "--alone", "--requests", str(arguments.requests)]
    command += ["--cancelled", str(arguments.cancelled), "--slow", str(arguments.slow)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"gRPC alone: {told['slope']:.1f} bytes a request; {told['came']}", flush=True)
    return float(told["slope"])


async def run(arguments: argparse.Namespace) -> int:
    grpc_grows = await asyncio.to_thread(grpc_alone, arguments)
    double, began = Double(), time.monotonic()
    async with service({"sick": double}, parallel=8, max_queued=1000) as (client, backends):
        backend = backends["sick"]
        soak = Soak(client, double, arguments)
        for _ in range(20):
            await soak.one("read")
        looks = []
        for _ in range(20):  # the watch over the double asks it now and then
            await asyncio.sleep(0.1)
            looks.append(counts(backend))
        before = {name: max(look[name] for look in looks) for name in looks[0]}
        await soak.all()
        after = counts(backend)
        for _ in range(100):
            if all(after[name] <= before[name] for name in before):
                break
            await asyncio.sleep(0.1)
            after = counts(backend)
        connections = [f"{item.status} to {item.raddr}" for item in psutil.Process().net_connections()]
        soak.double.kill()
    grows = soak.slope()
    halves = [slope(part) for part in (soak.memory[: len(soak.memory) // 2], soak.memory[len(soak.memory) // 2 :])]
    print(f"{arguments.requests} requests, {arguments.at_once} at once, in {time.monotonic() - began:.0f} s")
    for name, count in sorted(soak.came.items()):
        print(f"  {name:<30}{count:>8}")
    for name in before:
        print(f"  {name:<30}{before[name]:>8} -> {after[name]}")
    print(f"  {'memory after warm-up':<30}{grows:>8.1f} bytes a request")
    print(f"  {'first half, second half':<30}{halves[0]:>8.1f}, {halves[1]:.1f}")
    added = grows - grpc_grows
    print(f"  {'of it the router':<30}{added:>8.1f} bytes a request (limit {MAX_SLOPE:g})")
    leaked = any(after[name] > before[name] for name in before)
    if leaked:
        print(f"  connections: {sorted(connections)}")
    return 1 if leaked or added >= MAX_SLOPE or soak.came[CUT] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--cancelled", type=float, default=0.30, help="share of requests")
    parser.add_argument("--slow", type=float, default=0.05, help="share of requests")
    parser.add_argument("--kill-every", type=int, default=500)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if arguments.alone:
        asyncio.run(alone(arguments))
        return 0
    return asyncio.run(run(arguments))


if __name__ == "__main__":
    sys.exit(main())
