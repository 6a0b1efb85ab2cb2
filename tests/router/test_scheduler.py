"""The scheduler: order, bounds, fairness, memory; and that no place and no wake-up is ever lost."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

import psutil
import pytest
from support.scripted import entry

from benchmarks.scheduler import Day
from router.backends.patience import TimeIsUpError
from router.domain import ErrorReason, Loading, Priority, Queued, RouterError
from router.lifecycle import Lifecycle, Seat, measured_footprint, nothing
from router.line import INTERACTIVE_TURNS, Line, Ticket
from router.scheduler import MAX_RETRY_AFTER, Phase, Rules, Scheduler, Terms
from router.settings import ModelSettings, SchedulerSettings

I, B = Priority.INTERACTIVE, Priority.BATCH  # noqa: E741


class Port:
    """Notes what was decided; the test says when it is done."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.measured = 0
        self.done: list[str] = []

    def now(self) -> float:
        return self.clock

    def footprint(self) -> int:
        return self.measured

    def begin_load(self, model: str) -> None:
        self.done.append(f"load {model}")

    def cancel_load(self, model: str) -> None:
        self.done.append(f"cancel {model}")

    def begin_unload(self, model: str) -> None:
        self.done.append(f"unload {model}")

    def tell(self, ticket: Ticket) -> None: ...


def scheduler(budget: int | None = 100) -> tuple[Scheduler, Port]:
    port = Port()
    return Scheduler(Rules(budget, {I: 10.0, B: 60.0}, turn=5.0), port), port


def arrive(core: Scheduler, model: str, priority: Priority = I, hold: bool = False, **terms: object) -> Ticket:
    ticket = Ticket(priority, hold)
    core.arrive(model, Terms(**{"places": 1, "max_waiting": 10, "memory": 60, **terms}), ticket)  # type: ignore[arg-type]
    return ticket


def test_interactive_runs_before_batch_and_each_in_order_of_arrival() -> None:
    line = Line()
    tickets = [Ticket(priority) for priority in (B, I, B, I)]
    for ticket in tickets:
        line.join(ticket)
    assert [tickets.index(line.take()) for _ in range(4)] == [1, 3, 0, 2]


def test_every_fifth_place_goes_to_batch_under_endless_interactive_arrivals() -> None:
    line = Line()
    batch = [Ticket(B) for _ in range(3)]
    for ticket in batch:
        line.join(ticket)
    turns = []
    for _ in range(40):
        line.join(Ticket(I))
        line.join(Ticket(I))
        promised = next(line.order())
        turns.append(line.take())
        assert turns[-1] is promised
    for n, ticket in enumerate(batch):
        assert turns.index(ticket) + 1 == (INTERACTIVE_TURNS + 1) * (n + 1)


def test_the_line_is_bounded_and_a_free_place_is_no_waiting() -> None:
    core, _ = scheduler()
    running = [arrive(core, "elsewhere", loads=False, places=2, max_waiting=1) for _ in range(3)]
    assert [ticket.running for ticket in running] == [True, True, False]
    refused = arrive(core, "elsewhere", loads=False, places=2, max_waiting=1).refused
    assert refused is not None
    assert refused.reason is ErrorReason.QUEUE_FULL
    core.leave(running[0])
    assert running[2].running
    first = arrive(core, "other", loads=False, max_waiting=0)
    assert first.running
    assert arrive(core, "other", loads=False, max_waiting=0).refused


def test_a_full_line_says_when_to_come_back() -> None:
    core, port = scheduler()
    for _ in range(50):
        ticket = arrive(core, "elsewhere", loads=False, max_waiting=0)
        port.clock += 20.0
        core.leave(ticket)
    arrive(core, "elsewhere", loads=False, max_waiting=0)
    refused = arrive(core, "elsewhere", loads=False, max_waiting=0).refused
    assert refused is not None
    assert refused.retry_after == pytest.approx(20.0, abs=1.0)
    assert refused.retry_after is not None
    assert refused.retry_after <= MAX_RETRY_AFTER
    assert refused.metadata["max_queued"] == "0"


