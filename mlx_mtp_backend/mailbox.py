"""What the callers' threads and the MLX thread share. No MLX here."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_mtp_backend.api import GenerateParams, LoadOptions, LoadProgress
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.language.grammar import Grammar
from mlx_mtp_backend.models import LoadedModel
from mlx_mtp_backend.stream import Stream

log = logging.getLogger(__name__)


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

    def report(self, progress: LoadProgress) -> None:
        """A slice is done."""
        if self.on_progress is None:
            return
        try:
            self.on_progress(progress)
        except Exception:
            log.exception("on_progress of loading %s raised", self.name)


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


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """`what` must neither wait nor raise."""

    what: Callable[[], None]


Command = Submit | Load | Unload | Close | Wake | Call


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

    def require_open(self) -> None:
        """Raises EngineError ENGINE_CLOSED. The caller holds the lock."""
        if self.closed:
            raise EngineError(ErrorReason.ENGINE_CLOSED, "the engine is closed")

    def begin_load(self, name: str) -> None:
        """Note that a model loads. The caller holds the lock.

        Raises:
            EngineError: INVALID_PARAMS for a name in use, ENGINE_CLOSED.
        """
        self.require_open()
        if name in self.models or name in self.loading:
            raise EngineError(ErrorReason.INVALID_PARAMS, f"{name!r} is loaded or loading already", field="name")
        self.loading.add(name)

    def check(self, params: GenerateParams) -> LoadedModel:
        """Everything that can be refused at once, but for what compiling the response format finds.

        Returns:
            the model that the request asks for.

        Raises:
            EngineError: MODEL_NOT_LOADED, PROMPT_TOO_LONG, TOKEN_OUT_OF_RANGE, HEAD_MISSING, INVALID_PARAMS or
                ENGINE_CLOSED.
        """
        with self.lock:
            self.require_open()
            model = self.models.get(params.model)
        if model is None:
            raise EngineError(ErrorReason.MODEL_NOT_LOADED, f"{params.model!r} is not loaded", field="model")
        _check_tokens(params, model)
        if params.depth and not model.has_head:
            raise EngineError(ErrorReason.HEAD_MISSING, f"{params.model!r} has no head to draft with", field="depth")
        needs = {"stop_strings": params.stop_strings, "response_format": params.response_format}
        for field_name, value in needs.items():
            if value and model.text is None:
                detail = f"{params.model!r} has no tokenizer, which this needs"
                raise EngineError(ErrorReason.INVALID_PARAMS, detail, field=field_name)
        return model

    def admit(self) -> None:
        """Count one more stream.

        Raises:
            EngineError: QUEUE_FULL or ENGINE_CLOSED.
        """
        with self.lock:
            self.require_open()
            if self.streams >= self.capacity:
                raise EngineError(ErrorReason.QUEUE_FULL, f"{self.streams} streams run or wait already")
            self.streams += 1

    def release(self) -> None:
        with self.lock:
            self.streams -= 1


def _check_tokens(params: GenerateParams, model: LoadedModel) -> None:
    length = len(params.prompt)
    if length >= model.context_length:
        detail = f"the prompt has {length} tokens, the context holds {model.context_length}"
        raise EngineError(ErrorReason.PROMPT_TOO_LONG, detail, field="prompt")
    biased = [token for token, _ in params.sampling.logit_bias]
    for field_name, tokens in (
        ("prompt", params.prompt),
        ("stop_tokens", params.stop_tokens),
        ("logit_bias", biased),
    ):
        if not all(0 <= token < model.vocab_size for token in tokens):
            detail = f"a token is outside [0, {model.vocab_size})"
            raise EngineError(ErrorReason.TOKEN_OUT_OF_RANGE, detail, field=field_name)


def uncancellable() -> Future[Any]:
    """A future whose waiters may leave without ending the work: the engine always gets to set it."""
    result: Future[Any] = Future()
    result.set_running_or_notify_cancel()
    return result
