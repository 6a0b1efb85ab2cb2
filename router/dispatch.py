"""One request from name to answer: resolve the model, choose the backend, refuse what it cannot do, keep the time."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

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
    events: AsyncGenerator[Event, None]
    generation_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    clock: Clock = field(default_factory=Clock)


class Dispatcher:
    """Sends requests to backends.

    Args:
        catalog: the configured models.
        backends: by the names that the settings give them.
        now: monotonic clock in seconds.
    """

    def __init__(
        self, catalog: Catalog, backends: Mapping[str, Backend], now: Callable[[], float] = time.monotonic
    ) -> None:
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

    async def look(self, entry: ModelEntry) -> tuple[ModelEntry, Route | None, ModelState, str]:
        """The model as far as it is known, what would answer for it now, its state, and why it cannot be served."""
        try:
            served, chosen, backend = await self.find(entry.name)
        except RouterError as error:
            return entry, None, ModelState.FAILED, error.message
        known = served if served.path is None else entry
        return known, chosen, backend.model_state(served), ""

    async def generate(self, request: GenerationRequest) -> Answer:
        """Starts an answer; nothing happens until its events are consumed, and closing them stops the work.

        Raises:
            RouterError: the model is not known or cannot be served, or cannot do what the request asks.
        """
        entry, chosen, backend = await self.find(request.model)
        check_request(request, entry, backend.fields, backend.drafting(entry))
        answer = Answer(chosen, request, backend.generate(entry, request))
        answer.events = self._timed(answer, answer.events)
        return answer

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
