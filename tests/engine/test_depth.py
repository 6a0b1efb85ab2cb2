"""The depth controller on machines whose costs are made up: never slower than plain, near the best depth."""

import itertools
import math

import pytest
from support.machine import Machine, flat, h100, linear, open_blas, reference_blas, sloped

from mlx_mtp_backend.api import Rule
from mlx_mtp_backend.decode.depth import Acceptance, DepthController, Drafted
from mlx_mtp_backend.load import loading
from mlx_mtp_backend.models import WiringReport

# What a pass costs, a step of the head, and a row that the head has missed.
MACHINES = {
    "flat": (flat, 0.4, 0.05),
    "linear": (linear, 0.4, 1.0),
    "sloped": (sloped, 0.4, 0.1),
    "reference BLAS": (reference_blas, 3.7, 1.3),
    "OpenBLAS": (open_blas, 2.0, 0.3),
    "H100": (h100, 0.46, 0.06),
}
SEEDS = range(2)


def loaded(name: str, chances: list[float], seed: int = 0, **changes) -> Machine:
    """A machine as the controller knows it after a load."""
    cost, draft, head_row = MACHINES[name]
    return Machine(cost, chances, draft=draft, head_row=head_row, seed=seed, **changes).calibrate()


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.85, 1.0])
@pytest.mark.parametrize("streams", [1, 2, 4, 8])
def test_never_below_plain_and_near_the_best_depth(name, chance, streams):
    """Eight replies one after another. Where little is to be won, it may be left."""
    machine = loaded(name, [chance] * streams)
    for _ in range(8):
        machine.join([chance] * streams)
        machine.rounds(100)
    assert machine.over_plain() >= 0.97
    if (best := machine.rate(machine.best()) / machine.rate(0)) >= 1.5:
        assert machine.over_plain() >= 0.8 * best


@pytest.mark.parametrize("name", ["linear", "reference BLAS", "OpenBLAS", "H100"])
@pytest.mark.parametrize("chance", [0.3, 0.6, 0.85, 1.0])
@pytest.mark.parametrize("streams", [1, 2, 4, 8])
def test_a_first_short_reply_does_not_pay_for_learning(name, chance, streams):
    for seed in SEEDS:
        assert loaded(name, [chance] * streams, seed).rounds(90).over_plain() >= 0.97


@pytest.mark.parametrize("compiles", [3, 4, 5, 6])
@pytest.mark.parametrize("streams", [2, 4])
def test_a_device_that_compiles_does_not_poison_the_choice(compiles, streams):
    """The first rounds of each kind take 75 ms more; once they have been, the best depth is found."""
    for seed in SEEDS:
        machine = loaded("H100", [0.85] * streams, seed, compiles=compiles).rounds(400)
        machine.seconds = machine.tokens = 0.0
        machine.rounds(800)
        assert machine.over_plain() >= 0.8 * machine.rate(machine.best()) / machine.rate(0)


def test_no_draft_is_made_where_none_could_ever_pay():
    machine = loaded("linear", [1.0] * 4).rounds(2000)
    probes = len(machine.chosen) - machine.chosen.count(0)
    machine.rounds(1000)
    assert probes <= 2 * 9  # until its cost is beyond doubt
    assert set(machine.chosen[2000:]) == {0}


def test_probes_are_bounded():
    """Even if every one of them fails they lose a hundredth of the time."""
    machine = loaded("reference BLAS", [0.0])
    machine.head_row = 0.0
    machine.controller.restore(machine.controller.to_json() | {"catch_up": 0.0, "acceptance": [[500.0, 0.0]]})
    machine.rounds(4000)
    probes = sum(depth > 0 for depth in machine.chosen)
    lost = sum(machine.cost(depth) - machine.cost(0) for depth in machine.chosen)
    assert probes > 10
    assert 0.003 < lost / machine.seconds < 0.011


def test_a_dear_catch_up_is_no_probe():
    """Where a row that the head missed costs more than a hundredth of a round, a long reply outruns what may be spent;
    the next one begins with nothing missed."""
    machine = loaded("reference BLAS", [0.0])
    machine.controller.restore(machine.controller.to_json() | {"acceptance": [[500.0, 0.0]]})
    machine.rounds(4000)
    late = machine.chosen[1000:]
    assert late.count(0) == len(late)
    machine.join([1.0])
    machine.rounds(200)
    assert max(machine.chosen[4000:]) > 0


def test_what_catching_up_costs_is_weighed_against_what_is_left():
    def drafts(left: float) -> bool:
        controller = loaded("OpenBLAS", [0.8]).controller
        return controller.choose([controller.sequence()], missed=1000, left=left) > 0

    assert not drafts(2)
    assert drafts(math.inf)


def test_a_round_in_which_the_head_caught_up_is_not_timed():
    controller = DepthController()
    for _ in range(9):
        controller.observe([Drafted(None, 0, 0)], 1.0, caught_up=9)
    assert not controller.costs.known(1, 1)


def test_a_probe_waits_for_a_head_that_catches_up_in_slices():
    machine = loaded("flat", [0.9])
    controller, (stream,) = machine.controller, machine.streams
    controller.restore(controller.to_json() | {"acceptance": [[500.0, 0.0]]})
    while controller.choose([stream], missed=900) == 0:
        controller.observe([Drafted(stream, 0, 0)], machine.cost(0))
    for missed in (600, 300):
        assert controller.choose([stream], missed=missed) > 0
        controller.observe([Drafted(stream, 0, 0)], machine.cost(0) + 15, caught_up=300)
    depth = controller.choose([stream])
    assert depth > 0
    controller.observe([Drafted(stream, depth, 0)], machine.cost(depth))
    controller.observe([Drafted(stream, depth, 0)], machine.cost(depth))
    assert controller.choose([stream]) == 0


