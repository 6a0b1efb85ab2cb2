"""How the flat rows of a pass divide among sequences, for kernels that take several of them in one launch."""

from __future__ import annotations

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

    @property
    def slices(self) -> list[slice]:
        """Where each sequence's rows lie."""
        return [slice(end - count, end) for count, end in zip(self.counts, accumulate(self.counts), strict=True)]


def launch_size(count: int) -> int:
    """The number of sequences that a launch for `count` of them is compiled for.

    Raises:
        ValueError: more than a launch takes.
    """
    size = next((size for size in LAUNCH_SIZES if size >= count), None)
    if size is None:
        raise ValueError(f"{count} sequences: a launch takes at most {LAUNCH_SIZES[-1]}")
    return size
