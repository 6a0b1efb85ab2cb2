"""How the thread that reads from the engine reaches the event loop: little, and without waiting for it."""

from __future__ import annotations

import asyncio
import threading


class Waker:
    """Wakes readers on the event loop: one call into the loop for all the streams that one round of the engine feeds.

    Args:
        loop: of the readers.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._due: list[asyncio.Event] = []

    def wake(self, event: asyncio.Event) -> None:
        """Sets the event on the loop, soon; from any thread. Raises RuntimeError once the loop is closed."""
        with self._lock:
            self._due.append(event)
            if len(self._due) > 1:
                return
        self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        with self._lock:
            due, self._due = self._due, []
        for event in due:
            event.set()
