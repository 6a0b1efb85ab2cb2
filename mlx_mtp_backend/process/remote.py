"""The parent's side of a stream whose sequence is in the engine's process."""

from __future__ import annotations

import time
from collections.abc import Callable

from mlx_mtp_backend.api import Event, Finished, FinishReason, GenerateParams, Started, Statistics
from mlx_mtp_backend.errors import EngineError
from mlx_mtp_backend.stream import Stream


def step_of(capacity: int) -> int:
    """Tokens read after which the child is told: a quarter of what may wait, so that few messages are needed."""
    return max(1, capacity // 4)


def window_of(capacity: int) -> int:
    """Tokens that the child may send ahead: with those read but not told of, at least `capacity` are unread when it
    pauses, and at most a quarter more."""
    return capacity + step_of(capacity) - 1


class RemoteStream(Stream):
    """See Stream.

    Args:
        params: of the request.
        capacity: see EngineOptions.stream_buffer.
        cancel: tells the child that the reader has left.
        room: tells it how many tokens have been read.
    """

    def __init__(
        self,
        params: GenerateParams,
        capacity: int,
        on_ready: Callable[[], None] | None,
        cancel: Callable[[], None],
        room: Callable[[int], None],
    ) -> None:
        super().__init__(capacity, on_ready, self._woken)
        self._step = step_of(capacity)
        self._cancel = cancel
        self._room = room
        self._owed = 0
        self._came = 0
        self._prompt_tokens = len(params.prompt)
        self.submitted = time.monotonic()
        self.started: float | None = None

    def put(self, event: Event) -> None:
        """Called by the thread that reads from the child."""
        if isinstance(event, Started):
            self.started = time.monotonic()
        elif not isinstance(event, Finished):
            self._came += len(event.tokens)
        super().put(event)

    def release(self, tokens: int) -> None:
        """See Stream; tells the child now and then."""
        super().release(tokens)
        with self._changed:
            self._owed += tokens
            if self._owed < self._step or self._finished:
                return
            owed, self._owed = self._owed, 0
        self._room(owed)

    def _woken(self) -> None:
        if self.cancelled:
            self._cancel()

    def lost(self, error: EngineError) -> Finished:
        """The last event of a stream that the child says no more of; of its counts only those that are known here."""
        now = time.monotonic()
        started = now if self.started is None else self.started
        queued, decoded = started - self.submitted, now - started
        statistics = Statistics(self._prompt_tokens, self._came, 0, (), (), queued, 0.0, decoded)
        return Finished(FinishReason.ERROR, statistics, error=error)
