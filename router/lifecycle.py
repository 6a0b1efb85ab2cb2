"""The scheduler at work: requests as tasks, loads and unloads as coroutines of the backends, time from the loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil

from router.backends.patience import TimeIsUpError
from router.catalog import ModelEntry
from router.domain import ErrorReason, Loading, Priority, Progress, Queued, RouterError
from router.line import Ticket
from router.scheduler import Phase, Rules, Scheduler, Terms
from router.settings import SchedulerSettings

logger = logging.getLogger(__name__)

INTERNAL = "internal error; see the server's log"
FOOTPRINT_TTL = 0.5  # seconds that a measurement holds: it walks through the processes of the system
PROGRESS_INTERVAL = 0.5  # seconds between reports of a load whose fraction is known


def measured_footprint() -> int:
    """Bytes of memory that this process and its children hold, as the system counts them."""
    total = 0
    process = psutil.Process()
    for item in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has just ended
            total += item.memory_info().rss
    return total


@dataclass(frozen=True, slots=True)
class Seat:
    """A model as a backend offers it.

    Attributes:
        key: tells it from the models of other backends.
        terms: for the scheduler.
        load: brings it into memory; raises RouterError. Being cancelled gives the load up.
        unload: ends with its memory free, also where a load was given up.
        fraction: how far a load is, None where that is not known.
    """

    key: str
    terms: Terms
    load: Callable[[], Awaitable[None]]
    unload: Callable[[], Awaitable[None]]
    fraction: Callable[[], float | None] = lambda: None


async def nothing() -> None:
    """Load and unload of a model that another server keeps."""


class Lifecycle:
    """Admits requests to models, and has models loaded and dropped for them (see `router.scheduler`).

    A task enters, goes through `wait`, and leaves in a `finally`, whatever became of it: the state is in the ticket, so
    that a cancelled waiter loses no wake-up and keeps no place.

    Args:
        settings: `[scheduler]`.
        footprint: bytes that the router and its children take.
    """

    def __init__(
        self, settings: SchedulerSettings | None = None, footprint: Callable[[], int] = measured_footprint
    ) -> None:
        self._settings = settings or SchedulerSettings(memory_budget=None)
        rules = Rules(
            self._settings.memory_budget,
            {
                Priority.INTERACTIVE: self._settings.interactive_patience,
                Priority.BATCH: self._settings.batch_patience,
            },
            self._settings.turn,
        )
        self.scheduler = Scheduler(rules, self)
        self.loads = 0
        self._footprint = footprint
        self._measured, self._measured_until = 0, 0.0
        self._seats: dict[str, Seat] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._unloads: dict[str, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def terms(self, model: ModelEntry, parallel: int, max_waiting: int, lane: str = "") -> Terms:
        """The terms of a model that the router loads."""
        keep = model.settings.keep_alive
        return Terms(
            parallel,
            max_waiting,
            lane,
            memory=model.memory_bytes(parallel) or model.facts.size_bytes or 0,
            keep_alive=self._settings.keep_alive if keep is None else keep,
            pinned=model.settings.pin,
        )

    # For requests

    def enter(self, seat: Seat, priority: Priority, *, hold: bool = False) -> Ticket:
        """A ticket that runs or waits; with `hold` it only keeps the model in memory. Raises QUEUE_FULL."""
        known = self._seats.get(seat.key)
        if known is None or self.scheduler.phase(seat.key) is Phase.COLD:
            self._seats[seat.key] = seat
        ticket = Ticket(priority, hold)
        self.scheduler.arrive(seat.key, seat.terms, ticket)
        self._wind()
        if ticket.refused is not None:
            raise ticket.refused
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Gives the place back or leaves the line. Safe to call twice."""
        self.scheduler.leave(ticket)
        self._wind()

    async def wait(self, ticket: Ticket, deadline: float | None) -> AsyncGenerator[Progress, None]:
        """Progress until the ticket runs. Raises what it was refused with, and TimeIsUpError at `deadline`."""
        seat = self._seats[ticket.model]
        while not ticket.running:
            if ticket.refused is not None:
                raise ticket.refused.with_traceback(None)
            ticket.changed.clear()
            fraction = seat.fraction() if ticket.loading else None
            yield Loading(fraction) if ticket.loading else Queued(ticket.ahead)
            try:
                async with asyncio.timeout_at(deadline):
                    if fraction is None:
                        await ticket.changed.wait()
                    else:
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(PROGRESS_INTERVAL):
                                await ticket.changed.wait()
            except TimeoutError:
                raise TimeIsUpError from None

    @asynccontextmanager
    async def held(self, seat: Seat) -> AsyncGenerator[None, None]:
        """The model stays in memory in the block; it is loaded first if it must. Raises RouterError."""
        ticket = self.enter(seat, Priority.INTERACTIVE, hold=True)
        try:
            async for _ in self.wait(ticket, None):
                pass
            yield
        finally:
            self.leave(ticket)

    async def preload(self, seat: Seat) -> AsyncGenerator[Loading, None]:
        """Progress until the model is in memory. Leaving gives the load up if nobody else waits for it."""
        ticket = self.enter(seat, Priority.INTERACTIVE, hold=True)
        try:
            async for step in self.wait(ticket, None):
                yield step if isinstance(step, Loading) else Loading()
        finally:
            self.leave(ticket)

    async def unload(self, key: str, name: str, *, force: bool) -> None:
        """Has a model dropped and waits for that, though the caller may leave.

        Raises:
            RouterError: CAPABILITY_UNAVAILABLE where it is in use or being loaded, and not `force`.
        """
        if not self.scheduler.drop(key, force=force):
            running, waiting = self.counts(key)
            in_use = f"{running + waiting} requests use it" if running + waiting else "it is being loaded"
            raise RouterError(
                ErrorReason.CAPABILITY_UNAVAILABLE,
                f"model {name!r} cannot be unloaded: {in_use}",
                metadata={"model": name, "requests": str(running + waiting)},
            )
        self._wind()
        if (task := self._unloads.get(key)) is not None:
            await asyncio.shield(task)

    def lost(self, key: str) -> None:
        """A model went away with its engine."""
        if (loading := self._loads.pop(key, None)) is not None:
            loading.cancel()
        self.scheduler.lost(key)
        self._wind()

    def counts(self, key: str) -> tuple[int, int]:
        """Requests that run and that wait for a model."""
        model = self.scheduler.models.get(key)
        return (len(model.running), len(model.line)) if model else (0, 0)

    def idle(self, key: str) -> bool:
        """Whether nobody uses the model, waits for it or holds it."""
        model = self.scheduler.models.get(key)
        return model is None or model.idle

    def phase(self, key: str) -> Phase:
        """Where a model stands."""
        return self.scheduler.phase(key)

    async def close(self) -> None:
        """Ends every load and waits for what is being dropped. Safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._loads.values():
            task.cancel()
        await asyncio.gather(*self._loads.values(), *self._unloads.values(), return_exceptions=True)

    # What the scheduler decides

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def footprint(self) -> int:
        """See `measured_footprint`; looked at anew when a model came or went, and now and then."""
        now = self.now()
        if now >= self._measured_until:
            self._measured, self._measured_until = self._footprint(), now + FOOTPRINT_TTL
        return self._measured

    def begin_load(self, model: str) -> None:
        """Starts the backend's load."""
        self.loads += 1
        task = asyncio.create_task(self._load(self._seats[model]), name=f"load {model}")
        self._loads[model] = task
        task.add_done_callback(lambda done: self._forget(self._loads, model, done))

    def cancel_load(self, model: str) -> None:
        """Gives the backend's load up."""
        logger.info("nobody waits for %s any more: its load is given up", model)
        loading = self._loads[model]
        loading.cancel()
        self._start_unload(model, loading)

    def begin_unload(self, model: str) -> None:
        """Starts the backend's unload."""
        self._start_unload(model, None)

    def _start_unload(self, model: str, loading: asyncio.Task[None] | None) -> None:
        task = asyncio.create_task(self._unload(self._seats[model], loading), name=f"unload {model}")
        self._unloads[model] = task
        task.add_done_callback(lambda done: self._forget(self._unloads, model, done))

    async def _load(self, seat: Seat) -> None:
        logger.info("loading %s (%d bytes)", seat.key, seat.terms.memory)
        try:
            await seat.load()
            self._measured_until = 0.0
        except RouterError as error:
            logger.warning("%s could not be loaded: %s", seat.key, error)
            self.scheduler.load_failed(seat.key, error)
        except Exception:
            logger.exception("unexpected failure while %s was loaded", seat.key)
            self.scheduler.load_failed(seat.key, RouterError(ErrorReason.INTERNAL, INTERNAL))
        else:
            self.scheduler.loaded(seat.key)
        self._wind()

    async def _unload(self, seat: Seat, loading: asyncio.Task[None] | None) -> None:
        if loading is not None:
            await asyncio.wait({loading})
        try:
            await seat.unload()
            logger.info("unloaded %s", seat.key)
        except Exception:
            logger.exception("%s could not be unloaded", seat.key)
        self._measured_until = 0.0
        self.scheduler.unloaded(seat.key)
        self._wind()

    def _forget(self, tasks: dict[str, asyncio.Task[None]], model: str, done: asyncio.Task[None]) -> None:
        if tasks.get(model) is done:
            del tasks[model]

    def tell(self, ticket: Ticket) -> None:
        """Wakes whoever waits with it."""
        ticket.changed.set()

    def _wind(self) -> None:
        """Sets the timer for the next decision that time alone brings about."""
        due = self.scheduler.next_tick()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, due - self.now()) + 1e-3, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.scheduler.tick()
        self._wind()
