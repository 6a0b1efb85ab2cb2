"""The decisions (see the package): what happens, what is asked, what follows, and how it is reckoned."""

from __future__ import annotations

import math

from router.domain import ErrorReason, RouterError
from router.line import Ticket
from router.scheduler.models import MAX_RETRY_AFTER, MIN_RETRY_AFTER, Effects, Model, Phase, Rules, Terms


class Scheduler:
    """The decisions.

    Args:
        rules: of the service.
        effects: what they are told to.
    """

    def __init__(self, rules: Rules, effects: Effects) -> None:
        self.rules = rules
        self.models: dict[str, Model] = {}
        self.evictions = 0
        self._effects = effects

    # What happens

    def arrive(self, name: str, terms: Terms, ticket: Ticket) -> None:
        """A request comes: it runs, waits, or is refused with QUEUE_FULL or MEMORY_BUDGET, which the ticket tells."""
        model = self._known(name, terms)
        ticket.model, ticket.arrived = name, self._effects.now()
        if ticket.hold:
            model.holds[ticket] = None
        elif len(model.line) >= terms.max_waiting + max(0, terms.places - self._running_in_lane(model)):
            ticket.refused = self._full(model)
            return
        else:
            model.line.join(ticket)
        model.moved = True
        self._settle()

    def leave(self, ticket: Ticket) -> None:
        """A request goes, whatever became of it. Safe to call twice."""
        model = self.models.get(ticket.model)
        if model is None:
            return
        now = self._effects.now()
        if ticket in model.running:
            model.running.discard(ticket)
            model.stay += 0.2 * (now - ticket.admitted - model.stay)
        elif ticket in model.holds:
            del model.holds[ticket]
        elif model.line.leave(ticket):
            model.moved = True
        else:
            return
        if ticket.running:
            model.used_at = now
        self._settle()

    def loaded(self, name: str) -> None:
        """A load has ended well."""
        model = self.models.get(name)
        if model is not None and model.phase is Phase.LOADING:
            model.ready_at = model.used_at = self._effects.now()
            self._become(model, Phase.READY)
            self._settle()

    def load_failed(self, name: str, error: RouterError) -> None:
        """A load has ended badly: all who wait for it are refused with `error`."""
        model = self.models.get(name)
        if model is not None and model.phase is Phase.LOADING:
            self._become(model, Phase.COLD)
            self._refuse(model, error)
            self._settle()

    def unloaded(self, name: str) -> None:
        """A model's memory is free."""
        self._become(self.models[name], Phase.COLD)
        self._settle()

    def lost(self, name: str) -> None:
        """A model went away by itself."""
        model = self.models.get(name)
        if model is not None and model.phase in (Phase.READY, Phase.LOADING):
            self._become(model, Phase.COLD)
            self._settle()

    def drop(self, name: str, *, force: bool) -> bool:
        """Somebody wants a model dropped. False where it is in use and not `force`."""
        model = self.models.get(name)
        if model is None or not model.terms.loads or model.phase in (Phase.COLD, Phase.UNLOADING):
            return True
        if not force and (model.phase is Phase.LOADING or not model.idle):
            return False
        self._give_up(model)
        self._settle()
        return True

    def tick(self) -> None:
        """Time has passed (see `next_tick`)."""
        self._settle()

    def next_tick(self) -> float | None:
        """When a decision may change by itself; None: only when something happens."""
        now, times = self._effects.now(), []
        impatient = False
        for model in self.models.values():
            if model.evictable and model.idle and model.terms.keep_alive is not None:
                times.append(model.used_at + model.terms.keep_alive)
            if model.phase is Phase.COLD and self.rules.budget is not None:
                times += [ticket.arrived + self.rules.patience[ticket.priority] for ticket in model.waiters()]
                impatient = impatient or self._overdue(model, now)
        if impatient:
            busy = [model for model in self.models.values() if model.phase is Phase.READY]
            times += [model.ready_at + self.rules.turn for model in busy]
        return min((time for time in times if time > now), default=None)

    # What is asked

    def phase(self, name: str) -> Phase:
        """Where the model stands."""
        return self.models[name].phase if name in self.models else Phase.COLD

    def held(self) -> int:
        """Bytes of the budget in use."""
        return sum(model.terms.memory for model in self.models.values() if model.phase is not Phase.COLD)

    # What is decided

    def _settle(self) -> None:
        now = self._effects.now()
        for model in self.models.values():
            if model.phase is Phase.LOADING and not model.wanted:
                self._give_up(model)
        wanted = [model for model in self.models.values() if model.phase is Phase.COLD and model.wanted]
        wanted.sort(key=lambda model: self._urgency(model, now))
        free = self._free() if wanted else math.inf
        self._choose_yields(wanted, free, now)
        self._admit(now)
        self._make_room(wanted, free, now)
        for model in list(self.models.values()):
            keep = model.terms.keep_alive
            if keep is not None and model.evictable and model.idle and now >= model.used_at + keep:
                self._give_up(model)
            if model.moved:
                self._tell_positions(model)
            if model.idle and model.phase is Phase.COLD:
                del self.models[model.name]

    def _admit(self, now: float) -> None:
        for model in self.models.values():
            if model.phase is Phase.READY and not model.yields:
                for ticket in model.holds:
                    if not ticket.running:
                        self._run(ticket, now)
        lanes: dict[str, list[Model]] = {}
        for model in self.models.values():
            if model.line and model.phase is Phase.READY and not model.yields:
                lanes.setdefault(model.terms.lane or f"model {model.name}", []).append(model)
        for ready in lanes.values():
            free = ready[0].terms.places - self._running_in_lane(ready[0])
            for _ in range(free):
                open_lines = [model for model in ready if model.line]
                if not open_lines:
                    break
                model = min(open_lines, key=lambda model: self._urgency(model, now))
                ticket = model.line.take()
                model.running.add(ticket)
                model.moved = True
                self._run(ticket, now)

    def _run(self, ticket: Ticket, now: float) -> None:
        ticket.running, ticket.admitted, ticket.ahead, ticket.loading = True, now, 0, False
        self._effects.tell(ticket)

    def _choose_yields(self, wanted: list[Model], free: float, now: float) -> None:
        """Has busy models make room for the first that is overdue, if dropping idle ones does not."""
        for model in self.models.values():
            model.yields = False
        first = next(iter(wanted), None)
        if first is None or not self._overdue(first, now):
            return
        short = first.terms.memory - free - self._coming()
        short -= sum(model.terms.memory for model in self.models.values() if model.evictable)
        busy = [m for m in self.models.values() if m.phase is Phase.READY and m.terms.loads and not m.evictable]
        for model in sorted(busy, key=lambda model: model.ready_at):
            if short > 0 and not model.terms.pinned:
                model.yields = now >= model.ready_at + self.rules.turn
                short -= model.terms.memory

    def _make_room(self, wanted: list[Model], free: float, now: float) -> None:
        """Loads what fits, and drops idle models for what would."""
        total = free + self._coming()  # once everything that is being dropped is gone
        idle = sorted((m for m in self.models.values() if m.evictable), key=lambda model: model.used_at)
        for model in wanted:
            need = model.terms.memory
            if need > self._most_for():
                self._refuse(model, self._too_big(model))
                continue
            if need <= free:
                self._become(model, Phase.LOADING)
                self._effects.begin_load(model.name)
                free, total = free - need, total - need
                continue
            victims: list[Model] = []
            room = total
            while room < need and len(victims) < len(idle):
                victims.append(idle[len(victims)])
                room += victims[-1].terms.memory
            going = self._coming() + sum(victim.terms.memory for victim in victims)
            if self.held() == going + self._pinned():
                room = max(room, self._most_for())  # nothing else is left that could go
            if room >= need:
                for victim in victims:
                    self.evictions += 1
                    self._give_up(victim)
                del idle[: len(victims)]
                total = room - need  # what comes free is spoken for
                free = min(free, total)
            elif self._overdue(model, now):
                break

    def _give_up(self, model: Model) -> None:
        """Drops a model, or ends its load."""
        loading = model.phase is Phase.LOADING
        self._become(model, Phase.UNLOADING)
        (self._effects.cancel_load if loading else self._effects.begin_unload)(model.name)

    def _refuse(self, model: Model, error: RouterError) -> None:
        for ticket in [*model.line.order(), *(ticket for ticket in model.holds if not ticket.running)]:
            model.line.leave(ticket)
            model.holds.pop(ticket, None)
            ticket.refused = error
            self._effects.tell(ticket)

    def _become(self, model: Model, phase: Phase) -> None:
        model.phase, model.yields = phase, False
        model.moved = True

    def _tell_positions(self, model: Model) -> None:
        model.moved = False
        loading = model.phase is Phase.LOADING
        waiting = [*model.line.order(), *(ticket for ticket in model.holds if not ticket.running)]
        for ahead, ticket in enumerate(waiting):
            if (ticket.ahead, ticket.loading) != (ahead, loading):
                ticket.ahead, ticket.loading = ahead, loading
                self._effects.tell(ticket)

    # How it is reckoned

    def _known(self, name: str, terms: Terms) -> Model:
        model = self.models.get(name)
        if model is None:
            model = self.models[name] = Model(name, terms, Phase.COLD if terms.loads else Phase.READY)
        elif model.phase is Phase.COLD:
            model.terms = terms
        return model

    def _running_in_lane(self, model: Model) -> int:
        lane = model.terms.lane
        if not lane:
            return len(model.running)
        return sum(len(other.running) for other in self.models.values() if other.terms.lane == lane)

    def _overdue(self, model: Model, now: float) -> bool:
        return any(now >= ticket.arrived + self.rules.patience[ticket.priority] for ticket in model.waiters())

    def _urgency(self, model: Model, now: float) -> tuple[bool, int, float]:
        """Smaller is more urgent."""
        patience = self.rules.patience
        return min(
            (False, 0, ticket.arrived)
            if now >= ticket.arrived + patience[ticket.priority]
            else (True, ticket.priority.value, ticket.arrived)
            for ticket in model.waiters()
        )

    def _free(self) -> float:
        """Bytes that a load may take now. What the system measures counts where it is more than was reckoned with."""
        if self.rules.budget is None:
            return math.inf
        held = self.held()
        # With nothing in memory something must be able to load, whatever the process itself takes.
        return self.rules.budget - (max(held, self._effects.footprint()) if held else 0)

    def _coming(self) -> int:
        return sum(model.terms.memory for model in self.models.values() if model.phase is Phase.UNLOADING)

    def _pinned(self) -> int:
        """Bytes of what will stay."""
        models = (model for model in self.models.values() if model.terms.pinned)
        return sum(model.terms.memory for model in models if model.phase in (Phase.LOADING, Phase.READY))

    def _most_for(self) -> float:
        """Bytes that a model could have with everything gone that can go."""
        if self.rules.budget is None:
            return math.inf
        pinned = self._pinned()
        return self.rules.budget - (pinned + max(0, self._effects.footprint() - self.held()) if pinned else 0)

    def _full(self, model: Model) -> RouterError:
        queued = len(model.line)
        return RouterError(
            ErrorReason.QUEUE_FULL,
            f"{queued} requests wait for this model already",
            metadata={"queued": str(queued), "max_queued": str(model.terms.max_waiting)},
            retry_after=min(max(model.stay / model.terms.places, MIN_RETRY_AFTER), MAX_RETRY_AFTER),
        )

    def _too_big(self, model: Model) -> RouterError:
        need, most = model.terms.memory, max(0, int(self._most_for()))
        return RouterError(
            ErrorReason.MEMORY_BUDGET,
            f"the model takes {need / 2**30:.2f} GiB of memory and can have {most / 2**30:.2f} GiB",
            metadata={"memory_bytes": str(need), "available_bytes": str(most)},
        )
