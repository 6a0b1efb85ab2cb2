"""The GGUF reader, fuzzed: whatever the bytes, a header or a GgufError. `make fuzz` goes on for longer."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz import fuzzed
from support.gguf_files import Script, write_script_model
from support.hostile import key, string

from router.gguf import GgufError, read_gguf_header

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
# Sizes and counts as files have them, and those that break readers.
counts = st.one_of(st.integers(0, 6), st.sampled_from([2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]), U64)
codes = st.one_of(st.integers(0, 13), U32)


def odd(usual: st.SearchStrategy[int], other: st.SearchStrategy[int] = counts) -> st.SearchStrategy[int]:
    return st.integers(0, 14).flatmap(lambda roll: other if roll == 0 else usual)


@st.composite
def named(draw: st.DrawFn) -> bytes:
    """A string of the format, whose length is mostly its own."""
    data = draw(st.binary(max_size=6) | st.sampled_from([b"general.alignment", b"general.architecture", b"llama.x"]))
    return struct.pack("<Q", draw(odd(st.just(len(data))))) + data


@st.composite
def entries(draw: st.DrawFn) -> bytes:
    """A key and a value, whose type is mostly its own."""
    code = draw(codes)
    if code == 8:
        value = draw(named())
    elif code == 9:
        items = draw(st.integers(0, 5))
        value = struct.pack("<IQ", draw(codes), draw(odd(st.just(items)))) + draw(st.binary(max_size=8 * items))
    else:
        width = {0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(code, 4)
        value = draw(st.binary(min_size=width, max_size=width))
    return draw(named()) + struct.pack("<I", code) + value


@st.composite
def tensors(draw: st.DrawFn) -> bytes:
    shape = draw(st.lists(odd(st.integers(0, 4)), max_size=4))
    at = 32 * draw(odd(st.integers(0, 3), st.integers(0, 2**58)))
    dimensions = draw(odd(st.just(len(shape)), U32))
    kind = draw(odd(st.sampled_from([0, 1, 8, 30]), U32))
    return draw(named()) + struct.pack(f"<I{len(shape)}QIQ", dimensions, *shape, kind, at)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    keys = [key("general.architecture", 8, string("llama"))] * draw(st.sampled_from([1] * 9 + [0]))
    keys += draw(st.lists(entries(), max_size=4))
    table = draw(st.lists(tensors(), max_size=4))
    version = draw(odd(st.sampled_from([2, 3]), U32))
    told = struct.pack("<IQQ", version, draw(odd(st.just(len(table)))), draw(odd(st.just(len(keys)))))
    content = b"GGUF" + told + b"".join(keys) + b"".join(table)
    return content + bytes(draw(st.integers(0, 300)))


SEEN = {"read": 0, "refused": 0}


def read(path: Path, content: bytes, holes: int = 0) -> None:
    """Reads a file of that content and some holes: a sound header or a GgufError, any other error fails the test."""
    path.write_bytes(content)
    os.truncate(path, len(content) + holes)
    try:
        header = read_gguf_header(path)
    except GgufError:
        SEEN["refused"] += 1
        return
    SEEN["read"] += 1
    for text in (header.architecture, header.quantization, header.chat_template):
        assert isinstance(text, str)
    assert header.context_length is None or header.context_length > 0
    assert header.mtp_layers >= 0
    assert header.mtp_tensor is None or header.mtp_tensor in header.tensors
    assert header.cache_bytes is None or header.cache_bytes >= 0
    assert all(tensor.offset <= path.stat().st_size for tensor in header.tensors.values())


@fuzzed(250)
@given(content=files())
def test_fuzz_files_of_the_format(tmp_path: Path, content: bytes) -> None:
    read(tmp_path / "made.gguf", content)


def test_both_outcomes_were_seen() -> None:
    if not any(SEEN.values()):
        pytest.skip("run alone")
    assert min(SEEN.values()) > 0, SEEN


@fuzzed(100)
@given(content=st.binary(max_size=80))
def test_fuzz_any_bytes(tmp_path: Path, content: bytes) -> None:
    read(tmp_path / "any.gguf", b"GGUF\x03\0\0\0" + content)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    write_script_model(path, {"a": Script(["b", "c"])})
    return path.read_bytes()[: 2**15]  # its header, and a little of its data


@fuzzed(200)
@given(data=st.data())
def test_fuzz_flipped_bytes(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(good)
    # Counts and lengths sit at the ends of the header, so flips are drawn there as well as anywhere.
    position = st.integers(0, 400) | st.integers(0, len(content) - 1)
    for at, value in data.draw(st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=8)):
        content[at] = value
    read(tmp_path / "flipped.gguf", bytes(content), holes=2**26)  # in place of the weights
