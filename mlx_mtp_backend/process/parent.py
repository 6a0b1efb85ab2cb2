"""An engine in a process of its own, behind the interface of one on a thread.

Two interpreters do not share a lock: while the engine builds a round, the threads of this process go on. And native
code that aborts takes the engine along, not this process.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import cast

from mlx_mtp_backend.api import EngineOptions, GenerateParams, LoadOptions, LoadProgress
from mlx_mtp_backend.base import BaseEngine
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.language.text import load_text
from mlx_mtp_backend.mailbox import Load, Unload, uncancellable
from mlx_mtp_backend.models import LoadedModel
from mlx_mtp_backend.process import wire
from mlx_mtp_backend.process.outbox import Outbox
from mlx_mtp_backend.process.pulse import LOOK, Pulse
from mlx_mtp_backend.process.remote import RemoteStream
from mlx_mtp_backend.process.spawn import ChildProcess
from mlx_mtp_backend.stream import Stream

log = logging.getLogger(__name__)

START_LIMIT = 120.0  # seconds until the process must run: on a busy machine importing MLX takes a while
CLOSE_LIMIT = 10.0  # seconds for its last step, and what it keeps of its models
FLUSH_LIMIT = 1.0
LOGGERS = ("mlx_mtp_backend", "mtp_kernels")


class EngineProcess(BaseEngine):
    """Starts the process and waits until it runs. Callbacks come on the thread that reads from it.

    A response format is compiled in the process: one that cannot be followed ends its stream with INVALID_PARAMS.
    `close`, or the end of the process for whatever reason, ends every stream with ENGINE_CLOSED after the deltas that
    came; it does not start again by itself.

    Raises:
        EngineError: BLAS_MISSING, where an interposed BLAS was asked for; ENGINE_CLOSED where the process did not come
            up, about which the log has more.
    """

    def __init__(self, options: EngineOptions | None = None, on_end: Callable[[], None] | None = None) -> None:
        super().__init__(options, on_end)
        self._numbers = itertools.count(1)
        self._streams: dict[int, RemoteStream] = {}
        self._loads: dict[int, Load] = {}
        self._unloads: dict[int, Unload] = {}
        self._ready: Future[str | None] = uncancellable()
        self._closing = False
        self._over = threading.Event()
        self._pulse = Pulse()
        level = min(logging.getLogger(name).getEffectiveLevel() for name in LOGGERS)
        start = _frame(wire.Start(self._options, level))
        self._child = ChildProcess()
        self._outbox = Outbox(self._child.connection, "mlx-engine-writer")
        self._outbox.put_frame(start)
        self._reader = threading.Thread(target=self._read, name="mlx-engine-reader", daemon=True)
        self._outbox.start()
        self._reader.start()
        try:
            self._device = self._ready.result(START_LIMIT)
        except BaseException as error:
            self._child.kill()
            self._reader.join()
            if isinstance(error, TimeoutError):
                detail = f"the engine's process did not come up within {START_LIMIT:g} s"
                raise EngineError(ErrorReason.ENGINE_CLOSED, detail) from None
            raise
        threading.Thread(target=self._watch, name="mlx-engine-watch", daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._child.pid

    @property
    def device(self) -> str | None:
        """See BaseEngine. This process does not import MLX."""
        return self._device

    def load(
        self,
        name: str,
        path: Path,
        options: LoadOptions | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> Future[LoadedModel]:
        """See BaseEngine."""
        load = Load(name, path, options or LoadOptions(), on_progress, uncancellable())
        number = next(self._numbers)
        command = _frame(wire.LoadModel(number, name, path, load.options))
        with self._board.lock:
            self._board.begin_load(name)
            self._loads[number] = load
        self._outbox.put_frame(command)
        return load.result

    def unload(self, name: str) -> Future[None]:
        """See BaseEngine."""
        unload = Unload(name, uncancellable())
        number = next(self._numbers)
        command = _frame(wire.UnloadModel(number, name))
        with self._board.lock:
            self._board.require_open()
            self._unloads[number] = unload
        self._outbox.put_frame(command)
        return unload.result

    def submit(self, params: GenerateParams, on_ready: Callable[[], None] | None = None) -> Stream:
        """See BaseEngine."""
        self._board.check(params)
        number = next(self._numbers)
        stream = RemoteStream(
            params,
            self._options.stream_buffer,
            on_ready,
            lambda: self._outbox.put(wire.Cancel(number)),
            lambda tokens: self._outbox.put(wire.Room(number, tokens)),
        )
        request = _frame(wire.Generate(number, params, stream.submitted))
        self._board.admit()
        with self._board.lock:
            closed = self._board.closed
            if closed:
                self._board.streams -= 1
            else:
                self._streams[number] = stream
        if closed:
            raise EngineError(ErrorReason.ENGINE_CLOSED, "the engine is closed")
        self._outbox.put_frame(request)
        return stream

    def suspect(self) -> None:
        """See BaseEngine: the process is killed unless it says something within a few seconds, and its MLX thread ends
        its step within half a minute."""
        self._pulse.suspect()

    def close(self) -> None:
        """See BaseEngine. A process that does not end in time is killed."""
        self._closing = True
        self._outbox.put(wire.Quit())
        if threading.current_thread() is self._reader:  # from a callback, which must return first
            return
        if not self._over.wait(CLOSE_LIMIT):
            log.warning("the engine's process %d did not end within %g s: it is killed", self.pid, CLOSE_LIMIT)
            self._child.kill()
        self._reader.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK):
            if problem := self._pulse.look():
                log.critical("the engine's process %d %s: it is killed", self.pid, problem)
                self._child.kill()
                return
            if self._pulse.quiet:
                self._outbox.put(wire.Ping(step=False))
            if self._pulse.suspected:
                self._outbox.put(wire.Ping(step=True))

    # What follows runs on the thread that reads from the child.

    def _read(self) -> None:
        try:
            with self._child.connection.makefile("rb") as source:
                while (message := wire.receive(source, wire.TO_PARENT)) is not None:
                    self._pulse.heard()
                    self._obey(message)
        except ConnectionError:
            pass  # as good as its end
        except Exception as error:  # noqa: BLE001 - not even its text goes into the log: it may be a reply's
            log.critical("the engine's process %d breaks the protocol (%s): it is killed", self.pid, _brief(error))
            self._child.kill()
        self._end()

    def _obey(self, message: wire.ToParent) -> None:
        match message:
            case wire.Events(batches):
                for batch in batches:
                    self._deliver(batch)
            case wire.Progress(number, progress):
                if (load := self._loads.get(number)) is not None:
                    load.report(progress)
            case wire.Loaded():
                self._loaded(message)
            case wire.Unloaded(number):
                self._unloaded(number)
            case wire.Failed(number, failure):
                self._failed(number, failure.error())
            case wire.Ready(device):
                self._ready.set_result(device)
            case wire.Pong(step):
                if step:
                    self._pulse.stepped()
            case wire.Log(name, level, text):
                logging.getLogger(name).log(level, "%s", text)

    def _deliver(self, batch: wire.Batch) -> None:
        stream = self._streams[batch.stream]
        if batch.started is not None:
            with self._board.lock:
                self._board.decoding += 1
            stream.put(batch.started)
        for delta in batch.deltas:
            stream.put(delta)
        error = None if batch.failure is None else batch.failure.error()
        if batch.finished is not None:
            self._finish(batch.stream)
            stream.put(replace(batch.finished, error=error))
        elif error is not None:
            self._finish(batch.stream)
            stream.put(stream.lost(error))

    def _finish(self, number: int) -> None:
        """Before its reader knows: who asks again at once finds the place free."""
        with self._board.lock:
            stream = self._streams.pop(number)
            self._board.streams -= 1
            self._board.decoding -= stream.started is not None

    def _loaded(self, message: wire.Loaded) -> None:
        """It serves here once its text is read, on a thread: that takes a second where the vocabulary is large."""
        if not message.has_text:
            self._publish(message.number, message.model)
        elif (load := self._loads.get(message.number)) is not None:
            arguments = (message.number, load, message.model)
            threading.Thread(target=self._read_text, args=arguments, name="mlx-engine-text", daemon=True).start()

    def _read_text(self, number: int, load: Load, model: LoadedModel) -> None:
        try:
            text = load_text(load.path)
            if text is None:
                raise EngineError(ErrorReason.CHECKPOINT_UNREADABLE, f"the tokenizer of {load.name!r} went away")
        except EngineError as error:
            self._take_back(number, error)
        else:
            self._publish(number, replace(model, text=text))

    def _take_back(self, number: int, error: EngineError) -> None:
        """A load fails here that came about there. Its name is taken until it is gone there, too."""
        with self._board.lock:
            load = self._loads.pop(number, None)
        if load is None:  # unloaded, or closed, meanwhile
            return
        with contextlib.suppress(EngineError):
            self.unload(load.name).result()
        with self._board.lock:
            self._board.loading.discard(load.name)
        load.result.set_exception(error)

    def _publish(self, number: int, model: LoadedModel) -> None:
        with self._board.lock:
            load = self._loads.pop(number, None)  # None: unloaded, or closed, meanwhile
            if load is not None:
                self._board.loading.discard(load.name)
                self._board.models[load.name] = model
        if load is not None:
            load.result.set_result(model)

    def _unloaded(self, number: int) -> None:
        with self._board.lock:
            unload = self._unloads.pop(number)
            self._board.models.pop(unload.name, None)
            given_up = [one for one, load in self._loads.items() if load.name == unload.name and one < number]
        for one in given_up:  # loaded there, but its text was still being read here
            detail = f"{unload.name!r} was unloaded as it loaded"
            self._failed(one, EngineError(ErrorReason.MODEL_NOT_LOADED, detail))
        unload.result.set_result(None)

    def _failed(self, number: int, error: EngineError) -> None:
        with self._board.lock:
            load, unload = self._loads.pop(number, None), self._unloads.pop(number, None)
            if load is not None:
                self._board.loading.discard(load.name)
        if number == 0:
            self._closing = True  # the rest is no surprise
            self._ready.set_exception(error)
        for command in (load, unload):
            if command is not None:
                cast(Future[object], command.result).set_exception(error)

    def _end(self) -> None:
        """The process says no more: everything that waits for it is told so."""
        how = self._child.reap()
        self._outbox.close(FLUSH_LIMIT)
        if not self._closing:
            log.error("the engine's %s", how)
        closed = EngineError(ErrorReason.ENGINE_CLOSED, "the engine is closed" if self._closing else "the engine ended")
        with self._board.lock:
            self._board.closed = True
            self._board.models.clear()
            streams = tuple(self._streams.items())
            commands = (*self._loads, *self._unloads)
        for number, stream in streams:
            self._finish(number)
            stream.put(stream.lost(closed))
        for number in commands:
            self._failed(number, closed)
        self._over.set()
        if not self._ready.done():
            self._ready.set_exception(closed)
        elif self._ready.exception() is None and self._on_end is not None:
            self._on_end()


def _frame(message: wire.ToChild) -> bytes:
    """Raises EngineError INVALID_PARAMS for what cannot be said, such as text that is not Unicode."""
    try:
        return wire.encode(message)
    except wire.WireError as error:
        detail = f"it cannot be told to the engine's process: {error}"
        raise EngineError(ErrorReason.INVALID_PARAMS, detail) from None


def _brief(error: Exception) -> str:
    return str(error) if isinstance(error, wire.WireError) else type(error).__name__
