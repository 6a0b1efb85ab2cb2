"""Many streams through the whole router, and what it adds to them: `make load`.

The server runs in a process of its own, with a scripted backend that sends deltas at a steady rate, each with the time
at which it was made. The client reads them over loopback, as frames (see `benchmarks.frames`), and compares: the
monotonic clock is one for all processes. Two figures: a delta's way, from when the backend made it until the client has
it, for every delta once all streams run; and the first token, from the call until it is there, for the streams, which
begin in the first five seconds, and for short requests that come at a steady rate while all streams run.

Added is what the router adds to gRPC alone: the difference of the 99th percentiles between two measurements of one run,
the second through a server of the same streams that has no router. gRPC on the same event loop, the client, loopback
and a busy machine are in both; the absolute figures are printed too. It is measured with idle cores, and with the MLX
engine decoding two streams beside; gRPC alone then has an engine beside it, too. `--thread` also measures the engine on
a thread of the router, for comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
from mtp_router.generate import v1

from benchmarks.frames import Connection, connect
from router import event_loop
from router.client import AsyncClient

STREAM = "/mtp_router.generate.v1.GenerateService/StreamGenerate"
RAMP = 5.0  # seconds over which the streams begin
SHARES = (0.5, 0.9, 0.99, 0.999)
CONNECTIONS = 8  # that the streams share
SHORT = 20.0  # short requests a second
PATIENCE = 600.0  # seconds that an answer may take
MADE = re.compile(rb"@(\d+) ")  # when a delta was made, in nanoseconds; a message may hold several, merged
PREFIX = 5  # bytes of gRPC's before a message
FINISHED = v1.StreamGenerateResponse(finished=v1.GenerationFinished()).SerializeToString()[:1]  # the field's number


@dataclass(frozen=True)
class Asked:
    """A request, and how many deltas its answer has."""

    request: bytes
    deltas: int


@dataclass
class Seen:
    """What the clients saw; seconds."""

    late: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    messages: int = 0
    failures: list[str] = field(default_factory=list)


def percentile(values: list[float], share: float) -> float:
    """The value below which that share lies; infinite where there is none."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else float("inf")


