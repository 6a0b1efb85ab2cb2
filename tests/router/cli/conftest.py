from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_router import FakeRouter, running

COMMAND = [sys.executable, "-c", "import sys; from router.cli import main; sys.exit(main())"]


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with running() as router:
        yield router


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and none of the settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("MTP_ROUTER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GRPC_VERBOSITY", "ERROR")  # main() sets it where it is not set; undone after the test
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("MTP_ROUTER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def command() -> list[str]:
    """The command line as a process of its own."""
    return list(COMMAND)
