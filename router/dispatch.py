"""One request from name to answer: resolve the model, choose the backend, refuse what it cannot do, keep the time."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from router.backends.base import Backend
from router.catalog import Catalog, ModelEntry
from router.domain import (
    Capability,
    Delta,
    ErrorReason,
    Event,
    Finished,
    GenerationRequest,
    Loading,
    ModelState,
    Prefilling,
    Queued,
    Route,
    RouterError,
    Started,
    TokenCount,
)
from router.policy import check_request, choose_route
from router.resilience import Resilience

logger = logging.getLogger(__name__)

# Failures before the first token after which another model may answer, where the settings name one.
FALLS_BACK = (
    ErrorReason.BACKEND_UNAVAILABLE,
    ErrorReason.BACKEND_STALLED,
    ErrorReason.BACKEND_FAILED,
    ErrorReason.MODEL_LOAD_FAILED,
    ErrorReason.MODEL_NOT_FOUND,
    ErrorReason.MEMORY_BUDGET,
    ErrorReason.QUEUE_FULL,
    ErrorReason.NON_FINITE_LOGITS,
)
MIN_TIME_BUDGET = 0.001  # seconds that a fallback gets at least, to end with TIME_LIMIT in its own way


@dataclass(slots=True)
class Clock:
    """Where the time of one request went, in seconds; all zero until it happened."""

    queue: float = 0.0
    load: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


@dataclass(slots=True)
class Answer:
    """One generation: what answers, the request in force, and its clock (filled in as `events` is consumed)."""

    route: Route
    request: GenerationRequest
    events: AsyncGenerator[Event, None] = field(init=False)
    generation_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    clock: Clock = field(default_factory=Clock)


@dataclass(frozen=True, slots=True)
class Look:
    """A model as far as it is known, what would answer for it now, its state, and why it cannot be served."""

    entry: ModelEntry
    route: Route | None
    state: ModelState
    problem: str = ""
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What would answer one request."""

    entry: ModelEntry
    route: Route
    backend: Backend
    request: GenerationRequest


@dataclass(slots=True)
class _Chain:
    """The models that may still answer a request, in order, and why those before them could not."""

    request: GenerationRequest
    names: list[str]
    begin: float
    failures: dict[str, RouterError] = field(default_factory=dict)

    def failed(self, name: str, error: RouterError) -> None:
        """Notes a failure. Raises it where it is the model's own and not one that another model may make good."""
        if not self.failures and error.reason not in FALLS_BACK:
            raise error
        self.failures[name] = error
        if self.names:
            logger.warning("%s cannot answer for %s: %s", name, self.request.model, error)

    @property
    def cause(self) -> RouterError | None:
        """Why the requested model itself could not answer."""
        return next(iter(self.failures.values()), None)

    def error(self) -> RouterError:
        """The requested model's own failure, with what became of its fallbacks."""
        error = self.cause
        assert error is not None
        others = [f"{name} ({failure.reason})" for name, failure in list(self.failures.items())[1:]]
        if not others:
            return error
        tried = ", ".join(others)
        return RouterError(
            error.reason,
            f"{error.message}; nor could its fallbacks answer: {tried}",
            metadata={**error.metadata, "fallbacks": tried},
            violations=error.violations,
            retry_after=error.retry_after,
        )


