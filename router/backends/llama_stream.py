"""Talks to one child: an answer as a stream of events, and small questions. Every failure becomes a RouterError."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx

from router.backends.llama_answer import Answer, EventParser, broken_stream, reported_error
from router.backends.llama_process import LlamaProcess
from router.backends.patience import Patience
from router.domain import ErrorReason, Event, GenerationRequest, RouterError

CONNECT_TIMEOUT, WRITE_TIMEOUT = 5.0, 30.0
QUESTION_TIMEOUT = 30.0
MAX_ERROR_BYTES = 2**16
RETRY_AFTER = 1.0


def new_client() -> httpx.AsyncClient:
    """A client for children. No pool: llama-server closes a connection after a stream without saying so."""
    return httpx.AsyncClient(
        headers={"Connection": "close"},
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT, write=WRITE_TIMEOUT),
        trust_env=False,  # loopback goes through no proxy
        verify=False,  # and has no certificates to load
    )


async def stream_answer(
    client: httpx.AsyncClient, child: LlamaProcess, path: str, body: dict[str, Any], answer: Answer, patience: Patience
) -> AsyncGenerator[Event, None]:
    """The events of one generation. Closing the generator closes the connection, which stops the child's work.

    Raises:
        RouterError: as the child reported it; BACKEND_STALLED for silence; for a lost connection BACKEND_UNAVAILABLE
            before `Started` and BACKEND_FAILED after.
        TimeIsUpError: at the deadline.
    """
    try:
        async with contextlib.AsyncExitStack() as stack:
            async with patience.for_sign_of_life(started=False):
                request = client.stream("POST", child.address + path, json=body, headers=_headers(child))
                response = await stack.enter_async_context(request)
                if response.status_code != httpx.codes.OK:
                    raise await _refusal(response, answer.request)
            data = await stack.enter_async_context(contextlib.aclosing(_pieces(response)))
            parser = EventParser()
            while not answer.finished:
                async with patience.for_sign_of_life(answer.started):
                    piece = await anext(data, b"")
                if not piece:
                    raise connection_lost(answer.started)
                for item in parser.feed(piece):
                    for event in answer.take(item):
                        yield event
    except httpx.HTTPError:
        raise connection_lost(answer.started) from None


async def ask(
    client: httpx.AsyncClient, child: LlamaProcess, path: str, body: dict[str, Any], request: GenerationRequest
) -> dict[str, Any]:
    """The JSON object that answers a small question. Raises RouterError."""
    try:
        reply = await client.post(child.address + path, json=body, headers=_headers(child), timeout=QUESTION_TIMEOUT)
    except httpx.TimeoutException:
        raise RouterError(ErrorReason.BACKEND_STALLED, "llama.cpp did not answer in time") from None
    except httpx.HTTPError:
        raise connection_lost(started=False) from None
    content = _object(reply.content)
    if reply.status_code != httpx.codes.OK:
        raise reported_error(content.get("error"), request)
    return content


def connection_lost(started: bool) -> RouterError:
    """The error for a child that went away: before the first token another try may succeed."""
    if started:
        return RouterError(ErrorReason.BACKEND_FAILED, "llama.cpp ended in the middle of the answer")
    return RouterError(
        ErrorReason.BACKEND_UNAVAILABLE,
        "the llama.cpp process of this model cannot be reached",
        retry_after=RETRY_AFTER,
    )


def _headers(child: LlamaProcess) -> dict[str, str]:
    return {"Authorization": f"Bearer {child.api_key}"}


async def _pieces(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    async for piece in response.aiter_raw():
        yield piece


async def _refusal(response: httpx.Response, request: GenerationRequest) -> RouterError:
    content = bytearray()
    async for piece in response.aiter_raw():
        content += piece
        if len(content) > MAX_ERROR_BYTES:
            return broken_stream()
    return reported_error(_object(bytes(content)).get("error"), request)


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        raise broken_stream() from None
    if not isinstance(value, dict):
        raise broken_stream()
    return value
