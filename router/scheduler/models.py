"""What is decided about: models on their terms, the rules for all of them, and the port that decisions are told to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from router.domain import Priority
from router.line import Line, Ticket

MIN_RETRY_AFTER, MAX_RETRY_AFTER = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a model is served.

    Attributes:
        places: requests that run at once in its lane.
        max_waiting: requests that may wait for it.
        lane: models of one lane share the places; "" is a lane of its own.
        memory: bytes that it takes while it is in memory.
        loads: whether the router loads it; a model that another server keeps is always ready.
        keep_alive: seconds that it stays after its last request; None: until its memory is needed.
        pinned: it stays once it is loaded.
    """

    places: int
    max_waiting: int
    lane: str = ""
    memory: int = 0
    loads: bool = True
    keep_alive: float | None = None
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for all models.

    Attributes:
        budget: bytes for all models in memory; None: no limit.
        patience: seconds that a request waits before busy models have to make room for its own.
        turn: seconds that a model serves before it has to make room.
    """

    budget: int | None = None
    patience: Mapping[Priority, float] = field(
        default_factory=lambda: {Priority.INTERACTIVE: 10.0, Priority.BATCH: 60.0}
    )
    turn: float = 10.0


class Effects(Protocol):
    """What the decisions are told to. Nothing here may call the scheduler back at once."""

    def now(self) -> float:
        """Seconds of a monotonic clock."""

    def footprint(self) -> int:
        """Bytes that the router and its children take, as the system measures them."""

    def begin_load(self, model: str) -> None:
        """Begins to load; `loaded` or `load_failed` follows."""

    def cancel_load(self, model: str) -> None:
        """Gives a load up; `unloaded` follows when its memory is free again."""

    def begin_unload(self, model: str) -> None:
        """Drops a model; `unloaded` follows when its memory is free again."""

    def tell(self, ticket: Ticket) -> None:
        """The ticket has changed."""


class Phase(Enum):
    """Where a model stands."""

    COLD = "cold"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"


@dataclass(eq=False, slots=True)
class Model:
    """A model that was asked for. Times are of the port's clock."""

    name: str
    terms: Terms
    phase: Phase
    line: Line = field(default_factory=Line)
    running: set[Ticket] = field(default_factory=set)
    holds: dict[Ticket, None] = field(default_factory=dict)  # waiting and held
    ready_at: float = 0.0
    used_at: float = 0.0
    yields: bool = False  # takes no more requests, to make room for another
    stay: float = MIN_RETRY_AFTER  # a typical request's
    moved: bool = False  # the positions in its line must be told anew

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for it."""
        return bool(self.line) or any(not ticket.running for ticket in self.holds)

    @property
    def idle(self) -> bool:
        """Whether nobody needs it."""
        return not (self.running or self.holds or self.line)

    @property
    def busy(self) -> bool:
        """Whether somebody uses it now."""
        return bool(self.running) or any(ticket.running for ticket in self.holds)

    @property
    def evictable(self) -> bool:
        """Whether it may be dropped for another."""
        droppable = self.terms.loads and self.phase is Phase.READY and not self.terms.pinned
        return droppable and not self.busy and (self.yields or self.idle)

    def waiters(self) -> Iterator[Ticket]:
        """Who may be the most urgent."""
        yield from self.line.heads()
        yield from (ticket for ticket in self.holds if not ticket.running)
