"""Small checkpoints, written once a session."""

from pathlib import Path

import pytest

from mlx_mtp_backend.synthetic import Recipe, write


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; logits depend on every token before."""
    return write(tmp_path_factory.mktemp("history"), Recipe(kind="history"))


@pytest.fixture(scope="session")
def pass_through(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Readable text; the head is right after 85 % of the tokens."""
    return write(tmp_path_factory.mktemp("pass_through"), Recipe(kind="pass-through", layers=2))