def test_the_least_recently_used_idle_model_makes_room_and_no_other() -> None:
    core, port = scheduler()
    for second, name in enumerate(("a", "b", "c")):
        port.clock = float(second)
        ticket = arrive(core, name, memory=30)
        core.loaded(name)
        core.leave(ticket)
    port.clock = 10.0
    core.leave(arrive(core, "a", memory=30))  # used again
    waiting = arrive(core, "d", memory=30)
    assert port.done == ["load a", "load b", "load c", "unload b"]
    core.unloaded("b")
    assert port.done[-1] == "load d"
    core.loaded("d")
    assert waiting.running
    assert core.held() == 90


def test_a_busy_model_keeps_its_memory_until_another_is_overdue_and_then_takes_no_more_requests() -> None:
    core, port = scheduler()
    running = arrive(core, "a")
    core.loaded("a")
    other = arrive(core, "b", B)
    for _ in range(20):  # requests for what is in memory go first, and never leave it idle
        port.clock += 2.9
        following = arrive(core, "a")
        core.leave(running)
        assert following.running
        running = following
    assert port.done == ["load a"]
    port.clock = 60.0
    core.tick()
    late = arrive(core, "a")
    core.leave(running)
    assert not late.running
    assert port.done == ["load a", "unload a"]
    core.unloaded("a")
    core.loaded("b")
    assert other.running
    core.leave(other)
    assert port.done == ["load a", "unload a", "load b", "unload b"]  # idle, and another waits


def test_nothing_slips_past_who_is_overdue() -> None:
    core, port = scheduler()
    running = arrive(core, "a", memory=30)
    core.loaded("a")
    port.clock = 1.0
    large = arrive(core, "large", memory=90)
    small = arrive(core, "small", memory=20)
    assert port.done == ["load a", "load small"]  # there is room beside
    core.loaded("small")
    core.leave(small)
    port.clock = 20.0
    tiny = arrive(core, "tiny", memory=20)
    assert port.done == ["load a", "load small"]  # there would be room beside
    core.leave(running)
    assert port.done[2:] == ["unload small", "unload a"]
    core.unloaded("a")
    core.unloaded("small")
    assert port.done[4:] == ["load large"]
    core.loaded("large")
    assert large.running
    assert not tiny.running


def test_who_left_causes_no_load_and_no_eviction() -> None:
    core, port = scheduler()
    gone = arrive(core, "a")
    assert port.done == ["load a"]
    core.leave(gone)
    assert port.done == ["load a", "cancel a"]
    returned = arrive(core, "a")
    assert port.done == ["load a", "cancel a"]  # its memory is not free yet
    core.leave(returned)
    core.unloaded("a")
    assert port.done == ["load a", "cancel a"]
    busy = arrive(core, "a")
    core.loaded("a")
    left = arrive(core, "b")
    core.leave(left)
    core.leave(busy)
    port.clock = 1000.0
    core.tick()
    assert port.done == ["load a", "cancel a", "load a"]


def test_an_idle_model_goes_when_its_time_is_up_and_a_pinned_one_stays() -> None:
    core, port = scheduler()
    kept, brief = arrive(core, "kept", memory=10, pinned=True), arrive(core, "brief", memory=10, keep_alive=30.0)
    core.loaded("kept")
    core.loaded("brief")
    core.leave(kept)
    port.clock = 5.0
    core.leave(brief)
    assert core.next_tick() == 35.0
    port.clock = 35.0
    core.tick()
    assert port.done[-1] == "unload brief"
    assert arrive(core, "large", memory=95).refused is not None  # it would need the pinned one's memory
    assert core.phase("kept") is Phase.READY


