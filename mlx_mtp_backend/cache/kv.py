"""Keys and values of full attention, rolled back by moving an offset."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_mtp_backend.cache.base import copied

STEP = 256


class KVCache:
    """Rows [0, offset) of a buffer that grows in steps.

    MLX writes into the buffer in place as long as nothing else refers to it; a second reference would cost a copy of
    the whole buffer each pass. So a transaction is an offset, and rows past the offset are junk that the next pass
    writes over.
    """

    def __init__(self) -> None:
        self.offset = 0
        self._mark = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def begin(self) -> None:
        self._mark = self.offset

    def commit(self, keep: int) -> None:
        self.offset = self._mark + keep

    def abort(self) -> None:
        self.offset = self._mark

    @property
    def arrays(self) -> list[mx.array]:
        return [] if self._keys is None or self._values is None else [self._keys, self._values]

    @property
    def capacity(self) -> int:
        """Rows of the buffer; one at least stays unused."""
        return 0 if self._keys is None else self._keys.shape[2]

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add rows and return all of them.

        Args:
            keys, values: [1, kv heads, rows, head size].

        Returns:
            keys and values, [1, kv heads, offset + rows, head size].
        """
        start, end = self.offset, self.offset + keys.shape[2]
        if end >= self.capacity:
            self._resize(start, grown_size(self.capacity, end), keys.shape[1], keys.shape[3], keys.dtype)
        assert self._keys is not None
        assert self._values is not None
        self._keys[..., start:end, :] = keys
        self._values[..., start:end, :] = values
        self.offset = end
        return self._keys[..., :end, :], self._values[..., :end, :]

    def rows(self, start: int, end: int) -> tuple[mx.array, ...]:
        keys, values = self._keys, self._values
        if keys is None or values is None or not 0 <= start < end <= self.offset:
            return ()
        return copied(keys[..., start:end, :]), copied(values[..., start:end, :])

    def snapshot(self) -> tuple[mx.array, ...]:
        return ()

    def restore(self, rows: Sequence[tuple[mx.array, ...]], snapshot: tuple[mx.array, ...]) -> None:
        held = [stretch for stretch in rows if stretch]
        if held:
            keys, values = (mx.concatenate([stretch[i] for stretch in held], axis=2) for i in (0, 1))
            self.append(keys, values)
            self._mark = self.offset

    def _resize(self, used: int, size: int, heads: int, width: int, dtype: mx.Dtype) -> None:
        """Buffers of so many rows, of which the first `used` are those of the present ones."""

        def grown(old: mx.array | None) -> mx.array:
            room = mx.zeros((1, heads, size - used, width), dtype)
            return room if old is None else mx.concatenate([old[..., :used, :], room], axis=2)

        self._keys, self._values = grown(self._keys), grown(self._values)


def grown_size(present: int, needed: int) -> int:
    """Rows of a buffer with room for more than `needed`; by at least a quarter, so that a long reply copies it seldom.

    More, because MLX keeps an update that covers a whole array in place of it, in the update's own memory order, which
    no kernel takes.
    """
    return -(-max(needed + 1, present + present // 4) // STEP) * STEP
