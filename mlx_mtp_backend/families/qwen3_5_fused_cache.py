"""Caches that the few-row kernels read and write; see cache.base.LayerCache.

`commit` also takes a count that is still on the device ([1] int32), so that the next pass can be built before the host
knows how many rows were accepted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
from mtp_kernels import attention_inputs as inputs_kernel
from mtp_kernels import gated_delta as delta_kernel
from mtp_kernels.launch import host_ints

from mlx_mtp_backend.cache import KVCache
from mlx_mtp_backend.cache.kv import grown

Run = Callable[..., tuple[mx.array, mx.array, mx.array]]

_DRAFT_ROWS = 16  # kept free in a tail for the later passes of one transaction
_LAG = 2  # transactions whose counts a loop that builds one pass ahead may not have waited for


class OnDevice:
    """The small arrays that tell a pass where it is, made once for all layers of a sequence.

    `apart` holds what must be evaluated before the pass: within it, work that only some passes do would shift where MLX
    cuts the pass into CUDA graphs, and all of them would have to be instantiated anew.
    """

    def __init__(self) -> None:
        self.apart: list[mx.array] = []
        # Values hold their sources, so that no id is used twice.
        self._made: dict[tuple[int, ...], tuple[mx.array, ...]] = {}

    def ints(self, *numbers: int) -> mx.array:
        """[n] int32."""
        return self._once((0, *numbers), lambda: mx.array(numbers, dtype=mx.int32))

    def count(self, number: int | mx.array) -> mx.array:
        """[1] int32."""
        return number if isinstance(number, mx.array) else self.ints(number)

    def advanced(self, position: mx.array, rows: int | mx.array) -> mx.array:
        """Same base, `rows` later: positions are [2] int32, where the tail and where the rows begin."""
        rows_key = rows if isinstance(rows, int) else id(rows)
        sources = (position,) if isinstance(rows, int) else (position, rows)
        return self._once((1, id(position), rows_key), lambda: position + self.ints(0, 1) * rows, sources)

    def rebased(self, position: mx.array) -> mx.array:
        """Where the rows begin, a new tail begins too."""
        return self._once((2, id(position)), lambda: mx.concatenate([position[1:], position[1:]]), (position,))

    def _once(self, key: tuple[int, ...], make: Callable[[], mx.array], sources: tuple[mx.array, ...] = ()) -> mx.array:
        if key not in self._made:
            self._made[key] = (make(), *sources)
        return self._made[key][0]


@dataclass(frozen=True, slots=True)
class Pending:
    """A Gated DeltaNet state, and the last pass's projection rows, of which the first `kept` count.

    Kept rows reach the recurrent state during the next pass, so committing is free however many are kept.
    """

    state: delta_kernel.DeltaState
    kept: int | mx.array

    def keep(self) -> mx.array:
        """The count on the device."""
        return self.kept if isinstance(self.kept, mx.array) else mx.array([self.kept], dtype=mx.int32)


class FusedDeltaCache:
    """State of a Gated DeltaNet layer, rolled back by letting the next pass replay the kept rows only."""

    def __init__(self, weights: delta_kernel.DeltaWeights, run: Run, dtype: mx.Dtype) -> None:
        dim = delta_kernel.HEAD_DIM
        self._weights, self._run = weights, run
        self._no_rows = mx.zeros((1, weights.width), dtype)
        recurrent = mx.zeros((weights.value_heads, dim, dim), mx.float32)
        window = mx.zeros((3, weights.channels), dtype)
        self._pending = Pending(delta_kernel.DeltaState(recurrent, window, self._no_rows), 0)
        self._mark = self._pending
        self._many: mx.array | None = None

    def begin(self) -> None:
        self._mark = self._pending
        self._many = None

    def give(self, rows: int, on_device: OnDevice) -> list[mx.array]:
        """Recurrent state, window, pending rows, and how many of those count."""
        self._refuse_second_pass()
        state = self._pending.state
        return [state.recurrent, state.window, state.pending, on_device.count(self._pending.kept)]

    def take(self, after: list[mx.array], rows: int) -> None:
        """Continue from a pass: its settled state and window, and its rows, all counted until `commit` says."""
        self._pending = Pending(delta_kernel.DeltaState(*after), rows)

    def run_many(self, rows: mx.array) -> mx.array:
        """A prefill pass: output rows for projection rows [N, width], which all reach the state at once."""
        self._refuse_second_pass()
        self._many = rows
        return self._absorb(rows)

    def commit(self, keep: int | mx.array) -> None:
        if isinstance(keep, int) and keep == 0:
            self.abort()
            return
        if self._many is None:
            self._pending = replace(self._pending, kept=keep)
        elif (count := _host(keep)) < self._many.shape[0]:
            self._absorb(self._many[:count])
        self._mark, self._many = self._pending, None

    def abort(self) -> None:
        self._pending, self._many = self._mark, None

    def rows(self, start: int, end: int) -> tuple[mx.array, ...]:
        return ()

    def snapshot(self) -> tuple[mx.array, ...]:
        """Only between prefill passes, after which no row is pending."""
        if not isinstance(self._pending.kept, int) or self._pending.kept:
            raise RuntimeError("a snapshot with rows pending")
        state = self._pending.state
        return (state.recurrent, state.window)

    def restore(self, rows: Sequence[tuple[mx.array, ...]], snapshot: tuple[mx.array, ...]) -> None:
        if snapshot:
            recurrent, window = snapshot
            self._pending = self._mark = Pending(delta_kernel.DeltaState(recurrent, window, self._no_rows), 0)

    def _absorb(self, rows: mx.array) -> mx.array:
        """Runs rows from the state at `begin` into the present state."""
        y, recurrent, window = self._run(rows, self._mark.state, self._mark.keep(), self._weights, settle=True)
        self._pending = Pending(delta_kernel.DeltaState(recurrent, window, self._no_rows), 0)
        return y

    def _refuse_second_pass(self) -> None:
        if self._pending is not self._mark:
            raise RuntimeError("a second pass in one transaction")

    @property
    def arrays(self) -> list[mx.array]:
        state = self._pending.state
        return [state.recurrent, state.window, state.pending]


class FusedKVCache(KVCache):
    """Keys and values in a long buffer below a base, and in a short tail from there on.

    After a commit of a count on the device the next position is `_start` plus the rows `_since` it, and `offset` is an
    upper bound. The tail then moves at a position that only the device knows, with rows that do not count behind it:
    later ones are written over them.
    """

    def __init__(self, kv_heads: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self._kv_heads, self._dtype = kv_heads, dtype
        self._tail: mx.array | None = None
        self._base = 0
        self._start: mx.array | None = None
        self._since: int | mx.array = 0
        self._start_mark: tuple[mx.array | None, int | mx.array] = (None, 0)
        self._first: mx.array | None = None
        self._trail: deque[tuple[mx.array, int]] = deque(maxlen=_LAG)  # where transactions began, most rows each kept

    def begin(self) -> None:
        super().begin()
        self._start_mark = (self._start, self._since)
        self._first = None

    def give(self, rows: int, on_device: OnDevice) -> list[mx.array]:
        """Keys, values, tail, and the positions at which the tail and the new rows begin."""
        if self._first is None and self.offset - self._base + rows + _DRAFT_ROWS > inputs_kernel.TAIL:
            self._move(on_device)
            self._mark, self._start_mark = self.offset, (self._start, self._since)
        if self._tail is None:
            self._base = self.offset
            shape = (2, self._kv_heads, inputs_kernel.TAIL, inputs_kernel.HEAD_DIM)
            self._tail = mx.zeros(shape, self._dtype)
            on_device.apart += self.arrays
        if self.offset - self._base + rows > inputs_kernel.TAIL:
            raise RuntimeError(f"a transaction of more than {_DRAFT_ROWS} rows after its first pass")
        if self._keys is None or self._values is None:
            self._keys, self._values = self._room(0)
        if self._start is None:
            position = on_device.ints(self._base, self.offset)
        else:
            position = self._start = on_device.advanced(self._start, self._since)
            self._since = 0
        if self._first is None:
            self._first = position
        return [self._keys, self._values, self._tail, position]

    def take(self, after: list[mx.array], rows: int) -> None:
        """Continue from a pass: the tail with its rows."""
        (self._tail,) = after
        self.offset += rows
        self._since = rows

    def commit(self, keep: int | mx.array) -> None:
        if isinstance(keep, int) and keep == 0:
            self.abort()
            return
        if isinstance(keep, int):
            super().commit(keep)
        if isinstance(keep, mx.array) or self._start is not None:
            assert self._first is not None
            self._trail.append((self._first, self.offset - self._mark))
            self._start, self._since = self._first, keep

    def abort(self) -> None:
        super().abort()
        self._start, self._since = self._start_mark

    def rows(self, start: int, end: int) -> tuple[mx.array, ...]:
        self.settle()
        return super().rows(start, end)

    def settle(self) -> None:
        """Move the tail's rows into the long buffer; waits for a count that is still on the device."""
        if self._start is not None:
            base, first = host_ints(self._start)
            self._base, self.offset = base, first + _host(self._since)
            self._start, self._since = None, 0
            self._trail.clear()
        tail, self._tail = self._tail, None
        count = self.offset - self._base
        if tail is not None and count:
            self.offset = self._base
            self.append(tail[:1, :, :count], tail[1:, :, :count])

    def _move(self, on_device: OnDevice) -> None:
        """Move the tail without waiting for the newest counts."""
        if self._start is None or self._tail is None or len(self._trail) < _LAG:
            self.settle()
            return
        self.offset = host_ints(self._trail[0][0])[1] + sum(rows for _, rows in self._trail)
        position = on_device.advanced(self._start, self._since)
        keys, values = self._room(self.offset + inputs_kernel.TAIL)
        self._keys = mx.slice_update(keys, self._tail[:1], position[:1], axes=(2,))
        self._values = mx.slice_update(values, self._tail[1:], position[:1], axes=(2,))
        self._start, self._since = on_device.rebased(position), 0
        self._tail = None

    def _room(self, rows: int) -> tuple[mx.array, mx.array]:
        """The long buffers, with room for so many rows."""
        keys, values = self._keys, self._values
        if keys is None or values is None or keys.shape[2] < rows:
            empty = mx.zeros((1, self._kv_heads, 0, inputs_kernel.HEAD_DIM), self._dtype)
            used = 0 if keys is None else keys.shape[2]
            keys, values = grown(keys, empty, used, rows), grown(values, empty, used, rows)
        return keys, values

    @property
    def arrays(self) -> list[mx.array]:
        return super().arrays + ([] if self._tail is None else [self._tail])


def _host(count: int | mx.array) -> int:
    return count if isinstance(count, int) else host_ints(count)[0]