class Dispatcher:
    """Sends requests to backends.

    Args:
        catalog: the configured models.
        backends: by the names that the settings give them.
        now: monotonic clock in seconds.
        resilience: stands between requests and backends that fail.
    """

    def __init__(
        self,
        catalog: Catalog,
        backends: Mapping[str, Backend],
        now: Callable[[], float] = time.monotonic,
        resilience: Resilience | None = None,
    ) -> None:
        self._resilience = resilience or Resilience()
        self.catalog = catalog
        self.backends = dict(backends)
        self._now = now

    def route(self, name: str) -> tuple[ModelEntry, Route, Backend]:
        """The model behind `name`, as it is served, and what answers for it. Raises RouterError as `choose_route`."""
        offers = {key: backend.offer() for key, backend in self.backends.items()}
        chosen, entry = choose_route(name, self.catalog.resolve(name), offers)
        return entry, chosen, self.backends[chosen.backend]

    async def find(self, name: str) -> tuple[ModelEntry, Route, Backend]:
        """Like `route`, with what the backend knows of the model beyond its files. Raises also what `describe` does."""
        entry, chosen, backend = self.route(name)
        described = await backend.describe(entry)
        if described is not entry:
            offers = {key: backend.offer() for key, backend in self.backends.items()}
            chosen, described = choose_route(name, described, offers)
        return described, chosen, backend

    async def look(self, entry: ModelEntry) -> Look:
        """A model as it stands now."""
        try:
            served, chosen, backend = await self.find(entry.name)
        except RouterError as error:
            return Look(entry, None, ModelState.FAILED, error.message)
        known = served if served.path == entry.path else entry
        return Look(known, chosen, backend.model_state(served), memory_bytes=served.memory_bytes(backend.parallel))

    async def generate(self, request: GenerationRequest) -> Answer:
        """Starts an answer; nothing happens until its events are consumed, and closing them stops the work.

        Where the model fails before its first token, the fallbacks that its settings name are tried in order;
        `Answer.route` tells what answers once `Started` was given out.

        Raises:
            RouterError: the model is not known, or cannot do what the request asks; it cannot be served, and neither
                can any of its fallbacks.
        """
        model = self.catalog.resolve(request.model)
        chain = _Chain(request, [request.model, *self.catalog.fallbacks(model)], self._now())
        plan = await self._next_plan(chain)
        answer = Answer(plan.route, request)
        answer.events = self._timed(answer, self._with_fallbacks(answer, chain, plan))
        return answer

    async def _next_plan(self, chain: _Chain) -> _Plan:
        """The first model of the chain that can take the request. Raises the first one's error where none can."""
        while chain.names:
            name = chain.names.pop(0)
            try:
                return await self._plan(chain, name)
            except RouterError as error:
                chain.failed(name, error)
        raise chain.error()

    async def _plan(self, chain: _Chain, name: str) -> _Plan:
        request = chain.request
        entry, chosen, backend = await self.find(name)
        check_request(request, entry, backend.fields, backend.drafting(entry))
        if (cause := chain.cause) is None:
            return _Plan(entry, chosen, backend, request)
        reason = f"{request.model} cannot answer: {cause.message}; its fallback {entry.name}: {chosen.reason}"
        chosen = replace(chosen, requested_model=request.model, reason=reason, fallback_cause=cause.reason)
        if request.time_budget is not None:  # what went before is spent
            left = request.time_budget - (self._now() - chain.begin)
            request = replace(request, time_budget=max(left, MIN_TIME_BUDGET))
        return _Plan(entry, chosen, backend, request)

    async def _with_fallbacks(self, answer: Answer, chain: _Chain, plan: _Plan) -> AsyncGenerator[Event, None]:
        """The events of the first plan that gets to `Started`; before it, the progress of all that were tried."""
        while True:
            started = False
            try:
                async with aclosing(self._resilience.generate(plan.backend, plan.entry, plan.request)) as events:
                    async for event in events:
                        started |= isinstance(event, Started)
                        yield event
                return
            except RouterError as error:
                if started:
                    raise
                chain.failed(plan.entry.name, error)
            plan = await self._next_plan(chain)
            answer.route = plan.route

    async def _timed(self, answer: Answer, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """Passes events on, keeping the clock and holding the backend to the order that the contract promises."""
        clock, begin = answer.clock, self._now()
        last, stage = begin, None
        allowed: tuple[type, ...] = (Queued, Loading, Prefilling, Started)
        async with aclosing(events):
            async for event in events:
                if not isinstance(event, allowed):
                    raise AssertionError(f"backend {answer.route.backend} sent {type(event).__name__} out of order")
                now = self._now()
                if stage is Queued:
                    clock.queue += now - last
                elif stage is Loading:
                    clock.load += now - last
                last, stage = now, type(event)
                clock.total = now - begin
                if isinstance(event, Started):
                    clock.first_token = now - begin
                    allowed = (Delta, Finished)
                elif isinstance(event, Finished):
                    allowed = ()
                yield event
        if allowed:
            raise RouterError(
                ErrorReason.BACKEND_FAILED,
                f"backend {answer.route.backend!r} ended the answer without saying why",
                metadata={"backend": answer.route.backend},
            )

    async def count_tokens(self, request: GenerationRequest) -> tuple[Route, TokenCount]:
        """Counts a prompt's tokens. Raises RouterError where the model cannot."""
        entry, chosen, backend = await self.find(request.model)
        rendered = GenerationRequest(request.model, request.prompt, reasoning=request.reasoning, tools=request.tools)
        check_request(rendered, entry, backend.fields, backend.drafting(entry))
        if not entry.facts.can(Capability.COUNT_TOKENS):
            raise RouterError(
                ErrorReason.CAPABILITY_UNAVAILABLE,
                f"model {entry.name!r}: its backend cannot count tokens without generating",
                metadata={"model": entry.name, "capability": Capability.COUNT_TOKENS.name},
            )
        return chosen, await backend.count_tokens(entry, request)
