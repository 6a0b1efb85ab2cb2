"""What tuning keeps: the search, what counts as a win, and the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from mtp_kernels import tuning
from mtp_kernels.few_row_matmul.variants import CANDIDATES, Variant
from mtp_kernels.tuning import Result, Tuning, search, wins

A, B = Variant(4, 24, 1, 2, 1), Variant(4, 24, 2, 1, 8)


def test_the_search_keeps_each_products_fastest_and_passes_over_failures() -> None:
    gains = {("up", A): 0.1, ("up", B): 0.2, ("down", A): 0.01, ("down", B): 0.3}
    tried = []

    def measure(variants: Mapping[str, Variant]) -> dict[int, float] | None:
        tried.append(dict(variants))
        if variants.get("down") == B:
            return None  # failed its checks
        return {1: 1 - sum(gains[item] for item in variants.items())}

    best = search(["up", "down"], [A, B], measure)
    # A hundredth is noise.
    assert best == Result({"up": B}, {1: 0.8})
    assert tried == [{}, {"up": A}, {"up": B}, {"up": B, "down": A}, {"up": B, "down": B}]


def test_a_search_in_which_nothing_passes() -> None:
    assert search(["up"], [A], lambda variants: None) is None
    assert search(["up"], [A], lambda variants: {1: 2.0} if variants else None) == Result({"up": A}, {1: 2.0})


@pytest.mark.parametrize(
    ("kernels", "won"),
    [
        ({1: 0.9, 4: 0.9}, True),
        ({1: 1.01, 4: 0.5}, True),  # within the noise at one row
        ({1: 1.05, 4: 0.5}, False),  # slower without drafts
        ({1: 0.99, 4: 0.98}, False),  # no clear gain
    ],
)
def test_a_win(kernels: dict[int, float], won: bool) -> None:
    assert wins(kernels, {1: 1.0, 4: 1.0}) is won


def test_a_win_is_kept_for_its_device_and_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "kernel-tuning.json"
    Tuning(file, "M4").save(["up", "down"], "one", Result({"up": A}, {1: 0.5}), {1: 1.0})
    kept = Tuning(file, "M4")
    assert kept.won("one")
    assert kept.variants == {"up": A}
    assert not Tuning(file, "M3").won("one")
    monkeypatch.setattr(tuning, "KERNELS", "newer")
    assert not Tuning(file, "M4").won("one")


def test_a_later_win_drops_what_was_measured_with_other_variants(tmp_path: Path) -> None:
    kept = Tuning(tmp_path / "tuning.json", "M4")
    kept.save(["up", "down"], "one", Result({"up": A}, {1: 0.5}), {1: 1.0})
    kept.save(["down", "head"], "two", Result({"head": B}, {1: 0.5}), {1: 1.0})
    assert kept.won("one")
    assert kept.variants == {"up": A, "head": B}
    kept.save(["up"], "three", Result({"up": B}, {1: 0.5}), {1: 1.0})
    again = Tuning(tmp_path / "tuning.json", "M4")
    assert [again.won(name) for name in ("one", "two", "three")] == [False, True, True]
    assert again.variants == {"up": B, "head": B}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"variants": {"up": [1]}, "models": {}}}'])
def test_an_unreadable_file_counts_as_absent(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tuning.json"
    file.write_text(text)
    kept = Tuning(file, "M4")
    assert kept.variants == {}
    kept.save(["up"], "one", Result({}, {1: 0.5}), {1: 1.0})
    assert len(json.loads(file.read_text())) == 1


def test_nowhere_to_save() -> None:
    with pytest.raises(ValueError, match="no file"):
        Tuning(None, "M4").save(["up"], "one", Result({}, {1: 0.5}), {1: 1.0})


def test_candidates_are_distinct() -> None:
    assert len(set(CANDIDATES)) == len(CANDIDATES)
