"""Bounds every write of a stream with one timer: `asyncio.timeout` would set and cancel one for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

from router.domain import ErrorReason, RouterError


class Writes:
    """The writes of one stream, one after another. Made by `bounded_writes`.

    Args:
        limit: seconds that each may take.
        timeout: ends the stream.
    """

    def __init__(self, limit: float, timeout: asyncio.Timeout) -> None:
        self._limit = limit
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None  # when the write that is under way began
        self._timer = self._loop.call_later(limit, self._look)

    async def wait(self, write: Awaitable[None]) -> None:
        """Waits for one."""
        self._since = self._loop.time()
        await write
        self._since = None

    def close(self) -> None:
        """No more writes come."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._since is None else self._since) + self._limit
        if due <= now:
            self._timeout.reschedule(now)
        else:
            self._timer = self._loop.call_at(due, self._look)


@asynccontextmanager
async def bounded_writes(limit: float) -> AsyncIterator[Writes]:
    """In this block, a write that takes longer than `limit` seconds raises RouterError SLOW_CONSUMER: a caller that
    stops reading must not hold a backend's place until its own deadline."""
    try:
        async with asyncio.timeout(None) as timeout:
            writes = Writes(limit, timeout)
            try:
                yield writes
            finally:
                writes.close()
    except TimeoutError:
        if not timeout.expired():
            raise
        raise RouterError(
            ErrorReason.SLOW_CONSUMER,
            f"the stream was not read for {limit:g} s; the answer is incomplete",
            metadata={"slow_reader_limit": f"{limit:g}"},
        ) from None
