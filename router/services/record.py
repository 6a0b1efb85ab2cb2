"""What is kept of each request: figures, and one line in the log, as one JSON object."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc

from router.dispatch import Answer
from router.domain import Delta, ErrorReason, Event, Finished, RouterError
from router.metrics import Metrics

logger = logging.getLogger("router.requests")

MAX_NAME = 128  # characters of a model's name that a caller gave


class Record:
    """One request, from its arrival to its end.

    Args:
        metrics: of the server.
        answer: to be recorded.
    """

    def __init__(self, metrics: Metrics, answer: Answer) -> None:
        self._metrics = metrics
        self._answer = answer
        self._begin = time.monotonic()
        self._pieces = metrics.pieces()
        self._finished: Finished | None = None
        self.merged = 0

    async def watching(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """Passes the events on."""
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Delta):
                    self._pieces.came(self._who, event, time.monotonic())
                elif isinstance(event, Finished):
                    self._finished = event
                yield event

    def ended(self, error: BaseException | None) -> None:
        """Writes everything down; `error` is what the request ended with."""
        outcome, clock = _outcome(error), self._answer.clock
        who, seconds = self._who, time.monotonic() - self._begin
        self._metrics.ended(who, outcome, seconds, clock.queue, clock.load, clock.first_token)
        if self._finished is not None:
            self._metrics.finished(who, self._finished)
        self._metrics.merged(self.merged)
        logger.info("%s", json.dumps(self._line(outcome, seconds), ensure_ascii=False))

    @property
    def _who(self) -> tuple[str, str]:
        return self._answer.route.model, self._answer.route.backend

    def _line(self, outcome: str, seconds: float) -> dict[str, object]:
        answer, request, finished = self._answer, self._answer.request, self._finished
        line: dict[str, object] = {
            "event": "request",
            "generation_id": answer.generation_id,
            "model": answer.route.model,
            "backend": answer.route.backend,
            "outcome": outcome,
            "priority": request.priority.name,
            "queue": round(answer.clock.queue, 4),
            "load": round(answer.clock.load, 4),
            "first_token": round(answer.clock.first_token, 4),
            "total": round(seconds, 4),
        }
        if answer.route.requested_model != answer.route.model:
            line["requested_model"] = answer.route.requested_model
        if finished is not None:
            usage, drafts = finished.usage, finished.speculation
            line |= {"finish": finished.reason.name, "prompt_tokens": usage.prompt_tokens}
            line |= {"output_tokens": usage.output_tokens, "cached_tokens": usage.cached_tokens}
            line |= {"drafted": drafts.drafted_tokens, "accepted": drafts.accepted_tokens}
        if self.merged:
            line["merged_deltas"] = self.merged
        if request.correlation_id:
            line["correlation_id"] = request.correlation_id
        if request.labels:
            line["labels"] = dict(request.labels)
        return line


def refused(metrics: Metrics, model: str, error: RouterError) -> None:
    """A request that came to no backend. Its model is no label of the figures: callers could make up any number."""
    metrics.refused(error.reason.value)
    line = {"event": "request", "model": model[:MAX_NAME], "outcome": error.reason.value}
    logger.info("%s", json.dumps(line, ensure_ascii=False))


def _outcome(error: BaseException | None) -> str:
    match error:
        case None:
            return "ok"
        case RouterError():
            return error.reason.value
        case grpc.aio.BaseError() | asyncio.CancelledError() | GeneratorExit():
            return "cancelled"
        case _:
            return ErrorReason.INTERNAL.value
