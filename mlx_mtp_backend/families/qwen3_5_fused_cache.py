"""Caches that the few-row kernels read and write; see cache.base.LayerCache.

Each holds its kind of state for all layers of a sequence, so that what the host does for a sequence does not grow with
the number of layers. `commit` also takes a count that is still on the device ([1] int32), so that the next pass can be
built before the host knows how many rows were accepted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
from mtp_kernels import attention_inputs as inputs_kernel
from mtp_kernels import gated_delta as delta_kernel
from mtp_kernels.few_row_attention import first_row
from mtp_kernels.launch import host_ints

from mlx_mtp_backend.cache import KVCache
from mlx_mtp_backend.cache.kv import grown_size

# What a layer of a pass is given and leaves: [recurrent, window, tape] of all sequences, as gated_delta.DeltaState.
DeltaArrays = list[mx.array]

_DRAFT_ROWS = 16  # kept free in a tail for the later passes of one transaction
_LAG = 2  # transactions whose counts a loop that builds one pass ahead may not have waited for


class Recurrence(Protocol):
    """A Gated DeltaNet layer."""

    weights: delta_kernel.DeltaWeights

    def settle(self, rows: mx.array, before: DeltaArrays, keep: mx.array) -> tuple[mx.array, DeltaArrays]:
        """Runs any number of projection rows of one sequence into its state: output rows, and that state."""


@dataclass(frozen=True, slots=True)
class Held:
    """Where a sequence's states are.

    Kept rows reach the recurrent state during the next pass, so committing is free however many are kept.

    Attributes:
        layers: of all sequences that shared the last pass.
        place: this one's among them.
        count: how many they are.
        kept: rows on its tapes that count.
    """

    layers: list[DeltaArrays]
    place: int
    count: int
    kept: int | mx.array

    def alone(self, layer: int) -> DeltaArrays:
        """One layer's state of this sequence only."""
        arrays = self.layers[layer]
        return arrays if self.count == 1 else [array[self.place : self.place + 1] for array in arrays]


class FusedDeltaCache:
    """States of a sequence's Gated DeltaNet layers, rolled back by letting the next pass replay the kept rows only."""

    def __init__(self, layers: Sequence[Recurrence], dtype: mx.Dtype) -> None:
        self._layers = layers
        empty: dict[tuple[int, int], DeltaArrays] = {}
        for weights in (layer.weights for layer in layers):
            if (weights.value_heads, weights.channels) not in empty:
                state = delta_kernel.DeltaState.empty(weights, dtype)
                empty[weights.value_heads, weights.channels] = [state.recurrent, state.window, state.tape]
        states = [empty[layer.weights.value_heads, layer.weights.channels] for layer in layers]
        self._no_rows = [tape for _, _, tape in states]
        self._held = self._mark = Held(states, 0, 1, 0)
        self._many: list[mx.array] = []  # a prefill pass, by layer: its projection rows, and the states after them
        self._settled: list[DeltaArrays] = []

    def begin(self) -> None:
        self._mark = self._held
        self._many, self._settled = [], []

    def give(self) -> Held:
        """What a pass reads. Raises RuntimeError for a second one in a transaction."""
        if self._held is not self._mark or self._many:
            raise RuntimeError("a second pass in one transaction")
        return self._held

    def take(self, layers: list[DeltaArrays], place: int, count: int, rows: int) -> None:
        """Continue from a pass of so many sequences; its rows all count until `commit` says."""
        self._held = Held(layers, place, count, rows)

    def run_many(self, layer: int, rows: mx.array) -> mx.array:
        """A prefill pass, layer by layer: output rows for projection rows [N, width], which all reach the state."""
        if layer == 0:
            self.give()
        self._many.append(rows)
        y, state = self._absorb(layer, rows)
        self._settled.append(state)
        if len(self._settled) == len(self._layers):
            self._held = Held(self._settled, 0, 1, 0)
        return y

    def commit(self, keep: int | mx.array) -> None:
        if isinstance(keep, int) and keep == 0:
            self.abort()
            return
        if not self._many:
            held = self._held
            self._held = Held(held.layers, held.place, held.count, keep)
        elif (count := _host(keep)) < self._many[0].shape[0]:
            settled = [self._absorb(layer, rows[:count])[1] for layer, rows in enumerate(self._many)]
            self._held = Held(settled, 0, 1, 0)
        self.begin()

    def abort(self) -> None:
        self._held = self._mark
        self.begin()

    def rows(self, start: int, end: int) -> tuple[mx.array, ...]:
        return ()

    def snapshot(self) -> tuple[mx.array, ...]:
        """Only between prefill passes, after which no row is pending."""
        if not isinstance(self._held.kept, int) or self._held.kept:
            raise RuntimeError("a snapshot with rows pending")
        states = [self._held.alone(layer)[:2] for layer in range(len(self._layers))]
        return tuple(array for state in states for array in state)

    def restore(self, rows: Sequence[tuple[mx.array, ...]], snapshot: tuple[mx.array, ...]) -> None:
        if snapshot:
            pairs = zip(snapshot[::2], snapshot[1::2], self._no_rows, strict=True)
            self._held = self._mark = Held([list(arrays) for arrays in pairs], 0, 1, 0)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for arrays in self._held.layers for array in arrays]

    def _absorb(self, layer: int, rows: mx.array) -> tuple[mx.array, DeltaArrays]:
        """Runs rows from the state at `begin`."""
        y, (recurrent, window, _) = self._layers[layer].settle(rows, self._mark.alone(layer), counts([self._mark.kept]))
        return y, [recurrent, window, self._no_rows[layer]]


