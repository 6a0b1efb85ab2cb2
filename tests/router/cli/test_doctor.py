"""doctor and verify, as processes would run them."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from support.ollama_process import Double

from mlx_mtp_backend.decode.verification import Verification, verify
from mlx_mtp_backend.synthetic import Recipe, write
from router import doctor
from router.cli import main
from router.cli.verify import lines
from router.doctor import State

Capture = pytest.CaptureFixture[str]
ENGINE = {"mlx": "0.32.4", "platform": "cuda", "device": "H100", "kernel_checks": []}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"), Recipe(kind="pass-through", layers=2))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def diagnosis(capsys: Capture, *arguments: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Exit status, and the findings by area."""
    status = main(["doctor", "--json", *arguments])
    by_area: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(capsys.readouterr().out)["findings"]:
        by_area.setdefault(finding["area"], []).append(finding)
    return status, by_area


def test_a_working_machine_is_healthy(capsys: Capture) -> None:
    status, areas = diagnosis(capsys, "--target", f"127.0.0.1:{free_port()}")
    assert status == 0
    expected = {"packages", "memory", "disk", "mlx", "kernels", "backend llama_cpp", "backend mlx", "models", "server"}
    assert expected <= areas.keys()
    assert areas["packages"][0]["state"] == "ok"
    assert areas["backend llama_cpp"][0]["state"] == "ok"
    assert "pull smollm2" in areas["models"][0]["advice"]
    assert "serve" in areas["server"][0]["advice"]


@pytest.mark.parametrize(
    ("health_of_all", "state"),
    [(health_pb2.HealthCheckResponse.SERVING, "ok"), (health_pb2.HealthCheckResponse.NOT_SERVING, "problem")],
)
def test_a_server_is_asked_for_its_health(health_of_all: int, state: str, capsys: Capture) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", health_of_all)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        status, areas = diagnosis(capsys, "--target", f"127.0.0.1:{port}")
    finally:
        server.stop(None)
    assert areas["server"][0]["state"] == state
    assert status == (state == "problem")


def test_broken_models_and_hidden_files_are_told(home: Path, tmp_path: Path, capsys: Capture) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models" / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    (home / "models" / "mine.gguf").write_bytes(b"")
    config = tmp_path / "settings.toml"
    config.write_text(f'[models.mine]\npath = "{tmp_path / "gone.gguf"}"\n')
    status, areas = diagnosis(capsys, "--config", str(config))
    assert status == 1
    told = {finding["what"].split(":")[0].split(" ")[0]: finding for finding in areas["models"]}
    assert told["broken"]["state"] == told["mine"]["state"] == "problem"
    assert told["mine"]["advice"] == "mend or remove models.mine"
    assert "hidden" in told["mine.gguf"]["what"]


def test_a_head_that_a_conversion_dropped_is_told(tmp_path: Path, capsys: Capture) -> None:
    write(tmp_path / "bare", Recipe(head="none", layers=2))
    config = tmp_path / "settings.toml"
    config.write_text('[models.m]\npath = "bare"\n')
    status, areas = diagnosis(capsys, "--config", str(config))
    (told,) = [finding for finding in areas["models"] if finding["what"].startswith("m declares")]
    assert (status, told["state"]) == (0, "note")
    assert told["advice"].startswith("models.m.head_path can name the original checkpoint's folder")


def test_servers_of_others_are_asked(tmp_path: Path, capsys: Capture) -> None:
    double = Double()
    config = tmp_path / "settings.toml"
    config.write_text(
        f'[backends.ollama]\nhost = "{double.address}"\n'
        "[backends.rack]\nkind = 'llama_server'\nurl = 'http://127.0.0.1:9'\nconnect_timeout = 1.0\n"
        "[models.here]\nollama = 'smol'\nfallbacks = ['nowhere']\n"
        "[models.never]\nollama = 'never/pulled'\n"
        "[discovery]\nfolders = ['missing']\n"
    )
    try:
        status, areas = diagnosis(capsys, "--config", str(config))
    finally:
        double.kill()
    assert status == 1
    up, absent = areas["backend ollama"]
    assert (up["state"], up["what"]) == ("ok", "Ollama answers, version 0.33.0-rc2")
    assert (absent["state"], absent["advice"]) == ("problem", "fetch it there, or mend models.never")
    assert "ollama pull never/pulled" in absent["what"]
    (down,) = areas["backend rack"]
    assert (down["state"], down["advice"]) == ("note", "start it, or mend or remove backends.rack")  # nobody needs it
    told = [finding["what"] for finding in areas["models"]]
    assert "models.here.fallbacks: there is no model 'nowhere'" in told
    assert any("missing is no folder" in what for what in told)


