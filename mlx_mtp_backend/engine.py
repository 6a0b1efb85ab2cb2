"""The engine as callers see it: thread-safe, and free of MLX until its own thread starts."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp_backend import blas
from mlx_mtp_backend.api import EngineOptions, GenerateParams, LoadOptions, LoadProgress
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.mailbox import Board, Close, Inbox, Load, Submit, Unload, Wake
from mlx_mtp_backend.models import LoadedModel
from mlx_mtp_backend.stream import Stream


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One look at the engine.

    Attributes:
        active: streams that prefill or decode; waiting: streams in the queue.
    """

    loaded: tuple[str, ...]
    loading: tuple[str, ...]
    active: int
    waiting: int


class Engine:
    """Starts the one thread that owns MLX and talks to it. Every method may be called from any thread.

    Args:
        on_end: called on the MLX thread as it ends, whether `close` was called or the thread failed.

    Raises:
        EngineError: BLAS_TOO_LATE or BLAS_MISSING, where an interposed BLAS was asked for.
    """

    def __init__(self, options: EngineOptions | None = None, on_end: Callable[[], None] | None = None) -> None:
        self._options = options or EngineOptions()
        if self._options.interpose_blas:
            blas.interpose()
        self._on_end = on_end
        self._inbox = Inbox()
        self._board = Board(self._options.max_streams + self._options.max_waiting)
        self._thread = threading.Thread(target=self._run, name="mlx-engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if sys.platform == "linux":
            # With CUDA MLX would cut a pass over large weights into a graph every few launches. Read at first use.
            os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "60")
            os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "100000")
        # Imported here: MLX must not be imported before a BLAS is interposed, nor by callers that only inspect.
        from mlx_mtp_backend.worker import Worker

        try:
            Worker(self._options, self._inbox, self._board).run()
        finally:
            if self._on_end is not None:
                self._on_end()

    def load(
        self,
        name: str,
        path: Path,
        options: LoadOptions | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> Future[LoadedModel]:
        """Load the checkpoint in folder `path` under a name, in slices between the rounds of running streams.

        Raises:
            EngineError: INVALID_PARAMS for a name in use, ENGINE_CLOSED. The future may hold any reason that inspection
                and loading have.
        """
        with self._board.lock:
            self._require_open()
            if name in self._board.models or name in self._board.loading:
                raise EngineError(ErrorReason.INVALID_PARAMS, f"{name!r} is loaded or loading already", field="name")
            self._board.loading.add(name)
            result: Future[LoadedModel] = _uncancellable()
            self._inbox.put(Load(name, path, options or LoadOptions(), on_progress, result))
        return result

    def unload(self, name: str) -> Future[None]:
        """Drop a model, or give its load up. The future holds MODEL_IN_USE while streams need it, and MODEL_NOT_LOADED
        if there is none, or was none yet."""
        result: Future[None] = _uncancellable()
        with self._board.lock:
            self._require_open()
            self._inbox.put(Unload(name, result))
        return result

    def models(self) -> dict[str, LoadedModel]:
        with self._board.lock:
            return dict(self._board.models)

    def status(self) -> EngineStatus:
        with self._board.lock:
            active = self._board.decoding
            waiting = max(0, self._board.streams - active)
            return EngineStatus(tuple(self._board.models), tuple(sorted(self._board.loading)), active, waiting)

    def submit(self, params: GenerateParams, on_ready: Callable[[], None] | None = None) -> Stream:
        """Queue a request.

        Args:
            on_ready: called on the MLX thread when events begin to wait; must only wake the reader.

        Raises:
            EngineError: MODEL_NOT_LOADED, PROMPT_TOO_LONG, TOKEN_OUT_OF_RANGE, HEAD_MISSING, INVALID_PARAMS,
                QUEUE_FULL or ENGINE_CLOSED.
        """
        self._check(params)
        stream = Stream(self._options.stream_buffer, on_ready, lambda: self._inbox.put(Wake()))
        self._board.admit()
        with self._board.lock:
            closed = self._board.closed
            if not closed:
                self._inbox.put(Submit(params, stream, time.monotonic()))
        if closed:
            self._board.release()
            raise EngineError(ErrorReason.ENGINE_CLOSED, "the engine is closed")
        return stream

    def _check(self, params: GenerateParams) -> None:
        with self._board.lock:
            self._require_open()
            model = self._board.models.get(params.model)
        if model is None:
            raise EngineError(ErrorReason.MODEL_NOT_LOADED, f"{params.model!r} is not loaded", field="model")
        length = len(params.prompt)
        if length >= model.context_length:
            detail = f"the prompt has {length} tokens, the context holds {model.context_length}"
            raise EngineError(ErrorReason.PROMPT_TOO_LONG, detail, field="prompt")
        if not all(0 <= token < model.vocab_size for token in params.prompt):
            detail = f"a token is outside [0, {model.vocab_size})"
            raise EngineError(ErrorReason.TOKEN_OUT_OF_RANGE, detail, field="prompt")
        if params.depth and not model.has_head:
            raise EngineError(ErrorReason.HEAD_MISSING, f"{params.model!r} has no head to draft with", field="depth")
        if params.stop_strings and model.text is None:
            detail = f"{params.model!r} has no tokenizer to find stop strings with"
            raise EngineError(ErrorReason.INVALID_PARAMS, detail, field="stop_strings")

    def close(self) -> None:
        """End every stream with ENGINE_CLOSED and stop the thread; waits for it. Safe to call again."""
        self._inbox.put(Close())
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._board.closed:
            raise EngineError(ErrorReason.ENGINE_CLOSED, "the engine is closed")


def _uncancellable() -> Future[Any]:
    """A future whose waiters may leave without ending the work: the MLX thread always gets to set it."""
    result: Future[Any] = Future()
    result.set_running_or_notify_cancel()
    return result
