"""Reads the header of a GGUF file: metadata and tensor table, never weights.

The file may come from anywhere, so every count and length is bounded before it is used, and a broken file gives
`GgufError` and nothing else. Layout: the GGUF specification (versions 2 and 3, little endian) in the ggml repository.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

from mlx_mtp_backend.checkpoint.untrusted import RefusedFileError, links_may_lead, open_untrusted
from router.gguf_header import GgufHeader, GgufTensor, Value

MAX_HEADER_BYTES = 64 * 2**20
MAX_METADATA_KEYS = 4096
MAX_TENSORS = 50_000  # a mixture of experts stored one tensor per expert has some 30,000
MAX_NAME_BYTES = 256
MAX_STORED_STRING_BYTES = 2**20  # longer ones, such as a whole embedded tokenizer, are passed over
MAX_STORED_BYTES = 8 * 2**20
MAX_STORED_ITEMS = 64  # longer arrays, such as vocabularies, are passed over
MAX_ARRAY_STRINGS = 2_000_000  # over the whole file; the largest vocabularies with merges have about 800,000
MAX_DIMENSIONS = 4

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    code: struct.Struct("<" + letter)
    for code, letter in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "B",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# Tensor types: code, name, elements in a block, bytes in a block.
_TENSOR_TYPE_TABLE = (
    "0 F32 1 4,1 F16 1 2,2 Q4_0 32 18,3 Q4_1 32 20,6 Q5_0 32 22,7 Q5_1 32 24,8 Q8_0 32 34,9 Q8_1 32 40,"
    "10 Q2_K 256 84,11 Q3_K 256 110,12 Q4_K 256 144,13 Q5_K 256 176,14 Q6_K 256 210,15 Q8_K 256 292,"
    "16 IQ2_XXS 256 66,17 IQ2_XS 256 74,18 IQ3_XXS 256 98,19 IQ1_S 256 50,20 IQ4_NL 32 18,21 IQ3_S 256 110,"
    "22 IQ2_S 256 82,23 IQ4_XS 256 136,24 I8 1 1,25 I16 1 2,26 I32 1 4,27 I64 1 8,28 F64 1 8,29 IQ1_M 256 56,"
    "30 BF16 1 2,34 TQ1_0 256 54,35 TQ2_0 256 66,39 MXFP4 32 17,40 NVFP4 64 36,41 Q1_0 128 18"
)
_TENSOR_TYPES = {
    int(code): (name, int(block), int(size))
    for code, name, block, size in (row.split() for row in _TENSOR_TYPE_TABLE.split(","))
}


class GgufError(ValueError):
    """The file is not a usable GGUF file; the message says what is wrong with it and holds none of its content."""


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads the header of the file at `path`, in bounded time and memory.

    Raises:
        GgufError: not a regular file, not a GGUF file of version 2 or 3, cut short, contradictory, beyond the limits
            above, or a link out of the Hugging Face cache's repository that it lies in.
        OSError: the file cannot be read.
    """
    try:
        with open_untrusted(path, links_may_lead(path)) as file:
            return _Reader(file).header()
    except RefusedFileError as error:
        raise GgufError(f"it {error}") from None


