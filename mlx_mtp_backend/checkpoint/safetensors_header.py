"""Reads what a safetensors file says it holds, and believes none of it unchecked. No tensor data is read.

Format: eight bytes little-endian header length, a JSON header, the data. Limits below keep a hostile file cheap.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp_backend.checkpoint.untrusted import RefusedFileError, open_untrusted, parse_object, read_untrusted
from mlx_mtp_backend.errors import EngineError, ErrorReason

MAX_HEADER_BYTES = 32 * 2**20  # 200,000 tensors; the format allows 100 MB, which would cost gigabytes to parse
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8
MAX_BYTES = 2**60  # of one tensor, and elements of one side of it
MAX_HEADER_VALUES = 12 * MAX_TENSORS  # a tensor has some ten
MAX_JSON_VALUES = 1_000_000
SUFFIX = ".safetensors"
# How files that run code when they are read begin: ZIP (PyTorch) and pickle protocols 2 to 5.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

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


def read_json(path: Path, limit: int, roots: Sequence[Path] | None = None) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes.

    Args:
        roots: where its symbolic links may lead (see `open_untrusted`).

    Raises:
        EngineError: CHECKPOINT_UNREADABLE.
    """
    try:
        return parse_object(read_untrusted(path, limit, roots), MAX_JSON_VALUES)
    except OSError as error:
        raise unreadable(path, error.strerror or "cannot be read") from error
    except RefusedFileError as error:
        raise unreadable(path, str(error)) from error


def read_header(path: Path, label: str | None = None, roots: Sequence[Path] | None = None) -> dict[str, TensorInfo]:
    """Every tensor of one file, by name.

    Args:
        label: what to call the file in the result; its name by default.
        roots: where its symbolic links may lead (see `open_untrusted`).

    Raises:
        EngineError: CHECKPOINT_UNREADABLE, also for a file whose size is not what its header needs.
    """
    try:
        with open_untrusted(path, roots) as file:
            start = file.read(8)
            if len(start) < 8:
                raise RefusedFileError("is too short for safetensors")
            (length,) = struct.unpack("<Q", start)
            if length > MAX_HEADER_BYTES and start.startswith(_PICKLES):
                raise RefusedFileError("begins as a pickle does; pickles run code when they are read")
            if length > MAX_HEADER_BYTES:
                raise RefusedFileError(f"has a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
            size = os.fstat(file.fileno()).st_size
            if size < 8 + length:
                raise RefusedFileError("ends inside its header")
            text = file.read(length)
        entries = parse_object(text, MAX_HEADER_VALUES)
    except OSError as error:
        raise unreadable(path, error.strerror or "cannot be read") from error
    except RefusedFileError as error:
        raise unreadable(path, str(error)) from error
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
        dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = _BITS[dtype]
        # Before they are multiplied: numbers of a million digits would take minutes.
        known = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(path, f"describes tensor {name[:80]!r} in no known way") from error
    if not known or not all(type(number) is int and 0 <= number <= MAX_BYTES for number in (*shape, begin, stop)):
        raise unreadable(path, f"describes tensor {name[:80]!r} with numbers that are no shape and offsets")
    if stop - begin != (bits * math.prod(shape) + 7) // 8:
        raise unreadable(path, f"describes tensor {name[:80]!r} with a shape that its bytes do not fit")
    return TensorInfo(name, dtype, tuple(shape), label, stop - begin), (begin, stop)
