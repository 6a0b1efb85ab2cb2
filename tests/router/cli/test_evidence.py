"""`inspect` and `explain`: what a model can do, how that is known, and what would answer for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mtp_router.generate import v1
from support.fake_router import ROUTE, FakeRouter
from support.gguf_files import Script, write_script_model
from support.storages import FP8_CONFIG, fp8, stored

from mlx_mtp_backend.synthetic import Recipe, write
from router.cli import main

Capture = pytest.CaptureFixture[str]
DRIVER = "mlx_mtp_backend.families.qwen3_5_load"


def inspect_json(path: Path, capsys: Capture, status: int = 0) -> dict[str, object]:
    assert main(["inspect", str(path), "--json"]) == status
    value = json.loads(capsys.readouterr().out)
    assert isinstance(value, dict)
    return value


def test_inspect_shows_the_tensors_that_prove_a_head(tmp_path: Path, capsys: Capture) -> None:
    shown = inspect_json(write(tmp_path / "model", Recipe(layers=2)), capsys)
    assert shown["capabilities"]["mtp"]["supported"] is True  # type: ignore[index]
    assert shown["mtp_head"] == {
        "declared_layers": 1,
        "present": True,
        "driver": DRIVER,
        "place": "shards",
        "grafted": False,
        "warning": "",
    }
    head = shown["checkpoint"]["mtp"]  # type: ignore[index]
    assert head["status"] == "present"
    assert "mtp.fc.weight" in {tensor["name"] for tensor in head["tensors"]}


def test_inspect_tells_a_head_that_was_removed(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path / "model", Recipe(layers=2, head="none"))
    shown = inspect_json(path, capsys)
    assert shown["capabilities"]["mtp"]["supported"] is False  # type: ignore[index]
    assert shown["checkpoint"]["mtp"]["status"] == "declared_but_absent"  # type: ignore[index]
    assert main(["inspect", str(path)]) == 0
    assert "declared but absent" in capsys.readouterr().out


def test_inspect_tells_a_mixture_of_experts(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path / "model", Recipe(layers=2, experts=8))
    shown = inspect_json(path, capsys)
    assert shown["checkpoint"]["experts"] == {"count": 8, "per_token": 2}  # type: ignore[index]
    assert shown["capabilities"]["mtp"]["supported"] is True  # type: ignore[index]
    assert main(["inspect", str(path)]) == 0
    assert "qwen3_5_moe checkpoint, 8 experts a layer, 2 a token, quantization" in capsys.readouterr().out


def test_inspect_and_doctor_tell_of_weights_that_the_engine_does_not_read(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = write(tmp_path / "original", Recipe(layers=2))
    path = stored(original, tmp_path / "model", fp8, FP8_CONFIG)
    way_out = "convert the unquantised original with mlx_lm.convert"
    assert main(["inspect", str(path)]) == 1
    assert way_out in capsys.readouterr().out
    assert way_out in str(inspect_json(path, capsys, status=1)["problem"])
    monkeypatch.setenv("MTP_ROUTER_MODELS__M__PATH", str(path))
    assert main(["doctor", "--json", "--target", "127.0.0.1:1"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    (problem,) = (finding["what"] for finding in findings if finding["state"] == "problem")
    assert way_out in problem


def test_inspect_reads_gguf_files(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "small.gguf"
    write_script_model(path, {"a": Script(["b"])})
    shown = inspect_json(path, capsys)
    assert (shown["format"], shown["architecture"]) == ("gguf", "llama")
    assert shown["cache_bytes_per_token"] == 1 * 1 * (64 + 64) * 2
    assert "checkpoint" not in shown


def test_inspect_of_what_cannot_be_served(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    assert inspect_json(tmp_path / "junk.gguf", capsys, status=1)["problem"]
    assert inspect_json(tmp_path, capsys, status=1)["checkpoint"] is None
    assert main(["inspect", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_explain_says_what_would_answer_and_why(router: FakeRouter, capsys: Capture) -> None:
    grafted = v1.MtpHead(declared_layers=1, present=True, driver="qwen3_5", place="head_path", grafted=True)
    router.models = [v1.Model(name="tiny", route=ROUTE, memory_bytes=2_000_000, mtp_head=grafted)]
    assert main(["explain", "tiny", "--target", router.address]) == 0
    told = capsys.readouterr().out
    assert "local (llama_cpp)\nwhy:     no MTP head\nmemory:  about 2 MB" in told
    assert "head:    1 layers declared, tensors present (grafted, head_path), run by qwen3_5" in told
    assert main(["explain", "tiny", "--target", router.address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["route"]["reason"] == "no MTP head"


@pytest.mark.parametrize("arguments", [["models"], ["explain", "tiny"], ["top", "--once"]])
def test_a_head_that_looks_wrong_is_told_without_being_asked_for(
    router: FakeRouter, capsys: Capture, arguments: list[str]
) -> None:
    head = v1.MtpHead(declared_layers=1, present=True, driver="qwen3_5", place="shards")
    router.models = [v1.Model(name="tiny", route=ROUTE, mtp_head=head)]
    assert main([*arguments, "--target", router.address]) == 0
    assert "looks wrong" not in capsys.readouterr().out
    head.warning = "head looks wrong:\nacceptance 0.01, control 0.01"
    router.models = [v1.Model(name="tiny", route=ROUTE, mtp_head=head)]
    assert main([*arguments, "--target", router.address]) == 0
    assert ": head looks wrong: acceptance 0.01, control 0.01; " in " ".join(capsys.readouterr().out.split())


def test_explain_of_a_broken_model_fails(router: FakeRouter, capsys: Capture) -> None:
    router.models = [v1.Model(name="tiny", problem="tiny.gguf does not exist", fallbacks=["a", "b"])]
    assert main(["explain", "tiny", "--target", router.address]) == 1
    assert capsys.readouterr().out == "tiny: tiny.gguf does not exist\nelse:    a, then b\n"
