"""What a pass of the fused Qwen3.5 step reads from caches and leaves in them, whatever the number of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import mlx.core as mx
from mtp_kernels import few_row_matmul as matmul_kernel
from mtp_kernels import gated_delta as delta_kernel

from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.families.qwen3_5_fused_cache import FusedDeltaCache, FusedKVCache, counts, joined
from mlx_mtp_backend.families.qwen3_5_fused_layers import FusedAttention, FusedDelta

MAX_SEGMENT_ROWS = delta_kernel.TAPE
MAX_PASS_ROWS = matmul_kernel.MAX_ROWS
_LEAST_BOUND = 2048  # one sequence's splits up to here leave multiprocessors of a large GPU idle

Layer = FusedDelta | FusedAttention


@dataclass(frozen=True)
class Layout:
    """How many rows each sequence brings, and how many it has in the launches.

    Sequences get rows alike where a pass has room for that, since each mixture of rows would have to be compiled. What
    is added repeats a sequence's last row behind it, where rejected drafts would be: nothing that counts sees it.
    """

    rows: tuple[int, ...]
    launched: tuple[int, ...]

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Layout:
        rows = tuple(segment.rows for segment in segments)
        alike = (max(rows),) * len(rows)
        return cls(rows, alike if sum(alike) <= MAX_PASS_ROWS else rows)

    @property
    def alike(self) -> bool:
        """Whether the launches are those of many passes."""
        return len(set(self.launched)) == 1

    def spread(self, rows: mx.array) -> mx.array:
        """Rows of the pass, [N, ...], as the launches take them."""
        return rows if self.rows == self.launched else rows[self._sources]

    def gathered(self, rows: mx.array) -> mx.array:
        """The way back."""
        return rows if self.rows == self.launched else rows[self._places]

    @cached_property
    def _sources(self) -> mx.array:
        firsts = accumulate(self.rows, initial=0)
        own = zip(firsts, self.rows, self.launched, strict=False)
        return mx.array([first + min(row, rows - 1) for first, rows, launched in own for row in range(launched)])

    @cached_property
    def _places(self) -> mx.array:
        firsts = accumulate(self.launched, initial=0)
        return mx.array([first + row for first, rows in zip(firsts, self.rows, strict=False) for row in range(rows)])


@dataclass(frozen=True)
class Given:
    """What a pass reads.

    Attributes:
        states: by layer; of a recurrent one [recurrent, window, tape] of all sequences, else keys, values and tail of
            each sequence.
        where: the counts of rows kept, where layers are recurrent, and each sequence's position; see layers.Where.
        bound: no row lies at this position or beyond; one of few, as launches are sized by it.
    """

    states: list[Any]
    where: list[list[mx.array]]
    bound: int


def give(segments: Sequence[Segment], layers: Sequence[Layer], layout: Layout, *, whole: bool) -> Given:
    """What these layers read of the segments' caches, of keys and values all or the first rows.

    Raises:
        RuntimeError: the caches do not take this pass.
    """
    kvs = [kv_cache(segment) for segment in segments]
    held = [delta_cache(segment).give() for segment in segments if len(segment.caches) > 1]
    given = [kv.give(rows, whole=whole) for kv, rows in zip(kvs, layout.launched, strict=True)]
    recurrent = joined(held) if held else []
    apart = [array for one in given for array in one.apart]
    if held and recurrent is not held[0].layers:
        apart += [array for arrays in recurrent for array in arrays]
    if apart:
        mx.async_eval(apart)  # type: ignore[no-untyped-call]
    deltas, contexts = iter(recurrent), zip(*(one.layers for one in given), strict=True)
    states = [next(deltas) if isinstance(layer, FusedDelta) else list(next(contexts)) for layer in layers]
    keep = [counts([one.kept for one in held])] if recurrent else []
    return Given(states, [keep, [one.position for one in given]], _round_bound(max(one.bound for one in given)))


def _round_bound(bound: int) -> int:
    """The least of few that is no less: launches are at most twice as large as they must be, where that matters."""
    return max(_LEAST_BOUND, 1 << (bound - 1).bit_length())


def take(segments: Sequence[Segment], layers: Sequence[Layer], after: Sequence[Any]) -> None:
    """Gives the caches what a pass left, by layer: states of all sequences, or each sequence's tail."""
    pairs = list(zip(layers, after, strict=True))
    recurrent = [left for layer, left in pairs if isinstance(layer, FusedDelta)]
    tails = [left for layer, left in pairs if isinstance(layer, FusedAttention)]
    for place, segment in enumerate(segments):
        kv_cache(segment).take([own[place] for own in tails], segment.rows)
        if len(segment.caches) > 1:
            delta_cache(segment).take(recurrent, place, len(segments), segment.rows)


@contextmanager
def stock_attention(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """The segments as stock attention takes them, with a long buffer a layer; their rows count when all went well."""
    caches = [kv_cache(segment) for segment in segments]
    for cache in caches:
        cache.settle()
    yield [Segment(cache.long, segment.rows) for cache, segment in zip(caches, segments, strict=True)]
    for cache, segment in zip(caches, segments, strict=True):
        cache.run_many(segment.rows)


def kv_cache(segment: Segment) -> FusedKVCache:
    """A trunk's or head's keys and values."""
    cache = segment.caches[-1]
    assert isinstance(cache, FusedKVCache)
    return cache


def delta_cache(segment: Segment) -> FusedDeltaCache:
    """A trunk's recurrent states."""
    cache = segment.caches[0]
    assert isinstance(cache, FusedDeltaCache)
    return cache
