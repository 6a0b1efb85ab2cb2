"""How late the event loop wakes a sleeper while the MLX engine decodes: `make ticks`.

Idle, then with two streams decoding: in a process of its own, as the router has it, and on a thread of this process, by
the interval at which threads take turns in Python. Where the kernel tells (Linux), the time that the loop's thread was
ready but had no core is taken off: it is another program's, not the engine's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

TICK = 0.005  # seconds
OWN = 0.005  # seconds after which CPython has threads take turns, by itself
# Where the engine decodes, and the interval.
CASES = (("idle", OWN), ("process", OWN), ("thread", OWN), ("thread", 0.0005), ("thread", 0.0001))


def unscheduled() -> Callable[[], float]:
    """Reads the seconds that this thread was ready and did not run; always 0 where the kernel does not tell."""
    path = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    if not path.exists():
        return lambda: 0.0
    file = path.open()

    def read() -> float:
        file.seek(0)
        return int(file.read().split()[1]) / 1e9

    return read


async def delays(seconds: float) -> list[float]:
    """Of each sleep, seconds."""
    waited, values, end = unscheduled(), [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        off, began = waited(), time.perf_counter()
        await asyncio.sleep(TICK)
        values.append(max(0.0, time.perf_counter() - began - TICK - (waited() - off)))
    return sorted(values)


async def measure(where: str, interval: float, seconds: float) -> None:
    """Prints one line."""
    from mlx_mtp_backend import Engine, EngineOptions, EngineProcess, GenerateParams
    from mlx_mtp_backend.synthetic import Recipe, write
    from router.settings import MlxSettings

    sys.setswitchinterval(interval)
    options = EngineOptions(max_streams=2, cpu_nice=MlxSettings().cpu_nice if where == "process" else 0)
    tokens, ended, readers = [0], threading.Event(), []
    make = EngineProcess if where == "process" else Engine
    with tempfile.TemporaryDirectory() as folder, make(options) as engine:
        if where != "idle":
            path = write(Path(folder) / "words", Recipe(kind="history", layers=4, hidden=256))
            await asyncio.wrap_future(engine.load("words", path))

            def read() -> None:
                while not ended.is_set():
                    stream = engine.submit(GenerateParams("words", (1, 2, 3), max_tokens=400, ignore_eos=True))
                    for event in stream:
                        tokens[0] += len(getattr(event, "tokens", ()))
                        if ended.is_set():
                            stream.cancel()

            readers = [threading.Thread(target=read) for _ in range(2)]
            for reader in readers:
                reader.start()
            await asyncio.sleep(1.0)
            tokens[0] = 0
        values = await delays(seconds)
        ended.set()
        for reader in readers:
            reader.join()
    shares = "".join(f"{values[int(len(values) * share)] * 1e3:>9.2f}" for share in (0.5, 0.9, 0.99))
    what = f"{where}, {interval * 1e3:g} ms"
    print(f"{what:<22}{shares}{tokens[0] / seconds:>12.0f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--one", nargs=2, metavar=("WHERE", "INTERVAL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        asyncio.run(measure(arguments.one[0], float(arguments.one[1]), arguments.seconds))
        return 0
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; loop delay in ms, engine's tokens/s")
    print(f"{'':<22}{'p50':>9}{'p90':>9}{'p99':>9}{'tokens/s':>12}")
    for where, interval in CASES:
        command = [sys.executable, "-m", "benchmarks.ticks", "--seconds", str(arguments.seconds)]
        subprocess.run([*command, "--one", where, str(interval)], check=True, stderr=subprocess.DEVNULL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
