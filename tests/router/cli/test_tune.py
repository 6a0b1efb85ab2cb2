"""`tune`: its refusals here, and how it tells what was measured. That it measures and saves: tests/metal_host."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from mtp_kernels.few_row_matmul.variants import Variant
from mtp_kernels.launch import platform
from mtp_kernels.tuning import Result

from mlx_mtp_backend.load.tuning import Tuned
from router import doctor
from router.cli import main, tune

Capture = pytest.CaptureFixture[str]

WON = Tuned(
    model="qwen",
    device="Apple M4 Max",
    products=("64x128 4b g64", "32x64 4b g64"),
    stock={1: 0.020, 4: 0.040},
    best=Result({"64x128 4b g64": Variant(4, 24, 1, 4, 1)}, {1: 0.016, 4: 0.020}),
    saved=True,
    trials=25,
)


@pytest.mark.skipif(platform() == "metal", reason="here it would measure")
def test_without_metal_it_measures_and_saves_nothing(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTP_ROUTER_HOME", str(tmp_path / "home"))
    assert main(["tune", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "without Metal" in shown.out
    assert "nothing was measured" in shown.out
    assert main(["tune", str(tmp_path), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["saved"] is False
    assert "without Metal" in answer["error"]["message"]
    assert not (tmp_path / "home").exists()


def test_it_takes_a_folder(tmp_path: Path, capsys: Capture) -> None:
    assert main(["tune", str(tmp_path / "nothing")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_full_disk_is_told(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Tuned:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "kernel-tuning.json")

    monkeypatch.setattr(tune, "tune", full)
    assert main(["tune", str(tmp_path)]) == 1
    assert "what was measured cannot be saved: [Errno 28] No space left on device" in capsys.readouterr().out


def test_a_win_a_loss_and_failed_checks_are_told_apart() -> None:
    won = tune.lines(WON)
    assert won[0] == "qwen on Apple M4 Max: 25 trials of 2 products"
    assert won[3:5] == ["   1     20.00       16.00  1.25", "   4     40.00       20.00  2.00"]
    assert won[-1].startswith("saved")
    assert tune.lines(replace(WON, saved=False))[-1].startswith("not saved")
    assert "failed their checks" in tune.lines(replace(WON, saved=False, best=None))[-1]


def test_everything_measured_is_in_the_json() -> None:
    told = json.loads(json.dumps(tune.fields(WON)))
    assert told["stock"] == {"1": 0.020, "4": 0.040}
    assert told["best"]["seconds"] == {"1": 0.016, "4": 0.020}
    assert told["best"]["variants"]["64x128 4b g64"]["splits"] == 4
    assert (told["saved"], told["trials"]) == (True, 25)
    assert tune.fields(replace(WON, best=None))["best"] is None


def test_doctor_sends_a_mac_without_checks_here() -> None:
    advice = [next(doctor._kernels({"platform": name, "kernel_checks": []})).advice for name in ("cuda", "metal")]
    assert "verify PATH" in advice[0]
    assert "tune PATH" in advice[1]
