"""What the callers' threads and the MLX thread share. No MLX here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from mlx_mtp_backend.api import GenerateParams, LoadOptions, LoadProgress
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.grammar import Grammar
from mlx_mtp_backend.models import LoadedModel
from mlx_mtp_backend.stream import Stream


@dataclass(frozen=True, slots=True, eq=False)
class Submit:
    params: GenerateParams
    stream: Stream
    submitted: float
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    name: str
    path: Path
    options: LoadOptions
    on_progress: Callable[[LoadProgress], None] | None
    result: Future[LoadedModel]


@dataclass(frozen=True, slots=True, eq=False)
class Unload:
    name: str
    result: Future[None]


@dataclass(frozen=True, slots=True)
class Close:
    pass


@dataclass(frozen=True, slots=True)
class Wake:
    """Nothing to do but look again."""


Command = Submit | Load | Unload | Close | Wake


class Inbox:
    """Commands to the MLX thread, in order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._commands: list[Command] = []

    def put(self, command: Command) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def take(self, patience: float | None) -> list[Command]:
        """Every waiting command; waits up to `patience` seconds for the first, None for as long as it takes."""
        with self._changed:
            self._changed.wait_for(lambda: self._commands, patience)
            commands, self._commands = self._commands, []
            return commands


@dataclass(slots=True)
class Board:
    """What the MLX thread publishes and callers read. Hold `lock` for more than one look."""

    capacity: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    models: dict[str, LoadedModel] = field(default_factory=dict)
    loading: set[str] = field(default_factory=set)
    streams: int = 0
    decoding: int = 0
    closed: bool = False

    def admit(self) -> None:
        """Count one more stream.

        Raises:
            EngineError: QUEUE_FULL or ENGINE_CLOSED.
        """
        with self.lock:
            if self.closed:
                raise EngineError(ErrorReason.ENGINE_CLOSED, "the engine is closed")
            if self.streams >= self.capacity:
                raise EngineError(ErrorReason.QUEUE_FULL, f"{self.streams} streams run or wait already")
            self.streams += 1

    def release(self) -> None:
        with self.lock:
            self.streams -= 1
