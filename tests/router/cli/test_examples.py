"""The examples, as a reader would run them, against a server with scripted answers."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.fake_router import FakeRouter

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo with nothing to pull: `--help` stands in for that, all else is real."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("demo")
    monkeypatch.setattr(module, "PULLED", "--help")
    return module


def test_the_storm_is_one_to_41_in_order_with_its_cause_first() -> None:
    alerts = json.loads((EXAMPLES / "alert_storm.json").read_text())["alerts"]
    assert len(alerts) == 41
    assert [alert["id"] for alert in alerts] == [f"a-{number:02}" for number in range(1, 42)]
    times = [alert["time"] for alert in alerts]
    assert times == sorted(times)
    assert {alert["host"] for alert in alerts[:2]} == {"stor-ctl-02"}


def test_incident_summary_sends_every_alert_and_prints_the_figures(router: FakeRouter) -> None:
    command = [sys.executable, str(EXAMPLES / "incident_summary.py"), "--target", router.address]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.startswith("Hello\n")
    for part in ("backend: local", "why:     no MTP head", "TTFT:    0.50 s", "speed:   5.00 tokens/s"):
        assert part in done.stdout
    prompt = router.requests[0].input.messages.messages[-1].content
    alerts = json.loads((EXAMPLES / "alert_storm.json").read_text())["alerts"]
    assert all(alert["message"] in prompt and alert["host"] in prompt for alert in alerts)


def test_incident_summary_fails_without_a_server() -> None:
    command = [sys.executable, str(EXAMPLES / "incident_summary.py"), "--target", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_quickstart_is_short_and_works(router: FakeRouter) -> None:
    source = (EXAMPLES / "quickstart.py").read_text()
    assert len(source.splitlines()) <= 15
    code = source.replace("127.0.0.1:50061", router.address)
    assert code != source
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "Hello\n\nanswered by local: no MTP head\n"


def test_the_demo_shows_the_server_s_log_where_it_does_not_start(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "LANES", [])
    monkeypatch.setenv("MTP_ROUTER_SERVER__MAX_REQUEST_BYTES", "7")
    assert demo.main() == 1
    err = capsys.readouterr().err
    assert "max_request_bytes" in err
    assert "the demo failed: the server did not start" in err


def test_the_demo_drafts_on_the_real_server_and_drains_it(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "LANES", [lane for lane in demo.LANES if lane.replay])
    assert demo.main() == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "backend: mlx" in shown.out
    assert "with drafting off, the same seed gives the same text" in shown.out


def test_the_demo_fails_where_a_lane_fails(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "LANES", [demo.Lane("a model that nobody has", model="missing")])
    assert demo.main() == 1
    assert "the demo failed: no model named 'missing'" in capsys.readouterr().err
