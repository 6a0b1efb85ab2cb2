"""The demo behind `make demo`: fetches a model, starts the service, folds the bundled storm of alerts into a summary.

Exits 0, or non-zero with the last lines of the server's log where any step fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from incident_summary import STORM, describe, summarize

from router.client import Client, RouterCallError

START_LIMIT = 120.0  # seconds until the server listens
STOP_LIMIT = 60.0  # seconds for its drain
LOG_LINES = 15


@dataclass(frozen=True)
class Lane:
    """A model to show, and the name under which `mtp-router pull` knows it."""

    title: str
    model: str
    pull: str


LANES = [Lane("llama.cpp: a checkpoint without MTP heads", model="smollm2", pull="smollm2")]


class DemoError(Exception):
    """A step of the demo failed; the message says which."""


def mtp_router(*arguments: str) -> list[str]:
    """The command line of this very Python environment."""
    return [sys.executable, "-c", "import sys; from router.cli import main; sys.exit(main())", *arguments]


@contextmanager
def serving(log: IO[bytes]) -> Iterator[str]:
    """Runs the service on a free port until the block ends, then drains it. Yields its address."""
    command = mtp_router("serve", "--json", "--listen", "127.0.0.1:0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as server:
        assert server.stdout is not None
        watchdog = threading.Timer(START_LIMIT, server.kill)
        watchdog.start()
        try:
            line = server.stdout.readline()
            watchdog.cancel()
            if not line:
                raise DemoError("the server did not start")
            yield json.loads(line)["address"]
        finally:
            watchdog.cancel()
            status = _stop(server)
        if status != 0:
            raise DemoError(f"the server ended with status {status}")


def _stop(server: subprocess.Popen[bytes]) -> int:
    """Lets the server drain; its exit status."""
    server.terminate()
    try:
        return server.wait(STOP_LIMIT)
    except subprocess.TimeoutExpired:
        server.kill()
        raise DemoError(f"the server did not drain within {STOP_LIMIT:.0f} s") from None


def show(lane: Lane, client: Client) -> None:
    """Summarizes the storm on one lane."""
    storm = json.loads(STORM.read_text(encoding="utf-8"))
    print(f"\n== {lane.title}\n\n{len(storm['alerts'])} alerts, one summary:\n", flush=True)
    answer = summarize(client, lane.model, storm)
    if not answer.text.strip():
        raise DemoError(f"{lane.model} answered with no text")
    print("\n" + describe(answer), flush=True)


def main() -> int:
    """Runs the demo on every lane; its exit status."""
    for name in sorted({lane.pull for lane in LANES}):
        if subprocess.run(mtp_router("pull", name), check=False).returncode != 0:
            return 1
    with tempfile.TemporaryFile() as log:
        try:
            with serving(log) as address, Client(address) as client:
                for lane in LANES:
                    show(lane, client)
        except (DemoError, RouterCallError) as error:
            log.seek(0)
            tail = log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
            print("\n".join(["", *tail, f"the demo failed: {error}"]), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
