"""Capability by evidence, and no harm from a hostile folder."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from mlx_mtp_backend.checkpoint import MTPStatus, inspect_checkpoint, safetensors_header
from mlx_mtp_backend.checkpoint import files as checkpoint_files
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.synthetic import Recipe, write


@pytest.fixture
def copy(history: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(history, tmp_path / "copy"))


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(path: Path, head_path: Path | None = None) -> ErrorReason:
    with pytest.raises(EngineError) as caught:
        inspect_checkpoint(path, head_path)
    return caught.value.reason


@pytest.mark.parametrize("wrapper", [True, False])
@pytest.mark.parametrize("place", ["shards", "side", "folder"])
def test_a_head_is_found_wherever_it_lies(tmp_path, place, wrapper):
    report = inspect_checkpoint(write(tmp_path, Recipe(head=place, wrapper=wrapper)))
    assert report.mtp.status is MTPStatus.PRESENT
    assert len(report.mtp.tensors) == 15
    assert (report.mtp.declared, report.mtp.declared_by) == (1, "mtp_num_hidden_layers")
    expected = {
        "shards": "model-00003-of-00003.safetensors",
        "side": "mtp.safetensors",
        "folder": "mtp/model.safetensors",
    }
    assert {tensor.file for tensor in report.mtp.tensors} == {expected[place]}
    assert (report.family, report.context_length, report.layers) == ("qwen3_5", 4096, 4)
    assert report.has_tokenizer
    assert report.has_chat_template


def test_its_identity_is_that_of_its_files(copy, tmp_path):
    """Replaced weights, another configuration and another head are told without reading them."""
    head = write(tmp_path / "other", Recipe(head="side")) / "mtp.safetensors"
    shard = next(copy.glob("model-00001*"))
    seen = [inspect_checkpoint(copy).identity, inspect_checkpoint(copy, head).identity]
    assert inspect_checkpoint(copy).identity == seen[0]
    for changed, head_path in ((shard, None), (copy / "config.json", None), (head, head)):
        os.utime(changed, ns=(1, 1))
        seen.append(inspect_checkpoint(copy, head_path).identity)
    with (copy / "config.json").open("a") as file:
        file.write("\n")
    os.utime(copy / "config.json", ns=(1, 1))
    seen.append(inspect_checkpoint(copy).identity)
    assert len(set(seen)) == len(seen)


def test_declared_but_absent(tmp_path):
    report = inspect_checkpoint(write(tmp_path, Recipe(head="none")))
    assert report.mtp.status is MTPStatus.DECLARED_BUT_ABSENT
    assert report.mtp.evidence == ()


def test_an_index_that_lists_a_head_proves_nothing(copy):
    """The index still names the head's tensors, but the shard was stripped."""
    index = json.loads((copy / checkpoint_files.INDEX).read_text())
    shard = next(file for name, file in index["weight_map"].items() if name.startswith("mtp."))
    (copy / shard).write_bytes(struct.pack("<Q", 2) + b"{}")
    assert inspect_checkpoint(copy).mtp.status is MTPStatus.DECLARED_BUT_ABSENT


def test_tensors_without_a_declaration_still_count(copy):
    edit(copy / "config.json", lambda config: config["text_config"].pop("mtp_num_hidden_layers"))
    report = inspect_checkpoint(copy)
    assert (report.mtp.status, report.mtp.declared) == (MTPStatus.PRESENT, 0)


def test_a_misshapen_head_is_incomplete(copy):
    edit(copy / "config.json", lambda config: config["text_config"].update(intermediate_size=97))
    report = inspect_checkpoint(copy)
    assert report.mtp.status is MTPStatus.INCOMPLETE
    assert any("mlp.up_proj" in problem for problem in report.mtp.missing)


def test_another_family_has_no_driver(copy):
    edit(copy / "config.json", lambda config: config.update(model_type="deepseek_v3"))
    report = inspect_checkpoint(copy)
    assert (report.mtp.status, report.mtp.driver, report.trunk_driver) == (MTPStatus.NO_DRIVER, None, None)


def test_the_head_of_the_original_beside_another_trunk(history, tmp_path):
    """Of the original, only the shards that hold the head need to be there."""
    trunk = write(tmp_path / "trunk", Recipe(head="none"))
    original = Path(shutil.copytree(history, tmp_path / "original"))
    (original / "model-00001-of-00003.safetensors").unlink()
    report = inspect_checkpoint(trunk, original)
    assert report.mtp.status is MTPStatus.PRESENT
    assert inspect_checkpoint(trunk, original / "model-00003-of-00003.safetensors").mtp.status is MTPStatus.PRESENT
    assert refused(trunk, tmp_path / "nowhere") is ErrorReason.CHECKPOINT_UNREADABLE


@pytest.mark.parametrize("key", ["auto_map", "model_file"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_checkpoint_that_brings_code_is_refused(copy, key, nested):
    edit(copy / "config.json", lambda config: (config["text_config"] if nested else config).update({key: "evil.py"}))
    assert refused(copy) is ErrorReason.CHECKPOINT_RUNS_CODE


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 7])
def test_an_index_cannot_point_elsewhere(copy, name):
    edit(copy / checkpoint_files.INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    assert refused(copy) is ErrorReason.CHECKPOINT_UNREADABLE


def test_a_missing_shard_or_config_is_an_error(copy, tmp_path):
    (copy / "model-00002-of-00003.safetensors").unlink()
    assert refused(copy) is ErrorReason.CHECKPOINT_UNREADABLE
    assert refused(tmp_path / "nowhere") is ErrorReason.CHECKPOINT_UNREADABLE


def test_quantisation_is_reported(copy):
    edit(copy / "config.json", lambda config: config.update(quantization={"bits": 4, "group_size": 64}))
    quantization = inspect_checkpoint(copy).quantization
    assert quantization is not None
    assert (quantization.mode, quantization.bits, quantization.group_size) == ("affine", 4, 64)


def test_the_report_is_json(history):
    assert json.loads(json.dumps(inspect_checkpoint(history).to_json()))["mtp"]["status"] == "present"


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: object) -> dict:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


HOSTILE = {
    "too short": b"1234",
    "absurd header length": struct.pack("<Q", 1 << 60) + b"{}",
    "cut header": safetensors(entry())[:20],
    "not JSON": safetensors(b"nonsense"),
    "deep JSON": safetensors(b"[" * 100_000),
    "a list": safetensors([]),
    "unknown dtype": safetensors(entry(dtype="F33"), bytes(8)),
    "negative dimension": safetensors(entry(shape=[-1, -2]), bytes(8)),
    "float dimension": safetensors(entry(shape=[2.0]), bytes(8)),
    "bool dimension": safetensors(entry(shape=[True, 2]), bytes(8)),
    "wrong size": safetensors(entry(shape=[3]), bytes(8)),
    "huge shape": safetensors(entry(shape=[1 << 40, 1 << 40]), bytes(8)),
    "past the end": safetensors(entry(), bytes(4)),
    "trailing data": safetensors(entry(), bytes(12)),
    "three offsets": safetensors(entry(data_offsets=[0, 8, 9]), bytes(8)),
    "overlap": safetensors(entry() | {"u": entry()["t"]}, bytes(8)),
    "entry is text": safetensors({"t": "x"}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(EngineError) as caught:
        safetensors_header.read_header(file)
    assert caught.value.reason is ErrorReason.CHECKPOINT_UNREADABLE
