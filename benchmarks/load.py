"""Many streams through the whole router, and what it adds to them: `make load`.

The router runs in a process of its own, with a scripted backend that sends deltas at a steady rate, each with the time
at which it was made. The clients read them over loopback and compare: the monotonic clock is one for all processes.
First from gRPC alone, without a router, to compare with; then through the router; then with the MLX engine decoding two
streams beside it, in the router's process.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
from mtp_router.generate import v1

from router.client import AsyncClient

STREAM = "/mtp_router.generate.v1.GenerateService/StreamGenerate"
RAMP = 5.0  # seconds over which the streams begin
SHARES = (0.5, 0.9, 0.99, 0.999)
CHANNELS = 8  # connections that the streams share


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


async def one_stream(method: Any, request: bytes, seen: Seen, settled: float) -> None:
    """Reads one answer as raw messages: decoding them in Python would be measured along with the router."""
    began, first = time.monotonic(), True
    call = method(request, timeout=600)
    try:
        async for message in call:
            now = time.monotonic_ns()
            seen.messages += 1
            made = message.rfind(b" ")
            if first and made > 0:
                first = False
                seen.first.append(now / 1e9 - began)
            elif made > 0 and now / 1e9 > settled:
                digits = message[:made].split()[-1]
                while not digits.isdigit():
                    digits = digits[1:]
                seen.late.append((now - int(digits)) / 1e9)
    except grpc.aio.AioRpcError as error:
        seen.failures.append(f"{error.code().name} {error.details()}")


async def all_streams(address: str, streams: int, rate: float, seconds: float) -> Seen:
    request = v1.StreamGenerateRequest(input=v1.GenerationInput(model="scripted"))
    request.input.text = f"{rate} {int(rate * seconds)}"
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(CHANNELS)]
    methods = [channel.unary_stream(STREAM) for channel in channels]
    seen, tasks, began = Seen(), [], time.monotonic()
    for number in range(streams):
        await asyncio.sleep(began + number * RAMP / streams - time.monotonic())
        body = request.SerializeToString()
        tasks.append(asyncio.create_task(one_stream(methods[number % CHANNELS], body, seen, began + RAMP)))
    await asyncio.gather(*tasks)
    for channel in channels:
        await channel.close()
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


async def measure(arguments: argparse.Namespace, *options: str) -> tuple[Seen, dict[str, Any], int]:
    stand, busy, ended, tokens = Stand(*options), None, asyncio.Event(), 0
    try:
        if "--mlx" in options:
            async with AsyncClient(stand.address) as client:
                await client.preload("words")
            busy = asyncio.create_task(decoding(stand.address, ended))
        gc.collect()
        gc.disable()  # the client's own pauses are not the router's
        seen = await all_streams(stand.address, arguments.streams, arguments.rate, arguments.seconds)
        gc.enable()
        ended.set()
        if busy is not None:
            tokens = await busy
    finally:
        told = stand.end()
    return seen, told, tokens


@dataclass
class Shares:
    """99th percentiles, seconds."""

    late: float
    first: float


def report(title: str, arguments: argparse.Namespace, *options: str) -> tuple[Shares, bool]:
    """Prints one measurement. Returns what the limits are for, and whether nothing failed."""
    began = time.monotonic()
    seen, told, tokens = asyncio.run(measure(arguments, *options))
    seconds = time.monotonic() - began
    expected = arguments.streams * int(arguments.rate * arguments.seconds)
    print(f"\n{title}: {arguments.streams} streams x {arguments.rate:g} deltas/s x {arguments.seconds:g} s")
    print(f"  failures              {len(seen.failures)} {seen.failures[:2] or ''}")
    print(f"  messages              {seen.messages} ({expected} deltas were made)")
    measured = (("delta's way", seen.late), ("first token", seen.first), ("loop tick delay", told["ticks"]))
    for name, values in measured:
        shares = "  ".join(
            f"p{share * 100:g} {percentile(values, share) * 1e3:.2f}" for share in (0.5, 0.9, 0.99, 0.999)
        )
        print(f"  {name:<22}{shares} ms")
    print(f"  the server's CPU      {told['cpu'] * 1e6 / seen.messages:.0f} us a message")
    if tokens:
        print(f"  engine's tokens       {tokens / seconds:.0f}/s")
    return Shares(percentile(seen.late, 0.99), percentile(seen.first, 0.99)), not seen.failures


def judge(found: Shares, alone: Shares, late: float, first: float) -> bool:
    """Prints what the router added to gRPC alone at the 99th percentile. Returns whether that is within the limits."""
    added = Shares(found.late - alone.late, found.first - alone.first)
    good = added.late < late and added.first < first
    told = f"{added.late * 1e3:.2f} ms to a delta (limit {late * 1e3:g}), "
    told += f"{added.first * 1e3:.2f} ms to the first token ({first * 1e3:g})"
    print(f"  added at p99          {told}: {'kept' if good else 'NOT KEPT'}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    cores = os.cpu_count()
    print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, grpcio {grpc.__version__}, load "
          f"average {statistics.fmean(os.getloadavg()[:1]):.1f} before")  # fmt: skip
    alone, good = report("gRPC alone", arguments, "--bare")
    found, whole = report("the router", arguments)
    good = judge(found, alone, 0.002, 0.010) and good and whole
    found, whole = report("with the MLX engine decoding beside it", arguments, "--mlx")
    good = judge(found, alone, 0.015, 0.015) and good and whole
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