def joined(held: Sequence[Held]) -> list[DeltaArrays]:
    """States of these sequences in this order: as they are if one pass left them so, else copied together."""
    layers = held[0].layers
    if held[0].count == len(held) and all(one.layers is layers and one.place == i for i, one in enumerate(held)):
        return layers
    parts = ([one.alone(layer) for one in held] for layer in range(len(layers)))
    return [[mx.concatenate(list(arrays)) for arrays in zip(*part, strict=True)] for part in parts]


def counts(kept: Sequence[int | mx.array]) -> mx.array:
    """[S] int32 on the device."""
    known = [count for count in kept if isinstance(count, int)]
    if len(known) == len(kept):
        return mx.array(known, dtype=mx.int32)
    parts = [count if isinstance(count, mx.array) else mx.array([count], dtype=mx.int32) for count in kept]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


class LongKV(KVCache):
    """One layer's keys and values below a tail; stock attention appends to it, too."""

    def reserve(self, size: int, kv_heads: int, dtype: mx.Dtype) -> None:
        """Have a buffer of so many rows, which are no fewer than present."""
        if self.capacity < size:
            self._resize(self.capacity, size, kv_heads, inputs_kernel.HEAD_DIM, dtype)

    def put(self, tail: mx.array, position: mx.array) -> None:
        """Write a whole tail at a position that only the device knows ([1] int32)."""
        assert self._keys is not None
        assert self._values is not None
        self._keys = mx.slice_update(self._keys, tail[:1], position, axes=(2,))
        self._values = mx.slice_update(self._values, tail[1:], position, axes=(2,))


@dataclass(frozen=True, slots=True)
class GivenKV:
    """What a pass reads of one sequence.

    Attributes:
        layers: keys, values and tail of each.
        position: [3] int32, where the tail and where the new rows begin, and rows of the long buffers.
        bound: no row lies at this position or beyond.
        apart: what must be evaluated before the pass: within it, work that only some passes do would shift where MLX
            cuts the pass into CUDA graphs, and all of them would have to be instantiated anew.
    """

    layers: list[list[mx.array]]
    position: mx.array
    bound: int
    apart: list[mx.array]