class _Reader:
    """Reads forward through a window on the file. Knows how much may still be read and stored."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._file_bytes = os.fstat(file.fileno()).st_size
        self._end = min(self._file_bytes, MAX_HEADER_BYTES)
        self._window = b""
        self._at = 0  # in the window
        self._base = 0  # of the window in the file
        self._storable = MAX_STORED_BYTES
        self._array_strings = MAX_ARRAY_STRINGS

    def header(self) -> GgufHeader:
        tensor_count, key_count = self._preamble()
        metadata = self._metadata(key_count)
        if not isinstance(metadata.get("general.architecture"), str):
            raise GgufError("general.architecture is missing")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise GgufError("general.alignment is not a power of two")
        entries = self._tensor_entries(tensor_count)
        data = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        spans: list[tuple[int, int]] = []
        for name, entry in entries.items():
            tensors[name], size = self._placed(entry, data, alignment)
            spans.append((tensors[name].offset, size))
        end = 0
        for begin, size in sorted(spans):
            if size and begin < end:
                raise GgufError("its tensors overlap")
            end = max(end, begin + size)
        return GgufHeader(metadata, tensors, self._file_bytes)

    def _preamble(self) -> tuple[int, int]:
        if self._take(4) != b"GGUF":
            raise GgufError("it does not start with the GGUF magic")
        version = self._scalar(_U32)
        if version in (2 << 24, 3 << 24):
            raise GgufError("big-endian files are not supported")
        if version not in (2, 3):
            raise GgufError(f"version {version} is not supported")
        tensors, keys = self._scalar(_U64), self._scalar(_U64)
        if tensors > MAX_TENSORS:
            raise GgufError(f"it declares {tensors} tensors; the limit is {MAX_TENSORS}")
        if keys > MAX_METADATA_KEYS:
            raise GgufError(f"it declares {keys} metadata keys; the limit is {MAX_METADATA_KEYS}")
        return tensors, keys

    # Metadata

    def _metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        seen: set[str] = set()
        for _ in range(count):
            key = self._name()
            if key in seen:
                raise GgufError("a metadata key appears twice")
            seen.add(key)
            value = self._value(self._scalar(_U32))
            if value is not None:
                metadata[key] = value
        return metadata

    def _value(self, code: int) -> Value | None:
        """The value of that type, None if it is too long to keep."""
        if code == _STRING:
            return self._string()
        if code == _ARRAY:
            return self._array()
        if code not in _SCALARS:
            raise GgufError(f"metadata type {code} is not known")
        return _scalar_value(code, self._take(_SCALARS[code].size))

    def _string(self) -> str | None:
        size = self._scalar(_U64)
        if size > MAX_STORED_STRING_BYTES:
            self._skip(size)
            return None
        self._store(size)
        return self._take(size).decode("utf-8", errors="replace")

    def _array(self) -> Value | None:
        code, count = self._scalar(_U32), self._scalar(_U64)
        if code == _ARRAY:
            raise GgufError("arrays of arrays are not supported")
        if code == _STRING:
            return self._string_array(count)
        if code not in _SCALARS:
            raise GgufError(f"array type {code} is not known")
        size = _SCALARS[code].size
        if count > MAX_STORED_ITEMS:
            self._skip(count * size)
            return None
        return tuple(_scalar_value(code, self._take(size)) for _ in range(count))

    def _string_array(self, count: int) -> Value | None:
        self._array_strings -= count
        if self._array_strings < 0:
            raise GgufError(f"its arrays hold over {MAX_ARRAY_STRINGS} strings")
        if count > MAX_STORED_ITEMS:
            self._skip_strings(count)
            return None
        strings = [self._string() for _ in range(count)]
        return tuple(text for text in strings if text is not None) if None not in strings else None

    def _skip_strings(self, count: int) -> None:
        """Passes over a vocabulary: a loop on locals, since it runs some 100,000 times."""
        unpack = _U64.unpack_from
        while count:
            self._need(8)
            window, at = self._window, self._at
            last = len(window) - 8
            while count and at <= last:
                following = at + 8 + unpack(window, at)[0]
                if following > len(window):
                    break
                at = following
                count -= 1
            self._at = at
            if count and at <= last:  # the string reaches beyond the window
                self._skip(self._scalar(_U64))
                count -= 1

    # Tensor table

    def _tensor_entries(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._name()
            if name in entries:
                raise GgufError("a tensor appears twice")
            dimensions = self._scalar(_U32)
            if dimensions > MAX_DIMENSIONS:
                raise GgufError(f"a tensor has {dimensions} dimensions; the limit is {MAX_DIMENSIONS}")
            shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))
            entries[name] = shape, self._scalar(_U32), self._scalar(_U64)
        return entries

    def _placed(self, entry: tuple[tuple[int, ...], int, int], data: int, alignment: int) -> tuple[GgufTensor, int]:
        """The tensor, and its bytes; 0 bytes for a type that is not known."""
        shape, code, offset = entry
        if offset % alignment:
            raise GgufError("a tensor's offset is not aligned")
        elements = math.prod(shape)
        # The size of a type newer than this table is not known: only its start can be checked.
        name, block, block_bytes = _TENSOR_TYPES.get(code, (f"type {code}", 1, 0))
        if elements % block:
            raise GgufError("a tensor's size is not a whole number of blocks")
        size = elements // block * block_bytes
        if data + offset + size > self._file_bytes:
            raise GgufError("a tensor reaches beyond the end of the file")
        return GgufTensor(shape, name, data + offset), size

    # Bytes

    @property
    def _position(self) -> int:
        return self._base + self._at

    def _name(self) -> str:
        size = self._scalar(_U64)
        if size > MAX_NAME_BYTES:
            raise GgufError(f"a name has {size} bytes; the limit is {MAX_NAME_BYTES}")
        try:
            return self._take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise GgufError("a name is not UTF-8") from None

    def _scalar(self, kind: struct.Struct) -> int:
        value: int = kind.unpack(self._take(kind.size))[0]
        return value

    def _take(self, size: int) -> bytes:
        self._need(size)
        piece = self._window[self._at : self._at + size]
        self._at += size
        return piece

    def _need(self, size: int) -> None:
        """Makes `size` bytes available in the window."""
        if self._at + size <= len(self._window):
            return
        if self._position + size > self._end:
            raise GgufError(self._overrun())
        rest = self._window[self._at :]
        self._base += self._at
        self._at = 0
        self._window = rest + self._file.read(max(size - len(rest), 2**16))
        if len(self._window) < size:
            raise GgufError("it is cut short")  # it shrank since it was opened

    def _skip(self, size: int) -> None:
        if self._position + size > self._end:
            raise GgufError(self._overrun())
        if self._at + size <= len(self._window):
            self._at += size
            return
        self._base = self._position + size
        self._at = 0
        self._window = b""
        self._file.seek(self._base)

    def _store(self, size: int) -> None:
        self._storable -= size
        if self._storable < 0:
            raise GgufError(f"its metadata strings hold over {MAX_STORED_BYTES} bytes")

    def _overrun(self) -> str:
        if self._end < self._file_bytes:
            return f"its header is over {MAX_HEADER_BYTES} bytes"
        return "it is cut short"


def _scalar_value(code: int, data: bytes) -> int | float | bool:
    value: int | float = _SCALARS[code].unpack(data)[0]
    if code != _BOOL:
        return value
    if value not in (0, 1):
        raise GgufError("a boolean is neither 0 nor 1")
    return value == 1
