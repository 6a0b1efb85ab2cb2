"""Who waits for one model, and in which order they run.

The rule: INTERACTIVE before BATCH, each in order of arrival, but of every five places that come free while both wait,
the fifth goes to BATCH: a BATCH request with n BATCH requests in front of it waits for at most 5 (n + 1) places.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from router.domain import Priority, RouterError

INTERACTIVE_TURNS = 4  # that may pass a waiting BATCH request before it has its turn


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's stay, from its arrival to its leaving. Compared by identity.

    Attributes:
        hold: it only needs the model in memory, such as a preload, and takes no place.
        running: it has its place, or its model.
        ahead: waiting requests that will run before it, as things stand.
        loading: its model is being loaded.
        refused: why it will never run.
        changed: set with every change of the others, for whoever waits.
    """

    priority: Priority
    hold: bool = False
    model: str = ""
    running: bool = False
    ahead: int = 0
    loading: bool = False
    refused: RouterError | None = None
    arrived: float = 0.0
    admitted: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Line:
    """The waiting tickets of one model."""

    def __init__(self) -> None:
        # Dicts keep order of arrival and drop from the middle in constant time.
        self._waiting: dict[Priority, dict[Ticket, None]] = {Priority.INTERACTIVE: {}, Priority.BATCH: {}}
        self._passed = 0  # INTERACTIVE turns since a BATCH request began to wait or had its turn

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def join(self, ticket: Ticket) -> None:
        """Lines the ticket up."""
        self._waiting[ticket.priority][ticket] = None

    def leave(self, ticket: Ticket) -> bool:
        """Takes a ticket out; False if it was not there."""
        if ticket not in self._waiting[ticket.priority]:
            return False
        del self._waiting[ticket.priority][ticket]
        if not self._waiting[Priority.BATCH]:
            self._passed = 0
        return True

    def heads(self) -> Iterator[Ticket]:
        """The oldest of each priority."""
        for tickets in self._waiting.values():
            if tickets:
                yield next(iter(tickets))

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

    def take(self) -> Ticket:
        """The ticket whose turn it is; raises StopIteration where none waits."""
        ticket = next(self.order())
        passed = self._passed
        self.leave(ticket)
        batch_waits = bool(self._waiting[Priority.BATCH])
        self._passed = passed + 1 if ticket.priority is Priority.INTERACTIVE and batch_waits else 0
        return ticket
