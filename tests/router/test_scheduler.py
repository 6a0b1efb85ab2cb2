"""Admission: order, bounds, fairness, and that no place is ever lost."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain import ErrorReason, Priority, RouterError
from router.scheduler import INTERACTIVE_TURNS, MAX_RETRY_AFTER, Admission, Line, Ticket

I, B = Priority.INTERACTIVE, Priority.BATCH  # noqa: E741


def arrivals(line: Line, priorities: list[Priority]) -> list[Ticket]:
    tickets = [Ticket(priority) for priority in priorities]
    assert all(line.arrive(ticket) for ticket in tickets)
    return tickets


def served(line: Line, first: Ticket, tickets: list[Ticket]) -> list[int]:
    """Order in which the waiting tickets run when each in turn leaves."""
    order = []
    leaving = first
    while admitted := line.leave(leaving):
        (leaving,) = admitted
        order.append(tickets.index(leaving))
    return order


def test_interactive_runs_before_batch_and_each_in_order_of_arrival() -> None:
    line = Line(places=1, max_waiting=10)
    running, *waiting = arrivals(line, [B, B, I, B, I])
    assert served(line, running, waiting) == [1, 3, 0, 2]


def test_every_fifth_place_goes_to_batch() -> None:
    line = Line(places=1, max_waiting=100)
    running, *waiting = arrivals(line, [I, B, B, *[I] * 12])
    order = served(line, running, waiting)
    assert [position for position, i in enumerate(order) if waiting[i].priority is B] == [4, 9]


def test_batch_waits_for_a_bounded_number_of_turns_under_endless_interactive_arrivals() -> None:
    line = Line(places=1, max_waiting=100)
    running, *batch = arrivals(line, [I, B, B, B])
    turns = []
    for _ in range(40):
        arrivals(line, [I, I])
        (running,) = line.leave(running)
        turns.append(running)
    for n, ticket in enumerate(batch):
        assert turns.index(ticket) + 1 <= (INTERACTIVE_TURNS + 1) * (n + 1)


def test_the_line_is_bounded() -> None:
    line = Line(places=2, max_waiting=1)
    tickets = arrivals(line, [I, I, I])
    assert not line.arrive(Ticket(I))
    line.leave(tickets[2])
    assert line.arrive(Ticket(B))


def test_zero_waiting_turns_away_at_once_and_still_serves() -> None:
    line = Line(places=1, max_waiting=0)
    (running,) = arrivals(line, [I])
    assert not line.arrive(Ticket(I))
    assert line.leave(running) == []
    assert line.arrive(Ticket(I))


@given(st.lists(st.one_of(st.sampled_from([I, B]), st.integers(0, 30)), max_size=120), st.integers(1, 4))
def test_any_arrivals_and_departures_keep_the_line_consistent(steps: list[Priority | int], places: int) -> None:
    line = Line(places, max_waiting=8)
    present: list[Ticket] = []
    for step in steps:
        if isinstance(step, Priority):
            ticket = Ticket(step)
            full = line.waiting >= 8 and len(line.running) >= places
            assert line.arrive(ticket) is not full
            if not full:
                present.append(ticket)
        elif present:
            gone = present.pop(step % len(present))
            promised = list(line.order())
            admitted = line.leave(gone)
            assert admitted == [ticket for ticket in promised if ticket is not gone][: len(admitted)]
            assert line.leave(gone) == []  # leaving twice changes nothing
        assert len(line.running) == min(places, len(present))
        assert line.waiting == len(present) - len(line.running)
        assert {t for t in present if t.running} == line.running
        assert len(list(line.order())) == line.waiting


def test_a_full_line_says_when_to_come_back() -> None:
    now = 0.0
    admission = Admission(places=1, max_waiting=0, clock=lambda: now)
    for _ in range(50):
        ticket = admission.enter(I)
        now += 20.0
        admission.leave(ticket)
    admission.enter(I)
    with pytest.raises(RouterError) as caught:
        admission.enter(I)
    assert caught.value.reason is ErrorReason.QUEUE_FULL
    assert caught.value.retry_after == pytest.approx(20.0, abs=1.0)
    assert caught.value.retry_after <= MAX_RETRY_AFTER
    assert caught.value.metadata["max_queued"] == "0"


async def test_waiters_hear_their_position_and_their_turn() -> None:
    admission = Admission(places=1, max_waiting=10)
    first, second, third = (admission.enter(I) for _ in range(3))
    assert (first.running, second.ahead, third.ahead) == (True, 0, 1)
    third.changed.clear()
    admission.leave(second)
    await asyncio.wait_for(third.changed.wait(), 1)
    assert third.ahead == 0
    third.changed.clear()
    admission.leave(first)
    await asyncio.wait_for(third.changed.wait(), 1)
    assert third.running


async def test_cancelled_tasks_lose_no_place_and_no_wake_up() -> None:
    admission = Admission(places=2, max_waiting=1000)
    chooser = random.Random(7)
    finished = 0

    async def request() -> None:
        nonlocal finished
        ticket = admission.enter(chooser.choice([I, B]))
        try:
            while not ticket.running:
                ticket.changed.clear()
                await ticket.changed.wait()
            assert admission.active <= 2
            await asyncio.sleep(0)
            finished += 1
        finally:
            admission.leave(ticket)

    tasks = [asyncio.create_task(request()) for _ in range(1000)]
    for _ in range(300):
        await asyncio.sleep(0)
        chooser.choice(tasks).cancel()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert finished > 0
    assert (admission.active, admission.queued) == (0, 0)
