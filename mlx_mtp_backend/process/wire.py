"""What an engine's process and its parent say to each other: frames of JSON on a socket.

The child reads files that strangers made, so its words are checked: nothing but the messages below comes out of a
frame, each field of its declared type. Measured against pickle on 2 x86 cores, to encode and to decode: 6 + 16 us for
the deltas of 8 streams (pickle 41 + 49), 0.7 + 1.0 ms for a prompt of 30,000 tokens (pickle 0.4 + 0.6).
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ConfigDict, TypeAdapter
from pydantic_core import PydanticSerializationError, ValidationError

from mlx_mtp_backend.api import Delta, EngineOptions, Finished, GenerateParams, LoadOptions, LoadProgress, Started
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.models import LoadedModel

MAX_BODY = 64 * 2**20  # bytes
_HEAD = struct.Struct("!IB")  # the body's length, and the kind of message
# Errors and texts of models are parts of these types that never cross: they have forms of their own here.
_CONFIG = ConfigDict(strict=True, arbitrary_types_allowed=True, ser_json_inf_nan="constants")


class _Message:
    """How pydantic reads and writes every message."""

    __slots__ = ()
    __pydantic_config__ = _CONFIG


class WireError(Exception):
    """What came, or was to go, is no message. The text quotes nothing of it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An EngineError on its way."""

    reason: ErrorReason
    detail: str
    field: str | None

    @classmethod
    def of(cls, error: EngineError) -> Failure:
        return cls(error.reason, printable(error.detail), error.field)

    def error(self) -> EngineError:
        return EngineError(self.reason, self.detail, self.field)


@dataclass(frozen=True, slots=True)
class Start(_Message):
    """The first message: how to run, and the level from which log records are wanted."""

    options: EngineOptions
    log_level: int


@dataclass(frozen=True, slots=True)
class LoadModel(_Message):
    """Load; `number` is the answer's."""

    number: int
    name: str
    path: Path
    options: LoadOptions


@dataclass(frozen=True, slots=True)
class UnloadModel(_Message):
    """Unload, or give a load up."""

    number: int
    name: str


@dataclass(frozen=True, slots=True)
class Generate(_Message):
    """A request. `submitted` is of time.monotonic(), a clock that all processes of a machine share."""

    stream: int
    params: GenerateParams
    submitted: float


@dataclass(frozen=True, slots=True)
class Cancel(_Message):
    """The reader has left."""

    stream: int


@dataclass(frozen=True, slots=True)
class Room(_Message):
    """So many tokens have been read."""

    stream: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Ping(_Message):
    """Answer at once or, with `step`, from the MLX thread between two steps."""

    step: bool


@dataclass(frozen=True, slots=True)
class Quit(_Message):
    """Close the engine and end."""


@dataclass(frozen=True, slots=True)
class Ready(_Message):
    """The engine runs; see BaseEngine.device."""

    device: str | None


@dataclass(frozen=True, slots=True)
class Progress(_Message):
    """A slice of a load is done."""

    number: int
    progress: LoadProgress


@dataclass(frozen=True, slots=True)
class Loaded(_Message):
    """A model serves. Its text does not cross: where it has one, the parent reads it anew."""

    number: int
    model: LoadedModel
    has_text: bool


@dataclass(frozen=True, slots=True)
class Unloaded(_Message):
    """A model is gone."""

    number: int


@dataclass(frozen=True, slots=True)
class Failed(_Message):
    """A load, an unload or, with number 0, the start came to nothing."""

    number: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Batch:
    """Events of one stream, in this order. A failure is the error of `finished`, or stands for it where the request did
    not come to the engine."""

    stream: int
    started: Started | None
    deltas: tuple[Delta, ...]
    finished: Finished | None
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class Events(_Message):
    """What several streams have to tell."""

    batches: tuple[Batch, ...]


@dataclass(frozen=True, slots=True)
class Pong(_Message):
    """The answer to a ping."""

    step: bool


@dataclass(frozen=True, slots=True)
class Log(_Message):
    """A log record, its text complete."""

    name: str
    level: int
    text: str


ToChild = Start | LoadModel | UnloadModel | Generate | Cancel | Room | Ping | Quit
ToParent = Ready | Progress | Loaded | Unloaded | Failed | Events | Pong | Log
TO_CHILD: tuple[type[ToChild], ...] = (Start, LoadModel, UnloadModel, Generate, Cancel, Room, Ping, Quit)
TO_PARENT: tuple[type[ToParent], ...] = (Ready, Progress, Loaded, Unloaded, Failed, Events, Pong, Log)
_KINDS: tuple[type[Any], ...] = (*TO_CHILD, *TO_PARENT)


@functools.cache
def _adapter(number: int) -> TypeAdapter[Any]:
    return TypeAdapter(_KINDS[number])


def encode(message: ToChild | ToParent) -> bytes:
    """A frame.

    Raises:
        WireError: a text that is not Unicode, a number of a foreign type, more than MAX_BODY.
    """
    name, number = type(message).__name__, _KINDS.index(type(message))
    try:
        body = _adapter(number).dump_json(message, warnings=False)
    except (PydanticSerializationError, ValueError):
        raise WireError(f"a {name} cannot be written") from None
    if len(body) > MAX_BODY:
        raise WireError(f"a {name} of {len(body)} bytes is too long")
    return _HEAD.pack(len(body), number) + body


def receive(source: BinaryIO, kinds: tuple[type[Any], ...]) -> Any:
    """The next message, of one of these kinds; None at the end.

    Raises:
        WireError: anything else came.
        EngineError: a message whose values its type refuses.
    """
    head = source.read(_HEAD.size)
    if not head:
        return None
    if len(head) < _HEAD.size:
        raise WireError("a frame broke off")
    length, number = _HEAD.unpack(head)
    if length > MAX_BODY or number >= len(_KINDS) or _KINDS[number] not in kinds:
        raise WireError(f"a frame of kind {number} and {length} bytes is none")
    body = source.read(length)
    if len(body) < length:
        raise WireError("a frame broke off")
    try:
        return _adapter(number).validate_json(body)
    except ValidationError as error:
        raise WireError(f"no {_KINDS[number].__name__}: {error.error_count()} errors") from None


def printable(text: str) -> str:
    """With what is not Unicode, such as bytes of a file's name, replaced."""
    return text.encode("utf-8", "replace").decode()
