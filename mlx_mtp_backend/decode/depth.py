"""How many tokens to draft a round: the depth that promises the most tokens a second, 0 included.

What a round costs is measured, see costs; how likely drafts are kept is estimated position by position, for each
sequence and for the model. A depth is taken only if no sequence is expected to become slower than without drafts.
Other depths are tried where they might win, and what that loses is bounded. No MLX here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mtp_backend.decode.costs import Costs

MAX_DEPTH = 5  # deeper never paid with any released head
FIRST_GUESS = 0.6  # of a draft's chance, before anything was seen: low, as hoping for too much is dear
HYSTERESIS = 0.03  # another depth must promise this much more
DOUBT = 0.1  # and this much more again where its cost is only reckoned
TOLERANCE = 0.02  # one sequence may be expected to lose this much, if all together do not
PROBE_SHARE = 0.01  # of all time may be lost by rounds at other depths
SAVED = 4  # rounds' time that the share may grow to
PROBE_ROUNDS = 2  # in the first the head may have to catch up, which leaves the second to be timed
WORTH = 0.25  # what a probe might win, as a share; where it is less, the probe must be cheaper in proportion
DRIFT = 0.25  # that a cost may have fallen by since it was measured
HORIZON = 64  # rounds by which the head's catching up must have paid for itself, or as many as it missed
_SEQUENCE_MEMORY, _MODEL_MEMORY = 0.98, 0.997  # what an observation still weighs a round later
_CATCH_UPS, _TELLING_ROWS = 9, 32  # timings kept, of passes that are long enough to show
_REMEMBERED = 32.0  # rounds' worth of trust in what an earlier run saw
_SEEN = 2.5  # rounds that tell something of a draft position
_PRIOR_WEIGHT = 4.0  # rounds' worth of trust in the wider estimate


class Acceptance:
    """Chance of each draft to be kept, given that all before it were; older rounds count less.

    Args:
        prior: what to believe where little was seen; None: the position before.
        guess: of the first draft, without a prior.
    """

    def __init__(self, prior: Acceptance | None = None, guess: float = FIRST_GUESS) -> None:
        self._prior = prior
        self._guess = guess
        self._memory = _MODEL_MEMORY if prior is None else _SEQUENCE_MEMORY
        self._tried: list[float] = []
        self._kept: list[float] = []

    def observe(self, drafted: int, accepted: int) -> None:
        """One round. Drafts behind the first that fell tell nothing."""
        told = min(accepted + 1, drafted)
        self._tried += [0.0] * (told - len(self._tried))
        self._kept += [0.0] * (told - len(self._kept))
        for position in range(told):
            self._tried[position] = self._memory * self._tried[position] + 1
            self._kept[position] = self._memory * self._kept[position] + (position < accepted)

    def chance(self, position: int) -> float:
        """Of the draft at `position`, 0-based."""
        if self._prior is not None:
            believed = self._prior.chance(position)
        else:
            believed = self.chance(position - 1) if position else self._guess
        if position >= len(self._tried):
            return believed
        return (self._kept[position] + _PRIOR_WEIGHT * believed) / (self._tried[position] + _PRIOR_WEIGHT)

    def expected(self, depth: int) -> float:
        """Tokens that a round of this depth commits on average, its own included."""
        total = reach = 1.0
        for position in range(depth):
            reach *= self.chance(position)
            total += reach
        return total

    @property
    def positions(self) -> int:
        """How many draft positions were seen often enough to go one further."""
        return sum(tried >= _SEEN for tried in self._tried)

    def to_json(self) -> list[list[float]]:
        return [list(pair) for pair in zip(self._tried, self._kept, strict=True)]

    def restore(self, stored: Sequence[Sequence[float]]) -> None:
        """Begins from what was remembered, with little weight: what is asked now may be other text."""
        shrunk = [(float(tried), float(kept), min(1.0, _REMEMBERED / max(float(tried), 1.0))) for tried, kept in stored]
        self._tried = [tried * share for tried, _, share in shrunk]
        self._kept = [kept * share for _, kept, share in shrunk]


@dataclass(frozen=True, slots=True)
class Drafted:
    """What a round did for one sequence; `acceptance` is None for one whose depth is fixed."""

    acceptance: Acceptance | None
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class _Choice:
    """What rounds of one depth are expected to do.

    Attributes:
        rows: of the pass.
        seconds: of a round.
        at_least: likewise, if what is not certain turned out well.
        known: whether its cost was measured.
        tokens: of a round, all sequences together.
        fewest: of a round, for the sequence that gets fewest.
    """

    depth: int
    rows: int
    seconds: float
    at_least: float
    known: bool
    tokens: float
    fewest: float

    def rate(self, extra: float = 0.0) -> float:
        """Tokens a second, with so many seconds more each round."""
        return self.tokens / (self.seconds + extra)


@dataclass(slots=True)
class _Probe:
    """Rounds at another depth, to see what it gives.

    Attributes:
        price: seconds that it may lose, as booked; more where it can win little.
        seconds: that its rounds are still expected to take.
        left: rounds still to run.
    """

    sequences: int
    depth: int
    price: float
    seconds: float
    left: int = PROBE_ROUNDS


class DepthController:
    """Chooses the depth of one model's rounds.

    Args:
        most_rows: of a pass, beyond which the model has no fast path; None: no such limit.
        guess: of a first draft's chance, before anything was seen.
    """

    def __init__(self, most_rows: int | None = None, guess: float = FIRST_GUESS) -> None:
        self.costs = Costs()
        self.acceptance = Acceptance(guess=guess)
        self._most_rows = most_rows
        self._current: dict[int, int] = {}
        self._round = 0
        self._seen: dict[tuple[int, int], int] = {}
        self._credit = 0.0  # seconds that probes may lose
        self._probe: _Probe | None = None
        self._catch_ups: deque[float] = deque(maxlen=_CATCH_UPS)  # seconds for each row that a head had missed

    def sequence(self) -> Acceptance:
        """The estimate of a new sequence."""
        return Acceptance(self.acceptance)

    def choose(
        self,
        streams: Sequence[Acceptance],
        others: int = 0,
        other_rows: int = 0,
        missed: int = 0,
        left: float = math.inf,
    ) -> int:
        """The depth of the next round.

        Args:
            streams: the estimates of the sequences that take this depth, at least one.
            others: sequences of the pass whose depth is fixed, with `other_rows` rows.
            missed: rows that the head must run before it can draft for these sequences.
            left: rounds that these sequences may still run, on average.
        """
        sequences = len(streams) + others
        rows = [other_rows + len(streams) * (1 + depth) for depth in range(MAX_DEPTH + 1)]
        rows = [count for count in rows if self._most_rows is None or count <= self._most_rows] or rows[:1]
        if self._probe is not None and self._probe.sequences == sequences and self._probe.depth < len(rows):
            return self._probe.depth
        choices = self._choices(sequences, rows, streams)
        if not choices:
            return 0  # nothing can be compared before plain decoding was measured
        catching_up = self._catch_up * missed
        # A reply that has gone on for long is likely to go on for as long again.
        horizon = max(1, min(left, max(HORIZON, missed // len(streams))))
        current = _best(choices, self._current.get(sequences, 0), catching_up / horizon)
        self._current[sequences] = current
        return self._probing(sequences, choices, current, 0.0 if current else catching_up)

    def _choices(self, sequences: int, rows: Sequence[int], streams: Sequence[Acceptance]) -> list[_Choice]:
        """Depths from 0 on: to one draft more than was seen of acceptance, and to twice the rows of what is known, as a
        large pass may cost many times a small one."""
        within = max(2 * self.costs.most_rows(sequences), *rows[:2])
        choices = []
        for depth, count in enumerate(rows[: self.acceptance.positions + 2]):
            seconds = self.costs.seconds(sequences, count)
            if seconds is None or count > within:
                break
            at_least, known = self.costs.at_least(sequences, count) or seconds, self.costs.known(sequences, count)
            if known and not self.costs.firm(sequences, count):
                at_least *= 1 - DRIFT
            tokens = [stream.expected(depth) for stream in streams]
            choices.append(_Choice(depth, count, seconds, at_least, known, sum(tokens), min(tokens)))
        return choices

    def _probing(self, sequences: int, choices: Sequence[_Choice], current: int, catching_up: float) -> int:
        """`current`, or of the depths that might win the one seen longest ago, once what it may lose is paid for."""
        now, candidates = choices[current], []
        deeper = [choice for choice in choices[current + 1 :] if _gain(choice, choices, current) > HYSTERESIS]
        for choice in [*choices[:current], *deeper[:1]]:
            gain = _gain(choice, choices, current)
            if gain > HYSTERESIS:
                weight = max(1.0, WORTH / gain)
                # At worst: no draft stands that is not made at present.
                loss = max(0.0, choice.seconds - min(choice.tokens, now.tokens) / now.rate())
                price = weight * (PROBE_ROUNDS * loss + catching_up)
                if self._credit >= price:
                    expected = PROBE_ROUNDS * choice.seconds + catching_up
                    candidates.append(_Probe(sequences, choice.depth, price, expected))
        if not candidates:
            return current
        self._probe = min(candidates, key=lambda probe: self._seen.get((sequences, choices[probe.depth].rows), 0))
        self._credit -= self._probe.price
        return self._probe.depth

    def observe(self, streams: Sequence[Drafted], seconds: float, *, caught_up: int = 0) -> None:
        """A round is done.

        Args:
            streams: every sequence of the pass.
            caught_up: rows that the head ran because it had missed them; such a round's time tells nothing of others.
        """
        self._round += 1
        for stream in streams:
            if stream.drafted:
                self.acceptance.observe(stream.drafted, stream.accepted)
            if stream.drafted and stream.acceptance is not None:
                stream.acceptance.observe(stream.drafted, stream.accepted)
        sequences, rows = len(streams), sum(1 + stream.drafted for stream in streams)
        self._seen[sequences, rows] = self._round
        usual = self.costs.seconds(sequences, rows)
        if not caught_up:
            self.costs.observe(sequences, rows, seconds)
        elif usual is not None and caught_up >= _TELLING_ROWS and self.costs.known(sequences, rows):
            self.observe_catching_up(caught_up, max(seconds - usual, 0.0))
        if any(stream.acceptance is not None for stream in streams):
            self._credit = min(self._credit + PROBE_SHARE * seconds, SAVED * seconds)
        if self._probe is not None:
            only_caught_up = caught_up > 0 and not any(stream.drafted for stream in streams)
            self._continue(self._probe, sequences, seconds, 0 if only_caught_up else 1)

    def observe_catching_up(self, rows: int, seconds: float) -> None:
        """A head took so long for rows that it had missed."""
        self._catch_ups.append(seconds / rows)

    @property
    def _catch_up(self) -> float:
        """Seconds for each row that a head has missed: the lower quartile, as disturbances only add."""
        return sorted(self._catch_ups)[len(self._catch_ups) // 4] if self._catch_ups else 0.0

    def _continue(self, probe: _Probe, sequences: int, seconds: float, rounds: int) -> None:
        """A probe goes on; what its rounds took beyond what was expected is booked at the end."""
        probe.seconds -= seconds
        probe.left -= rounds
        if probe.left == 0 or probe.sequences != sequences:
            self._credit += min(0.0, probe.seconds)
            self._probe = None

    def to_json(self) -> dict[str, Any]:
        """What is worth remembering."""
        return {
            "costs": self.costs.to_json(),
            "acceptance": self.acceptance.to_json(),
            "catch_up": self._catch_up,
            "head_step": self.costs.head_step,
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Begins from what was remembered. Raises ValueError, TypeError or KeyError where it is malformed."""
        self.costs.restore(stored["costs"])
        self.acceptance.restore(stored["acceptance"])
        catch_up, head_step = float(stored["catch_up"]), float(stored["head_step"])
        if not 0 <= catch_up < math.inf or not 0 <= head_step < math.inf:
            raise ValueError("a head takes a number of seconds")
        self._catch_ups, self.costs.head_step = deque([catch_up], _CATCH_UPS), head_step


