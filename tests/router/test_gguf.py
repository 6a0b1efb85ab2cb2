"""The GGUF header reader: good files, broken files, and files made to hurt."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from router import gguf as reader
from router.gguf import GgufError, read_gguf_header
from router.gguf_header import GgufHeader, gguf_cache_bytes

SECONDS = 3.0  # of processor time; 0.5 on the machine this was written on
MEGABYTES = 50


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.gguf"
    writer = gguf.GGUFWriter(path, "qwen35")
    writer.add_context_length(4096)
    writer.add_file_type(15)
    writer.add_chat_template("{{ messages }} é")
    writer.add_uint32("qwen35.nextn_predict_layers", 2)
    writer.add_token_list([f"token {i}" for i in range(3000)])
    writer.add_token_scores([0.5] * 3000)
    writer.add_array("general.languages", ["en", "de"])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_float32("qwen35.rope.freq_base", 1e4)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.add_tensor("blk.10.nextn.eh_proj.weight", np.ones((4, 8), np.float16))
    writer.add_tensor("blk.9.nextn.eh_proj.weight", np.ones((4, 8), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, code: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", code) + value


def tensor(name: str, shape: tuple[int, ...], code: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, code, offset)


ARCHITECTURE = entry("general.architecture", 8, string("llama"))


def build(entries: list[bytes], tensors: list[bytes] = [], *, version: int = 3, data: int = 0) -> bytes:  # noqa: B006
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


@pytest.fixture
def read(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Reads a file of these bytes under the promised limits of time and memory."""
    path = tmp_path / "made.gguf"

    def run(content: bytes, size: int | None = None) -> GgufHeader:
        path.write_bytes(content)
        if size is not None:
            with path.open("r+b") as file:
                file.truncate(size)
        return read_bounded(path)

    return run


def read_bounded(path: Path) -> GgufHeader:
    """Reads twice, since tracing allocations makes the interpreter many times slower."""
    started = time.thread_time()
    try:
        read_gguf_header(path)
    except GgufError:
        pass
    finally:
        assert time.thread_time() - started < SECONDS
    tracemalloc.start()
    try:
        return read_gguf_header(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEGABYTES * 2**20


def test_reads_what_gguf_py_writes(good: Path) -> None:
    header = read_gguf_header(good)
    ours = gguf.GGUFReader(good)
    assert header.architecture == "qwen35"
    assert header.quantization == "Q4_K_M"
    assert header.context_length == 4096
    assert header.chat_template == "{{ messages }} é"
    assert header.mtp_layers == 2
    assert header.mtp_tensor == "blk.9.nextn.eh_proj.weight"
    assert header.file_bytes == good.stat().st_size
    assert header.metadata["general.languages"] == ("en", "de")
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert header.metadata["qwen35.rope.freq_base"] == 1e4
    assert "tokenizer.ggml.tokens" not in header.metadata
    placed = {t.name: (tuple(int(n) for n in t.shape), t.tensor_type.name, t.data_offset) for t in ours.tensors}
    assert {name: (t.shape, t.type, t.offset) for name, t in header.tensors.items()} == placed


def test_a_file_cut_anywhere_in_its_header_or_data_is_refused(good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, len(content) - 64, 97), len(content) - 64]:
        cut.write_bytes(content[:size])
        with pytest.raises(GgufError):
            read_gguf_header(cut)


def test_type_of_most_tensors_stands_in_for_a_missing_file_type(read) -> None:  # type: ignore[no-untyped-def]
    table = [tensor("a", (32,), 8, 0), tensor("b", (32,), 8, 64), tensor("c", (1,), 0, 128)]
    assert read(build([ARCHITECTURE], table, data=160)).quantization == "Q8_0"
    assert read(build([ARCHITECTURE])).quantization == ""


def test_optional_facts_are_absent_rather_than_wrong(read) -> None:  # type: ignore[no-untyped-def]
    wrong_types = [
        entry("llama.context_length", 6, struct.pack("<f", 2.0)),
        entry("llama.nextn_predict_layers", 5, struct.pack("<i", -1)),
        entry("tokenizer.chat_template", 7, b"\x01"),
    ]
    header = read(build([ARCHITECTURE, *wrong_types]))
    assert (header.context_length, header.mtp_layers, header.chat_template) == (None, 0, "")
    assert header.mtp_tensor is None