def test_no_stream_pays_for_another():
    """Drafting would raise the sum, and slow the sequence whose drafts all fall."""
    machine = Machine(lambda sequences, rows: 10.0 + 3.0 * (rows > 2), [1.0, 0.0]).calibrate().rounds(1500)
    assert machine.rate(5) > 2 * machine.rate(0)
    assert machine.chosen[200:].count(0) > 0.96 * 1300


def test_unequal_streams_share_a_depth_that_suits_all():
    machine = loaded("H100", [0.85, 0.7, 0.85, 0.6]).rounds(1500)
    assert machine.over_plain() >= 0.95 * machine.rate(machine.best()) / machine.rate(0)


def test_it_follows_a_change_of_acceptance():
    machine = Machine(flat, [0.0]).rounds(1000)
    assert machine.chosen[-200:].count(0) > 150
    machine.chances = [0.95]
    machine.rounds(1500)
    assert sorted(machine.chosen[-200:])[100] >= 3
    machine.chances = [0.0]
    machine.rounds(600)
    assert machine.chosen[-200:].count(0) > 150


def test_it_follows_a_change_of_costs():
    machine = loaded("OpenBLAS", [0.9]).rounds(300)
    assert sorted(machine.chosen[-100:])[50] >= 3
    machine.pass_cost = lambda sequences, rows: 21.5 * rows
    machine.rounds(300)
    assert machine.chosen[-100:].count(0) > 90


def test_small_differences_change_nothing():
    """Depths within a few percent of each other are not taken in turn."""
    machine = loaded("H100", [0.85]).rounds(2000)
    chosen = machine.chosen[500:]
    changes = sum(a != b for a, b in itertools.pairwise(chosen))
    assert changes < len(chosen) / 10


def test_a_new_number_of_streams_is_reckoned_and_not_explored():
    """After two and eight streams, five draft at once."""
    machine = loaded("OpenBLAS", [0.85] * 2).rounds(200)
    for streams in (8, 5):
        machine.join([0.85] * streams)
        machine.rounds(200)
    assert machine.chosen[400] > 0
    assert 0 not in machine.chosen[400:]


def test_nothing_is_drafted_before_plain_was_measured():
    machine = Machine(flat, [0.9]).rounds(5)
    assert machine.chosen == [0] * 5


def test_rows_beyond_the_fast_path_are_not_tried():
    controller = DepthController(most_rows=12)
    streams = [controller.sequence() for _ in range(4)]
    for _ in range(400):
        depth = controller.choose(streams)
        assert 4 * (1 + depth) <= 12
        controller.observe([Drafted(stream, depth, depth) for stream in streams], 1.0)
    assert depth == 2
    assert DepthController(most_rows=2).choose(streams) == 0


def test_sequences_of_fixed_depth_are_part_of_the_pass():
    controller = DepthController()
    mine, fixed = controller.sequence(), Drafted(None, 3, 1)
    for _ in range(600):
        depth = controller.choose([mine], others=1, other_rows=4)
        controller.observe([Drafted(mine, depth, depth), fixed], 10.0 + (depth > 2) * 20)
    assert depth == 2
    assert controller.costs.known(2, 7)


def test_acceptance_counts_only_drafts_behind_kept_ones():
    acceptance = Acceptance()
    for _ in range(200):
        acceptance.observe(3, 1)
    assert acceptance.chance(0) > 0.95
    assert acceptance.chance(1) < 0.05
    assert acceptance.expected(3) == pytest.approx(2.0, abs=0.1)


def test_a_sequence_begins_with_what_its_model_shows():
    model = Acceptance()
    for _ in range(500):
        model.observe(1, 0)
    assert Acceptance(model).expected(1) < 1.05
    assert Acceptance().expected(2) == pytest.approx(1 + 0.6 + 0.36)


def test_what_was_never_drafted_is_approached_one_position_at_a_time():
    machine = loaded("H100", [0.0]).rounds(8)
    assert max(machine.chosen) == 1
    machine = loaded("H100", [1.0]).rounds(30)
    assert [max(machine.chosen[:end]) for end in (2, 5, 8)] == [1, 2, 3]
    assert machine.chosen[-1] == 5


@pytest.mark.parametrize(("positions", "kept", "guess"), [(100, 0.2, 0.2), (100, 0.9, 0.6), (3, 0.2, 0.6)])
def test_a_head_that_did_badly_in_its_check_begins_with_less_hope(positions, kept, guess):
    report = WiringReport(positions, 0.5, 0.0, {}, None, dict.fromkeys(Rule, kept), healthy=True)
    controller = DepthController(guess=loading.first_guess(report, Rule.COUPLING))
    assert controller.sequence().chance(0) == pytest.approx(guess)
    assert loading.first_guess(None, Rule.COUPLING) == 0.6


def test_it_is_remembered():
    machine = loaded("flat", [0.9]).rounds(200)
    again = DepthController()
    again.restore(machine.controller.to_json())
    assert again.choose([again.sequence()]) >= 3
    assert DepthController().choose([Acceptance()]) == 0
    assert again.to_json()["head_step"] == 0.4
    for spoilt in ({"costs": [[1, 2]]}, {"catch_up": -1}, {"head_step": math.nan}, {"acceptance": 3}):
        with pytest.raises((TypeError, ValueError)):
            DepthController().restore(machine.controller.to_json() | spoilt)
    with pytest.raises(KeyError):
        DepthController().restore({})
