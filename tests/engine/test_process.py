"""The engine in a process of its own: it answers like one on a thread; and what happens where either process ends."""

import contextlib
import io
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import reason_of, tokens_of, until

from mlx_mtp_backend import (
    Delta,
    Engine,
    EngineError,
    EngineOptions,
    EngineProcess,
    ErrorReason,
    Finished,
    FinishReason,
    FormatKind,
    GenerateParams,
    LoadOptions,
    LoadProgress,
    ResponseFormat,
    Sampling,
    Statistics,
    TokenLogprob,
    WiringPolicy,
)
from mlx_mtp_backend.language import grammar
from mlx_mtp_backend.process import child, parent, pulse, spawn, wire
from mlx_mtp_backend.process.pulse import SILENT, STUCK, SUSPECTED_SILENT, Pulse
from mlx_mtp_backend.process.remote import step_of, window_of

QUIET = LoadOptions(depth=2, wiring=WiringPolicy.OFF, prefill_chunk=16)
PROMPT = tuple(range(3, 43))
LONG = PROMPT * 90
SCHEMA = ResponseFormat(FormatKind.JSON_SCHEMA, '{"type": "object", "properties": {"n": {"enum": [1, 2]}}}')
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel sends no such signal elsewhere")


def ask(**changes) -> GenerateParams:
    defaults = {"prompt": PROMPT, "max_tokens": 24, "sampling": Sampling(0.8), "seed": 5, "ignore_eos": True}
    return GenerateParams("history", **defaults | changes)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def loaded(history: Path, on_end=None, **options) -> EngineProcess:
    engine = EngineProcess(EngineOptions(**{"device": "cpu", "max_streams": 4} | options), on_end)
    engine.load("history", history, QUIET).result(timeout=60)
    return engine


@pytest.fixture(scope="module")
def engine(history: Path):
    with loaded(history, stream_buffer=32, slow_reader_limit=1.0) as engine:
        yield engine


@pytest.fixture(scope="module")
def near(history: Path):
    with Engine(EngineOptions(device="cpu")) as engine:
        engine.load("history", history, QUIET).result(timeout=60)
        yield engine


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


