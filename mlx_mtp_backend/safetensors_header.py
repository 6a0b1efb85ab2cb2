"""Reads what a safetensors file says it holds, and believes none of it unchecked. No tensor data is read.

Format: eight bytes little-endian header length, a JSON header, the data. Limits below keep a hostile file cheap.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp_backend.errors import EngineError, ErrorReason

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its file's header describes it; `file` is relative to the checkpoint's folder."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    bytes: int


def unreadable(path: Path, why: str) -> EngineError:
    return EngineError(ErrorReason.CHECKPOINT_UNREADABLE, f"{path.name}: {why}")


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes.

    Raises:
        EngineError: CHECKPOINT_UNREADABLE.
    """
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise unreadable(path, error.strerror or "cannot be read") from error
    if len(text) > limit:
        raise unreadable(path, f"is larger than {limit} bytes")
    return _object(path, text)


def _object(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, "is not valid JSON") from error
    if not isinstance(value, dict):
        raise unreadable(path, "is not a JSON object")
    return value


def read_header(path: Path, label: str | None = None) -> dict[str, TensorInfo]:
    """Every tensor of one file, by name.

    Args:
        label: what to call the file in the result; its name by default.

    Raises:
        EngineError: CHECKPOINT_UNREADABLE, also for a file whose size is not what its header needs.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise unreadable(path, "is too short for safetensors")
            (length,) = struct.unpack("<Q", start)
            if length > MAX_HEADER_BYTES:
                raise unreadable(path, f"has a header of {length} bytes")
            text = file.read(length)
            size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error.strerror or "cannot be read") from error
    if len(text) < length:
        raise unreadable(path, "ends inside its header")
    entries = _object(path, text)
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise unreadable(path, f"names {len(entries)} tensors")
    return _checked(path, entries, label or path.name, size - 8 - length)


def _checked(path: Path, entries: dict[str, Any], label: str, data_bytes: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items():
        tensors[name], span = _tensor(path, name, entry, label)
        spans.append(span)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise unreadable(path, "has tensors that overlap or leave a gap")
        end = stop
    if end != data_bytes:
        raise unreadable(path, f"holds {data_bytes} bytes of data where its header needs {end}")
    return tensors


def _tensor(path: Path, name: str, entry: Any, label: str) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        dtype, shape, (begin, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, stop))
        bits = _BITS[dtype] * math.prod(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(path, f"describes tensor {name[:80]!r} in no known way") from error
    if not whole or len(shape) > MAX_DIMENSIONS or stop - begin != (bits + 7) // 8:
        raise unreadable(path, f"describes tensor {name[:80]!r} with a shape that its bytes do not fit")
    return TensorInfo(name, dtype, shape, label, stop - begin), (begin, stop)