@pytest.mark.parametrize("kept", [0, 64])
def test_short_arrays_are_kept_and_long_ones_passed_over(read, kept: int) -> None:  # type: ignore[no-untyped-def]
    numbers = struct.pack("<IQ", 4, kept) + struct.pack(f"<{kept}I", *range(kept))
    longer = struct.pack("<IQ", 4, 65) + bytes(4 * 65)
    header = read(build([ARCHITECTURE, entry("kept", 9, numbers), entry("long", 9, longer)]))
    assert header.metadata["kept"] == tuple(range(kept))
    assert "long" not in header.metadata


def test_a_huge_embedded_string_is_passed_over(read) -> None:  # type: ignore[no-untyped-def]
    tokenizer = entry("tokenizer.huggingface.json", 8, string(b"x" * (20 * 2**20)))
    header = read(build([tokenizer, ARCHITECTURE]))
    assert "tokenizer.huggingface.json" not in header.metadata
    assert header.architecture == "llama"


def test_a_vocabulary_that_crosses_the_reader_window_is_passed_over_exactly(read) -> None:  # type: ignore[no-untyped-def]
    words = [b"w" * (i * 37 % 9000) for i in range(400)]
    array = struct.pack("<IQ", 8, len(words)) + b"".join(string(word) for word in words)
    header = read(build([entry("words", 9, array), ARCHITECTURE, entry("after", 4, struct.pack("<I", 7))]))
    assert header.metadata["after"] == 7


HUGE = 2**63
BROKEN = {
    "wrong magic": b"GGML" + build([ARCHITECTURE])[4:],
    "empty": b"",
    "version 1": build([ARCHITECTURE], version=1),
    "version 4": build([ARCHITECTURE], version=4),
    "big endian": build([ARCHITECTURE], version=3 << 24),
    "no architecture": build([entry("general.name", 8, string("x"))]),
    "architecture of the wrong type": build([entry("general.architecture", 4, bytes(4))]),
    "absurd key count": b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE),
    "absurd tensor count": b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0),
    "more keys than the file holds": b"GGUF" + struct.pack("<IQQ", 3, 0, 4096),
    "more tensors than the file holds": b"GGUF" + struct.pack("<IQQ", 3, 50_000, 1) + ARCHITECTURE,
    "overlong key": build([ARCHITECTURE, entry("k" * 300, 4, bytes(4))]),
    "key beyond the file": build([ARCHITECTURE, struct.pack("<Q", HUGE)]),
    "string beyond the file": build([ARCHITECTURE, entry("s", 8, struct.pack("<Q", HUGE) + b"abc")]),
    "key that is not UTF-8": build([ARCHITECTURE, entry(b"\xff\xfe", 4, bytes(4))]),
    "duplicate key": build([ARCHITECTURE, ARCHITECTURE]),
    "unknown type": build([ARCHITECTURE, entry("x", 13, bytes(8))]),
    "unknown array type": build([ARCHITECTURE, entry("x", 9, struct.pack("<IQ", 77, 1) + bytes(8))]),
    "nested array": build([ARCHITECTURE, entry("x", 9, struct.pack("<IQ", 9, 1) * 50)]),
    "array beyond the file": build([ARCHITECTURE, entry("x", 9, struct.pack("<IQ", 10, HUGE))]),
    "too many strings": build([ARCHITECTURE, entry("x", 9, struct.pack("<IQ", 8, HUGE))]),
    "boolean of 2": build([ARCHITECTURE, entry("x", 7, b"\x02")]),
    "alignment of 3": build([ARCHITECTURE, entry("general.alignment", 4, struct.pack("<I", 3))]),
    "alignment of 0": build([ARCHITECTURE, entry("general.alignment", 4, bytes(4))]),
    "alignment of text": build([ARCHITECTURE, entry("general.alignment", 8, string("32"))]),
    "duplicate tensor": build([ARCHITECTURE], [tensor("a", (1,), 0, 0)] * 2, data=32),
    "too many dimensions": build([ARCHITECTURE], [tensor("a", (1,) * 5, 0, 0)], data=32),
    "absurd dimension count": build([ARCHITECTURE], [string("a") + struct.pack("<I", 2**32 - 1)], data=32),
    "absurd shape": build([ARCHITECTURE], [tensor("a", (HUGE, HUGE, HUGE, HUGE), 0, 0)], data=32),
    "offset beyond the file": build([ARCHITECTURE], [tensor("a", (1,), 0, HUGE)], data=32),
    "one byte beyond the file": build([ARCHITECTURE], [tensor("a", (9,), 0, 0)], data=32),
    "offset off the alignment": build([ARCHITECTURE], [tensor("a", (1,), 0, 1)], data=64),
    "partial block": build([ARCHITECTURE], [tensor("a", (33,), 8, 0)], data=128),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_refused(read, content: bytes) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(GgufError) as caught:
        read(content)
    assert str(caught.value)


