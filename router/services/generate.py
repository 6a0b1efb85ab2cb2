"""GenerateService: answers, whole or streamed, and token counts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from mtp_router.generate import v1

from router.dispatch import Answer, Dispatcher
from router.domain import Delta, Finished, GenerationRequest, RouterError, Started
from router.metrics import Metrics
from router.services import render
from router.services.calls import Calls, Context
from router.services.errors import reports_errors
from router.services.outbox import Outbox, filling, joined
from router.services.parse import parse_input, parse_model_name, refuse_unknown_fields
from router.services.record import Record, refused
from router.services.writes import bounded_writes

Request = v1.GenerateRequest | v1.StreamGenerateRequest | v1.CountTokensRequest


class GenerateService(v1.GenerateServiceServicer):
    """Serves GenerateService.

    Cancellation reaches a handler as one of several exceptions, by where it is suspended, so the backend is stopped
    by leaving `aclosing`, never by catching one of them.

    Args:
        dispatcher: sends requests to backends.
        calls: bounds the calls.
        metrics: takes the figures.
        slow_reader_limit: seconds that an event may wait for its reader.
        max_unread_bytes: of an answer that may wait for its reader.
    """

    def __init__(
        self, dispatcher: Dispatcher, calls: Calls, metrics: Metrics, slow_reader_limit: float, max_unread_bytes: int
    ) -> None:
        self._dispatcher = dispatcher
        self._calls = calls
        self._metrics = metrics
        self._slow_reader_limit = slow_reader_limit
        self._max_unread_bytes = max_unread_bytes

    @reports_errors
    async def Generate(self, request: v1.GenerateRequest, context: Context) -> v1.GenerateResponse:
        """Answers in one message."""
        pieces: list[Delta] = []
        async with (
            self._calls.bounded(context),
            self._answer(request) as (answer, record),
            aclosing(record.watching(answer.events)) as events,
        ):
            async for event in events:
                if isinstance(event, Started):
                    begun = render.started(answer, event)
                elif isinstance(event, Delta):
                    pieces.append(event)
                elif isinstance(event, Finished):
                    ended = render.finished(answer, event)
        return v1.GenerateResponse(started=begun, output=render.delta(joined(pieces)), finished=ended)

    @reports_errors
    async def StreamGenerate(  # type: ignore[override]  # grpc.aio also takes a coroutine that writes
        self, request: v1.StreamGenerateRequest, context: Context
    ) -> None:
        """Answers event by event."""
        outbox = Outbox(self._max_unread_bytes)
        async with (
            self._calls.bounded(context),
            self._answer(request) as (answer, record),
            filling(outbox, record.watching(answer.events)),
            bounded_writes(self._slow_reader_limit) as writes,
        ):
            while (event := await outbox.take()) is not None:
                record.merged = outbox.merged
                if isinstance(event, Delta):
                    response = v1.StreamGenerateResponse(delta=render.delta(event))
                elif isinstance(event, Started):
                    response = v1.StreamGenerateResponse(started=render.started(answer, event))
                elif isinstance(event, Finished):
                    response = v1.StreamGenerateResponse(finished=render.finished(answer, event))
                elif request.include_progress:
                    response = v1.StreamGenerateResponse(progress=render.progress(event))
                else:
                    continue
                await writes.wait(context.write(response))

    @reports_errors
    async def CountTokens(self, request: v1.CountTokensRequest, context: Context) -> v1.CountTokensResponse:
        """Counts a prompt's tokens."""
        async with self._calls.bounded(context):
            parsed = self._parse(request)
            route, count = await self._dispatcher.count_tokens(parsed)
        return v1.CountTokensResponse(
            model=route.model, prompt_tokens=count.prompt_tokens, context_length=count.context_length
        )

    def _parse(self, request: Request) -> GenerationRequest:
        refuse_unknown_fields(request)
        name = parse_model_name(request.input)
        return parse_input(request.input, self._dispatcher.catalog.resolve(name).sampling)

    @asynccontextmanager
    async def _answer(self, request: Request) -> AsyncIterator[tuple[Answer, Record]]:
        """The answer to a request; whatever ends the block is recorded."""
        try:
            answer = await self._dispatcher.generate(self._parse(request))
        except RouterError as error:
            refused(self._metrics, request.input.model, error)
            raise
        record = Record(self._metrics, answer)
        try:
            yield answer, record
        except BaseException as error:
            record.ended(error)
            raise
        record.ended(None)
