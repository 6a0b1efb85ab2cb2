"""What a round costs, by the sequences and rows of its pass: measured, and reckoned where nothing was measured.

A round is disturbed in one direction only: whatever else the machine does, compiling included, adds time. So the lower
timings are believed, and one kind of round is compared with others only once its lower timings agree. No MLX here.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence

_UNTIMED = 2  # rounds of each kind: they compile, and instantiate graphs
_WINDOW, _ENOUGH = 9, 3  # timings kept of each kind, and how many may do
_AGREE = 1.15  # the lowest two lie within
_SURPRISE, _CONVINCED = 1.5, 6  # times what was reckoned: then so many timings are wanted, as some may have compiled


class Costs:
    """Seconds of a round by (sequences, rows): the lower quartile of the newest timings.

    Attributes:
        head_step: seconds that the head takes for one more draft, as far as known.
    """

    def __init__(self) -> None:
        self.head_step = 0.0
        self._rounds: Counter[tuple[int, int]] = Counter()
        self._timings: dict[tuple[int, int], deque[float]] = {}
        self._settled: dict[tuple[float, float], float] = {}

    def observe(self, sequences: int, rows: int, seconds: float) -> None:
        """One round. The first of its kind are not timed."""
        key = (sequences, rows)
        self._rounds[key] += 1
        if self._rounds[key] <= _UNTIMED:
            return
        timings = self._timings.setdefault(key, deque(maxlen=_WINDOW))
        timings.append(seconds)
        lowest = sorted(timings)
        if len(lowest) < _ENOUGH:
            return
        believed, reckoned = lowest[len(lowest) // 4], self._reckoned(sequences, rows)
        plausible = reckoned is None or not self._telling() or believed <= _SURPRISE * reckoned
        agree = lowest[1] <= _AGREE * lowest[0] and (plausible or len(lowest) >= _CONVINCED)
        if agree or len(lowest) == _WINDOW:
            self._settled[key] = believed

    def known(self, sequences: int, rows: int) -> bool:
        """Whether it was measured well enough to compare others with."""
        return (sequences, rows) in self._settled

    def firm(self, sequences: int, rows: int) -> bool:
        """Whether more timings would tell little."""
        key = (sequences, rows)
        return key in self._settled and not 0 < len(self._timings.get(key, ())) < _WINDOW

    def most_rows(self, sequences: int) -> int:
        """Of the passes of so many sequences that are known; 0 for none."""
        return int(max((rows for count, rows in self._settled if count == sequences), default=0))

    def seconds(self, sequences: float, rows: float) -> float | None:
        """What a round takes, as measured or else reckoned; None where that would be a guess."""
        own = self._settled.get((sequences, rows))
        return self._reckoned(sequences, rows) if own is None else own

    def at_least(self, sequences: int, rows: int) -> float | None:
        """Likewise, but no more than is certain: what was not measured takes no less than fewer rows."""
        fewer = max((r for count, r in self._settled if count == sequences and r <= rows), default=None)
        return self.seconds(sequences, rows) if fewer is None else self._settled[sequences, fewer]

    def _reckoned(self, sequences: float, rows: float) -> float | None:
        """From other kinds of round: of as many sequences, or of fewer and of more with as many rows each."""
        alike = self._alike(sequences, rows)
        return self._between(sequences, rows) if alike is None else alike

    def _alike(self, sequences: float, rows: float) -> float | None:
        """From rounds of as many sequences; None where none of fewer rows is known."""
        known = sorted(r for count, r in self._settled if count == sequences and r != rows)
        fewer = max((r for r in known if r < rows), default=None)
        if fewer is None:
            return None
        cost = self._settled[sequences, fewer]
        more = min((r for r in known if r > rows), default=None)
        if more is None:
            return cost + (rows - fewer) * (self._row_price(sequences) + self.head_step / sequences)
        return cost + (rows - fewer) * (self._settled[sequences, more] - cost) / (more - fewer)

    def _between(self, sequences: float, rows: float) -> float | None:
        """From what is known of the next fewer and the next more sequences by themselves."""
        counts = {count for count, _ in self._settled}
        less, more = (
            max((count for count in counts if count < sequences), default=None),
            min((count for count in counts if count > sequences), default=None),
        )
        if less is None or more is None:
            return None
        places = [(count, rows * count / sequences) for count in (less, more)]
        low, high = (self._settled.get(place) or self._alike(*place) for place in places)
        return None if low is None or high is None else low + (sequences - less) / (more - less) * (high - low)

    def _row_price(self, sequences: float) -> float:
        """Seconds that a row more takes but for the head's step: of as many sequences, else of the number nearest to it
        that tells."""
        telling = self._telling()
        if not telling:
            return 0.0
        count = min(telling, key=lambda known: (abs(known - sequences), known))
        least, most = min(telling[count]), max(telling[count])
        slope = (self._settled[count, most] - self._settled[count, least]) / (most - least)
        return max(0.0, slope - self.head_step / count)

    def _telling(self) -> dict[float, list[float]]:
        """Rows of the known passes, by number of sequences, where there are several: they tell what a row takes."""
        passes: dict[float, list[float]] = {}
        for count, rows in self._settled:
            passes.setdefault(count, []).append(rows)
        return {count: rows for count, rows in passes.items() if len(rows) > 1}

    def to_json(self) -> list[list[float]]:
        return [[*key, seconds] for key, seconds in sorted(self._settled.items())]

    def restore(self, stored: Sequence[Sequence[float]]) -> None:
        """Begins from what was remembered. Raises ValueError or TypeError where it is malformed."""
        settled: dict[tuple[float, float], float] = {
            (int(count), int(rows)): float(seconds) for count, rows, seconds in stored
        }
        if not all(0 < count <= rows for count, rows in settled):
            raise ValueError("a round has a row for each of its sequences")
        if not all(0 < seconds < math.inf for seconds in settled.values()):
            raise ValueError("a round takes a positive number of seconds")
        self._settled = settled
