"""Admission to one model: who runs, who waits, who is turned away.

`Line` decides and knows no event loop; `Admission` wakes the waiting tasks. The rule: INTERACTIVE before BATCH, each in
order of arrival, but of every five places that come free while both wait, the fifth goes to BATCH, so that a BATCH
request with n BATCH requests in front of it waits for at most 5 (n + 1) places.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from router.domain import ErrorReason, Priority, RouterError

INTERACTIVE_TURNS = 4  # that may pass a waiting BATCH request before it has its turn
MIN_RETRY_AFTER, MAX_RETRY_AFTER = 1.0, 60.0


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's stay, from its arrival to its leaving. Compared by identity."""

    priority: Priority
    running: bool = False
    ahead: int = 0  # waiting requests that will run before it, as things stand
    admitted_at: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Line:
    """Pure decisions: `places` requests run, up to `max_waiting` wait."""

    def __init__(self, places: int, max_waiting: int) -> None:
        self.places = places
        self.max_waiting = max_waiting
        self.running: set[Ticket] = set()
        # Dicts keep order of arrival and drop from the middle in constant time.
        self._waiting: dict[Priority, dict[Ticket, None]] = {Priority.INTERACTIVE: {}, Priority.BATCH: {}}
        self._passed = 0  # INTERACTIVE turns since a BATCH request began to wait or had its turn

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    def arrive(self, ticket: Ticket) -> bool:
        """Admits or lines up the ticket; False, and nothing changed, if the line is full."""
        if len(self.running) < self.places and not self.waiting:
            self._run(ticket)
            return True
        if self.waiting >= self.max_waiting:
            return False
        self._waiting[ticket.priority][ticket] = None
        return True

    def leave(self, ticket: Ticket) -> list[Ticket]:
        """Removes the ticket, whether it runs, waits or is gone already; returns those admitted in its place."""
        self.running.discard(ticket)
        self._waiting[ticket.priority].pop(ticket, None)
        if not self._waiting[Priority.BATCH]:
            self._passed = 0
        admitted = []
        while len(self.running) < self.places and self.waiting:
            following = next(self.order())
            self._take_turn(following)
            admitted.append(following)
        return admitted

    def order(self) -> Iterator[Ticket]:
        """The waiting tickets in the order in which they will run if nobody else arrives."""
        interactive, batch = iter(self._waiting[Priority.INTERACTIVE]), iter(self._waiting[Priority.BATCH])
        passed = self._passed
        first, second = next(interactive, None), next(batch, None)
        while first is not None or second is not None:
            if second is not None and (first is None or passed >= INTERACTIVE_TURNS):
                yield second
                second, passed = next(batch, None), 0
            elif first is not None:
                yield first
                first, passed = next(interactive, None), passed + (second is not None)

    def _take_turn(self, ticket: Ticket) -> None:
        del self._waiting[ticket.priority][ticket]
        if ticket.priority is Priority.BATCH or not self._waiting[Priority.BATCH]:
            self._passed = 0
        else:
            self._passed += 1
        self._run(ticket)

    def _run(self, ticket: Ticket) -> None:
        ticket.running = True
        self.running.add(ticket)


class Admission:
    """A `Line` for asyncio tasks.

    A task enters, waits on `ticket.changed` until `ticket.running`, and leaves in a `finally`, whatever became of it:
    the state is in the ticket, so a cancelled waiter loses no wake-up and keeps no place.

    Args:
        places: requests that run at once.
        max_waiting: requests that may wait.
        clock: seconds, for the advice given to those turned away.
    """

    def __init__(self, places: int, max_waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._line = Line(places, max_waiting)
        self._clock = clock
        self._typical_stay = MIN_RETRY_AFTER

    @property
    def active(self) -> int:
        """How many run."""
        return len(self._line.running)

    @property
    def queued(self) -> int:
        """How many wait."""
        return self._line.waiting

    def enter(self, priority: Priority) -> Ticket:
        """A ticket that runs or waits. Raises RouterError QUEUE_FULL."""
        ticket = Ticket(priority, admitted_at=self._clock())
        if not self._line.arrive(ticket):
            raise RouterError(
                ErrorReason.QUEUE_FULL,
                f"{self.queued} requests wait for this model already",
                metadata={"queued": str(self.queued), "max_queued": str(self._line.max_waiting)},
                retry_after=self._retry_after(),
            )
        self._tell_positions()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Gives the place back or leaves the line. Safe to call twice."""
        if ticket in self._line.running:
            stay = self._clock() - ticket.admitted_at
            self._typical_stay += 0.2 * (stay - self._typical_stay)
        for admitted in self._line.leave(ticket):
            admitted.ahead = 0
            admitted.admitted_at = self._clock()
            admitted.changed.set()
        self._tell_positions()

    def _tell_positions(self) -> None:
        for ahead, ticket in enumerate(self._line.order()):
            if ticket.ahead != ahead:
                ticket.ahead = ahead
                ticket.changed.set()

    def _retry_after(self) -> float:
        """Seconds until a place in the line is likely to come free."""
        return min(max(self._typical_stay / self._line.places, MIN_RETRY_AFTER), MAX_RETRY_AFTER)
