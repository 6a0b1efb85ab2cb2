"""Every hostile file is refused with its reason, and what is harmless is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hostile import CASES, MARK, Case, good_checkpoint

from router.facts import MAX_TEXT, read_facts


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_checkpoint(tmp_path_factory.mktemp("good") / "m")


@pytest.mark.parametrize("case", [case for case in CASES if not case.heavy], ids=lambda case: case.name)
def test_a_hostile_file(case: Case, good: Path, tmp_path: Path) -> None:
    path = case.make(tmp_path, good)
    facts = read_facts(path)
    assert case.says in facts.problem
    assert bool(facts.problem) == bool(case.says)
    assert len(facts.problem) <= MAX_TEXT
    assert str(tmp_path) not in facts.problem
    assert not (tmp_path / MARK).exists()


def test_the_pickles_would_run_code(good: Path, tmp_path: Path) -> None:
    import pickle

    (case,) = (case for case in CASES if case.name == "checkpoint: pickles only")
    file = case.make(tmp_path, good) / "pytorch_model.bin"
    pickle.loads(file.read_bytes())
    assert (tmp_path / MARK).exists()