def python(code: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


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


class FakeProcess:
    """A process whose words the test chooses."""

    pid = -1

    def __init__(self) -> None:
        self.connection, self.far = socket.socketpair()
        self.killed = False

    def kill(self) -> None:
        self.killed = True
        self.far.close()

    def reap(self) -> str:
        self.connection.close()
        self.far.close()
        return "process ended"


def frames() -> st.SearchStrategy[bytes]:
    """Bytes, and frames that are well formed but for their body or its meaning."""
    bodies = st.binary(max_size=60) | st.sampled_from([b"{}", b"[]", b'{"number": 1}', b'{"batches": [[]]}', b"null"])
    framed = st.builds(lambda kind, body: len(body).to_bytes(4) + bytes([kind]) + body, st.integers(0, 30), bodies)
    strangers = st.builds(
        lambda number: wire.encode(wire.Events((wire.Batch(number, None, (Delta((1,), "x"),), None, None),))),
        st.integers(2, 9),
    )
    return st.binary(min_size=1, max_size=60) | framed | strangers


@settings(deadline=None)
@given(words=frames())
def test_garbage_from_the_process_ends_the_process_and_not_the_parent(words):
    fake, ends = FakeProcess(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parent, "ChildProcess", lambda: fake)
        fake.far.sendall(wire.encode(wire.Ready(None)))
        engine = EngineProcess(EngineOptions(), lambda: ends.append(None))
        load = engine.load("m", Path("m"))
        unload = engine.unload("m")
        with contextlib.suppress(OSError):  # killed already
            fake.far.sendall(words)
            fake.far.shutdown(socket.SHUT_WR)
        for future in (load, unload):
            assert isinstance(future.exception(timeout=10), EngineError)
        engine.close()
    assert len(ends) == 1


@given(words=frames())
def test_only_messages_come_out_of_a_frame(words):
    for kinds, errors in ((wire.TO_PARENT, wire.WireError), (wire.TO_CHILD, (wire.WireError, EngineError))):
        try:
            message = wire.receive(io.BytesIO(words), kinds)
        except errors:
            continue
        assert isinstance(message, kinds)


def test_every_message_arrives_as_it_was_sent(near):
    model = replace(near.models()["history"], text=None)
    logprob = TokenLogprob(7, -0.1, ((7, -0.1), (8, float("-inf"))))
    statistics = Statistics(3, 2, 1, (1, 1), (1, 0), 0, 0.1, 0.25, (0, 1))
    started = next(iter(near.submit(ask(seed=(1 << 64) - 1))))
    finished = Finished(FinishReason.STOP_STRING, statistics, stop="5")
    failure = wire.Failure(ErrorReason.INVALID_PARAMS, "é", "seed")
    batch = wire.Batch(1, started, (Delta((1, 2), "\N{SNOWMAN}", (logprob,)),), finished, failure)
    options = LoadOptions(head_path=Path("h"), wiring=WiringPolicy.REFUSE)
    messages = [
        wire.Start(EngineOptions(kernel_checks=Path("k"), slow_reader_limit=1), 20),
        wire.LoadModel(1, "m", Path("p"), options),
        wire.UnloadModel(2, "m"),
        wire.Generate(3, ask(response_format=SCHEMA, ignore_eos=False, logprobs=2, stop_strings=("x",)), 1.25),
        wire.Cancel(3),
        wire.Room(3, 17),
        wire.Ping(step=True),
        wire.Quit(),
        wire.Ready("Metal"),
        wire.Progress(1, LoadProgress("rows", 0.5)),
        wire.Loaded(1, model, has_text=True),
        wire.Unloaded(2),
        wire.Failed(0, failure),
        wire.Events((batch, replace(batch, finished=replace(finished, stop=5)))),
        wire.Pong(step=False),
        wire.Log("mlx_mtp_backend", 30, "text"),
    ]
    assert {type(message) for message in messages} == {*wire.TO_CHILD, *wire.TO_PARENT}
    for message in messages:
        kinds = wire.TO_CHILD if isinstance(message, wire.TO_CHILD) else wire.TO_PARENT
        arrived = wire.receive(io.BytesIO(wire.encode(message)), kinds)
        if isinstance(message, wire.Loaded):  # models are compared by identity
            names = [name for name in type(model).__slots__ if name not in ("report", "wiring")]
            assert [getattr(arrived.model, name) for name in names] == [getattr(model, name) for name in names]
            assert arrived.model.report == model.report
        else:
            assert arrived == message
        with pytest.raises(wire.WireError):
            wire.receive(io.BytesIO(wire.encode(message)[:-1]), kinds)


def test_compiling_holds_up_nobody_else(near, monkeypatch):
    """Another request is answered while a format waits for its compiler; one that is cancelled meanwhile is not run."""
    compiling, go_on, real = threading.Event(), threading.Event(), grammar._compiled

    def slow(*args):
        compiling.set()
        assert go_on.wait(30)
        return real(*args)

    monkeypatch.setattr(grammar, "_compiled", slow)
    here, there = socket.socketpair()
    outbox = child.EventOutbox(there)
    outbox.start()
    host = child.Host(near, outbox, threading.Event())
    serving = threading.Thread(target=host.serve, args=(there.makefile("rb"),))
    serving.start()
    source = here.makefile("rb")

    def finished() -> wire.Batch:
        while True:
            for batch in wire.receive(source, (wire.Events,)).batches:
                if batch.finished is not None or batch.failure is not None:
                    return batch

    rules = [ResponseFormat(FormatKind.REGEX, rule) for rule in ("yes|no", "maybe")]
    for number, rule in enumerate(rules, 1):
        request = ask(response_format=rule, ignore_eos=False)
        here.sendall(wire.encode(wire.Generate(number, request, time.monotonic())))
    here.sendall(wire.encode(wire.Cancel(2)))
    assert compiling.wait(30)
    here.sendall(wire.encode(wire.Generate(3, ask(), time.monotonic())))
    assert finished().stream == 3
    go_on.set()
    ends = {batch.stream: batch.finished.reason for batch in (finished(), finished())}
    assert ends == {1: FinishReason.STOP_TOKEN, 2: FinishReason.CANCELLED}
    here.close()
    source.close()
    serving.join(10)
    outbox.close(1.0)
    there.close()
