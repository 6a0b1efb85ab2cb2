"""The demo behind `make demo`: the bundled storm of alerts, folded into a summary on each kind of backend.

Fetches a model, writes a synthetic checkpoint, starts the service, and shows what answered and why. Exits 0, or
non-zero with the last lines of the server's log where any step fails.
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
from pathlib import Path
from typing import IO, Any

from incident_summary import STORM, describe, request, summarize
from mtp_router.generate import v1

from router.client import Answer, Client, RouterCallError

START_LIMIT = 120.0  # seconds until the server listens
STOP_LIMIT = 60.0  # seconds for its drain
LOG_LINES = 15


PULLED = "smollm2"
SYNTHETIC = "synthetic-mtp"
SETTINGS = """\
[backends.mlx]
allow_cpu = true

[models.{name}]
path = "{path}"
"""


@dataclass(frozen=True)
class Lane:
    """A model to show. `replay`: ask again with drafting off, and compare."""

    title: str
    model: str
    replay: bool = False


LANES = [
    Lane("llama.cpp: SmolLM2-135M, a real model without prediction heads", PULLED),
    Lane("MLX: a synthetic checkpoint with a prediction head (it recites; it cannot read alerts)", SYNTHETIC, True),
]


class DemoError(Exception):
    """A step of the demo failed; the message says which."""


def mtp_router(*arguments: str) -> list[str]:
    """The command line of this very Python environment."""
    return [sys.executable, "-c", "import sys; from router.cli import main; sys.exit(main())", *arguments]


def prepare(folder: Path) -> Path:
    """Fetches and writes the models. Returns the settings file that serves them."""
    run(mtp_router("pull", PULLED))
    checkpoint = folder / SYNTHETIC
    options = ("--kind", "pass-through", "--acceptance", "0.85", "--context", "8192")
    run([sys.executable, "-m", "mlx_mtp_backend.synthetic", str(checkpoint), *options], stdout=subprocess.DEVNULL)
    settings = folder / "mtp-router.toml"
    settings.write_text(SETTINGS.format(name=SYNTHETIC, path=checkpoint.as_posix()))
    return settings


def run(command: list[str], stdout: int | None = None) -> None:
    """Runs one step. Raises DemoError where it fails."""
    if subprocess.run(command, stdout=stdout, check=False).returncode != 0:
        raise DemoError(f"`{' '.join(command[-4:])}` failed")


@contextmanager
def serving(settings: Path, log: IO[bytes]) -> Iterator[str]:
    """Runs the service on a free port until the block ends, then drains it. Yields its address."""
    command = mtp_router("serve", "--json", "--listen", "127.0.0.1:0", "--config", str(settings))
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
    print(f"\n== {lane.title}\n\n{len(storm['alerts'])} alerts, one summary:\n")
    answer = summarize(client, lane.model, storm)
    if not answer.text.strip():
        raise DemoError(f"{lane.model} answered with no text")
    print("\n" + describe(answer), flush=True)
    if lane.replay:
        print(f"replay:  {replay(lane, client, storm, answer)}")


def replay(lane: Lane, client: Client, storm: dict[str, Any], answer: Answer) -> str:
    """Whether the same seed gives the same text when nothing is drafted."""
    assert answer.finished is not None
    plain = client.generate(lane.model, **request(storm), speculation="off")
    same = plain.output.text == answer.text
    promised = answer.finished.replay == v1.REPLAY_EXACT
    if promised and not same:
        raise DemoError("the same seed gave another text without drafts, against what the answer promised")
    drafted, total = answer.finished.speculation, answer.finished.usage.output_tokens
    verdict = "the same text" if same else "another text, which was not promised to be the same"
    return f"{total} tokens in {drafted.rounds} verify passes; with drafting off, the same seed gives {verdict}"


def main() -> int:
    """Runs the demo on every lane; its exit status."""
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="mtp-router-demo-") as folder:
        try:
            settings = prepare(Path(folder))
            with serving(settings, log) as address, Client(address) as client:
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
