"""What a caller holds of a running request. No MLX here: any thread may use it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator

from mlx_mtp_backend.api import Delta, Event, Finished

log = logging.getLogger(__name__)


class Stream:
    """The events of one request, from the MLX thread to a reader.

    Args:
        capacity: unread tokens above which the sequence pauses.
        on_ready: called on the MLX thread when events begin to wait; must only wake the reader.
        wake: called by the reader's thread when it cancelled, or made room again.
    """

    def __init__(self, capacity: int, on_ready: Callable[[], None] | None, wake: Callable[[], None]) -> None:
        self._capacity = capacity
        self._on_ready = on_ready
        self._wake = wake
        self._changed = threading.Condition()
        self._events: deque[Event] = deque()
        self._unread_tokens = 0
        self._cancelled = False
        self._finished = False

    def read(self) -> list[Event]:
        """Every event that waits, oldest first; empty if none does. Never blocks."""
        events = self.take()
        if tokens := sum(len(event.tokens) for event in events if isinstance(event, Delta)):
            self.release(tokens)
        return events

    def take(self) -> list[Event]:
        """As `read`, for who passes the events on: their tokens count as unread until they are released."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
        return events

    def release(self, tokens: int) -> None:
        """So many of the tokens taken have been read."""
        with self._changed:
            was_full = self._unread_tokens >= self._capacity
            self._unread_tokens -= tokens
            wakes = was_full and self._unread_tokens < self._capacity
        if wakes:
            self._wake()

    def __iter__(self) -> Iterator[Event]:
        """Block for each event; ends after Finished."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events)
            for event in self.read():
                yield event
                if isinstance(event, Finished):
                    return

    def cancel(self) -> None:
        """Ask the sequence to leave; Finished(CANCELLED) follows within one round. Nothing happens after Finished."""
        with self._changed:
            if self._cancelled or self._finished:
                return
            self._cancelled = True
        self._wake()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def finished(self) -> bool:
        """Whether Finished was put, read or not."""
        return self._finished

    @property
    def full(self) -> bool:
        with self._changed:
            return self._unread_tokens >= self._capacity

    def put(self, event: Event) -> None:
        """Called by the MLX thread only. Nothing follows Finished."""
        with self._changed:
            if self._finished:
                raise RuntimeError("an event after Finished")
            first = not self._events
            self._events.append(event)
            if isinstance(event, Delta):
                self._unread_tokens += len(event.tokens)
            self._finished = isinstance(event, Finished)
            self._changed.notify_all()
        if first and self._on_ready is not None:
            self._call(self._on_ready)

    def _call(self, on_ready: Callable[[], None]) -> None:
        """A reader that cannot be woken is gone (its event loop was closed); it must not take the engine along."""
        try:
            on_ready()
        except Exception:
            log.exception("on_ready raised; cancelling its stream")
            self._on_ready = None
            self.cancel()