class Stand:
    """The router's process (see `benchmarks.stand`)."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "benchmarks.stand", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = json.loads(self.process.stdout.readline())["address"]

    def end(self) -> dict[str, Any]:
        """What it measured of itself."""
        told, _ = self.process.communicate("", timeout=60)
        return dict(json.loads(told.splitlines()[-1]))


async def one_stream(connection: Connection, answer: Asked, seen: Seen, settled: float) -> None:
    """Reads one answer. Its first delta counts, and others that come after `settled`."""
    began, left, finished = time.monotonic(), answer.deltas, False

    def heard(data: bytes) -> None:
        nonlocal left, finished
        now = time.monotonic_ns()
        seen.messages += 1
        finished = data.startswith(FINISHED, PREFIX)
        made = MADE.findall(data)
        if made and left == answer.deltas:
            seen.first.append(now / 1e9 - began)
        elif made and now / 1e9 > settled:
            seen.late += [(now - int(digits)) / 1e9 for digits in made]
        left -= len(made)

    try:
        async with asyncio.timeout(PATIENCE):
            trailers = await connection.call(STREAM, answer.request, heard)
    except (ConnectionError, TimeoutError) as error:
        seen.failures.append(str(error) or "no end of the answer")
        return
    if left or not finished:
        what = "finished" if finished else "not finished"
        seen.failures.append(f"{what}, {left} of {answer.deltas} deltas missing, trailers {trailers!r}")


def scripted(rate: float, count: int) -> Asked:
    """A request for so many deltas."""
    request = v1.StreamGenerateRequest(input=v1.GenerationInput(model="scripted"))
    request.input.text = f"{rate} {count}"
    return Asked(request.SerializeToString(), count)


async def all_streams(address: str, streams: int, rate: float, seconds: float) -> Seen:
    with ExitStack() as stack:
        connections = []
        for _ in range(CONNECTIONS):
            connections.append(await connect(address))
            stack.callback(connections[-1].close)
        seen, tasks, began = Seen(), [], time.monotonic()
        # At random: streams that began at even intervals would all send at the same few moments of a period.
        rng = random.Random(0)
        starts = sorted(rng.uniform(0, RAMP) for _ in range(streams))
        plan = [(start, scripted(rate, int(rate * seconds))) for start in starts]
        plan += [(RAMP + number / SHORT, scripted(rate, 1)) for number in range(int(SHORT * (seconds - RAMP)))]
        for number, (due, answer) in enumerate(plan):
            await asyncio.sleep(began + due - time.monotonic())
            connection = connections[number % CONNECTIONS]
            tasks.append(asyncio.create_task(one_stream(connection, answer, seen, began + RAMP)))
        await asyncio.gather(*tasks)
    return seen


async def decoding(address: str, ended: asyncio.Event) -> int:
    """Keeps the engine busy with two streams; returns the tokens that it made."""
    tokens = 0
    async with AsyncClient(address, retry=None) as client:

        async def again() -> None:
            nonlocal tokens
            while not ended.is_set():
                answer = client.stream("words", prompt="again", max_output_tokens=500, ignore_end_of_generation=True)
                async for delta in answer:
                    tokens += delta.token_count
                    if ended.is_set():
                        answer.close()
                        break

        await asyncio.gather(*(again() for _ in range(2)))
    return tokens


async def measure(arguments: argparse.Namespace, options: list[str], beside: bool) -> tuple[Seen, dict[str, Any], int]:
    """What clients saw, what the server measured of itself, and tokens of the engine.

    Args:
        options: of the server that is measured.
        beside: the engine decodes in another server.
    """
    stands = [Stand(*options), *([Stand("--mlx")] if beside else [])]
    busy, ended, tokens = None, asyncio.Event(), 0
    try:
        if beside or "--mlx" in options:
            async with AsyncClient(stands[-1].address) as client:
                await client.preload("words")
            busy = asyncio.create_task(decoding(stands[-1].address, ended))
        gc.collect()
        gc.disable()  # the client's own pauses are not the router's
        seen = await all_streams(stands[0].address, arguments.streams, arguments.rate, arguments.seconds)
        gc.enable()
        ended.set()
        if busy is not None:
            tokens = await busy
    finally:
        told = [stand.end() for stand in stands]
    return seen, told[0], tokens


@dataclass
class Shares:
    """99th percentiles, seconds, and whether nothing failed."""

    late: float
    first: float
    whole: bool


def report(title: str, arguments: argparse.Namespace, *options: str, beside: bool = False) -> Shares:
    """Prints one measurement."""
    began = time.monotonic()
    seen, told, tokens = event_loop.run(measure(arguments, list(options), beside))
    seconds = time.monotonic() - began
    print(f"\n{title}")
    print(f"  messages              {seen.messages}, {len(seen.failures)} failures {seen.failures[:2] or ''}")
    measured = (("delta's way", seen.late), ("first token", seen.first), ("loop tick delay", told["ticks"]))
    for name, values in measured:
        shares = "  ".join(f"p{share * 100:g} {percentile(values, share) * 1e3:.2f}" for share in SHARES)
        print(f"  {name:<22}{shares} ms")
    print(f"  the server's CPU      {told['cpu'] * 1e6 / seen.messages:.0f} us a message")
    if tokens:
        print(f"  engine's tokens       {tokens / seconds:.0f}/s")
    sys.stdout.flush()
    return Shares(percentile(seen.late, 0.99), percentile(seen.first, 0.99), not seen.failures)


def judge(found: Shares, alone: Shares, late: float, first: float) -> bool:
    """Prints what the router added to gRPC alone at the 99th percentile. Returns whether that is within the limits."""
    added = found.late - alone.late, found.first - alone.first
    good = added[0] < late and added[1] < first and found.whole and alone.whole
    told = f"{added[0] * 1e3:.2f} ms to a delta (limit {late * 1e3:g}), "
    told += f"{added[1] * 1e3:.2f} ms to the first token ({first * 1e3:g})"
    print(f"  added at p99          {told}: {'kept' if good else 'NOT KEPT'}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--thread", action="store_true", help="compare with the engine on a thread of the router's")
    parser.add_argument("--only", choices=("idle", "busy"), help="without the engine, or with it")
    arguments = parser.parse_args()
    host = f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before"
    print(f"{host}, Python {platform.python_version()}, grpcio {grpc.__version__}")
    print(f"{arguments.streams} streams x {arguments.rate:g} deltas/s x {arguments.seconds:g} s")
    good = True
    if arguments.only != "busy":
        alone = report("gRPC alone", arguments, "--bare")
        good = judge(report("the router", arguments), alone, 0.002, 0.010)
    if arguments.only != "idle":
        alone = report("gRPC alone, the MLX engine decoding beside it", arguments, "--bare", beside=True)
        found = report("the router, its MLX engine decoding", arguments, "--mlx")
        good = judge(found, alone, 0.015, 0.015) and good
        if arguments.thread:
            found = report("the router, its MLX engine decoding on a thread", arguments, "--mlx", "--thread")
            judge(found, alone, 0.015, 0.015)  # for comparison
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
