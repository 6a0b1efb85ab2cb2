"""Looks after a server that somebody else started: whether it answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from router.domain import BackendState, ErrorReason, RouterError

logger = logging.getLogger(__name__)

LOOK_TIMEOUT = 10.0  # seconds
FIRST_BACKOFF = 0.5  # seconds after the first failed look; doubles up to the interval


class Watch:
    """Asks a server at intervals, sooner where it is down or was suspected.

    Args:
        who: name of the server's kind, for messages.
        look: asks it once; raises RouterError where it cannot be used. Returns whether anything changed there.
        interval: seconds between looks while it is up.
        changed: called on the event loop when its state, or something there, has changed.
    """

    def __init__(
        self, who: str, look: Callable[[], Awaitable[bool]], interval: float, changed: Callable[[], None]
    ) -> None:
        self.state = BackendState.STARTING
        self.error: RouterError | None = None
        self.retry_after: float | None = None
        self._who = who
        self._look = look
        self._interval = interval
        self._changed = changed
        self._now = asyncio.Event()
        self._looked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to look."""
        self._task = asyncio.create_task(self._look_for_ever(), name=f"watch {self._who}")

    async def close(self) -> None:
        """Ends the looking. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def first_look(self) -> None:
        """Waits until the server was asked once, whatever came of it."""
        await self._looked.wait()

    def suspect(self) -> None:
        """Something went wrong: look now."""
        self._now.set()

    async def _look_for_ever(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            self._now.clear()
            before, different = self.state, False
            try:
                async with asyncio.timeout(LOOK_TIMEOUT):
                    different = await self._look()
            except TimeoutError:
                self._down(RouterError(ErrorReason.BACKEND_STALLED, f"{self._who} does not answer"), backoff)
            except RouterError as error:
                self._down(error, backoff)
            else:
                self.state, self.error, self.retry_after, backoff = BackendState.READY, None, None, FIRST_BACKOFF
            self._looked.set()
            if different or before is not self.state:
                self._changed()
            if self.state is BackendState.READY:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._now.wait(), self._interval)
            else:  # requests that fail must not speed the asking up
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, self._interval)

    def _down(self, error: RouterError, backoff: float) -> None:
        if self.state is not BackendState.DOWN:
            logger.warning("%s cannot be used: %s", self._who, error)
        self.state, self.error, self.retry_after = BackendState.DOWN, error, backoff
