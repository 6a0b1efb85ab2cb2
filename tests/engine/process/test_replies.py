"""The engine in a process of its own answers like one on a thread."""

import itertools
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.engine_process import QUIET, SCHEMA, ask
from support.engines import reason_of, tokens_of, until

from mlx_mtp_backend import (
    EngineError,
    EngineOptions,
    EngineProcess,
    ErrorReason,
    Finished,
    FinishReason,
    LoadOptions,
    Sampling,
    Statistics,
)
from mlx_mtp_backend.process import parent
from mlx_mtp_backend.process.remote import step_of, window_of


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampling": Sampling(0.0), "depth": 0},
        {"logprobs": 3, "sampling": Sampling(0.9, top_k=40, repetition_penalty=1.2, logit_bias=((77, 2),))},
        {"response_format": SCHEMA, "ignore_eos": False, "max_tokens": 60},
        {"seed": (1 << 64) - 1, "stop_tokens": frozenset(range(0, 700, 9)), "boundaries": (16,)},
    ],
)
def test_replies_are_those_of_an_engine_on_a_thread(engine, near, changes):
    here, there = (list(one.submit(ask(**changes))) for one in (near, engine))
    assert there[0] == here[0]
    assert tokens_of(there) == tokens_of(here)
    for what in ("text", "logprobs"):
        first, second = ([getattr(event, what) for event in events[1:-1]] for events in (here, there))
        assert list(itertools.chain(*second)) == list(itertools.chain(*first))

    def counts(events) -> dict[str, object]:
        statistics = events[-1].statistics
        return {name: getattr(statistics, name) for name in Statistics.__slots__ if not name.startswith("seconds")}

    assert counts(there) == counts(here)
    assert (there[-1].reason, there[-1].stop) == (here[-1].reason, here[-1].stop)


def test_a_model_is_told_as_it_is(engine, near):
    here, there = (one.models()["history"] for one in (near, engine))
    alike = {"text": None, "load_seconds": 0.0, "kernel_checks": ()}
    assert replace(there, **alike).report == replace(here, **alike).report
    for name in ("context_length", "vocab_size", "has_head", "depth", "replay", "fingerprint", "unseeded_rule"):
        assert getattr(there, name) == getattr(here, name)
    assert there.text.encode("pump") == here.text.encode("pump")
    assert engine.device is None


