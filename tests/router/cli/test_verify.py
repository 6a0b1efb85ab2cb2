"""`verify` as a process: Ctrl-C ends it wherever it is."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.slow_load import SLOW_SLICE

from mlx_mtp_backend.synthetic import Recipe, write

SLOW_REPLY = """
import sys, time
import mlx_mtp_backend.decode.rounds as rounds
def slow(*arguments):
    print("in the middle of a prefill", flush=True)
    time.sleep(60)
rounds.prefill_chunk = slow
"""


@pytest.mark.parametrize("slowed", [SLOW_SLICE, SLOW_REPLY], ids=["load", "decode"])
def test_ctrl_c_ends_it_at_once(command: list[str], tmp_path: Path, slowed: str) -> None:
    path = write(tmp_path / "model", Recipe(kind="pass-through", layers=2))
    arguments = [command[0], "-c", slowed + command[2], "verify", str(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("in the middle of a ")
        begin = time.monotonic()
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (130, "", "")
    assert time.monotonic() - begin < 5.0  # it takes some milliseconds, on a machine that is not busy