def _best(choices: Sequence[_Choice], current: int, catching_up: float) -> int:
    """The depth that promises most, or the present one if that promises hardly less, and no less than none.

    Args:
        catching_up: seconds of it in each round that drafts.
    """
    plain = choices[0].seconds
    rates: dict[int, float] = {}
    for choice in choices:
        extra = (catching_up if choice.depth else 0.0) + (0.0 if choice.known else DOUBT * choice.seconds)
        if choice.fewest / (choice.seconds + extra) >= (1 - TOLERANCE) / plain or not choice.depth:
            rates[choice.depth] = choice.rate(extra)
    best = max(rates, key=lambda depth: rates[depth])
    stays = current in rates and rates[0] <= rates[current] and rates[best] <= (1 + HYSTERESIS) * rates[current]
    return current if stays else best


def _gain(choice: _Choice, choices: Sequence[_Choice], current: int) -> float:
    """What a depth might win over the present one, as a share: if all drafts stood that are not made at present, or if
    fewer drafts had become cheaper than they were."""
    now = choices[current]
    if choice.depth < current:
        cost = (1 - DRIFT) * choice.seconds if choice.known else choice.at_least
        return choice.tokens / cost / now.rate() - 1
    reach = now.tokens - (choices[current - 1].tokens if current else 0.0)
    return (now.tokens + (choice.depth - current) * reach) / choice.at_least / now.rate() - 1