def test_it_does_not_import_mlx_here(history):
    code = f"""
        import sys
        from pathlib import Path
        from mlx_mtp_backend import *
        with EngineProcess(EngineOptions(device="cpu")) as engine:
            engine.load("m", Path({str(history)!r}), LoadOptions(wiring=WiringPolicy.OFF)).result()
            print(len(list(engine.submit(GenerateParams("m", (1, 2, 3), max_tokens=5, seed=1)))) > 2)
        print([name for name in sys.modules if name.split(".")[0] in ("mlx", "mlx_lm")])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "[]"], done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the interposed BLAS is for Linux")
def test_a_blas_is_interposed_there_though_mlx_is_here(history):
    with EngineProcess(EngineOptions(device="cpu", interpose_blas=True)) as engine:
        info = engine.load("m", history, QUIET).result(timeout=60)
        assert (info.replay.value, "blas=openblas" in info.fingerprint) == ("best_effort", True)


def test_log_records_keep_their_logger_and_level(engine, history, caplog):
    with caplog.at_level(logging.INFO):
        engine.load("second", history, LoadOptions(depth=2)).result(timeout=60)
        engine.unload("second").result(timeout=10)
        until(lambda: any("head looks wrong" in record.message for record in caplog.records))
    (record,) = [record for record in caplog.records if "head looks wrong" in record.message]
    assert (record.name, record.levelname) == ("mlx_mtp_backend.load.loading", "WARNING")


def test_signals_of_a_terminal_or_a_service_manager_are_the_parents(engine):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.pid, number)
    assert list(engine.submit(ask()))[-1].reason is FinishReason.MAX_TOKENS
    assert os.getpgid(engine.pid) == engine.pid
    assert os.getsid(engine.pid) == os.getsid(0)  # or Linux would not heed its niceness beside this process


def test_what_cannot_be_told_is_refused(engine):
    assert reason_of(lambda: engine.submit(ask(stop_strings=("\ud800",)))) is ErrorReason.INVALID_PARAMS
    assert reason_of(lambda: engine.load("x", Path("\udcff"))) is ErrorReason.INVALID_PARAMS
    assert reason_of(lambda: engine.unload("\udcff")) is ErrorReason.INVALID_PARAMS
    options = EngineOptions(kernel_checks=Path("\udcff"))
    assert reason_of(lambda: EngineProcess(options)) is ErrorReason.INVALID_PARAMS
    assert engine.status().loading == ()
    assert engine.status().waiting == 0


def test_a_reader_that_does_not_read_holds_up_only_itself(engine):
    """It waits in the child and here for as many tokens as were allowed, then is cut; others do not wait for it."""
    whole = tokens_of(engine.submit(ask(max_tokens=120)))
    slow, beside = engine.submit(ask(max_tokens=120)), []
    until(lambda: slow.full)
    for _ in range(3):
        beside.append(list(engine.submit(ask(seed=6)))[-1].reason)
    assert beside == [FinishReason.MAX_TOKENS] * 3
    until(lambda: slow.finished)
    events = slow.read()
    assert events[-1].reason is FinishReason.SLOW_READER
    assert 32 <= len(tokens_of(events)) < window_of(32) + 3
    assert tokens_of(events) == whole[: len(tokens_of(events))]


def test_a_reader_that_reads_late_gets_everything(engine):
    stream, events = engine.submit(ask(max_tokens=200)), []
    while not events or not isinstance(events[-1], Finished):
        until(lambda: stream.full or stream.finished)
        time.sleep(0.05)
        events += stream.read()
    assert len(tokens_of(events)) == 200
    assert events[-1].reason is FinishReason.MAX_TOKENS


@pytest.mark.parametrize("capacity", [1, 2, 3, 8, 1024])
def test_a_paused_stream_has_at_least_its_buffer_unread(capacity):
    most_untold = step_of(capacity) - 1
    assert window_of(capacity) - most_untold == capacity
    assert step_of(capacity) <= capacity


def test_a_load_is_given_up(engine, history):
    load = engine.load("late", history, LoadOptions())
    unload = engine.unload("late")
    assert reason_of(lambda: load.result(timeout=20)) is ErrorReason.MODEL_NOT_LOADED
    assert reason_of(lambda: unload.result(timeout=20)) is ErrorReason.MODEL_NOT_LOADED
    assert (set(engine.models()), engine.status().loading) == ({"history"}, ())


def test_a_load_is_given_up_while_its_text_is_read(engine, history, monkeypatch):
    reading, go_on, real = threading.Event(), threading.Event(), parent.load_text

    def slow(path: Path):
        reading.set()
        assert go_on.wait(30)
        return real(path)

    monkeypatch.setattr(parent, "load_text", slow)
    load = engine.load("late", history, QUIET)
    assert reading.wait(30)
    engine.unload("late").result(timeout=20)
    assert reason_of(lambda: load.result(timeout=20)) is ErrorReason.MODEL_NOT_LOADED
    go_on.set()
    monkeypatch.undo()
    engine.load("late", history, QUIET).result(timeout=30)
    engine.unload("late").result(timeout=20)
    assert set(engine.models()) == {"history"}


def test_a_load_fails_where_its_text_cannot_be_read_here(engine, history, monkeypatch):
    def broken(path: Path):
        raise EngineError(ErrorReason.CHECKPOINT_UNREADABLE, "planted")

    monkeypatch.setattr(parent, "load_text", broken)
    assert reason_of(lambda: engine.load("x", history, QUIET).result(timeout=30)) is ErrorReason.CHECKPOINT_UNREADABLE
    monkeypatch.undo()
    engine.load("x", history, QUIET).result(timeout=30)
    engine.unload("x").result(timeout=20)
