"""`serve` as a process: a second signal ends it at once, whatever its threads are at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.slow_load import SLOW_SLICE

from mlx_mtp_backend.synthetic import Recipe, write

ENGINE = (
    SLOW_SLICE
    + """
import logging
from mlx_mtp_backend.process import child
def print(text, **_):  # all that the server tells of the process is its log
    logging.getLogger("mlx_mtp_backend").warning(text)
child.main()
"""
)
SERVE = """
import sys
from mlx_mtp_backend.process import spawn
from router.cli import main
spawn.MODULE = "planted_engine"
sys.exit(main())
"""
SETTINGS = """
[server]
listen = "127.0.0.1:0"
[backends.mlx]
allow_cpu = true
[models.m]
path = "model"
preload = true
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_server_at_once(tmp_path: Path, second: signal.Signals) -> None:
    write(tmp_path / "model", Recipe(kind="pass-through", layers=2))
    (tmp_path / "settings.toml").write_text(SETTINGS)
    (tmp_path / "planted_engine.py").write_text(ENGINE)
    command = [sys.executable, "-c", SERVE, "serve", "--config", str(tmp_path / "settings.toml")]
    environment = {**os.environ, "MTP_ROUTER_HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path)}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as server:
        assert server.stderr is not None
        assert any("in the middle of a slice" in line for line in server.stderr)
        server.send_signal(signal.SIGINT)
        assert any("load is given up" in line for line in server.stderr)  # it drains
        begin = time.monotonic()
        server.send_signal(second)
        _, told = server.communicate(timeout=30)
    assert server.returncode == 128 + second
    assert told.endswith("mtp-router: ended without draining\n")
    assert "Traceback" not in told
    assert time.monotonic() - begin < 5.0  # it takes some milliseconds, on a machine that is not busy
