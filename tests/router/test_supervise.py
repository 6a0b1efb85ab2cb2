"""`serve --supervise`: the server comes back after an abort, and ends when it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from router.client import Client

COMMAND = [sys.executable, "-c", "import sys; from router.cli import main; sys.exit(main())"]
# A server that tells which signals came, and ends by the first line of a file.
PRETENDER = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGHUP, lambda *_: print("hup", flush=True))
signal.signal(signal.SIGTERM, lambda *_: (print("term", flush=True), sys.exit(0)))
end = pathlib.Path(sys.argv[1]).read_text()
print("up", flush=True)
if end == "abort":
    os.abort()
elif end:
    sys.exit(int(end))
while True:
    time.sleep(0.01)
"""
SUPERVISE = """
import json, sys
from router.supervise import Supervisor
sys.exit(Supervisor(json.loads(sys.argv[1]), first_pause=float(sys.argv[2])).run())
"""


def line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    # A line that does not come must fail a test, not hang it.
    watchdog = threading.Timer(90.0, lambda: [kill(process) for process in started])
    watchdog.start()

    def begin(*command: str, **options: str) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, env={**os.environ, **options}, **pipes))
        return started[-1]

    yield begin
    watchdog.cancel()
    for process in started:
        kill(process)
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
        child.kill()
    process.kill()


@pytest.fixture
def pretend(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    def begin(end: str, pause: float = 0.05) -> subprocess.Popen[str]:
        (tmp_path / "end").write_text(end)
        command = [sys.executable, "-c", PRETENDER, str(tmp_path / "end")]
        return start(sys.executable, "-c", SUPERVISE, json.dumps(command), str(pause))

    return begin


def test_an_abort_is_followed_by_a_start_and_a_longer_pause(pretend, tmp_path):
    supervisor = pretend("abort")
    assert [line(supervisor.stdout) for _ in range(3)] == ["up"] * 3
    (tmp_path / "end").write_text("")
    assert line(supervisor.stdout) == "up"
    supervisor.send_signal(signal.SIGTERM)
    told, complaints = supervisor.communicate(timeout=20)
    assert (told.split(), supervisor.returncode) == (["term"], 0)
    pauses = [text.rpartition("again in ")[2] for text in complaints.splitlines() if "SIGABRT" in text]
    assert pauses == ["0.05 s", "0.1 s", "0.2 s"]


def test_signals_are_for_the_server_and_its_own_status_is_the_last(pretend):
    supervisor = pretend("")
    assert line(supervisor.stdout) == "up"
    supervisor.send_signal(signal.SIGHUP)
    assert line(supervisor.stdout) == "hup"
    supervisor.send_signal(signal.SIGTERM)
    assert line(supervisor.stdout) == "term"
    assert supervisor.wait(20) == 0


def test_ctrl_c_before_the_server_has_started_is_quiet(start):
    starting = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    supervisor = start(sys.executable, "-c", SUPERVISE, json.dumps(starting), "0.05")
    assert line(supervisor.stdout) == "up"
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.communicate(timeout=20) == ("", "")
    assert supervisor.returncode == 128 + signal.SIGINT


def test_a_signal_during_the_pause_ends_it(pretend):
    supervisor = pretend("abort", pause=600.0)
    assert "SIGABRT" in line(supervisor.stderr)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(20) == 128 + signal.SIGTERM


def test_a_server_that_was_started_wrongly_is_not_started_again(pretend):
    supervisor = pretend("1")
    told, _ = supervisor.communicate(timeout=20)
    assert (told.split(), supervisor.returncode) == (["up"], 1)


@pytest.fixture
def served(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> subprocess.Popen[str]:
    config = tmp_path / "settings.toml"
    config.write_text('[server]\nlisten = "127.0.0.1:1"\n')
    command = [*COMMAND, "serve", "--supervise", "--json", "--config", str(config), "--listen", "127.0.0.1:0"]
    return start(*command, MTP_ROUTER_HOME=str(tmp_path / "home"))


def test_the_service_is_back_after_an_abort_and_drains(served):
    json.loads(line(served.stdout))
    (first,) = psutil.Process(served.pid).children()
    first.send_signal(signal.SIGABRT)
    address = json.loads(line(served.stdout))["address"]
    assert not address.endswith(":1")  # both starts heed all options
    with Client(address) as client:
        assert list(client.list_models()) == []
    (second,) = psutil.Process(served.pid).children()
    assert second.pid != first.pid
    served.send_signal(signal.SIGTERM)
    _, complaints = served.communicate(timeout=20)
    assert served.returncode == 0
    assert not psutil.pid_exists(second.pid)
    # Where it came from, by the server; what became of it, by the supervisor.
    assert "Fatal Python error: Aborted" in complaints
    assert "was ended by SIGABRT" in complaints
    assert "draining" in complaints


def test_a_server_whose_supervisor_was_killed_drains(served):
    json.loads(line(served.stdout))
    (server,) = psutil.Process(served.pid).children()
    served.kill()
    until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    assert "draining" in served.communicate()[1]
