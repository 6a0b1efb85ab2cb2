"""How weights are stored is told from headers, before anything is loaded, and what is not read is refused with the way
out."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from support.storages import AWQ_CONFIG, FOREIGN, FP8_CONFIG, awq, fp8, relabel, stored

from mlx_mtp_backend import EngineError, ErrorReason, LoadOptions
from mlx_mtp_backend.checkpoint import MTPStatus, inspect_checkpoint
from mlx_mtp_backend.load import loading
from mlx_mtp_backend.synthetic import Recipe, write


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("original"), Recipe(layers=2))


def refused(path: Path, head_path: Path | None = None) -> EngineError:
    """What the first slice of a load raises."""
    with pytest.raises(EngineError) as caught:
        next(loading.load("model", path, LoadOptions(head_path=head_path), None, None))
    return caught.value


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_read_is_told_with_its_evidence_and_the_way_out(original, tmp_path, kind):
    store, config, shown = FOREIGN[kind]
    path = stored(original, tmp_path / "model", store, config)
    report = inspect_checkpoint(path)
    assert report.mtp.status is MTPStatus.PRESENT
    assert f"{shown}); convert the unquantised original with mlx_lm.convert, or take" in report.refusal
    assert "head_path" in report.refusal
    if config is not None:
        label = f"{config['quant_method']} {config.get('format', '')}".strip()
        assert report.quantization.mode == label
        assert f"({label} by config.json, " in report.refusal
    assert refused(path).reason is ErrorReason.STORAGE_UNSUPPORTED
    assert json.loads(json.dumps(report.to_json()))["refusal"] == report.refusal


def test_a_label_proves_nothing(original, tmp_path):
    report = inspect_checkpoint(stored(original, tmp_path / "model", lambda w: {"weight": w}, FP8_CONFIG))
    assert (report.quantization.mode, report.refusal) == ("fp8", None)


def test_what_is_read_is_not_refused(original, tmp_path):
    assert inspect_checkpoint(original).refusal is None
    assert inspect_checkpoint(stored(original, tmp_path / "model", awq, AWQ_CONFIG)).refusal is None


def test_a_vision_tower_does_not_matter(original, tmp_path):
    path = Path(shutil.copytree(original, tmp_path / "model"))
    mx.save_safetensors(str(path / "model-vision.safetensors"), {"model.visual.fc.weight": mx.zeros(8, mx.uint8)})
    relabel(path / "model-vision.safetensors")
    (path / "model.safetensors.index.json").unlink()
    assert inspect_checkpoint(path).refusal is None


@pytest.mark.parametrize(("store", "shown"), [(fp8, "F8_E4M3"), (awq, "I32")], ids=["fp8", "awq"])
def test_a_head_that_is_not_read_is_incomplete(original, tmp_path, store, shown):
    other = stored(original, tmp_path / "other", store, AWQ_CONFIG, head=True)
    report = inspect_checkpoint(original, other)
    assert (report.mtp.status, report.refusal) == (MTPStatus.INCOMPLETE, None)
    first = report.mtp.missing[0]
    assert first.startswith("mtp.layers.0.")
    assert first.endswith(f"(stored as {shown}, which is not read)")
    error = refused(original, other)
    assert error.reason is ErrorReason.WEIGHTS_MISMATCH
    assert first in error.detail
