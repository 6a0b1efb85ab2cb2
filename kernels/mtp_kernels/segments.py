"""How the flat rows of a pass divide among sequences, for kernels that take several of them in one launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

LAUNCH_SIZES = (1, 2, 4, 8)
"""Numbers of sequences that a launch is compiled for; a launch of fewer is padded with sequences of no rows."""


@dataclass(frozen=True)
class Segments:
    """The sequences of a pass.

    Attributes:
        counts: rows of each, at least 1.
        starts: [S + 1] int32, the row at which each begins, and the number of rows.
    """

    counts: tuple[int, ...]
    starts: mx.array

    @classmethod
    def of(cls, counts: tuple[int, ...]) -> Segments:
        """Segments of so many rows each."""
        return cls(counts, mx.array([0, *accumulate(counts)], mx.int32))

    def launches(self) -> Iterator[Group]:
        """The sequences in groups that one launch takes each."""
        most = LAUNCH_SIZES[-1]
        if len(self.counts) <= most:
            yield Group(slice(0, len(self.counts)), slice(0, sum(self.counts)), self)
            return
        slices = self.slices
        for first in range(0, len(slices), most):
            own = slice(first, min(first + most, len(slices)))
            yield Group(own, slice(slices[first].start, slices[own.stop - 1].stop), Segments.of(self.counts[own]))

    @property
    def slices(self) -> list[slice]:
        """Where each sequence's rows lie."""
        return [slice(end - count, end) for count, end in zip(self.counts, accumulate(self.counts), strict=True)]


@dataclass(frozen=True)
class Group:
    """Sequences of one launch.

    Attributes:
        own: which of the pass's sequences they are.
        rows: which of its rows are theirs.
        segments: of those rows.
    """

    own: slice
    rows: slice
    segments: Segments


def numbered(name: str, size: int) -> tuple[str, ...]:
    """name0, name1, ...: a launch's parameters of one kind."""
    return tuple(f"{name}{i}" for i in range(size))


def padded(arrays: Sequence[mx.array], size: int) -> list[mx.array]:
    """As many arrays as a launch has parameters; the first stands for those that are not there."""
    return [*arrays, *[arrays[0]] * (size - len(arrays))]


def of_sequence(name: str, size: int, number: str = "sequence") -> str:
    """C++ for the one of parameters name0, name1, ... that belongs to a sequence; `{}` in a name takes its digit."""
    names = [name.format(i) if "{}" in name else f"{name}{i}" for i in range(size)]
    return "".join(f"{number} == {i} ? {names[i]} : " for i in range(size - 1, 0, -1)) + names[0]


def launch_size(count: int) -> int:
    """The number of sequences that a launch for `count` of them is compiled for.

    Raises:
        ValueError: more than a launch takes.
    """
    size = next((size for size in LAUNCH_SIZES if size >= count), None)
    if size is None:
        raise ValueError(f"{count} sequences: a launch takes at most {LAUNCH_SIZES[-1]}")
    return size
