"""Heads beside a trunk that mlx-lm quantised, in any mode: the original's, from its shards or a side file, and a
quantised one."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.qwen3_5 import Model, ModelArgs
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from support.storages import AWQ_CONFIG, awq, stored

from mlx_mtp_backend import Engine, EngineOptions, GenerateParams, LoadOptions, Sampling, WiringPolicy
from mlx_mtp_backend.api import Delta, Finished
from mlx_mtp_backend.checkpoint import MTPStatus, inspect_checkpoint
from mlx_mtp_backend.synthetic import Recipe, write

GROUP_SIZE, BITS = 32, 8
PROMPT = tuple(range(3, 43))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain that its head predicts, so that acceptance shows whether the head is the right one."""
    return write(tmp_path_factory.mktemp("original"), Recipe(kind="pass-through", acceptance=1.0, layers=2))


@pytest.fixture(scope="module")
def trunk(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(original, tmp_path_factory.mktemp("trunk"), GROUP_SIZE, BITS)


def converted(original: Path, folder: Path, group_size: int, bits: int, mode: str = "affine") -> Path:
    """What mlx-lm's converter makes of the original: quantised, its head dropped."""
    model, config = load_model(original, get_model_classes=lambda config: (Model, ModelArgs), strict=False)
    model, config = quantize_model(model, config, group_size, bits, mode)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(original / name, folder / name)
    return folder


def head_of(original: Path) -> dict[str, mx.array]:
    """The original's head, by the names of a file that holds nothing else."""
    tensors = inspect_checkpoint(original).mtp.tensors
    return {t.name.removeprefix("mtp."): mx.load(str(original / t.file))[t.name] for t in tensors}


def quantised(head: dict[str, mx.array]) -> dict[str, mx.array]:
    packed: dict[str, mx.array] = {}
    for name, weight in head.items():
        if weight.ndim == 1:
            packed[name] = weight
            continue
        stem = name.removesuffix("weight")
        parts = mx.quantize(weight, group_size=GROUP_SIZE, bits=BITS)
        packed |= dict(zip((f"{stem}weight", f"{stem}scales", f"{stem}biases"), parts, strict=True))
    return packed


def accepted_share(path: Path, head_path: Path | None = None) -> float:
    """Of the drafts of a seeded reply; its tokens must be those of plain decoding."""
    with Engine(EngineOptions(device="cpu")) as engine:
        options = LoadOptions(head_path=head_path, wiring=WiringPolicy.OFF)
        model = engine.load("model", path, options).result(timeout=60)
        assert model.has_head
        replies, end = [], None
        for depth in (0, 3):
            params = GenerateParams("model", PROMPT, 24, Sampling(0.6), seed=4, depth=depth, ignore_eos=True)
            events = list(engine.submit(params))
            replies.append([token for event in events if isinstance(event, Delta) for token in event.tokens])
            end = events[-1]
    assert isinstance(end, Finished)
    assert replies[0] == replies[1]
    assert len(replies[0]) == 24
    return sum(end.statistics.accepted) / sum(end.statistics.drafted)


def test_without_its_head_the_trunk_has_none(trunk):
    report = inspect_checkpoint(trunk)
    assert report.mtp.status is MTPStatus.DECLARED_BUT_ABSENT
    assert report.quantization is not None
    assert (report.quantization.bits, report.quantization.group_size) == (BITS, GROUP_SIZE)


def test_the_head_comes_from_the_originals_shards(trunk, original):
    report = inspect_checkpoint(trunk, original)
    assert report.mtp.status is MTPStatus.PRESENT
    assert len(report.mtp.tensors) == 15
    assert accepted_share(trunk, original) > 0.9


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"), [("affine", 3, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
def test_every_mode_of_mlx_is_read_and_drafted_for(original, tmp_path, mode, bits, group_size):
    path = converted(original, tmp_path, group_size, bits, mode)
    report = inspect_checkpoint(path, original)
    assert (report.mtp.status, report.refusal) == (MTPStatus.PRESENT, None)
    assert report.quantization is not None
    assert (report.quantization.mode, report.quantization.bits) == (mode, bits)
    assert accepted_share(path, original) > 0.9


def test_a_trunk_that_autoawq_packed_is_read_and_drafted_for(original, tmp_path):
    assert accepted_share(stored(original, tmp_path, awq, AWQ_CONFIG)) > 0.9


def test_only_the_shards_that_hold_the_head_need_be_there(trunk, original, tmp_path):
    shards = {t.file for t in inspect_checkpoint(original).mtp.tensors}
    for name in (*shards, "model.safetensors.index.json"):
        shutil.copy(original / name, tmp_path / name)
    assert accepted_share(trunk, tmp_path) > 0.9


@pytest.mark.parametrize("place", ["mtp.safetensors", "model-mtp.safetensors", "mtp/model.safetensors"])
@pytest.mark.parametrize("pack", [dict, quantised], ids=["16 bits", "quantised"])
def test_the_head_comes_from_a_file_beside_the_trunk(trunk, original, tmp_path, place, pack):
    folder = Path(shutil.copytree(trunk, tmp_path / "model"))
    (folder / place).parent.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / place), pack(head_of(original)))
    assert inspect_checkpoint(folder).mtp.status is MTPStatus.PRESENT
    assert accepted_share(folder) > 0.9


def test_a_head_of_another_model_is_refused(trunk, tmp_path):
    other = write(tmp_path, Recipe(kind="history"))
    report = inspect_checkpoint(trunk, other)
    assert report.mtp.status is MTPStatus.INCOMPLETE
    assert report.mtp.missing
    assert json.dumps(report.to_json())