def test_a_tensor_of_a_type_newer_than_the_reader_is_listed(read) -> None:  # type: ignore[no-untyped-def]
    header = read(build([ARCHITECTURE], [tensor("a", (64,), 99, 0)], data=32))
    assert header.tensors["a"].type == "type 99"


def test_a_sparse_terabyte_is_refused(read) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(GgufError, match="header is over"):
        read(build([entry("x", 9, struct.pack("<IQ", 0, 2**39))]), 2**40)


def test_the_most_strings_allowed_are_passed_over_in_bounded_time(tmp_path: Path) -> None:
    array = struct.pack("<IQ", 8, reader.MAX_ARRAY_STRINGS) + bytes(8 * reader.MAX_ARRAY_STRINGS)
    path = tmp_path / "strings.gguf"
    path.write_bytes(build([ARCHITECTURE, entry("x", 9, array)]))
    started = time.thread_time()
    assert "x" not in read_gguf_header(path).metadata
    assert time.thread_time() - started < SECONDS


SIZES = {"block_count": 4, "embedding_length": 64, "attention.head_count": 8, "attention.head_count_kv": 2}


@pytest.mark.parametrize(
    ("sizes", "cache"),
    [
        (SIZES, 4 * 2 * (8 + 8) * 2),  # layers x heads x (keys + values) x bytes
        ({**SIZES, "attention.key_length": 16, "attention.value_length": 32}, 4 * 2 * (16 + 32) * 2),
        ({**SIZES, "attention.head_count_kv": None}, 4 * 8 * (8 + 8) * 2),
        ({**SIZES, "attention.head_count_kv": (0, 2, 0, 2)}, 2 * 2 * (8 + 8) * 2),
        ({**SIZES, "block_count": 9, "full_attention_interval": 4, "nextn_predict_layers": 1}, 3 * 2 * (8 + 8) * 2),
        ({**SIZES, "attention.kv_lora_rank": 512, "rope.dimension_count": 64}, 4 * 576 * 2),
        ({**SIZES, "attention.head_count_kv": (0, 2, -1)}, None),
        ({**SIZES, "attention.head_count_kv": "two"}, None),
        ({**SIZES, "block_count": 2**40}, None),
        ({**SIZES, "embedding_length": None}, None),
        ({}, None),
    ],
)
def test_what_a_token_of_context_takes(sizes: dict[str, object], cache: int | None) -> None:
    keys = {f"llama.{key}": value for key, value in sizes.items() if value is not None}
    assert gguf_cache_bytes({"general.architecture": "llama", **keys}) == cache


def test_many_stored_strings_are_refused(read) -> None:  # type: ignore[no-untyped-def]
    entries = [entry(f"k{i}", 8, string(b"x" * 2**20)) for i in range(9)]
    with pytest.raises(GgufError, match="strings hold over"):
        read(build([ARCHITECTURE, *entries]))


def test_the_largest_tensor_table_stays_within_the_memory_limit(read) -> None:  # type: ignore[no-untyped-def]
    table = [tensor(f"{i:06}" + "n" * 240, (1, 1, 1, 1), 0, 32 * i) for i in range(reader.MAX_TENSORS)]
    assert len(read(build([ARCHITECTURE], table, data=32 * reader.MAX_TENSORS)).tensors) == reader.MAX_TENSORS
