"""GenerateService: answers, whole or streamed, and token counts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import grpc
from mtp_router.generate import v1

from router.dispatch import Answer, Dispatcher
from router.domain import Delta, ErrorReason, Event, Finished, GenerationRequest, RouterError, Started
from router.services import render
from router.services.calls import Calls, Context
from router.services.errors import reports_errors
from router.services.parse import parse_input, parse_model_name, refuse_unknown_fields

logger = logging.getLogger(__name__)
Request = v1.GenerateRequest | v1.StreamGenerateRequest | v1.CountTokensRequest


class GenerateService(v1.GenerateServiceServicer):
    """Serves GenerateService.

    Cancellation reaches a handler as one of several exceptions, by where it is suspended, so the backend is stopped
    by leaving `aclosing`, never by catching one of them.

    Args:
        dispatcher: sends requests to backends.
        calls: bounds the calls.
        slow_reader_limit: seconds that an event may wait for its reader.
    """

    def __init__(self, dispatcher: Dispatcher, calls: Calls, slow_reader_limit: float) -> None:
        self._dispatcher = dispatcher
        self._calls = calls
        self._slow_reader_limit = slow_reader_limit

    @reports_errors
    async def Generate(self, request: v1.GenerateRequest, context: Context) -> v1.GenerateResponse:
        """Answers in one message."""
        pieces: list[Delta] = []
        async with self._calls.bounded(context), self._answer(request) as (answer, events):
            async for event in events:
                if isinstance(event, Started):
                    begun = render.started(answer, event)
                elif isinstance(event, Delta):
                    pieces.append(event)
                elif isinstance(event, Finished):
                    ended = render.finished(answer, event)
        return v1.GenerateResponse(started=begun, output=render.delta(_joined(pieces)), finished=ended)

    @reports_errors
    async def StreamGenerate(  # type: ignore[override]  # grpc.aio also takes a coroutine that writes
        self, request: v1.StreamGenerateRequest, context: Context
    ) -> None:
        """Answers event by event."""
        async with self._calls.bounded(context), self._answer(request) as (answer, events):
            async for event in events:
                if isinstance(event, Started):
                    response = v1.StreamGenerateResponse(started=render.started(answer, event))
                elif isinstance(event, Delta):
                    response = v1.StreamGenerateResponse(delta=render.delta(event))
                elif isinstance(event, Finished):
                    response = v1.StreamGenerateResponse(finished=render.finished(answer, event))
                elif request.include_progress:
                    response = v1.StreamGenerateResponse(progress=render.progress(event))
                else:
                    continue
                await self._send(context, response)

    @reports_errors
    async def CountTokens(self, request: v1.CountTokensRequest, context: Context) -> v1.CountTokensResponse:
        """Counts a prompt's tokens."""
        async with self._calls.bounded(context):
            parsed = self._parse(request)
            route, count = await self._dispatcher.count_tokens(parsed)
        return v1.CountTokensResponse(
            model=route.model, prompt_tokens=count.prompt_tokens, context_length=count.context_length
        )

    async def _send(self, context: Context, response: v1.StreamGenerateResponse) -> None:
        """Writes one event. A caller that stops reading must not hold a backend's place until its own deadline."""
        try:
            async with asyncio.timeout(self._slow_reader_limit):
                await context.write(response)
        except TimeoutError:
            raise RouterError(
                ErrorReason.SLOW_CONSUMER,
                f"the stream was not read for {self._slow_reader_limit:g} s; the answer is incomplete",
                metadata={"slow_reader_limit": f"{self._slow_reader_limit:g}"},
            ) from None

    def _parse(self, request: Request) -> GenerationRequest:
        refuse_unknown_fields(request)
        name = parse_model_name(request.input)
        return parse_input(request.input, self._dispatcher.catalog.resolve(name).sampling)

    @asynccontextmanager
    async def _answer(self, request: Request) -> AsyncIterator[tuple[Answer, AsyncGenerator[Event, None]]]:
        """The answer to a request; whatever ends the block stops the backend, and is logged in one line."""
        answer = await self._dispatcher.generate(self._parse(request))
        outcome = "ok"
        try:
            async with aclosing(answer.events) as events:
                yield answer, events
        except RouterError as error:
            outcome = error.reason.value
            raise
        except Exception as error:
            outcome = "cancelled" if isinstance(error, grpc.aio.BaseError) else ErrorReason.INTERNAL.value
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        finally:
            logger.info(
                "generation %s model=%s backend=%s outcome=%s first_token=%.3f total=%.3f correlation_id=%s labels=%s",
                answer.generation_id,
                answer.route.model,
                answer.route.backend,
                outcome,
                answer.clock.first_token,
                answer.clock.total,
                answer.request.correlation_id or "-",
                dict(answer.request.labels) or "-",
            )


def _joined(pieces: list[Delta]) -> Delta:
    """All pieces of an answer as one."""
    counts = [piece.token_count for piece in pieces]
    return Delta(
        text="".join(piece.text for piece in pieces),
        reasoning_text="".join(piece.reasoning_text for piece in pieces),
        token_count=None if None in counts else sum(count for count in counts if count is not None),
        logprobs=tuple(item for piece in pieces for item in piece.logprobs),
        tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
    )
