"""The stock caches, with a second form in which few-row kernels read and write them.

Each cache is in one form at a time. `settle` brings the stock form back, for passes of many rows and for snapshots.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mtp_kernels import attention_inputs as inputs_kernel
from mtp_kernels import gated_delta as delta_kernel

from mlx_mtp_backend.cache import DeltaCache, KVCache
from mlx_mtp_backend.cache.delta import Replay

OnDevice = Callable[..., mx.array]
Run = Callable[..., tuple[mx.array, mx.array, mx.array]]


class FusedDeltaCache(DeltaCache):
    """A Gated DeltaNet state plus the last pass's rows, of which the first `kept` count.

    Kept rows reach the recurrent state during the next pass, so committing is free however many are kept.
    """

    def __init__(self, weights: delta_kernel.DeltaWeights, run: Run, replay: Replay, dtype: mx.Dtype) -> None:
        super().__init__(3, replay)
        self._weights, self._run, self._dtype = weights, run, dtype
        self._pending: mx.array | None = None
        self._kept = 0
        self._fused_mark: tuple[mx.array | None, mx.array | None, mx.array | None, int] | None = None

    def begin(self) -> None:
        super().begin()
        self._fused_mark = (self.conv, self.state, self._pending, self._kept)

    def give(self, rows: int, on_device: OnDevice) -> list[mx.array]:
        """Recurrent state, window, pending rows, and how many of those count."""
        weights = self._weights
        if self.conv is None or self.state is None:
            self.conv = mx.zeros((1, 3, weights.channels), self._dtype)
            self.state = mx.zeros((1, weights.value_heads, delta_kernel.HEAD_DIM, delta_kernel.HEAD_DIM), mx.float32)
        pending = self._pending
        if pending is None:
            pending = mx.zeros((1, weights.width), self._dtype)
        if pending.shape[0] + rows > delta_kernel.MAX_ROWS:
            pending = pending[: self._kept]
        # Indexing with [0] would copy.
        return [self.state.squeeze(0), self.conv.squeeze(0), pending, on_device(self._kept)]

    def take(self, after: list[mx.array], rows: int) -> None:
        """Continue from a pass: its settled state and window, and its rows, all counted until `commit` says."""
        recurrent, window, self._pending = after
        self.state, self.conv = mx.expand_dims(recurrent, 0), mx.expand_dims(window, 0)
        self._kept = rows

    def commit(self, keep: int) -> None:
        if self._pending is None:
            super().commit(keep)
        elif keep == 0:
            self.abort()
        else:
            self._kept = keep
        self._fused_mark = None

    def abort(self) -> None:
        super().abort()
        if self._fused_mark is not None:
            self.conv, self.state, self._pending, self._kept = self._fused_mark
        self._fused_mark = None

    def settle(self) -> None:
        """Run the kept rows into the state."""
        if self._pending is None:
            return
        if self._kept and self.conv is not None and self.state is not None:
            state = delta_kernel.DeltaState(self.state.squeeze(0), self.conv.squeeze(0), self._pending)
            keep = mx.array([self._kept], dtype=mx.int32)
            _, recurrent, window = self._run(self._pending[:1], state, keep, self._weights)
            self.state, self.conv = mx.expand_dims(recurrent, 0), mx.expand_dims(window, 0)
        self._pending, self._kept = None, 0

    @property
    def arrays(self) -> list[mx.array]:
        return super().arrays + ([] if self._pending is None else [self._pending])


class FusedKVCache(KVCache):
    """Keys and values in a long buffer below `base`, and in a short tail from there on."""

    def __init__(self, kv_heads: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self._kv_heads, self._dtype = kv_heads, dtype
        self._tail: mx.array | None = None
        self._base = 0

    def give(self, rows: int, on_device: OnDevice) -> list[mx.array]:
        """Keys, values, tail, and the positions at which the tail and the new rows begin."""
        if self._tail is not None and self.offset - self._base + rows > inputs_kernel.TAIL:
            self.settle()
        if self._tail is None:
            self._base = self.offset
            shape = (2, self._kv_heads, inputs_kernel.TAIL, inputs_kernel.HEAD_DIM)
            self._tail = mx.zeros(shape, self._dtype)
        if self._keys is None or self._values is None:
            room = (1, self._kv_heads, inputs_kernel.TAIL, inputs_kernel.HEAD_DIM)
            self._keys, self._values = mx.zeros(room, self._dtype), mx.zeros(room, self._dtype)
        return [self._keys, self._values, self._tail, on_device(self._base, self.offset)]

    def take(self, after: list[mx.array], rows: int) -> None:
        """Continue from a pass: the tail with its rows."""
        (self._tail,) = after
        self.offset += rows

    def settle(self) -> None:
        """Move the tail's rows into the long buffer."""
        tail, self._tail = self._tail, None
        count = self.offset - self._base
        if tail is not None and count:
            self.offset = self._base
            self.append(tail[:1, :, :count], tail[1:, :, :count])

    @property
    def arrays(self) -> list[mx.array]:
        return super().arrays + ([] if self._tail is None else [self._tail])