class FusedKVCache:
    """Keys and values of a sequence's attention layers: in long buffers below a base, in short tails from there on.

    After a commit of a count on the device the next position is `_start` plus the rows `_since` it, and `offset` is an
    upper bound. Tails then move at a position that only the device knows, with rows that do not count behind it:
    later ones are written over them.
    """

    def __init__(self, layers: int, kv_heads: int, dtype: mx.Dtype) -> None:
        self.long = [LongKV() for _ in range(layers)]
        self.offset = 0
        self._mark = 0
        self._kv_heads, self._dtype = kv_heads, dtype
        self._tails: list[mx.array] = []
        self._first_rows: list[list[mx.array]] = []  # of keys and values, while tails are in use
        self._base = self._capacity = 0
        self._start: mx.array | None = None
        self._since: int | mx.array = 0
        self._start_mark: tuple[mx.array | None, int | mx.array] = (None, 0)
        self._first: mx.array | None = None
        self._trail: deque[tuple[mx.array, int]] = deque(maxlen=_LAG)  # where transactions began, most rows each kept

    def begin(self) -> None:
        self._mark = self.offset
        self._start_mark = (self._start, self._since)
        self._first = None

    def give(self, rows: int, *, whole: bool) -> GivenKV:
        """What a pass of so many rows reads, of keys and values all or the first rows."""
        if self._first is None and self.offset - self._base + rows + _DRAFT_ROWS > inputs_kernel.TAIL:
            self._move()
            self._mark, self._start_mark = self.offset, (self._start, self._since)
        apart: list[mx.array] = []
        if not self._tails:
            self._base = self.offset
            shape = (2, self._kv_heads, inputs_kernel.TAIL, inputs_kernel.HEAD_DIM)
            self._tails = [mx.zeros(shape, self._dtype)] * len(self.long)
            self._reserve(0)
            if not whole:
                self._first_rows = [[first_row(array) for array in long.arrays] for long in self.long]
            apart = [*self.arrays, *(array for arrays in self._first_rows for array in arrays)]
        if self.offset - self._base + rows > inputs_kernel.TAIL:
            raise RuntimeError(f"a transaction of more than {_DRAFT_ROWS} rows after its first pass")
        if self._start is None:
            position = mx.array([self._base, self.offset, self._capacity], dtype=mx.int32)
        else:
            position = self._start = _advanced(self._start, self._since)
            self._since = 0
        if self._first is None:
            self._first = position
        longs = [long.arrays for long in self.long] if whole else self._first_rows
        layers = [[*arrays, tail] for arrays, tail in zip(longs, self._tails, strict=True)]
        return GivenKV(layers, position, self.offset + rows, apart)

    def take(self, tails: list[mx.array], rows: int) -> None:
        """Continue from a pass: the tails with its rows."""
        self._tails = tails
        self.offset += rows
        self._since = rows

    def run_many(self, rows: int) -> None:
        """Count rows that stock attention appended to every long buffer, which `settle` made ready."""
        self.offset += rows

    def commit(self, keep: int | mx.array) -> None:
        if isinstance(keep, int) and keep == 0:
            self.abort()
            return
        if isinstance(keep, int):
            self.offset = self._mark + keep
        if isinstance(keep, mx.array) or self._start is not None:
            assert self._first is not None
            self._trail.append((self._first, self.offset - self._mark))
            self._start, self._since = self._first, keep
        self._drop_late_tails()

    def abort(self) -> None:
        self.offset = self._mark
        self._start, self._since = self._start_mark
        self._drop_late_tails()

    @property
    def arrays(self) -> list[mx.array]:
        return [array for long in self.long for array in long.arrays] + self._tails

    def rows(self, start: int, end: int) -> tuple[mx.array, ...]:
        self.settle()
        return tuple(array for long in self.long for array in long.rows(start, end))

    def snapshot(self) -> tuple[mx.array, ...]:
        return ()

    def restore(self, rows: Sequence[tuple[mx.array, ...]], snapshot: tuple[mx.array, ...]) -> None:
        for layer, long in enumerate(self.long):
            long.restore([stretch[2 * layer : 2 * layer + 2] for stretch in rows], ())
            self.offset = self._mark = long.offset

    def settle(self) -> None:
        """Move the tails' rows into the long buffers; waits for a count that is still on the device."""
        if self._start is not None:
            base, first, _ = host_ints(self._start)
            self._base, self.offset = base, first + _host(self._since)
            self._start, self._since = None, 0
            self._trail.clear()
        tails = self._taken_tails()
        count = self.offset - self._base
        for layer, long in enumerate(self.long):
            long.offset = self.offset
            if tails and count:
                long.offset = self._base
                long.append(tails[layer][:1, :, :count], tails[layer][1:, :, :count])

    def _move(self) -> None:
        """Move the tails without waiting for the newest counts."""
        if self._start is None or not self._tails or len(self._trail) < _LAG:
            self.settle()
            return
        self.offset = host_ints(self._trail[0][0])[1] + sum(rows for _, rows in self._trail)
        position = _advanced(self._start, self._since)
        tails = self._taken_tails()
        self._reserve(self.offset + inputs_kernel.TAIL)
        for long, tail in zip(self.long, tails, strict=True):
            long.put(tail, position[:1])
        capacity = mx.array([self._capacity], dtype=mx.int32)
        self._start, self._since = mx.concatenate([position[1:2], position[1:2], capacity]), 0

    def _taken_tails(self) -> list[mx.array]:
        """The tails, which are in use no more, nor are first rows: no buffer is written in place while those live."""
        tails, self._tails, self._first_rows = self._tails, [], []
        return tails

    def _reserve(self, rows: int) -> None:
        """Room for more than so many rows in every long buffer, and as much in all: a pass is told one capacity."""
        present = max((long.capacity for long in self.long), default=0)
        self._capacity = present if present > rows else grown_size(present, rows)
        for long in self.long:
            long.reserve(self._capacity, self._kv_heads, self._dtype)

    def _drop_late_tails(self) -> None:
        """A tail that begins behind what is kept holds nothing of it."""
        if self._start is None and self.offset < self._base:
            self._taken_tails()


def _advanced(position: mx.array, rows: int | mx.array) -> mx.array:
    """Same base and capacity, `rows` later."""
    return position + mx.array([0, 1, 0], dtype=mx.int32) * rows


def _host(count: int | mx.array) -> int:
    return count if isinstance(count, int) else host_ints(count)[0]
