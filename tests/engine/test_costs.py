"""What rounds are taken to cost: measured where their times agree, reckoned from others where nothing was measured."""

import pytest

from mlx_mtp_backend.decode.costs import Costs


def measured(**kinds: float) -> Costs:
    """Costs that know rounds given as s1_r4=seconds."""
    costs = Costs()
    for kind, seconds in kinds.items():
        sequences, rows = (int(part[1:]) for part in kind.split("_"))
        for _ in range(8):
            costs.observe(sequences, rows, seconds)
    return costs


def test_rounds_that_compile_or_are_disturbed_are_not_believed():
    costs = Costs()
    for noisy in (99.0, 60.0, 1.0, 50.0, 1.02, 70.0, 1.01):
        costs.observe(1, 1, noisy)
    assert costs.seconds(1, 1) == 1.01


def test_times_that_disagree_are_no_measurement():
    costs = Costs()
    for noisy in (9.0, 9.0, 1.0, 2.0, 3.0):
        costs.observe(1, 1, noisy)
    assert not costs.known(1, 1)
    costs.observe(1, 1, 1.1)
    assert costs.known(1, 1)


def test_it_follows_what_changes():
    costs = measured(s1_r1=1.0)
    for _ in range(9):
        costs.observe(1, 1, 3.0)
    assert costs.seconds(1, 1) == 3.0


@pytest.mark.parametrize("compiling", [3, 4, 5])
def test_rounds_that_go_on_compiling_do_not_pass_for_slow_ones(compiling):
    """As on a GPU: five rounds of 75 ms where a few more rows should take 20."""
    costs = measured(s1_r1=8.6, s1_r4=10.5, s4_r4=15.7)
    for _ in range(compiling):
        costs.observe(4, 8, 75.0)
    assert not costs.known(4, 8)
    assert costs.seconds(4, 8) < 25
    for _ in range(4):
        costs.observe(4, 8, 20.0)
    assert costs.known(4, 8)
    assert costs.seconds(4, 8) == 20.0


def test_a_surprise_that_lasts_is_believed():
    costs = measured(s1_r1=10.0, s1_r2=10.0, s8_r8=10.0)
    for _ in range(8):
        costs.observe(8, 16, 20.0)
    assert costs.seconds(8, 16) == 20.0


def test_between_known_passes_costs_are_drawn_from_both():
    costs = measured(s1_r1=10.0, s1_r3=14.0)
    assert costs.seconds(1, 2) == 12.0
    assert not costs.known(1, 2)


def test_a_row_costs_what_it_costs_elsewhere():
    costs = measured(s1_r1=10.0, s1_r3=14.0, s4_r4=20.0)
    assert costs.seconds(1, 5) == 18.0
    assert costs.seconds(4, 8) == 28.0
    costs.head_step = 1.0  # of the two seconds a row takes, where a row more is a draft more
    assert costs.seconds(1, 5) == 18.0
    assert costs.seconds(4, 8) == 25.0
    assert costs.seconds(4, 12) == 30.0


def test_of_several_the_nearest_number_of_sequences_tells():
    costs = measured(s1_r1=10.0, s1_r2=11.0, s4_r4=20.0, s4_r8=40.0, s5_r5=30.0)
    assert costs.seconds(5, 10) == 55.0


def test_a_number_of_sequences_between_known_ones_needs_no_measuring():
    costs = measured(s2_r2=20.0, s2_r4=24.0, s8_r8=50.0, s8_r16=66.0)
    assert costs.seconds(4, 4) == 30.0
    assert costs.seconds(4, 8) == pytest.approx(24 + (66 - 24) / 3)
    assert costs.seconds(9, 9) is costs.seconds(1, 1) is None


def test_numbers_that_know_only_passes_of_more_rows_do_not_ask_each_other_for_ever():
    costs = measured(s1_r1=10.0, s2_r8=30.0, s4_r16=40.0, s8_r8=50.0)
    assert costs.seconds(2, 2) is costs.seconds(4, 4) is None
    assert costs.seconds(2, 9) is not None


def test_more_rows_are_never_reckoned_cheaper():
    assert measured(s1_r1=10.0, s1_r2=9.0).seconds(1, 6) == 9.0


def test_nothing_is_known_of_nothing():
    assert Costs().seconds(1, 1) is None
    assert measured(s1_r1=1.0).seconds(1, 2) == 1.0


def test_what_is_remembered_is_firm_until_measured_anew():
    costs = Costs()
    costs.restore(measured(s1_r1=1.0, s2_r2=2.0).to_json())
    assert costs.to_json() == [[1, 1, 1.0], [2, 2, 2.0]]
    assert costs.firm(1, 1)
    for _ in range(3):
        costs.observe(1, 1, 1.0)
    assert costs.known(1, 1)
    assert not costs.firm(1, 1)


@pytest.mark.parametrize("stored", [[[1, 1, 0.0]], [[1, 1, float("nan")]], [[2, 1, 1.0]], [[0, 1, 1.0]], [[1, 1]]])
def test_senseless_memories_are_refused(stored):
    with pytest.raises((TypeError, ValueError)):
        Costs().restore(stored)
