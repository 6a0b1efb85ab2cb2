"""A machine whose costs are made up, on which the depth controller is tried: deterministic, in milliseconds."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence

from mlx_mtp_backend.decode.depth import MAX_DEPTH, DepthController, Drafted

# (sequences, rows) -> milliseconds of a pass of the trunk.
Pass = Callable[[int, int], float]


def flat(sequences: int, rows: int) -> float:
    """The same up to eight rows, as on a GPU."""
    return 10.0 * -(-rows // 8)


def linear(sequences: int, rows: int) -> float:
    """Every row costs a pass."""
    return 10.0 * rows


def sloped(sequences: int, rows: int) -> float:
    return 8.0 + 2.0 * rows


def reference_blas(sequences: int, rows: int) -> float:
    """A small model on a CPU with the BLAS that MLX's wheel links: a second row costs two thirds of a pass."""
    return 14.0 + 26.0 * rows


def open_blas(sequences: int, rows: int) -> float:
    return 20.0 + 1.5 * rows


def h100(sequences: int, rows: int) -> float:
    """Near what the 27B shape took on one H100: steps of one sequence, and 15.7 and 34 ms for four of 4 and 16 rows."""
    at, took = (1, 2, 4, 6, 8, 48), (8.56, 8.41, 9.09, 9.94, 10.7, 28.7)
    place = max(1, bisect_left(at, rows))
    share = (rows - at[place - 1]) / (at[place] - at[place - 1])
    step = took[place - 1] + share * (took[place] - took[place - 1])
    return step + 2.2 * (sequences - 1) + (0.9 * (rows - sequences) if sequences > 1 else 0.0)


class Machine:
    """Rounds of sequences that keep each draft with a set chance.

    Args:
        chances: of each sequence's drafts.
        draft: what a step of the head takes.
        head_row: what a row takes that the head has missed.
        compiles: rounds of each (sequences, rows) that take `compiling` instead.
    """

    def __init__(
        self,
        cost: Pass,
        chances: Sequence[float],
        *,
        draft: float = 0.4,
        head_row: float = 0.0,
        compiles: int = 0,
        compiling: float = 75.0,
        seed: int = 0,
        controller: DepthController | None = None,
    ) -> None:
        self.controller = controller or DepthController()
        self.pass_cost, self.draft, self.head_row = cost, draft, head_row
        self.compiles, self.compiling = compiles, compiling
        self.random = random.Random(seed)
        self.ran: Counter[tuple[int, int]] = Counter()
        self.seconds = self.tokens = 0.0
        self.chosen: list[int] = []
        self.join(chances)

    def join(self, chances: Sequence[float]) -> None:
        """Other sequences take the place of those before; what was compiled stays so."""
        self.chances = list(chances)
        self.streams = [self.controller.sequence() for _ in chances]
        self.missed = 0

    def calibrate(self) -> Machine:
        """What the engine times after a load, of one sequence."""
        for depth in (0, 1, 3):
            for _ in range(12):
                if not self.controller.costs.known(1, 1 + depth):
                    self.controller.costs.observe(1, 1 + depth, self._timing(1, depth))
        self.controller.costs.head_step = self.draft
        self.controller.observe_catching_up(64, 64 * self.head_row)
        return self

    def cost(self, depth: int) -> float:
        count = len(self.streams)
        return self.pass_cost(count, count * (1 + depth)) + depth * self.draft

    def rounds(self, count: int) -> Machine:
        for _ in range(count):
            depth = self.controller.choose(self.streams, missed=self.missed)
            self.chosen.append(depth)
            fates = []
            for stream, chance in zip(self.streams, self.chances, strict=True):
                accepted = 0
                while accepted < depth and self.random.random() < chance:
                    accepted += 1
                fates.append(Drafted(stream, depth, accepted))
                self.tokens += 1 + accepted
            caught_up = self.missed if depth else 0
            self.missed = 0 if depth else self.missed + len(self.streams)
            extra = caught_up * self.head_row
            compiling = self._compiling(len(self.streams), depth)
            self.seconds += self.cost(depth) + extra + compiling
            noise = self._noise() * (self.cost(depth) + extra)
            self.controller.observe(fates, noise + compiling, caught_up=caught_up)
        return self

    def rate(self, depth: int) -> float:
        """Tokens a millisecond that a fixed depth would give."""
        expected = sum(sum(chance**k for k in range(depth + 1)) for chance in self.chances)
        return expected / self.cost(depth)

    def best(self) -> int:
        return max(range(MAX_DEPTH + 1), key=self.rate)

    def over_plain(self) -> float:
        return self.tokens / self.seconds / self.rate(0)

    def _timing(self, sequences: int, depth: int) -> float:
        own = self.pass_cost(sequences, sequences * (1 + depth)) + depth * self.draft
        return self._noise() * own + self._compiling(sequences, depth)

    def _noise(self) -> float:
        return 3.0 if self.random.random() < 0.05 else self.random.uniform(0.95, 1.05)

    def _compiling(self, sequences: int, depth: int) -> float:
        self.ran[sequences, depth] += 1
        return self.compiling if self.ran[sequences, depth] <= self.compiles else 0.0