def test_a_model_that_can_never_fit_is_refused_and_what_is_measured_counts() -> None:
    core, port = scheduler()
    refused = arrive(core, "giant", memory=101).refused
    assert refused is not None
    assert refused.reason is ErrorReason.MEMORY_BUDGET
    ticket = arrive(core, "a", memory=40)
    core.loaded("a")
    core.leave(ticket)
    port.measured = 70  # more than was reckoned with
    arrive(core, "b", memory=40)
    assert port.done == ["load a", "unload a"]


def test_a_hold_keeps_a_model_without_taking_a_place() -> None:
    core, port = scheduler()
    hold = arrive(core, "a", hold=True)
    request = arrive(core, "a")
    core.loaded("a")
    assert hold.running
    assert request.running
    core.leave(request)
    arrive(core, "b")
    assert port.done == ["load a"]
    core.leave(hold)
    assert port.done == ["load a", "unload a"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_days(seed: int) -> None:
    """`make scheduler` runs a longer one."""
    day = Day(seed)
    day.run(3000)
    assert day.counts["served"] > 300
    assert day.port.told["loads given up"] > 10
    assert day.scheduler.evictions > 50


# --------------------------------------------------------------------------------------------------------------------
# At work


def elsewhere(places: int = 1, max_waiting: int = 10) -> Seat:
    return Seat("elsewhere", Terms(places, max_waiting, loads=False), nothing, nothing)


class Loaded:
    """A model whose load ends when the test says so."""

    def __init__(self, key: str = "model", **terms: object) -> None:
        self.go, self.error, self.log = asyncio.Event(), None, []  # type: ignore[var-annotated]
        self.fraction = None
        terms = {"places": 1, "max_waiting": 4, "memory": 10, **terms}
        self.seat = Seat(key, Terms(**terms), self.load, self.unload, lambda: self.fraction)  # type: ignore[arg-type]

    async def load(self) -> None:
        self.log.append("load")
        await self.go.wait()
        if self.error is not None:
            raise self.error
        self.log.append("loaded")

    async def unload(self) -> None:
        self.log.append("unload")


async def events_of(lifecycle: Lifecycle, seat: Seat, deadline: float | None = None) -> list[object]:
    ticket = lifecycle.enter(seat, I)
    try:
        return [event async for event in lifecycle.wait(ticket, deadline)]
    finally:
        lifecycle.leave(ticket)


async def until(condition) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_waiters_hear_their_position_and_their_turn() -> None:
    lifecycle = Lifecycle()
    first, second, third = (lifecycle.enter(elsewhere(), I) for _ in range(3))
    assert (first.running, second.ahead, third.ahead) == (True, 0, 1)
    async with aclosing(lifecycle.wait(third, None)) as events:
        assert await anext(events) == Queued(1)
        lifecycle.leave(second)
        assert await anext(events) == Queued(0)
        lifecycle.leave(first)
        assert [event async for event in events] == []
    assert third.running


async def test_cancelled_tasks_lose_no_place_and_no_wake_up() -> None:
    lifecycle, chooser, finished = Lifecycle(), random.Random(7), 0
    seat = elsewhere(2, 1000)

    async def request() -> None:
        nonlocal finished
        ticket = lifecycle.enter(seat, chooser.choice([I, B]))
        try:
            async for _ in lifecycle.wait(ticket, None):
                pass
            assert lifecycle.counts(seat.key)[0] <= 2
            await asyncio.sleep(0)
            finished += 1
        finally:
            lifecycle.leave(ticket)

    tasks = [asyncio.create_task(request()) for _ in range(1000)]
    for _ in range(300):
        await asyncio.sleep(0)
        chooser.choice(tasks).cancel()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert finished > 0
    assert lifecycle.counts(seat.key) == (0, 0)


async def test_one_load_serves_all_and_a_failed_one_refuses_all() -> None:
    lifecycle, model = Lifecycle(), Loaded()
    model.error = RouterError(ErrorReason.MODEL_LOAD_FAILED, "planted")
    tasks = [asyncio.create_task(events_of(lifecycle, model.seat)) for _ in range(3)]
    await until(lambda: model.log)
    model.go.set()
    failures = await asyncio.gather(*tasks, return_exceptions=True)
    assert [getattr(failure, "reason", None) for failure in failures] == [ErrorReason.MODEL_LOAD_FAILED] * 3
    model.error = None
    assert await events_of(lifecycle, model.seat) == [Loading()]
    assert model.log == ["load", "load", "loaded"]


async def test_a_load_is_given_up_with_its_last_waiter_and_only_then() -> None:
    lifecycle, model = Lifecycle(), Loaded()
    first, second = (asyncio.create_task(events_of(lifecycle, model.seat)) for _ in range(2))
    await until(lambda: model.log)
    first.cancel()
    await asyncio.sleep(0.01)
    assert lifecycle.phase("model") is Phase.LOADING
    second.cancel()
    await until(lambda: lifecycle.phase("model") is Phase.COLD)
    assert model.log == ["load", "unload"]
    model.go.set()
    assert await events_of(lifecycle, model.seat) == [Loading()]


async def test_time_runs_out_while_waiting_and_while_loading() -> None:
    lifecycle, model = Lifecycle(), Loaded()
    now = asyncio.get_running_loop().time()
    with pytest.raises(TimeIsUpError):
        await events_of(lifecycle, model.seat, now + 0.02)
    running = lifecycle.enter(elsewhere(), I)
    with pytest.raises(TimeIsUpError):
        await events_of(lifecycle, elsewhere(), now + 0.04)
    lifecycle.leave(running)
    await until(lambda: lifecycle.phase("model") is Phase.COLD)


async def test_an_idle_model_is_dropped_by_the_clock_alone() -> None:
    lifecycle, model = Lifecycle(), Loaded(keep_alive=0.03)
    model.go.set()
    await events_of(lifecycle, model.seat)
    assert lifecycle.phase("model") is Phase.READY
    await until(lambda: "unload" in model.log)


async def test_preload_and_unload() -> None:
    lifecycle, model = Lifecycle(), Loaded()
    model.fraction = 0.25
    loading = lifecycle.preload(model.seat)
    assert await anext(loading) == Loading(0.25)
    with pytest.raises(RouterError) as caught:
        await lifecycle.unload("model", "model", force=False)
    assert caught.value.reason is ErrorReason.CAPABILITY_UNAVAILABLE
    model.go.set()
    assert [step async for step in loading] == []
    ticket = lifecycle.enter(model.seat, I)
    assert ticket.running
    with pytest.raises(RouterError):
        await lifecycle.unload("model", "model", force=False)
    await lifecycle.unload("model", "model", force=True)
    assert lifecycle.phase("model") is Phase.COLD
    lifecycle.leave(ticket)
    await lifecycle.unload("model", "model", force=False)  # nothing to do
    assert model.log == ["load", "loaded", "unload"]


async def test_models_are_swapped_within_the_budget() -> None:
    settings = SchedulerSettings(memory_budget=15)  # type: ignore[arg-type]
    lifecycle, first, second = Lifecycle(settings, lambda: 0), Loaded("first"), Loaded("second")
    first.go.set()
    second.go.set()
    for _ in range(3):
        await events_of(lifecycle, first.seat)
        await events_of(lifecycle, second.seat)
    assert lifecycle.scheduler.evictions == 5
    assert first.log == ["load", "loaded", "unload"] * 3
    await lifecycle.close()


def test_terms_come_from_the_settings() -> None:
    lifecycle = Lifecycle(SchedulerSettings(keep_alive=7.0))
    assert lifecycle.terms(entry(), 2, 3) == Terms(2, 3, memory=1000, keep_alive=7.0)
    assert lifecycle.terms(entry(keep_alive=1.0, pin=True), 1, 0) == Terms(1, 0, "", 1000, keep_alive=1.0, pinned=True)
    assert measured_footprint() > 2**20
    with pytest.raises(ValueError, match="another server keeps"):
        ModelSettings(ollama="smol", pin=True)
    assert SchedulerSettings().memory_budget == psutil.virtual_memory().total * 7 // 10
