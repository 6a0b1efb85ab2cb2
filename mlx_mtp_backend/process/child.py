"""The process that runs the engine: `python -m mlx_mtp_backend.process.child FD`, started by `spawn`.

FD is its end of the socket to the parent. It ends when that, or its standard input, ends, which also happens when the
parent dies of SIGKILL.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import logging
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

from mlx_mtp_backend.api import Delta, EngineOptions, Event, Finished, Started
from mlx_mtp_backend.engine import Engine
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.load import blas
from mlx_mtp_backend.load.device import accelerator
from mlx_mtp_backend.models import LoadedModel
from mlx_mtp_backend.process import wire
from mlx_mtp_backend.process.outbox import Outbox
from mlx_mtp_backend.process.priority import yield_to_parent
from mlx_mtp_backend.process.remote import window_of
from mlx_mtp_backend.stream import Stream

log = logging.getLogger(__name__)

COMPILERS = 2  # threads that compile response formats
FLUSH_LIMIT = 5.0  # seconds that the last words may take


class EventOutbox(Outbox):
    """Also sends what streams have to tell: one message for all that are ready."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, "mlx-engine-writer")
        self._ready: dict[int, None] = {}
        self._streams: dict[int, Stream] = {}

    def open(self, number: int, stream: Stream) -> None:
        """From now on its events are sent, also those that wait already."""
        with self._changed:
            self._streams[number] = stream
            self._ready[number] = None
            self._changed.notify()

    def mark(self, number: int) -> None:
        """Events of the stream wait. Called on the MLX thread, which goes on at once."""
        with self._changed:
            self._ready[number] = None
            self._changed.notify()

    def stream(self, number: int) -> Stream | None:
        """One that is open: its last event has not been sent."""
        return self._streams.get(number)

    def waits(self) -> bool:
        """See Outbox."""
        return bool(self._ready) or super().waits()

    def take(self) -> bytes:
        """Events first: what was put after them may tell of what came of them."""
        with self._changed:
            ready = [(number, self._streams[number]) for number in self._ready if number in self._streams]
            self._ready.clear()
            frames = super().take()
        batches = [_batch(number, events) for number, stream in ready if (events := stream.take())]
        for batch in batches:
            if batch.finished is not None:
                del self._streams[batch.stream]
        return wire.encode(wire.Events(tuple(batches))) + frames if batches else frames


def _batch(number: int, events: list[Event]) -> wire.Batch:
    started = next((event for event in events if isinstance(event, Started)), None)
    deltas = tuple(event for event in events if isinstance(event, Delta))
    finished = events[-1] if isinstance(events[-1], Finished) else None
    if finished is None or finished.error is None:
        return wire.Batch(number, started, deltas, finished, None)
    return wire.Batch(number, started, deltas, replace(finished, error=None), wire.Failure.of(finished.error))


