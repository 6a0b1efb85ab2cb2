"""The depth controller against a machine whose costs are made up: never slower than plain, near the best depth."""

import random

import pytest

from mlx_mtp_backend.depth import MAX_DEPTH, Acceptance, Costs, DepthController, Drafted


def flat(rows: int) -> float:
    """A pass that costs the same up to eight rows, as on a GPU, and a little for each draft."""
    return 10.0 * -(-rows // 8)


def linear(rows: int) -> float:
    """A pass whose every row costs a pass, as on a CPU."""
    return 10.0 * rows


def sloped(rows: int) -> float:
    return 8.0 + 2.0 * rows


class Machine:
    """Rounds of sequences that keep each draft with a set chance, at made-up costs and with noise."""

    def __init__(self, verify, chances: list[float], *, draft: float = 0.4, seed: int = 0) -> None:
        self.controller = DepthController()
        self.verify, self.chances, self.draft = verify, chances, draft
        self.random = random.Random(seed)
        self.streams = [self.controller.sequence() for _ in chances]
        self.seconds = self.tokens = 0.0
        self.chosen: list[int] = []

    def cost(self, depth: int) -> float:
        return self.verify(len(self.streams) * (1 + depth)) + depth * self.draft

    def rounds(self, count: int) -> None:
        for _ in range(count):
            depth = self.controller.choose(self.streams)
            self.chosen.append(depth)
            fates = []
            for stream, chance in zip(self.streams, self.chances, strict=True):
                accepted = 0
                while accepted < depth and self.random.random() < chance:
                    accepted += 1
                fates.append(Drafted(stream, depth, accepted))
                self.tokens += 1 + accepted
            seconds = self.cost(depth)
            self.seconds += seconds
            noise = 3.0 if self.random.random() < 0.05 else self.random.uniform(0.95, 1.05)
            self.controller.observe(fates, seconds * noise)

    def rate(self, depth: int) -> float:
        """Tokens a second that a fixed depth would give."""
        expected = sum(sum(chance**k for k in range(depth + 1)) for chance in self.chances)
        return expected / self.cost(depth)


@pytest.mark.parametrize("verify", [flat, linear, sloped])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.85, 1.0])
@pytest.mark.parametrize("streams", [1, 2, 4, 8])
def test_near_the_best_depth_and_never_below_plain(verify, chance, streams):
    machine = Machine(verify, [chance] * streams)
    machine.rounds(1500)
    rate = machine.tokens / machine.seconds
    best = max(machine.rate(depth) for depth in range(MAX_DEPTH + 1))
    assert rate >= 0.97 * machine.rate(0)
    assert rate >= 0.9 * best


def test_nothing_is_drafted_before_plain_was_measured():
    machine = Machine(flat, [0.9])
    machine.rounds(5)
    assert machine.chosen == [0] * 5


def test_no_stream_pays_for_another():
    """Drafting would raise the sum, and slow the sequence whose drafts all fall."""
    machine = Machine(lambda rows: 10.0 + 3.0 * (rows > 2), [1.0, 0.0])
    machine.rounds(600)
    assert machine.chosen[-300:].count(0) > 270


def test_it_follows_a_change_of_acceptance():
    machine = Machine(flat, [0.0])
    machine.rounds(1000)
    machine.chances = [0.95]
    machine.rounds(1500)
    assert sorted(machine.chosen[-200:])[100] >= 3
    machine.chances = [0.0]
    machine.verify = linear
    machine.rounds(600)
    assert machine.chosen[-200:].count(0) > 180


def test_probes_are_bounded():
    machine = Machine(linear, [0.5])
    machine.rounds(2000)
    probing = sum(machine.cost(depth) for depth in machine.chosen[200:] if depth)
    assert 0 < probing < 0.05 * machine.seconds


def test_rows_beyond_the_fast_path_are_not_tried():
    controller = DepthController(most_rows=12)
    streams = [controller.sequence() for _ in range(4)]
    for _ in range(400):
        depth = controller.choose(streams)
        assert 4 * (1 + depth) <= 12
        controller.observe([Drafted(stream, depth, depth) for stream in streams], 1.0)
    assert depth == 2
    assert DepthController(most_rows=2).choose(streams) == 0


def test_a_round_in_which_the_head_caught_up_is_not_timed():
    controller = DepthController()
    for _ in range(5):
        controller.observe([Drafted(None, 0, 0)], 1.0, caught_up=9)
    assert not controller.costs.known(1, 1)


def test_catching_up_is_part_of_the_price():
    """Where every row that the head missed costs half a round, a long reply without drafts is left as it is."""

    def lagging(per_row: float) -> int:
        controller, missed, drafted = DepthController(), 0, 0
        stream = controller.sequence()
        for _ in range(3000):
            depth = controller.choose([stream], missed=missed)
            caught_up, missed = (missed, 0) if depth else (0, missed + 1)
            drafted += depth > 0
            controller.observe(
                [Drafted(stream, depth, 0)], 1.0 + 0.5 * depth + per_row * caught_up, caught_up=caught_up
            )
        return drafted

    assert lagging(0.5) < lagging(0.0) / 3


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
    assert Acceptance().expected(2) == pytest.approx(1 + 0.8 + 0.64)


def test_what_was_not_measured_costs_what_less_costs():
    costs = Costs()
    for rows, seconds in ((1, 1.0), (3, 2.0)):
        for noisy in (99.0, 60.0, seconds, 50.0, seconds):  # two compile, one was disturbed
            costs.observe(1, rows, noisy)
    assert [costs.seconds(1, rows) for rows in (1, 2, 3, 9)] == [1.0, 1.0, 2.0, 2.0]
    for noisy in (99.0, 60.0, 4.0):
        costs.observe(2, 2, noisy)
    assert costs.seconds(2, 4) == 5.0  # two sequences, and what a single one's third row cost
    assert costs.seconds(3, 3) == 2.0
    assert Costs().seconds(1, 1) is None


def test_it_is_remembered():
    machine = Machine(flat, [0.9])
    machine.rounds(200)
    again = DepthController()
    again.restore(machine.controller.to_json())
    assert again.choose([again.sequence()]) == machine.controller.choose(machine.streams)
    with pytest.raises((KeyError, TypeError, ValueError)):
        again.restore({"costs": [[1, 2]], "acceptance": [], "catch_up": 0})
