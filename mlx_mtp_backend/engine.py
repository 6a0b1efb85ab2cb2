"""The engine on a thread of this process: free of MLX until that thread starts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from mlx_mtp_backend.api import EngineOptions, GenerateParams, LoadOptions, LoadProgress
from mlx_mtp_backend.base import BaseEngine
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.load import blas
from mlx_mtp_backend.load.device import accelerator, prepare_mlx
from mlx_mtp_backend.mailbox import Call, Close, Inbox, Load, Submit, Unload, Wake, uncancellable
from mlx_mtp_backend.models import LoadedModel
from mlx_mtp_backend.stream import Stream


class Engine(BaseEngine):
    """Starts the one thread that owns MLX and talks to it. Its callbacks come on that thread.

    Raises:
        EngineError: BLAS_TOO_LATE or BLAS_MISSING, where an interposed BLAS was asked for; INVALID_PARAMS for
            `cpu_nice`, which takes a process.
    """

    def __init__(self, options: EngineOptions | None = None, on_end: Callable[[], None] | None = None) -> None:
        super().__init__(options, on_end)
        if self._options.cpu_nice:
            detail = "only an engine in a process of its own can yield to this one"
            raise EngineError(ErrorReason.INVALID_PARAMS, detail, field="cpu_nice")
        if self._options.interpose_blas:
            blas.interpose()
        self._inbox = Inbox()
        self._thread = threading.Thread(target=self._run, name="mlx-engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        prepare_mlx()
        # Imported here: MLX must not be imported before a BLAS is interposed, nor by callers that only inspect.
        from mlx_mtp_backend.worker import Worker

        try:
            Worker(self._options, self._inbox, self._board).run()
        finally:
            if self._on_end is not None:
                self._on_end()

    @property
    def device(self) -> str | None:
        """See BaseEngine. Imports MLX."""
        return accelerator(self._options.device)

    def load(
        self,
        name: str,
        path: Path,
        options: LoadOptions | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> Future[LoadedModel]:
        """See BaseEngine."""
        result: Future[LoadedModel] = uncancellable()
        with self._board.lock:
            self._board.begin_load(name)
            self._inbox.put(Load(name, path, options or LoadOptions(), on_progress, result))
        return result

    def unload(self, name: str) -> Future[None]:
        """See BaseEngine."""
        result: Future[None] = uncancellable()
        with self._board.lock:
            self._board.require_open()
            self._inbox.put(Unload(name, result))
        return result

    def submit(
        self,
        params: GenerateParams,
        on_ready: Callable[[], None] | None = None,
        submitted: float | None = None,
    ) -> Stream:
        """See BaseEngine. A response format is compiled first, on the caller's thread (see ModelText.compile).

        Args:
            submitted: time.monotonic() from which the request's times count; None for this moment.
        """
        model = self._board.check(params)
        wanted = params.response_format
        grammar = None if wanted is None or model.text is None else model.text.compile(wanted)
        stream = Stream(self._options.stream_buffer, on_ready, lambda: self._inbox.put(Wake()))
        self._board.admit()
        with self._board.lock:
            closed = self._board.closed
            if not closed:
                since = time.monotonic() if submitted is None else submitted
                self._inbox.put(Submit(params, stream, since, grammar))
        if closed:
            self._board.release()
            raise EngineError(ErrorReason.ENGINE_CLOSED, "the engine is closed")
        return stream

    def call(self, what: Callable[[], None]) -> None:
        """Have something called on the MLX thread between two of its steps; never, where it has ended."""
        self._inbox.put(Call(what))

    def suspect(self) -> None:
        """Nothing: a thread cannot be ended from outside."""

    def close(self) -> None:
        """See BaseEngine."""
        self._inbox.put(Close())
        if threading.current_thread() is not self._thread:
            self._thread.join()
