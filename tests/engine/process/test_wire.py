"""What the two processes say to each other, and garbage in its place."""

import contextlib
import io
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_process import SCHEMA, ask

from mlx_mtp_backend import (
    Delta,
    EngineError,
    EngineOptions,
    EngineProcess,
    ErrorReason,
    Finished,
    FinishReason,
    FormatKind,
    LoadOptions,
    LoadProgress,
    ResponseFormat,
    Statistics,
    TokenLogprob,
    WiringPolicy,
)
from mlx_mtp_backend.language import grammar
from mlx_mtp_backend.process import child, parent, wire


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

    ended: list[wire.Batch] = []  # of one message, several may end

    def finished() -> wire.Batch:
        while not ended:
            batches = wire.receive(source, (wire.Events,)).batches
            ended.extend(batch for batch in batches if batch.finished is not None or batch.failure is not None)
        return ended.pop(0)

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
