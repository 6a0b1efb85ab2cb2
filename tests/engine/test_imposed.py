"""The acceptance that benchmarks impose is the one they name."""

import pytest

from benchmarks.imposed import Decks, kept_drafts

LAW = (0.85, 0.72, 0.61, 0.52, 0.44)


@pytest.mark.parametrize("rounds", [1, 24, 48, 60])
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_every_draft_survives_as_often_as_the_law_says(rounds, depth):
    kept = kept_drafts(LAW[:depth], rounds)
    for position, chance in enumerate(LAW[:depth]):
        assert abs(sum(count > position for count in kept) - rounds * chance) <= 0.5
    assert max(kept) <= depth


def test_the_order_is_shuffled_and_repeats():
    kept = kept_drafts(LAW, 48)
    assert kept == kept_drafts(LAW, 48) != kept_drafts(LAW, 48, seed=1)
    assert kept not in (sorted(kept), sorted(kept, reverse=True))


def test_certain_drafts_are_all_kept():
    assert kept_drafts((1.0, 1.0), 9) == [2] * 9
    assert kept_drafts((0.0,), 9) == [0] * 9


@pytest.mark.parametrize("depth", [1, 3])
def test_each_stream_meets_the_law_by_itself(depth):
    decks = Decks(LAW)
    for stream in range(8):
        for rounds in (20, 40):
            mean = sum(decks.draw(stream, depth) for _ in range(rounds)) / rounds
            assert mean == pytest.approx(sum(LAW[:depth]), abs=depth / 20)


def test_many_decks_have_no_bias():
    decks = Decks((0.62,))
    assert sum(decks.draw(0, 1) for _ in range(4000)) / 4000 == pytest.approx(0.62, abs=0.005)


def test_shallow_rounds_take_a_card_each():
    decks, twin = Decks(LAW), Decks(LAW)
    assert [decks.draw(0, 2) for _ in range(20)] == [min(twin.draw(0, 5), 2) for _ in range(20)]