class LogHandler(logging.Handler):
    """Log records go to the parent's loggers of the same names."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        """Never waits; where the parent reads nothing, records are lost."""
        with contextlib.suppress(wire.WireError):
            text = wire.printable(self.format(record))
            self._outbox.put(wire.Log(record.name, record.levelno, text), may_be_lost=True)


class Host:
    """Does what the parent says."""

    def __init__(self, engine: Engine, outbox: EventOutbox, closing: threading.Event) -> None:
        self._engine = engine
        self._closing = closing
        self._outbox = outbox
        self._compilers = ThreadPoolExecutor(COMPILERS, "compile")
        self._lock = threading.Lock()
        self._early: dict[int, bool] = {}  # requests on their way to the engine: whether they were cancelled

    def serve(self, source: BinaryIO) -> None:
        """Until the parent says so, or has gone."""
        while (message := wire.receive(source, wire.TO_CHILD)) is not None:
            match message:
                case wire.Generate():
                    self._generate(message)
                case wire.Cancel(number):
                    self._cancel(number)
                case wire.Room(number, tokens):
                    if (stream := self._outbox.stream(number)) is not None:
                        stream.release(tokens)
                case wire.LoadModel():
                    self._load(message)
                case wire.UnloadModel(number, name):
                    self._answer(number, partial(self._engine.unload, name), _unloaded)
                case wire.Ping(step=False):
                    self._outbox.put(wire.Pong(step=False))
                case wire.Ping():
                    self._engine.call(partial(self._outbox.put, wire.Pong(step=True)))
                case wire.Quit():
                    self._closing.set()
                    self._engine.close()

    def _generate(self, message: wire.Generate) -> None:
        with self._lock:
            self._early[message.stream] = False
        if message.params.response_format is None:
            self._submit(message)
        else:  # on another thread: it takes up to a second, and others wait behind it
            self._compilers.submit(self._submit, message)

    def _submit(self, message: wire.Generate) -> None:
        number = message.stream
        try:
            stream = self._engine.submit(message.params, lambda: self._outbox.mark(number), message.submitted)
        except EngineError as error:
            self._refuse(number, error)
            return
        except Exception:  # no other request may suffer for it
            log.exception("a request could not be taken")
            self._refuse(number, EngineError(ErrorReason.BUILD_FAILURE, "this request could not be taken"))
            return
        self._outbox.open(number, stream)
        with self._lock:
            cancelled = self._early.pop(number)
        if cancelled:
            stream.cancel()

    def _refuse(self, number: int, error: EngineError) -> None:
        with self._lock:
            del self._early[number]
        self._outbox.put(wire.Events((wire.Batch(number, None, (), None, wire.Failure.of(error)),)))

    def _cancel(self, number: int) -> None:
        with self._lock:
            if number in self._early:
                self._early[number] = True
                return
        if (stream := self._outbox.stream(number)) is not None:
            stream.cancel()

    def _load(self, message: wire.LoadModel) -> None:
        def begin() -> Future[LoadedModel]:
            return self._engine.load(
                message.name,
                message.path,
                message.options,
                lambda progress: self._outbox.put(wire.Progress(message.number, progress)),
            )

        self._answer(message.number, begin, _loaded)

    def _answer(self, number: int, begin: Callable[[], Future[Any]], told: Callable[[Any, int], wire.ToParent]) -> None:
        """Has something begun; its outcome is told, on the MLX thread."""

        def done(result: Future[Any]) -> None:
            try:
                self._outbox.put(told(result.result(), number))
            except EngineError as error:
                self._outbox.put(wire.Failed(number, wire.Failure.of(error)))
            except wire.WireError as error:
                failure = wire.Failure(ErrorReason.CHECKPOINT_UNREADABLE, f"not to be told: {error}", None)
                self._outbox.put(wire.Failed(number, failure))

        try:
            begin().add_done_callback(done)
        except EngineError as error:
            self._outbox.put(wire.Failed(number, wire.Failure.of(error)))


def _loaded(model: LoadedModel, number: int) -> wire.ToParent:
    return wire.Loaded(number, replace(model, text=None), model.text is not None)


def _unloaded(_: None, number: int) -> wire.ToParent:
    return wire.Unloaded(number)


def main() -> None:
    """Serves until the parent goes away or says so."""
    for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal or a service manager: for the parent, which drains
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    os.dup2(2, 1)  # native code may print
    die_with_parent()
    threading.excepthook = lambda told: _fail(told.exc_value)
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        with connection.makefile("rb") as source:
            _serve(connection, source)
    except Exception as error:  # noqa: BLE001 - whatever it was, this process ends by it
        _fail(error)
    os._exit(0)  # the parent is gone, or the engine was never there


def _fail(error: BaseException | None) -> None:
    """A thread that should not end has ended: so does the process, its last words being why."""
    traceback.print_exception(error)
    os._exit(1)


def _serve(connection: socket.socket, source: BinaryIO) -> None:
    start = wire.receive(source, (wire.Start,))
    if start is None:
        return
    outbox, closing, options = EventOutbox(connection), threading.Event(), start.options
    logging.basicConfig(level=start.log_level, handlers=[LogHandler(outbox)], format="%(message)s")

    def ended() -> None:
        outbox.close(FLUSH_LIMIT)
        os._exit(0 if closing.is_set() else 1)  # nothing else is worth waiting for, and MLX may abort at a usual exit

    try:
        if options.interpose_blas:
            blas.interpose()
    except EngineError as error:
        outbox.put(wire.Failed(0, wire.Failure.of(error)))
        outbox.start()
        outbox.close(FLUSH_LIMIT)
        return
    device = accelerator(options.device)
    if device is None and options.cpu_nice:
        yield_to_parent(options.cpu_nice)
    outbox.start()  # from here on threads start, which yield like this one
    engine = Engine(_own(options), ended)
    outbox.put(wire.Ready(device))
    Host(engine, outbox, closing).serve(source)


def _own(options: EngineOptions) -> EngineOptions:
    """As the engine here needs them. The parent counts streams, and may have the last event of some that are still
    counted here; and it tells of what was read a little late."""
    return replace(
        options,
        cpu_nice=0,
        max_waiting=2 * options.max_waiting + options.max_streams,
        stream_buffer=window_of(options.stream_buffer),
    )


def die_with_parent() -> None:
    """Has the kernel end this process at the end of its standard input, where the kernel can (Linux): native code may
    hold the interpreter's lock for long. Elsewhere the thread that reads the socket sees to it once it runs."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([0], [], [], 0)[0]:  # it ended before the signal was armed
        os._exit(0)


if __name__ == "__main__":
    main()
