"""What every kind of cache can do.

A transaction is begin, any number of passes that add rows, then commit(keep) or abort. Between transactions a cache
holds exactly the rows that were kept.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def begin(caches: Iterable[LayerCache]) -> None:
    for cache in caches:
        cache.begin()


def commit(caches: Iterable[LayerCache], keep: int) -> None:
    for cache in caches:
        cache.commit(keep)


def abort(caches: Iterable[LayerCache]) -> None:
    for cache in caches:
        cache.abort()
