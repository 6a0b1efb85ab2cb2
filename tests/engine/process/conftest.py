from pathlib import Path

import pytest
from support.engine_process import QUIET, loaded

from mlx_mtp_backend import Engine, EngineOptions


@pytest.fixture(scope="module")
def engine(history: Path):
    with loaded(history, stream_buffer=32, slow_reader_limit=1.0) as engine:
        yield engine


@pytest.fixture(scope="module")
def near(history: Path):
    with Engine(EngineOptions(device="cpu")) as engine:
        engine.load("history", history, QUIET).result(timeout=60)
        yield engine
