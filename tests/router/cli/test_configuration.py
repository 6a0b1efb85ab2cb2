"""The settings as commands take and show them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fake_router import FakeRouter

from router.cli import main
from router.settings import ServerSettings, Settings, effective_settings, load_settings

Capture = pytest.CaptureFixture[str]


def test_the_address_comes_from_the_settings(
    router: FakeRouter, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MTP_ROUTER_SERVER__LISTEN", router.address)
    assert main(["generate", "--model", "tiny", "--prompt", "Hi"]) == 0
    monkeypatch.setenv("MTP_ROUTER_SERVER__LISTEN", "127.0.0.1:0")
    assert main(["models"]) == 2
    assert "--target" in capsys.readouterr().err
    monkeypatch.delenv("MTP_ROUTER_SERVER__LISTEN")
    file = tmp_path / "router.toml"
    file.write_text(f'[server]\nlisten = "{router.address}"\n')
    assert main(["generate", "--config", str(file), "--model", "tiny", "--prompt", "Hi"]) == 0


def test_config_prints_toml_that_gives_the_same_settings(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "router.toml"
    file.write_text('[models."a.b"]\npath = "x \\"y\\".gguf"\naliases = ["c"]\n[sampling]\ntemperature = 0.5\n')
    monkeypatch.setenv("MTP_ROUTER_SERVER__DRAIN_GRACE", "7")
    assert main(["config", "--config", str(file)]) == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out) == effective_settings(load_settings(file))
    assert "drain_grace = 7.0  # MTP_ROUTER_SERVER__DRAIN_GRACE\n" in out
    assert "temperature = 0.5  # file\n" in out
    assert 'listen = "127.0.0.1:50061"\n' in out
    assert f"# settings file: {file}\n" in out
    assert main(["config", "--config", str(file), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["settings"] == effective_settings(load_settings(file))
    assert data["origins"]["server.drain_grace"] == "MTP_ROUTER_SERVER__DRAIN_GRACE"
    assert data["origins"]["sampling.temperature"] == "file"
    assert data["origins"]["server.listen"] == "default"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[server]\nlissten = 1\n", "server.lissten"),
        ('[server]\nlisten = "0.0.0.0:1"\n', "allow_remote"),
        ("[server\n", "invalid settings"),
        ("\xff", "invalid settings"),
        (None, "no settings file"),
    ],
)
@pytest.mark.parametrize("command_name", ["config", "serve", "models"])
def test_wrong_settings_are_status_2(
    command_name: str, text: str | None, complaint: str, capsys: Capture, tmp_path: Path
) -> None:
    file = tmp_path / "router.toml"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    assert main([command_name, "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1


def test_serve_takes_the_address_from_the_arguments(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: list[ServerSettings] = []

    def serve(settings: Settings, load: Callable[[], Settings], *, announce_json: bool, lifeline: None) -> int:
        served.extend([settings.server, load().server])
        return 0

    monkeypatch.setattr("router.process.serve", serve)
    file = tmp_path / "router.toml"
    file.write_text("[server]\ndrain_grace = 7.0\n")
    assert main(["serve", "--config", str(file), "--listen", "127.0.0.1:7"]) == 0
    moved = ServerSettings(listen="127.0.0.1:7", drain_grace=7.0)
    assert served == [moved, moved]  # a refresh reads it the same way, and finds no change
    assert main(["serve", "--listen", "0.0.0.0:7"]) == 2
    assert "allow_remote" in capsys.readouterr().err
