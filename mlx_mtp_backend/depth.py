"""How many tokens to draft a round: the depth that promises the most tokens a second, 0 included.

What a round costs is measured, by the sequences and rows of its pass; how likely drafts are kept is estimated position
by position, for each sequence and for the model. A depth is taken only if no sequence is expected to become slower than
without drafts. No MLX here.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 5  # deeper never paid with any released head
FIRST_GUESS = 0.8  # of a draft's chance, before anything was seen
HYSTERESIS = 0.03  # another depth must promise this much more
TOLERANCE = 0.02  # a sequence may be expected to lose this much
PROBE_SHARE = 0.01  # of all time may go to rounds at other depths
PROBE_ROUNDS = 3
HORIZON = 64  # rounds by which the head's catching up must have paid for itself
_UNTIMED = 2  # rounds of each kind: they compile, and instantiate graphs
_WINDOW, _ENOUGH = 9, 3  # timings kept of each kind of round, and how many a median needs
_SEQUENCE_MEMORY, _MODEL_MEMORY = 0.97, 0.999  # what an observation still weighs a round later
_REMEMBERED = 32.0  # rounds' worth of trust in what an earlier run saw
_PRIOR_WEIGHT = 4.0  # rounds' worth of trust in the wider estimate


class Acceptance:
    """Chance of each draft to be kept, given that all before it were; older rounds count less.

    Args:
        prior: what to believe where little was seen; None: the position before, and FIRST_GUESS at the first.
    """

    def __init__(self, prior: Acceptance | None = None) -> None:
        self._prior = prior
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
            believed = self.chance(position - 1) if position else FIRST_GUESS
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

    def to_json(self) -> list[list[float]]:
        return [list(pair) for pair in zip(self._tried, self._kept, strict=True)]

    def restore(self, stored: Sequence[Sequence[float]]) -> None:
        """Begins from what was remembered, with little weight: the files may be others."""
        shrunk = [(float(tried), float(kept), min(1.0, _REMEMBERED / max(float(tried), 1.0))) for tried, kept in stored]
        self._tried = [tried * share for tried, _, share in shrunk]
        self._kept = [kept * share for _, kept, share in shrunk]


class Costs:
    """Seconds of a round by (sequences, rows), as the median of the newest timings."""

    def __init__(self) -> None:
        self._rounds: Counter[tuple[int, int]] = Counter()
        self._timings: dict[tuple[int, int], deque[float]] = {}
        self._believed: dict[tuple[int, int], float] = {}

    def observe(self, sequences: int, rows: int, seconds: float) -> None:
        """One round. The first of its kind are not timed."""
        key = (sequences, rows)
        self._rounds[key] += 1
        if self._rounds[key] > _UNTIMED:
            timings = self._timings.setdefault(key, deque(maxlen=_WINDOW))
            timings.append(seconds)
            self._believed[key] = statistics.median(timings) if len(timings) >= _ENOUGH else min(timings)

    def known(self, sequences: int, rows: int) -> bool:
        """Whether it was measured often enough to compare others with."""
        key = (sequences, rows)
        return key in self._believed and not 0 < len(self._timings.get(key, ())) < _ENOUGH

    def seen(self, sequences: int, rows: int) -> bool:
        """Whether it was measured at all."""
        return (sequences, rows) in self._believed

    def seconds(self, sequences: int, rows: int) -> float | None:
        """What a round takes at least; None where nothing at all is known.

        What was not measured is taken to cost what fewer rows cost, plus what the difference is known to cost a single
        sequence. So it may look better than it is, and then is tried and measured.
        """
        fewer = max((r for count, r in self._believed if count == sequences and r <= rows), default=None)
        if fewer is None:
            return self.seconds(1, rows) if sequences != 1 else None
        cost = self._believed[sequences, fewer]
        if fewer == rows or sequences == 1:
            return cost
        more, less = self.seconds(1, rows), self.seconds(1, fewer)
        return cost if more is None or less is None else cost + max(more - less, 0.0)

    def to_json(self) -> list[list[float]]:
        return [[*key, seconds] for key, seconds in sorted(self._believed.items())]

    def restore(self, stored: Sequence[Sequence[float]]) -> None:
        believed = {(int(count), int(rows)): float(seconds) for count, rows, seconds in stored}
        if not all(0 < seconds < math.inf for seconds in believed.values()):
            raise ValueError("a round takes a positive number of seconds")
        self._believed = believed


@dataclass(frozen=True, slots=True)
class Drafted:
    """What a round did for one sequence; `acceptance` is None for one whose depth is fixed."""

    acceptance: Acceptance | None
    drafted: int
    accepted: int


class DepthController:
    """Chooses the depth of one model's rounds.

    Args:
        most_rows: of a pass, beyond which the model has no fast path; None: no such limit.
    """

    def __init__(self, most_rows: int | None = None) -> None:
        self.costs = Costs()
        self.acceptance = Acceptance()
        self._most_rows = most_rows
        self._current: dict[int, int] = {}
        self._round = 0
        self._seen: dict[tuple[int, int], int] = {}
        self._credit = 0.0
        self._probe: tuple[int, int, int] | None = None  # sequences, depth, rounds left
        self._catch_up = 0.0  # seconds for each row that a head has missed

    def sequence(self) -> Acceptance:
        """The estimate of a new sequence."""
        return Acceptance(self.acceptance)

    def choose(self, streams: Sequence[Acceptance], others: int = 0, other_rows: int = 0, missed: int = 0) -> int:
        """The depth of the next round.

        Args:
            streams: the estimates of the sequences that take this depth, at least one.
            others: sequences of the pass whose depth is fixed, with `other_rows` rows.
            missed: rows that the head must run before it can draft for these sequences.
        """
        sequences = len(streams) + others
        rows = [other_rows + len(streams) * (1 + depth) for depth in range(MAX_DEPTH + 1)]
        rows = [count for count in rows if self._most_rows is None or count <= self._most_rows] or rows[:1]
        if self._probe is not None and self._probe[0] == sequences and self._probe[1] < len(rows):
            return self._probe[1]
        plain = self.costs.seconds(sequences, rows[0])
        if plain is None or not self.costs.known(sequences, rows[0]):
            return 0  # nothing can be compared before plain decoding was measured
        # One step deeper than what was seen: a deep pass may cost many times a shallow one.
        rows = rows[: max(depth for depth, count in enumerate(rows) if self.costs.seen(sequences, count)) + 2]
        rates: dict[int, float] = {}
        catching_up = self._catch_up * missed
        for depth, count in enumerate(rows):
            seconds = self.costs.seconds(sequences, count) or plain
            seconds += catching_up / HORIZON if depth else 0.0
            tokens = [stream.expected(depth) for stream in streams]
            if min(tokens) / seconds >= (1 - TOLERANCE) / plain:
                rates[depth] = sum(tokens) / seconds
        best, current = max(rates, key=lambda depth: rates[depth]), self._current.get(sequences, 0)
        if current not in rates or rates[best] > (1 + HYSTERESIS) * rates[current]:
            current = best
        self._current[sequences] = current
        return self._probing(sequences, current, rows, 0.0 if current else catching_up)

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
        if not caught_up:
            self.costs.observe(sequences, rows, seconds)
        elif self.costs.seen(sequences, rows):
            extra = max(seconds - (self.costs.seconds(sequences, rows) or 0.0), 0.0) / caught_up
            self._catch_up = 0.5 * (self._catch_up + extra) if self._catch_up else extra
        if any(stream.acceptance is not None for stream in streams):
            self._credit = min(self._credit + PROBE_SHARE * seconds, 10 * PROBE_ROUNDS * seconds)
        if self._probe is not None:
            count, depth, left = self._probe
            self._probe = (count, depth, left - 1) if left > 1 and count == sequences else None

    def _probing(self, sequences: int, current: int, rows: Sequence[int], catching_up: float) -> int:
        """`current`, or no drafts or a neighbour, if seen long ago, once enough time has gone by to pay for it."""
        others = [depth for depth in (current - 1, current + 1, 0) if 0 <= depth < len(rows) and depth != current]
        if not others:
            return current
        depth = min(others, key=lambda d: self._seen.get((sequences, rows[d]), 0))
        price = PROBE_ROUNDS * (self.costs.seconds(sequences, rows[depth]) or 0.0) + catching_up
        if self._credit < price:
            return current
        self._credit -= price
        self._probe = (sequences, depth, PROBE_ROUNDS)
        return depth

    def to_json(self) -> dict[str, Any]:
        """What is worth remembering."""
        return {
            "costs": self.costs.to_json(),
            "acceptance": self.acceptance.to_json(),
            "catch_up": self._catch_up,
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Begins from what was remembered. Raises ValueError, TypeError or KeyError where it is malformed."""
        self.costs.restore(stored["costs"])
        self.acceptance.restore(stored["acceptance"])
        catch_up = float(stored["catch_up"])
        if not 0 <= catch_up < math.inf:
            raise ValueError("catching up takes a number of seconds")
        self._catch_up = catch_up
