"""The readers of checkpoints, fuzzed: whatever the bytes, a report or a typed error. `make fuzz` goes on for longer."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz import fuzzed

from mlx_mtp_backend import EngineError, ErrorReason, inspect_checkpoint
from mlx_mtp_backend.checkpoint.safetensors_header import TensorInfo, read_header
from mlx_mtp_backend.families.layouts import Spelling
from mlx_mtp_backend.synthetic import Recipe, write

Report = TypeVar("Report")

numbers = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31, 2**32, 2**53, 2**60, 2**63, 2**64, -(2**63)]), st.integers()
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=8))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def odd(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what is usual there, else anything."""
    return st.integers(0, 9).flatmap(lambda roll: values if roll == 0 else usual)


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """A header's text, and how many bytes of data follow: tensors that lie behind one another, with something amiss."""
    entries: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.text(max_size=6), max_size=6, unique=True)):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        begin, end = end, end + 4 * math.prod(shape) + draw(st.sampled_from([0] * 20 + [-4, 4]))
        entries[name] = draw(
            odd(
                st.fixed_dictionaries(
                    {
                        "dtype": odd(st.sampled_from(["F32", "I32", "U32", "F32", "BF16", "F4"])),
                        "shape": odd(st.just(shape)),
                        "data_offsets": odd(st.just([begin, end])),
                    }
                )
            )
        )
    if draw(st.booleans()):
        entries["__metadata__"] = draw(values)
    text = json.dumps(entries).encode()
    for at, byte in draw(st.lists(st.tuples(st.integers(0, len(text) - 1), st.integers(0, 255)), max_size=2)):
        text = text[:at] + bytes([byte]) + text[at + 1 :]
    return text, max(0, end + draw(st.sampled_from([0] * 20 + [-1, 1])))


def report_or_refusal(look: Callable[[], Report]) -> Report | None:
    """What `look` finds, None where it refuses the files. Any other error fails the test."""
    reason = ErrorReason.CHECKPOINT_UNREADABLE
    try:
        return look()
    except EngineError as error:
        reason = error.reason
    assert reason in (ErrorReason.CHECKPOINT_UNREADABLE, ErrorReason.CHECKPOINT_RUNS_CODE)
    return None


def read(path: Path, content: bytes) -> dict[str, TensorInfo] | None:
    """The header; None where it is refused."""
    path.write_bytes(content)
    return report_or_refusal(lambda: read_header(path))


SEEN = {"read": 0, "refused": 0}


@fuzzed(300)
@given(made=headers(), length=odd(st.none()))
def test_fuzz_a_header_tells_of_exactly_the_data_or_is_refused(
    tmp_path: Path, made: tuple[bytes, int], length: Any
) -> None:
    text, data = made
    told = length if isinstance(length, int) and 0 <= length < 2**64 else len(text)
    found = read(tmp_path / "x.safetensors", struct.pack("<Q", told) + text + bytes(data))
    SEEN["refused" if found is None else "read"] += 1
    if found is not None:
        assert sum(tensor.bytes for tensor in found.values()) == data
        assert all(type(side) is int and side >= 0 for tensor in found.values() for side in tensor.shape)


def test_both_outcomes_were_seen() -> None:
    if not any(SEEN.values()):
        pytest.skip("run alone")
    assert min(SEEN.values()) > 0, SEEN


@fuzzed(100)
@given(content=st.binary(max_size=64))
def test_fuzz_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    read(tmp_path / "x.safetensors", content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fuzz") / "m", Recipe(layers=2))


@fuzzed(100)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_fuzz_a_changed_byte_in_a_shard(folder: Path, tmp_path: Path, position: int, value: int) -> None:
    name = "model-00003-of-00003.safetensors"
    good = (folder / name).read_bytes()
    read(tmp_path / name, good[:position] + bytes([value]) + good[position + 1 :])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of experts; its head's one by one, so that their number in the config is how many names are looked for."""
    return write(tmp_path_factory.mktemp("fuzz") / "m", Recipe(layers=2, experts=8, spelling=Spelling.EACH))


@pytest.mark.parametrize("kind", ["folder", "mixture"])
@fuzzed(100)
@given(data=st.data())
def test_fuzz_a_config_that_says_anything(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, data: st.DataObject
) -> None:
    folder: Path = request.getfixturevalue(kind)
    copy = tmp_path / "m"
    if not copy.exists():
        shutil.copytree(folder, copy)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        for key in data.draw(st.lists(st.sampled_from(sorted(part)), max_size=3)):
            part[key] = data.draw(values)
    (copy / "config.json").write_text(json.dumps(config))
    report = report_or_refusal(lambda: inspect_checkpoint(copy))
    if report is not None:
        json.dumps(report.to_json())
