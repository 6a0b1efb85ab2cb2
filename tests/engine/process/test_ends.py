"""What happens where the engine's process, or its parent, ends or hangs."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import Future

import psutil
import pytest
from support.engine_process import LONG, QUIET, ask, gone, loaded, python
from support.engines import reason_of, tokens_of, until

from mlx_mtp_backend import EngineOptions, EngineProcess, ErrorReason, FinishReason, LoadOptions
from mlx_mtp_backend.process import parent, pulse, spawn
from mlx_mtp_backend.process.pulse import SILENT, STUCK, SUSPECTED_SILENT, Pulse

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel sends no such signal elsewhere")


@pytest.mark.parametrize("stage", ["load", "prefill", "decode"])
def test_a_process_that_is_killed_ends_what_it_had(history, caplog, stage):
    ends: list[None] = []
    engine = loaded(history, lambda: ends.append(None), stream_buffer=4096)
    whole = tokens_of(engine.submit(ask(max_tokens=400))) if stage == "decode" else ()
    busy = engine.submit(ask(max_tokens=400) if stage == "decode" else ask(prompt=LONG))
    waiting = [engine.submit(ask(prompt=LONG, seed=seed)) for seed in range(4)]
    seen = threading.Event()
    load = engine.load("second", history, LoadOptions(), lambda _: seen.set()) if stage == "load" else Future()
    events: list = []
    until(lambda: seen.is_set() if stage == "load" else bool(events.extend(busy.read()) or events))
    if stage == "decode":
        until(lambda: events.extend(busy.read()) or len(tokens_of(events)) > 3)
    os.kill(engine.pid, signal.SIGKILL)
    events += list(busy)
    assert (events[-1].reason, events[-1].error.reason) == (FinishReason.ERROR, ErrorReason.ENGINE_CLOSED)
    came = tokens_of(events)
    assert came == whole[: len(came)]
    assert events[-1].statistics.completion_tokens == len(came)
    for stream in waiting:
        assert list(stream)[-1].error.reason is ErrorReason.ENGINE_CLOSED
    if stage == "load":
        assert reason_of(lambda: load.result(timeout=10)) is ErrorReason.ENGINE_CLOSED
    until(lambda: ends)
    assert reason_of(lambda: engine.submit(ask())) is ErrorReason.ENGINE_CLOSED
    assert (engine.models(), engine.status().active, engine.status().waiting) == ({}, 0, 0)
    assert f"process {engine.pid} was ended by SIGKILL" in caplog.text
    engine.close()
    engine.close()
    assert len(ends) == 1


def test_nothing_is_left_of_an_engine(history):
    def counts() -> tuple[int, int, int]:
        return threading.active_count(), len(os.listdir("/dev/fd")), len(psutil.Process().children())

    loaded(history).close()
    before, ends = counts(), []
    for _ in range(2):
        engine = loaded(history, lambda: ends.append(None))
        engine.close()
        assert gone(engine.pid)
    until(lambda: all(left <= had for left, had in zip(counts(), before, strict=True)))
    assert len(ends) == 2


@pytest.mark.parametrize("suspected", [True, False])
def test_a_process_that_is_stopped_is_killed(history, monkeypatch, caplog, suspected):
    monkeypatch.setattr(pulse, "SUSPECTED_SILENT" if suspected else "SILENT", 2)
    ends: list[None] = []
    engine = loaded(history, lambda: ends.append(None))
    stream = engine.submit(ask(max_tokens=3000))
    next(iter(stream))
    os.kill(engine.pid, signal.SIGSTOP)
    load = engine.load("second", history, QUIET)
    if suspected:
        engine.suspect()
    assert list(stream)[-1].error.reason is ErrorReason.ENGINE_CLOSED
    assert reason_of(lambda: load.result(timeout=10)) is ErrorReason.ENGINE_CLOSED
    until(lambda: ends)
    assert "says nothing" in caplog.text
    assert gone(engine.pid)
    engine.close()


def test_closing_does_not_wait_long_for_a_process_that_is_stopped(history, monkeypatch):
    monkeypatch.setattr(parent, "CLOSE_LIMIT", 0.5)
    engine = loaded(history)
    os.kill(engine.pid, signal.SIGSTOP)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 10
    assert gone(engine.pid)


def test_a_suspected_engine_that_steps_is_trusted_again(engine):
    engine.suspect()
    assert engine._pulse.suspected
    until(lambda: not engine._pulse.suspected)
    assert list(engine.submit(ask()))[-1].reason is FinishReason.MAX_TOKENS


def test_a_pulse_counts_looks():
    looks = Pulse()
    assert [looks.look() for _ in range(SILENT)] == [None] * SILENT
    assert "nothing" in looks.look()
    stuck = Pulse()
    stuck.suspect()
    for _ in range(STUCK):
        stuck.heard()
        assert stuck.look() is None
    stuck.heard()
    assert "no step" in stuck.look()
    stuck.stepped()
    assert stuck.look() is None
    silent = Pulse()
    silent.suspect()
    assert [silent.look() is None for _ in range(SUSPECTED_SILENT + 1)] == [True] * SUSPECTED_SILENT + [False]


def test_it_does_not_outlive_its_parent(history):
    code = """
        import os, signal, sys
        from pathlib import Path
        from mlx_mtp_backend import *
        engine = EngineProcess(EngineOptions(device="cpu"))
        engine.load("m", Path(sys.argv[1]), LoadOptions(wiring=WiringPolicy.OFF)).result()
        engine.submit(GenerateParams("m", (1, 2, 3), max_tokens=4000, seed=1, ignore_eos=True))
        print(engine.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with python(code, str(history)) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
    until(lambda: gone(pid), 10)


@linux
def test_not_even_where_native_code_holds_the_interpreter():
    code = """
        from mlx_mtp_backend.process.child import die_with_parent
        die_with_parent()
        print("holds", flush=True)
        sum(range(10**13))
    """
    with python(code) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        assert run.stdout.readline() == "holds\n"
        time.sleep(0.1)
        run.stdin.close()
        assert run.wait(10) == -signal.SIGIO


def test_a_process_that_does_not_come_up_is_an_error(monkeypatch, caplog):
    monkeypatch.setattr(spawn, "MODULE", "mlx_mtp_backend.process.nothing_there")
    ends: list[None] = []
    assert reason_of(lambda: EngineProcess(EngineOptions(), lambda: ends.append(None))) is ErrorReason.ENGINE_CLOSED
    assert "nothing_there" in caplog.text  # its last words
    assert ends == []


PLANTED = """
import time
from mlx_mtp_backend import worker
from mlx_mtp_backend.process import child

def broken(*_):
    {fault}

worker.Worker._prefill = broken
child.main()
"""


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ('raise RuntimeError("planted")', ["the engine's loop failed", "planted", "ended with status 1"]),
        ("time.sleep(1000)", ["has taken no step", "was ended by SIGKILL"]),
        ("sum(range(10**13))", ["says nothing", "was ended by SIGKILL"]),  # holds the interpreter's lock
    ],
)
def test_an_engine_that_fails_or_hangs_in_its_process_is_ended(history, tmp_path, monkeypatch, caplog, fault, told):
    (tmp_path / "planted_child.py").write_text(PLANTED.format(fault=fault))
    monkeypatch.setattr(spawn, "MODULE", "planted_child")
    monkeypatch.setattr(pulse, "STUCK", 5)
    monkeypatch.setattr(pulse, "SUSPECTED_SILENT", 2)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ends: list[None] = []
    engine = loaded(history, lambda: ends.append(None))
    stream = engine.submit(ask())
    until(lambda: engine.suspect() or stream.finished)
    assert list(stream)[-1].error.reason is ErrorReason.ENGINE_CLOSED
    until(lambda: ends)
    assert [text for text in told if text not in caplog.text] == []
    engine.close()


def test_a_system_that_starts_no_process_is_an_error(monkeypatch):
    files = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert reason_of(lambda: EngineProcess(EngineOptions())) is ErrorReason.ENGINE_CLOSED
    assert len(os.listdir("/dev/fd")) == files


def test_garbage_from_the_parent_ends_the_process(history, caplog):
    ends: list[None] = []
    engine = loaded(history, lambda: ends.append(None))
    engine._outbox.put_frame(b"\x00\x00\x00\x02\x03{]")
    until(lambda: ends)
    assert "ended with status 1" in caplog.text
    assert "WireError: no Generate" in caplog.text
    engine.close()
