"""`models`, `top` and `refresh` against a real server in this process."""

from __future__ import annotations

import json

import pytest
from mtp_router.generate import v1
from prometheus_client import start_http_server
from support.fake_router import FakeRouter
from support.terminal import on_a_terminal

from router.cli import main
from router.domain import DraftSource, Finished, FinishReason, SpeculationStatistics, Usage
from router.metrics import Metrics

Capture = pytest.CaptureFixture[str]


def test_models(router: FakeRouter, capsys: Capture) -> None:
    assert main(["models", "--target", router.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == ["model-0", "local", "ready", "8192", "98 MB", "chat"]
    assert len(lines) == 5
    assert main(["models", "--target", router.address, "model-1", "--evidence"]) == 0
    out = capsys.readouterr().out
    assert "tokenizer.chat_template present" in out
    assert "no MTP head" in out
    assert "about 476 MB once loaded" in out
    assert "fallbacks    spare" in out
    assert "model-0" not in out
    assert main(["models", "--target", router.address, "--json"]) == 0
    assert [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()] == ["MODEL_STATE_READY"] * 5
    assert main(["models", "--target", router.address, "missing"]) == 1
    assert "MODEL_NOT_FOUND" in capsys.readouterr().err


def test_models_shows_problems_and_how_to_get_a_first_model(router: FakeRouter, capsys: Capture) -> None:
    router.models = [v1.Model(name="broken", state=v1.MODEL_STATE_FAILED, problem="x.gguf does not exist")]
    assert main(["models", "--target", router.address]) == 0
    assert "broken: x.gguf does not exist" in capsys.readouterr().out
    router.models = []
    assert main(["models", "--target", router.address]) == 0
    assert "mtp-router pull smollm2" in capsys.readouterr().out


def test_models_draws_a_table_on_a_terminal(router: FakeRouter, command: list[str]) -> None:
    status, seen = on_a_terminal([*command, "models", "--target", router.address])
    assert status == 0
    assert "capabilities" in seen
    assert "model-4" in seen


def test_top_shows_backends_models_and_what_the_metrics_page_tells(router: FakeRouter, capsys: Capture) -> None:
    assert main(["top", "--target", router.address, "--once"]) == 0
    out = capsys.readouterr().out
    assert "local" in out
    assert "model-4" in out
    assert "--metrics" in out
    metrics = Metrics()
    drafts = SpeculationStatistics(DraftSource.MTP_HEAD, 2, 4, 3, ((2, 2), (2, 1)))
    metrics.finished(("model-1", "local"), Finished(FinishReason.MAX_TOKENS, Usage(1, 6), drafts))
    metrics.ended(("model-1", "local"), "ok", 1.0, 0.0, 0.0, 0.25)
    page, thread = start_http_server(0, "127.0.0.1", metrics.registry)
    try:
        where = f"127.0.0.1:{page.server_port}"
        assert main(["top", "--target", router.address, "--metrics", where]) == 0  # no terminal: one look
    finally:
        page.shutdown()
        page.server_close()
        thread.join()
    row = next(line for line in capsys.readouterr().out.splitlines() if "model-1" in line)
    assert "0.250 s" in row
    assert "75%" in row
    assert main(["top", "--target", router.address, "--metrics", where]) == 2
    assert "cannot read the metrics page" in capsys.readouterr().err


def test_refresh_tells_what_is_different(router: FakeRouter, capsys: Capture) -> None:
    assert main(["refresh", "--target", router.address]) == 0
    assert capsys.readouterr().out == "nothing has changed\n"
    router.refreshed = v1.RefreshModelsResponse(
        added=["a", "b"], removed=["c"], changed=["d"], kept=["e"], needs_restart=["server"]
    )
    assert main(["refresh", "--target", router.address]) == 0
    told = ["added: a, b", "removed: c", "changed: d", "in use and so left as they were: e", "take a restart: server"]
    assert capsys.readouterr().out.splitlines() == told
    assert main(["refresh", "--target", router.address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == ["e"]
