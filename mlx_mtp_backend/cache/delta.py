"""State of a Gated DeltaNet layer, rolled back by replaying the accepted rows from a tape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

# (rows' recurrence inputs, state) -> state after them.
Replay = Callable[[tuple[mx.array, ...], mx.array | None], mx.array]


@dataclass(frozen=True, slots=True)
class Tape:
    """What one pass fed to the layer.

    Attributes:
        conv_input: [1, window + rows, channels], the old window with the new rows after it.
        recurrence: inputs of the recurrence, each [1, rows, ...].
    """

    conv_input: mx.array
    recurrence: tuple[mx.array, ...]


class DeltaCache:
    """Convolution window [1, window, channels] and recurrent state [1, value heads, value size, key size].

    The recurrence overwrites its state, so dropping rows means going back: the state at `begin` is kept by reference
    (arrays do not change) and the kept rows are run through the recurrence again, without any weights.
    """

    def __init__(self, window: int, replay: Replay) -> None:
        self.conv: mx.array | None = None
        self.state: mx.array | None = None
        self._window = window
        self._replay = replay
        self._mark: tuple[mx.array | None, mx.array | None] = (None, None)
        self._tape: Tape | None = None

    def begin(self) -> None:
        self._mark = (self.conv, self.state)
        self._tape = None

    def advance(self, tape: Tape, state: mx.array) -> None:
        """Take the state after a pass. One pass a transaction: only then is the tape complete."""
        if self._tape is not None:
            raise RuntimeError("a second pass in one transaction")
        self.conv = tape.conv_input[:, -self._window :]
        self.state = state
        self._tape = tape

    def commit(self, keep: int) -> None:
        tape = self._tape
        if keep == 0 or tape is None:
            self.abort()
            return
        if keep < tape.recurrence[0].shape[1]:
            self.conv = tape.conv_input[:, keep : keep + self._window]
            self.state = self._replay(tuple(rows[:, :keep] for rows in tape.recurrence), self._mark[1])
        self._settle()

    def abort(self) -> None:
        self.conv, self.state = self._mark
        self._settle()

    @property
    def arrays(self) -> list[mx.array]:
        return [array for array in (self.conv, self.state) if array is not None]

    def rows(self, start: int, end: int) -> tuple[mx.array, ...]:
        return ()

    def snapshot(self) -> tuple[mx.array, ...]:
        return tuple(self.arrays)

    def restore(self, rows: Sequence[tuple[mx.array, ...]], snapshot: tuple[mx.array, ...]) -> None:
        if snapshot:
            self.conv, self.state = snapshot
            self._mark = (self.conv, self.state)

    def _settle(self) -> None:
        """Drop the tape, and the reference that would keep its whole convolution input alive."""
        if self.conv is not None and self._tape is not None:
            self.conv = mx.contiguous(self.conv)
        self._tape = None
        self._mark = (self.conv, self.state)
