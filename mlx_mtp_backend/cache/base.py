"""What every kind of cache can do.

A transaction is begin, any number of passes that add rows, then commit(keep) or abort. Between transactions a cache
holds exactly the rows that were kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import mlx.core as mx


class LayerCache(Protocol):
    """One layer's state of one sequence."""

    def begin(self) -> None:
        """Remember the present state."""

    def commit(self, keep: int) -> None:
        """Keep the first `keep` rows added since `begin` and forget the others ever came."""

    def abort(self) -> None:
        """Return to the state at `begin`; also right when a pass was built half way."""

    @property
    def arrays(self) -> list[mx.array]:
        """What must be evaluated for the state to be settled."""

    def rows(self, start: int, end: int) -> tuple[mx.array, ...]:
        """Copies of what rows [start, end) left, where rows can be told apart; nothing for a recurrent state."""

    def snapshot(self) -> tuple[mx.array, ...]:
        """The state after the last row, where rows cannot be told apart; nothing for keys and values."""

    def restore(self, rows: Sequence[tuple[mx.array, ...]], snapshot: tuple[mx.array, ...]) -> None:
        """Fill an empty cache with consecutive stretches of rows, from the first on, and the state after them."""


def copied(array: mx.array) -> mx.array:
    """A copy of keys or values [..., rows, width] that does not keep the buffer alive which they are a part of."""
    half = array.shape[-2] // 2
    return mx.concatenate([array[..., :half, :], array[..., half:, :]], axis=-2)


def begin(caches: Iterable[LayerCache]) -> None:
    for cache in caches:
        cache.begin()


def commit(caches: Iterable[LayerCache], keep: int) -> None:
    for cache in caches:
        cache.commit(keep)


def abort(caches: Iterable[LayerCache]) -> None:
    for cache in caches:
        cache.abort()
