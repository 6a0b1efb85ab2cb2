"""Drives the scheduler through random days and holds it to its word: `make scheduler`.

Everything is virtual: requests come, leave and end, loads succeed, fail and are cancelled, memory is measured higher
than reckoned, models are dropped, lost and pinned, in an order drawn from a seed. After every step the invariants are
checked; in the end the arrivals stop, and whoever still waits must be served.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from router.domain import ErrorReason, Priority, RouterError
from router.line import INTERACTIVE_TURNS, Ticket
from router.scheduler import Model, Phase, Rules, Scheduler, Terms

BUDGET = 100
PATIENCE = {Priority.INTERACTIVE: 10.0, Priority.BATCH: 40.0}
TURN = 10.0
LONGEST_REQUEST, LONGEST_LOAD, LONGEST_UNLOAD, STEP = 8.0, 5.0, 2.0, 4.0
MODELS = {
    "small": Terms(places=2, max_waiting=4, memory=20),
    "middle": Terms(places=1, max_waiting=6, memory=45, keep_alive=30.0),
    "large": Terms(places=3, max_waiting=3, memory=80),
    "pinned": Terms(places=2, max_waiting=2, memory=15, pinned=True),
    "twin-a": Terms(places=2, max_waiting=3, memory=30, lane="engine"),
    "twin-b": Terms(places=2, max_waiting=3, memory=30, lane="engine", keep_alive=5.0),
    "elsewhere": Terms(places=1, max_waiting=3, loads=False),
    "giant": Terms(places=1, max_waiting=1, memory=BUDGET + 1),
}


def longest_wait() -> float:
    """Seconds that nobody may wait longer: the patience, then a turn for every five of its line."""
    a_turn = TURN + LONGEST_REQUEST + LONGEST_UNLOAD + LONGEST_LOAD + 4 * STEP
    turns = max((INTERACTIVE_TURNS + 1) * terms.max_waiting // terms.places for terms in MODELS.values())
    return max(PATIENCE.values()) + turns * a_turn


@dataclass
class Port:
    """The effects as a world of its own: what was begun, and when it ends."""

    chooser: random.Random
    clock: float = 0.0
    overhead: int = 0  # measured beyond what is reckoned
    loads: dict[str, float] = field(default_factory=dict)
    unloads: dict[str, float] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)
    scheduler: Scheduler = field(init=False)
    dropping: bool = False  # somebody asked for what is dropped now

    def now(self) -> float:
        return self.clock

    def footprint(self) -> int:
        return self.scheduler.held() + self.overhead

    def begin_load(self, model: str) -> None:
        self.told["loads"] += 1
        assert any(not t.running for t in present(self.scheduler.models[model])), f"{model} is loaded for nobody"
        self.loads[model] = self.clock + self.chooser.uniform(0, LONGEST_LOAD)

    def cancel_load(self, model: str) -> None:
        self.told["loads given up"] += 1
        del self.loads[model]
        self.unloads[model] = self.clock + self.chooser.uniform(0, LONGEST_UNLOAD)

    def begin_unload(self, name: str) -> None:
        self.told["unloads"] += 1
        model = self.scheduler.models[name]
        if not self.dropping:
            assert not model.running, f"{name} is dropped while it is busy"
            assert not any(ticket.running for ticket in model.holds), f"{name} is dropped while it is held"
            assert not model.terms.pinned, f"{name} is dropped though it is pinned"
            keep = model.terms.keep_alive
            expired = keep is not None and self.clock >= model.used_at + keep
            others = (m for m in self.scheduler.models.values() if m is not model and m.phase is Phase.COLD)
            assert expired or any(other.wanted for other in others), f"{name} is dropped for nobody"
        self.unloads[name] = self.clock + self.chooser.uniform(0, LONGEST_UNLOAD)

    def tell(self, ticket: Ticket) -> None:
        self.told["told"] += 1


def present(model: Model) -> list[Ticket]:
    """Everybody who is there for a model."""
    return [*model.running, *model.holds, *model.line.order()]


class Day:
    """One run of a seed."""

    def __init__(self, seed: int) -> None:
        self.chooser = random.Random(seed)
        self.port = Port(self.chooser)
        self.scheduler = self.port.scheduler = Scheduler(Rules(BUDGET, PATIENCE, TURN), self.port)
        self.tickets: dict[Ticket, float] = {}  # present, and when they end once they run
        self.longest = {Priority.INTERACTIVE: 0.0, Priority.BATCH: 0.0}
        self.counts: Counter[str] = Counter()
        self.limit = longest_wait()

    def run(self, steps: int) -> None:
        """That many steps, then no more arrivals until everybody has left."""
        for _ in range(steps):
            self.step()
            self.check()
        end = self.port.clock + self.limit
        while self.tickets:
            self.pass_time()
            self.check()
            assert self.port.clock < end, f"{len(self.tickets)} are never served"

    def step(self) -> None:
        """Something happens."""
        arrivals = 200 if self.port.clock % 600 > 300 else 40  # rush hours
        events = ("arrive", "leave", "time", "drop", "lose", "measure")
        match self.chooser.choices(events, (arrivals, 14, 44, 0.6, 0.4, 1))[0]:
            case "arrive":
                self.arrive()
            case "leave" if self.tickets:
                ticket = self.chooser.choice(list(self.tickets))
                self.counts["left early"] += not ticket.running
                self.leave(ticket)
            case "drop":
                self.drop()
            case "lose":
                name = self.chooser.choice(list(MODELS))
                if self.scheduler.phase(name) is Phase.READY and MODELS[name].loads:
                    self.scheduler.lost(name)
                    for ticket in [t for t in self.tickets if t.model == name and t.running]:
                        self.leave(ticket)
            case "measure":
                self.port.overhead = self.chooser.choice([0, 0, 0, 3, 12])
            case _:
                self.pass_time()

    def arrive(self) -> None:
        name = self.chooser.choices(list(MODELS), (8, 6, 4, 3, 6, 6, 3, 1))[0]
        priority = self.chooser.choice([Priority.INTERACTIVE, Priority.INTERACTIVE, Priority.BATCH])
        ticket = Ticket(priority, hold=self.chooser.random() < 0.05)
        self.scheduler.arrive(name, MODELS[name], ticket)
        self.counts["arrived"] += 1
        if ticket.refused is None:
            self.tickets[ticket] = 0.0
        else:
            assert ticket.refused.reason in (ErrorReason.QUEUE_FULL, ErrorReason.MEMORY_BUDGET)
            self.counts[f"refused: {ticket.refused.reason.value}"] += 1

    def leave(self, ticket: Ticket) -> None:
        del self.tickets[ticket]
        self.scheduler.leave(ticket)
        self.scheduler.leave(ticket)  # twice changes nothing

    def drop(self) -> None:
        name, self.port.dropping = self.chooser.choice(list(MODELS)), True
        force = self.chooser.random() < 0.5
        model = self.scheduler.models.get(name)
        busy = model is not None and MODELS[name].loads and (not model.idle or model.phase is Phase.LOADING)
        busy = busy and model is not None and model.phase not in (Phase.COLD, Phase.UNLOADING)
        assert self.scheduler.drop(name, force=force) == (force or not busy)
        self.port.dropping = False
        if force:
            for ticket in [t for t in self.tickets if t.model == name and t.running and MODELS[name].loads]:
                self.leave(ticket)

    def pass_time(self) -> None:
        """A while passes; what was due by then happens."""
        port = self.port
        port.clock += self.chooser.uniform(0, STEP)
        for name in [name for name, due in port.unloads.items() if due <= port.clock]:
            del port.unloads[name]
            self.scheduler.unloaded(name)
        for name in [name for name, due in port.loads.items() if due <= port.clock]:
            if port.loads.pop(name, None) is None:  # given up a moment ago
                continue
            if self.chooser.random() < 0.05:
                self.scheduler.load_failed(name, RouterError(ErrorReason.MODEL_LOAD_FAILED, "planted"))
            else:
                self.scheduler.loaded(name)
        self.notice()
        for ticket in [t for t, end in self.tickets.items() if t.running and end <= port.clock]:
            self.counts["served"] += 1
            self.leave(ticket)
        due = self.scheduler.next_tick()
        assert due is None or due > port.clock
        self.scheduler.tick()
        self.notice()

    def notice(self) -> None:
        """Requests that began to run get an end; those that were refused leave."""
        for ticket, end in list(self.tickets.items()):
            if ticket.refused is not None:
                self.counts[f"refused: {ticket.refused.reason.value}"] += 1
                self.leave(ticket)
            elif ticket.running and not end:
                self.tickets[ticket] = self.port.clock + self.chooser.uniform(0.1, LONGEST_REQUEST)

    def check(self) -> None:
        """The invariants."""
        self.notice()
        models = self.scheduler.models
        held = sum(model.terms.memory for model in models.values() if model.phase is not Phase.COLD)
        assert held <= BUDGET, f"{held} of {BUDGET} are held"
        lanes: Counter[str] = Counter()
        for model in models.values():
            lanes[model.terms.lane or model.name] += len(model.running)
            assert len(model.line) <= model.terms.max_waiting + model.terms.places
            assert model.phase is not Phase.LOADING or model.wanted, f"{model.name} is loaded for nobody"
            assert not model.running or model.phase is not Phase.LOADING
            for ticket in present(model):
                assert ticket in self.tickets, "somebody is there who has left"
                wait = (ticket.admitted if ticket.running else self.port.clock) - ticket.arrived
                self.longest[ticket.priority] = max(self.longest[ticket.priority], wait)
                assert wait <= self.limit, f"{ticket.priority.name} waits for {wait:.0f} s"
            free = model.terms.places - lanes[model.terms.lane or model.name]
            if model.phase is Phase.READY and not model.yields and not model.terms.lane:
                assert not model.line or free <= 0, f"{model.name} has places, and requests wait"
        for name, running in lanes.items():
            places = next(m.terms.places for m in models.values() if name in (m.terms.lane, m.name))
            assert running <= places, f"{running} run in {name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    day, began = Day(arguments.seed), time.perf_counter()
    try:
        day.run(arguments.steps)
    except AssertionError as broken:
        print(f"seed {arguments.seed}, {day.port.clock:.0f} s into the day: {broken}", file=sys.stderr)
        return 1
    print(f"{arguments.steps} steps of seed {arguments.seed} in {time.perf_counter() - began:.1f} s: nothing is broken")
    for what, count in sorted((day.counts + day.port.told).items()):
        print(f"  {what:<24}{count:>9}")
    print(f"  {'evictions':<24}{day.scheduler.evictions:>9}")
    for priority, seconds in day.longest.items():
        print(f"  longest wait {priority.name:<11}{seconds:>9.1f} s (none may pass {day.limit:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
