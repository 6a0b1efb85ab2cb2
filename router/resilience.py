"""What stands between a request and a backend that fails: a breaker, and the only retries that there are.

A backend is left alone after several failures in a row; after a pause one request, and no other, tries it again: it
closes the breaker with its first token, or doubles the pause. A llama.cpp child fails alone, any other backend as a
whole. Replies that tell of a state, such as a full queue or a wrong key, are no failures.

A request is retried only before its first token, and only where the backend says that a moment later it may succeed.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import Enum

from router.backends.base import Backend
from router.catalog import ModelEntry
from router.domain import BackendKind, ErrorReason, Event, GenerationRequest, RouterError, Started
from router.settings import ResilienceSettings

logger = logging.getLogger(__name__)

FIRST_DELAY, DELAY_GROWTH = 0.1, 3.0  # seconds before the first retry, and how it grows
SOON = 1.0  # a backend that asks for more seconds than this is not tried again by the same request
MIN_TIME_BUDGET = 0.001  # seconds that a retry gets at least, to end with TIME_LIMIT in the backend's own way


class BreakerState(Enum):
    """Whether requests go through: all, none, or one to try."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True)
class Breaker:
    """Pure decisions; `now` is in seconds of one clock.

    Attributes:
        limit: failures in a row that open it.
        pause, longest_pause: seconds that it stays open at first, and at most.
    """

    limit: int
    pause: float
    longest_pause: float
    failures: int = 0
    opened: float | None = None  # None: closed
    openings: int = 0  # since it was closed
    probing: bool = False

    @property
    def length(self) -> float:
        """Seconds that it stays open this time."""
        return min(self.pause * 2.0 ** min(self.openings - 1, 30), self.longest_pause)

    def state(self, now: float) -> BreakerState:
        """As it stands."""
        if self.opened is None:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if now >= self.opened + self.length else BreakerState.OPEN

    def refusal(self, now: float) -> float | None:
        """None lets the request through, in half-open state as the only one; else seconds until it may try again."""
        match self.state(now):
            case BreakerState.CLOSED:
                return None
            case BreakerState.OPEN if self.opened is not None:
                return self.opened + self.length - now
            case _ if self.probing:
                return self.pause
        self.probing = True
        return None

    def succeeded(self) -> None:
        """A first token came."""
        self.failures, self.openings, self.opened, self.probing = 0, 0, None, False

    def failed(self, now: float, *, probe: bool = False) -> None:
        """The backend failed; `probe`: the one request that tried it."""
        self.failures += 1
        if probe or (self.opened is None and self.failures >= self.limit):
            self.opened, self.openings, self.probing = now, self.openings + 1, False

    def undecided(self) -> None:
        """The one that tried left without having found out."""
        self.probing = False

    def recovered(self, now: float) -> None:
        """The backend was seen to be well: the next request may try."""
        if self.opened is not None:
            self.opened = now - self.length


class Resilience:
    """The breakers of all backends.

    Args:
        settings: `[resilience]`.
        noted: called with what happened ("retry", or the state that a breaker came to) and the breaker's name.
        now: monotonic clock in seconds.
    """

    def __init__(
        self,
        settings: ResilienceSettings | None = None,
        noted: Callable[[str, str], None] = lambda what, name: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings or ResilienceSettings()
        self._noted = noted
        self._now = now
        self._breakers: dict[str, Breaker] = {}

    def states(self) -> dict[str, BreakerState]:
        """Breakers that were needed so far, by name."""
        now = self._now()
        return {name: breaker.state(now) for name, breaker in self._breakers.items()}

    def recovered(self, backend: str) -> None:
        """The backend was seen to be well."""
        if backend in self._breakers:
            self._breakers[backend].recovered(self._now())

    async def generate(
        self, backend: Backend, entry: ModelEntry, request: GenerationRequest
    ) -> AsyncGenerator[Event, None]:
        """The events of `backend.generate`, tried again where that helps.

        Raises:
            RouterError: the backend's; BACKEND_UNAVAILABLE where it is being left alone.
        """
        name = _circuit(backend, entry)
        begin, attempt = self._now(), 0
        while True:
            breaker = self._admit(name)
            probe = breaker.probing  # no other request passes while one tries
            started = False
            try:
                async with aclosing(backend.generate(entry, request)) as events:
                    async for event in events:
                        if not started and isinstance(event, Started):
                            started, probe = True, False
                            self._succeeded(name, breaker)
                        yield event
                return
            except RouterError as error:
                if _is_failure(error):
                    self._failed(name, breaker, probe=probe)
                if started or attempt >= self._settings.retries or not _worth_another(error):
                    raise
                reason = error.reason.value
            finally:
                if probe:
                    breaker.undecided()
            delay = FIRST_DELAY * DELAY_GROWTH**attempt * random.uniform(0.8, 1.2)
            attempt += 1
            logger.info("retry %d of %s in %.2f s, after %s", attempt, entry.name, delay, reason)
            self._noted("retry", name)
            await asyncio.sleep(delay)
            if request.time_budget is not None:
                left = request.time_budget - (self._now() - begin)
                request = replace(request, time_budget=max(left, MIN_TIME_BUDGET))

    def _admit(self, name: str) -> Breaker:
        settings = self._settings
        if name not in self._breakers:
            self._breakers[name] = Breaker(settings.failures, settings.pause, settings.longest_pause)
        breaker = self._breakers[name]
        wait = breaker.refusal(self._now())
        if wait is not None:
            raise RouterError(
                ErrorReason.BACKEND_UNAVAILABLE,
                f"backend {name!r} has failed {breaker.failures} times in a row and is left alone for a while",
                metadata={"backend": name, "failures": str(breaker.failures)},
                retry_after=wait,
            )
        if breaker.probing:
            self._noted(BreakerState.HALF_OPEN.value, name)
        return breaker

    def _succeeded(self, name: str, breaker: Breaker) -> None:
        was_open = breaker.opened is not None
        breaker.succeeded()
        if was_open:
            logger.warning("%s answers again", name)
            self._noted(BreakerState.CLOSED.value, name)

    def _failed(self, name: str, breaker: Breaker, *, probe: bool) -> None:
        openings = breaker.openings
        breaker.failed(self._now(), probe=probe)
        if breaker.openings > openings:
            logger.warning(
                "%s has failed %d times in a row: left alone for %g s", name, breaker.failures, breaker.length
            )
            self._noted(BreakerState.OPEN.value, name)


def _circuit(backend: Backend, entry: ModelEntry) -> str:
    """What fails together: a backend, or one model of those that each have a process of their own."""
    own_process = backend.kind is BackendKind.LLAMA_CPP and not backend.offer().external
    return f"{backend.name}/{entry.name}" if own_process else backend.name


def _is_failure(error: RouterError) -> bool:
    if error.reason is ErrorReason.BACKEND_UNAVAILABLE:
        return error.retry_after is not None  # without it, it tells of a state, such as a wrong key
    return error.reason in (ErrorReason.BACKEND_FAILED, ErrorReason.BACKEND_STALLED)


def _worth_another(error: RouterError) -> bool:
    soon = error.retry_after is not None and error.retry_after <= SOON
    return error.reason is ErrorReason.BACKEND_UNAVAILABLE and soon
