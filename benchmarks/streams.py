"""Streams that decode together, at the controller's depth and plainly, measured side by side.

Both sides decode the same seeded replies, so the same tokens. They take turns, a token or two at a time and in random
order, so that whatever else the machine does meets both. Rounds of one kind (rows, and slots that the head had missed)
count as their median, since one disturbed round would outweigh what is looked for; a kind of which there is one round
counts as it was. Where a side's arrays happen to lie in memory can cost it several percent for good, so it is all done
again with other arrays, made in the other order, and the median over these repetitions counts. Three figures, from the
most direct to the least disturbed:

* wall: wall time;
* cpu: CPU time of the process, which does not count what it waits for a core; not with OpenBLAS, whose threads spin
  while they wait for one another;
* work: a kind costs the same on both sides, as it is the same work; by CPU time or, with OpenBLAS, by wall time. So all
  that differs is which rounds were run.

The controller times its rounds by wall time, as in the service, or by CPU time, where a shared machine would show it
something else each time.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from mlx_mtp_backend.api import Rule, Sampling
from mlx_mtp_backend.decode import rounds, sequence
from mlx_mtp_backend.decode.depth import DepthController
from mlx_mtp_backend.decode.drafters import HeadDrafter
from mlx_mtp_backend.decode.pacing import paced_round
from mlx_mtp_backend.load import calibration

STREAMS = (1, 2, 4, 8)
SAMPLING = Sampling(0.6, top_k=20, top_p=0.95)
PROMPT_TOKENS = 32
TURN = 2  # tokens of each stream
_SPARE = 64  # a stream that is ahead of the others must not end before they do
_DRAWS = 1000
Row = dict[str, Any]


@dataclass(frozen=True)
class Timed:
    """One round.

    Attributes:
        kind: rows of the trunk's pass, and those that the head had missed.
        seconds: wall time and the process's CPU time.
    """

    kind: tuple[int, int]
    tokens: int
    seconds: tuple[float, float]


Turn = tuple[list[Timed], list[Timed]]  # the controller's rounds and the plain ones
CONTROLLER_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# By BLAS: each figure's clock, and whether both sides share costs.
FIGURES = {
    "stock": {"wall": (0, False), "cpu": (1, False), "work": (1, True)},
    "openblas": {"wall": (0, False), "work": (0, True)},
}


class Side:
    """Streams that decode together; their prompts are read.

    Args:
        depths: chooses their depth; None decodes plainly.
    """

    def __init__(self, model: Any, streams: int, tokens: int, depths: DepthController | None) -> None:
        self._model, self._depths = model, depths or DepthController()
        self._drafter = HeadDrafter(model)
        self.streams = [
            sequence.start(
                model,
                tuple(range(40 + 5 * n, 40 + 5 * n + PROMPT_TOKENS)),
                sampling=SAMPLING,
                seed=n,
                rule=Rule.COUPLING,
                depth=0,
                limit=PROMPT_TOKENS + tokens + _SPARE,
                acceptance=depths.sequence() if depths else None,
            )
            for n in range(streams)
        ]
        for one in self.streams:
            while one.prefilling:
                rounds.prefill_chunk(model, one, 256)

    def tokens(self) -> int:
        return sum(len(one.tokens) for one in self.streams)

    def turn(self, tokens: int) -> list[Timed]:
        """Rounds until the streams together have at least so many tokens in all."""
        done = []
        while (before := self.tokens()) < tokens:
            pending = sum(one.pending_rows for one in self.streams)
            wall, cpu = time.perf_counter(), time.process_time()
            fates = paced_round(self._model, self._drafter, self._depths, self.streams).committed
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            rows = sum(1 + fate.drafted for fate in fates)
            missed = max(0, pending - rows) if rows > len(fates) else 0
            done.append(Timed((rows, missed), self.tokens() - before, seconds))
        return done


def measure(model: Any, acceptance: float, tokens: int, clock: str, repetitions: int, blas: str) -> Iterator[Row]:
    """A row for each number of streams. The controllers, one a repetition, begin as after a load: they know one
    stream's rounds, and what they try to learn of several is part of what is measured.

    Args:
        tokens: of each of the most streams; of fewer up to four times as many, as their rounds take less.
        clock: of CONTROLLER_CLOCKS.
        blas: of FIGURES.
    """
    own = SimpleNamespace(perf_counter=CONTROLLER_CLOCKS[clock])
    with patch.object(rounds, "time", own), patch.object(calibration, "time", own):
        controllers = [_calibrated(model) for _ in range(repetitions)]
        order = random.Random(int(acceptance * 100))
        for streams in STREAMS:
            count = tokens * min(4, max(STREAMS) // streams)
            done = [_repetition(model, streams, count, depths, order, n) for n, depths in enumerate(controllers)]
            used = [depth for one in done for depth in one.depths]
            yield {
                "acceptance": acceptance,
                "streams": streams,
                "tokens": count,
                "repetitions": repetitions,
                "mean_depth": statistics.fmean(used),
            } | {figure: interval([one.turns for one in done], *how) for figure, how in FIGURES[blas].items()}


def _calibrated(model: Any) -> DepthController:
    depths = DepthController(model.most_rows)
    for _ in calibration.calibrate(model, HeadDrafter(model), depths):
        pass
    return depths


@dataclass(frozen=True)
class Repetition:
    """Both sides from the first to the last token.

    Attributes:
        depths: of each of the controller's rounds, by stream.
    """

    turns: list[Turn]
    depths: list[int]


def _repetition(
    model: Any, streams: int, tokens: int, depths: DepthController, order: random.Random, number: int
) -> Repetition:
    sides = [Side(model, streams, tokens, own) for own in ((None, depths) if number % 2 else (depths, None))]
    plain, auto = sides if number % 2 else reversed(sides)
    turns: list[Turn] = []
    start = auto.tokens()
    for end in range(start + streams * TURN, start + streams * tokens + 1, streams * TURN):
        first_auto = order.random() < 0.5
        early = (auto if first_auto else plain).turn(end)
        late = (plain if first_auto else auto).turn(end)
        turns.append((early, late) if first_auto else (late, early))
    _same(auto, plain)
    used = [depth for one in auto.streams for depth, count in enumerate(one.depths) for _ in range(count)]
    return Repetition(turns, used)


def _same(auto: Side, plain: Side) -> None:
    """The replies are equal as far as both got: speed at the price of other tokens would be no speed."""
    for one, other in zip(auto.streams, plain.streams, strict=True):
        common = min(len(one.tokens), len(other.tokens))
        if one.tokens[:common] != other.tokens[:common]:
            raise AssertionError("drafting changed a reply")


def interval(repetitions: Sequence[Sequence[Turn]], clock: int, shared: bool) -> dict[str, float]:
    """The controller's tokens a second over plain ones: the median over repetitions, and the middle 95 % of draws of
    repetitions and of their turns."""
    rng = random.Random(0)

    def drawn() -> float:
        chosen = rng.choices(repetitions, k=len(repetitions))
        return statistics.median(_ratio(rng.choices(turns, k=len(turns)), clock, shared) for turns in chosen)

    draws = sorted(drawn() for _ in range(_DRAWS))
    return {
        "auto_over_plain": statistics.median(_ratio(turns, clock, shared) for turns in repetitions),
        "low": draws[int(0.025 * _DRAWS)],
        "high": draws[int(0.975 * _DRAWS)],
    }


def _ratio(turns: Sequence[Turn], clock: int, shared: bool) -> float:
    auto, plain = ([one for turn in turns for one in turn[side]] for side in (0, 1))
    costs = _costs([*auto, *plain], clock) if shared else None
    return _rate(auto, costs or _costs(auto, clock)) / _rate(plain, costs or _costs(plain, clock))


def _rate(done: Sequence[Timed], costs: dict[tuple[int, int], float]) -> float:
    return sum(one.tokens for one in done) / sum(costs[one.kind] for one in done)


def _costs(done: Sequence[Timed], clock: int) -> dict[tuple[int, int], float]:
    """The median seconds of each kind of round."""
    kinds: dict[tuple[int, int], list[float]] = {}
    for one in done:
        kinds.setdefault(one.kind, []).append(one.seconds[clock])
    return {kind: statistics.median(seconds) for kind, seconds in kinds.items()}