def test_a_server_that_a_model_needs_is_a_problem_where_it_is_down(tmp_path: Path, capsys: Capture) -> None:
    config = tmp_path / "settings.toml"
    config.write_text(
        "[backends.ollama]\nhost = 'http://127.0.0.1:9'\n[models.m]\nollama = 'smol'\n"
        "[models.lost]\nllama_server = 'x'\n"
    )
    status, areas = diagnosis(capsys, "--config", str(config))
    assert status == 1
    assert [finding["state"] for finding in areas["backend ollama"]] == ["problem"]
    assert "no backend of kind llama_server is configured" in areas["models"][0]["what"]


def test_the_human_form_has_a_line_a_finding(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "note ", "problem ")) for line in printed)


def test_packages_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["httpx==0.0.1", "no-such-package==1", "mlx[cpu]==9; extra == 'cpu'"]
    )
    findings = {finding.what.split(" ")[0]: finding for finding in doctor._packages()}
    assert findings.keys() == {"httpx", "no-such-package"}
    assert findings["httpx"].state is State.NOTE
    assert findings["no-such-package"].state is State.PROBLEM
    assert findings["no-such-package"].advice == "pip install no-such-package==1"


def test_an_engine_that_does_not_start_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "executable", "/bin/false")
    engine = doctor.probe_engine()
    assert "error" in engine


@pytest.mark.parametrize(
    ("checks", "state", "text"),
    [
        ([], State.NOTE, "no kernel has been checked"),
        ([{"implementation": "cuda"}], State.OK, "1 kernels"),
        (
            [{"implementation": "fallback", "kernel": "k", "shape": "s", "reason": "differs"}],
            State.PROBLEM,
            "k (s): differs",
        ),
    ],
)
def test_kernel_checks_are_told(checks: list[dict[str, str]], state: State, text: str) -> None:
    (finding,) = doctor._kernels(ENGINE | {"kernel_checks": checks})
    assert finding.state is state
    assert text in finding.what


@pytest.fixture(scope="module")
def verified(checkpoint: Path) -> Verification:
    """One run for both forms of the report; the tests further down have the command run it."""
    return verify(checkpoint, tokens=24)


def test_verify_reports_one_checkpoint(
    checkpoint: Path, verified: Verification, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.cli.verify.verify", lambda *_, **__: verified)
    assert main(["verify", str(checkpoint), "--json"]) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed)
    assert report["passed"]
    assert [run["depth"] for run in report["runs"]] == [0, 1, 2, 3, 4]
    assert all(run["equals_plain"] and run["tokens"] == 24 for run in report["runs"])
    assert report["runs"][1]["accepted"][0] > 0.5
    assert report["wiring"]["healthy"]
    assert len(report["files"]["mtp"]["tensors"]) == 15
    assert str(checkpoint.parent) not in printed  # a report is for sharing


def test_verify_says_what_a_person_needs(verified: Verification) -> None:
    printed = "\n".join(lines(verified))
    assert "yes drafting changes no token: 5 depths, the same tokens" in printed
    assert "fastest at depth" in printed


def test_verify_of_a_head_and_a_tokenizer_that_are_missing_fails(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path, Recipe(kind="history", layers=2, head="none"))
    (path / "tokenizer.json").unlink()
    assert main(["verify", str(path), "--tokens", "8", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [run["depth"] for run in report["runs"]] == [0]
    verdicts = {verdict["promise"]: verdict["holds"] for verdict in report["verdicts"]}
    assert verdicts["the head's tensors are there"] is False
    assert verdicts["its tokenizer is there"] is False


def test_verify_of_a_head_that_was_scrambled_fails(tmp_path: Path, capsys: Capture) -> None:
    """A history model's head is random: right names, wrong values."""
    path = write(tmp_path, Recipe(kind="history", layers=2))
    assert main(["verify", str(path), "--tokens", "8", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    verdicts = {verdict["promise"]: verdict["holds"] for verdict in report["verdicts"]}
    assert verdicts["the head is wired right"] is False
    assert verdicts["drafting changes no token"] is True


def test_verify_refuses_what_is_no_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    assert main(["verify", str(tmp_path), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == {"reason": "checkpoint_unreadable", "message": "config.json: No such file or directory"}
