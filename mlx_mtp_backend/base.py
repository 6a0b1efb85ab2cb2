"""What every engine offers its callers, whichever thread or process owns MLX."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mlx_mtp_backend.api import EngineOptions, GenerateParams, LoadOptions, LoadProgress
from mlx_mtp_backend.mailbox import Board
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


class BaseEngine(ABC):
    """An engine: `Engine` on a thread of this process, `EngineProcess` in a process of its own. Every method may be
    called from any thread.

    Args:
        options: None for the defaults.
        on_end: called once as the engine ends, whether `close` was called or it failed, when every stream has its last
            event and every future its result.
    """

    def __init__(self, options: EngineOptions | None = None, on_end: Callable[[], None] | None = None) -> None:
        self._options = options or EngineOptions()
        self._on_end = on_end
        self._board = Board(self._options.max_streams + self._options.max_waiting)

    @property
    @abstractmethod
    def device(self) -> str | None:
        """ "Metal" or "CUDA"; None where MLX computes on the CPU."""

    @abstractmethod
    def load(
        self,
        name: str,
        path: Path,
        options: LoadOptions | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> Future[LoadedModel]:
        """Load the checkpoint in folder `path` under a name, in slices between the rounds of running streams.

        Args:
            on_progress: called on a thread of the engine's; must not wait.

        Raises:
            EngineError: INVALID_PARAMS for a name in use, ENGINE_CLOSED. The future may hold any reason that inspection
                and loading have.
        """

    @abstractmethod
    def unload(self, name: str) -> Future[None]:
        """Drop a model, or give its load up. The future holds MODEL_IN_USE while streams need it, and MODEL_NOT_LOADED
        if there is none, or was none yet."""

    @abstractmethod
    def submit(self, params: GenerateParams, on_ready: Callable[[], None] | None = None) -> Stream:
        """Queue a request.

        Args:
            on_ready: called on a thread of the engine's when events begin to wait; must only wake the reader.

        Raises:
            EngineError: MODEL_NOT_LOADED, PROMPT_TOO_LONG, TOKEN_OUT_OF_RANGE, HEAD_MISSING, INVALID_PARAMS,
                QUEUE_FULL or ENGINE_CLOSED.
        """

    @abstractmethod
    def suspect(self) -> None:
        """A stream had no sign of life: have a look at the engine, and end it if it can neither answer nor go on."""

    @abstractmethod
    def close(self) -> None:
        """End every stream with ENGINE_CLOSED, and the engine; waits for it. Safe to call again."""

    def models(self) -> dict[str, LoadedModel]:
        """Those that serve, by name."""
        with self._board.lock:
            return dict(self._board.models)

    def status(self) -> EngineStatus:
        """What it is doing."""
        with self._board.lock:
            active = self._board.decoding
            waiting = max(0, self._board.streams - active)
            return EngineStatus(tuple(self._board.models), tuple(sorted(self._board.loading)), active, waiting)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
