"""Rolling restarts under load, with the shipped client: `make drain`.

Routers (processes of their own, `mtp-router serve`) are restarted in turn while clients go on asking, each with both
addresses in its target. No request may fail: those that run are answered within the grace period, those that come
meanwhile go to the other router. With `--routers 1` there is none: they wait for it by the client's own retries.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.ollama_process import Double  # noqa: E402

from router.client import AsyncClient, RouterCallError  # noqa: E402

WORDS = "one two three four five six seven eight"
CONFIG = """
[server]
listen = "{listen}"
drain_grace = 20.0
[backends.ollama]
host = "{host}"
parallel = 64
max_queued = 1000
check_interval = 0.5
[models.words]
ollama = "smol"
"""


class Router:
    """`mtp-router serve`."""

    def __init__(self, config: Path) -> None:
        command = [str(Path(sys.executable).parent / "mtp-router"), "serve", "--json", "--config", str(config)]
        environment = {**os.environ, "MTP_ROUTER_HOME": str(config.parent)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the router did not start")
        self.address = str(json.loads(line)["address"])

    def end(self) -> int:
        """SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status


class Load:
    """Clients that ask one request after the other."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.came: Counter[str] = Counter()
        self.slowest = 0.0
        self.ended = False

    async def client(self) -> None:
        async with AsyncClient(self.address) as client:
            while not self.ended:
                began = time.monotonic()
                try:
                    await self.one(client)
                except RouterCallError as error:
                    self.came[f"FAILED: {error.reason or error.code.name}"] += 1
                self.slowest = max(self.slowest, time.monotonic() - began)

    async def one(self, client: AsyncClient) -> None:
        text = ""
        messages = [{"role": "user", "content": WORDS}]
        async for delta in client.stream("words", messages=messages, temperature=0.0):
            text += delta.text
        self.came["whole" if text == WORDS + " " else "FAILED: cut short"] += 1


async def start(folder: Path, double: Double, number: int, listen: str = "127.0.0.1:0") -> Router:
    """A router; a later one of the same number takes its address over."""
    config = folder / f"{number}.toml"
    config.write_text(CONFIG.format(listen=listen, host=double.address))
    return await asyncio.to_thread(Router, config)


async def run(arguments: argparse.Namespace) -> int:
    double, statuses, away = Double(), [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            await asyncio.to_thread(double.fail, slow=0.002)
            routers = [await start(folder, double, number) for number in range(arguments.routers)]
            load = Load("ipv4:" + ",".join(router.address for router in routers))
            clients = [asyncio.create_task(load.client()) for _ in range(arguments.clients)]
            for count in range(arguments.restarts):
                await asyncio.sleep(arguments.pause)
                number = count % arguments.routers
                began, address = time.monotonic(), routers[number].address
                statuses.append(await asyncio.to_thread(routers[number].end))
                routers[number] = await start(folder, double, number, address)
                away.append(time.monotonic() - began)
            await asyncio.sleep(arguments.pause)
            load.ended = True
            await asyncio.gather(*clients)
            statuses += [await asyncio.to_thread(router.end) for router in routers]
        finally:
            double.kill()
    failed = sum(count for name, count in load.came.items() if name != "whole")
    print(f"{arguments.restarts} restarts of {arguments.routers} routers under {arguments.clients} clients")
    for name, count in sorted(load.came.items()):
        print(f"  {name:<30}{count:>8}")
    print(f"  {'exit statuses':<30}{statuses}")
    print(f"  {'a restart took, at most':<30}{max(away):>8.2f} s")
    print(f"  {'slowest request':<30}{load.slowest:>8.2f} s")
    return 1 if failed or any(statuses) or not load.came["whole"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--routers", type=int, default=2, choices=(1, 2))
    parser.add_argument("--restarts", type=int, default=6)
    parser.add_argument("--pause", type=float, default=3.0, help="seconds between restarts")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
