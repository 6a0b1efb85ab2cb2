"""Talks to one child: an answer as a stream of events, and small questions. Every failure becomes a RouterError."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import httpx

from router.backends.llama_answer import Answer, EventParser, broken_stream, reported_error
from router.backends.llama_request import chat_body
from router.backends.one_shot import OneShot
from router.backends.patience import Patience
from router.domain import ErrorReason, Event, GenerationRequest, MessagesPrompt, RouterError, TokensPrompt

CONNECT_TIMEOUT, WRITE_TIMEOUT = 5.0, 30.0
QUESTION_TIMEOUT = 30.0
MAX_ERROR_BYTES = 2**16
RETRY_AFTER = 1.0


class Endpoint(Protocol):
    """Where a llama-server answers: base URL of its routes, and the key that they ask for ("" for none)."""

    @property
    def address(self) -> str: ...

    @property
    def api_key(self) -> str: ...


def new_client(
    *, connect_timeout: float = CONNECT_TIMEOUT, verify: bool = False, socket: str | None = None
) -> httpx.AsyncClient:
    """A client for llama-servers.

    Args:
        verify: check certificates; loopback has none to load.
        socket: path of a UNIX socket to connect to, whatever the address.
    """
    return httpx.AsyncClient(
        headers={"Connection": "close"},
        transport=OneShot(httpx.create_ssl_context(verify=verify, trust_env=False), socket),
        timeout=httpx.Timeout(None, connect=connect_timeout, write=WRITE_TIMEOUT),
        trust_env=False,  # no proxies
        follow_redirects=False,
    )


async def stream_answer(
    client: httpx.AsyncClient, child: Endpoint, path: str, body: dict[str, Any], answer: Answer, patience: Patience
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
    client: httpx.AsyncClient,
    child: Endpoint,
    path: str,
    body: dict[str, Any] | None,
    request: GenerationRequest | None,
) -> dict[str, Any]:
    """The JSON object that answers a small question, by GET where there is no body. Raises RouterError."""
    method = "GET" if body is None else "POST"
    try:
        reply = await client.request(
            method, child.address + path, json=body, headers=_headers(child), timeout=QUESTION_TIMEOUT
        )
    except httpx.TimeoutException:
        raise RouterError(ErrorReason.BACKEND_STALLED, "llama.cpp did not answer in time") from None
    except httpx.HTTPError:
        raise connection_lost(started=False) from None
    if reply.status_code != httpx.codes.OK:
        raise _status_error(reply.status_code, reply.content, request)
    return _object(reply.content)


async def count_prompt(client: httpx.AsyncClient, child: Endpoint, request: GenerationRequest) -> int:
    """Tokens of the request's prompt, by llama.cpp's own template and tokenizer. Raises RouterError."""
    prompt = request.prompt
    if isinstance(prompt, TokensPrompt):
        return len(prompt.ids)
    if isinstance(prompt, MessagesPrompt):
        rendered = await ask(client, child, "/apply-template", chat_body(request), request)
        text = str(rendered.get("prompt", ""))
    else:
        text = prompt.text
    body = {"content": text, "add_special": True, "parse_special": True}
    return len((await ask(client, child, "/tokenize", body, request)).get("tokens", []))


def connection_lost(started: bool) -> RouterError:
    """The error for a child that went away: before the first token another try may succeed."""
    if started:
        return RouterError(ErrorReason.BACKEND_FAILED, "llama.cpp ended in the middle of the answer")
    return RouterError(
        ErrorReason.BACKEND_UNAVAILABLE,
        "the llama.cpp that serves this model cannot be reached",
        retry_after=RETRY_AFTER,
    )


def _headers(child: Endpoint) -> dict[str, str]:
    return {"Authorization": f"Bearer {child.api_key}"} if child.api_key else {}


async def _pieces(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    async for piece in response.aiter_raw():
        yield piece


async def _refusal(response: httpx.Response, request: GenerationRequest) -> RouterError:
    content = bytearray()
    async for piece in response.aiter_raw():
        content += piece
        if len(content) > MAX_ERROR_BYTES:
            return broken_stream()
    return _status_error(response.status_code, bytes(content), request)


def _status_error(status: int, content: bytes, request: GenerationRequest | None) -> RouterError:
    """The error for a reply that is not OK."""
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return RouterError(ErrorReason.BACKEND_UNAVAILABLE, "llama.cpp wants a key that the router does not have")
    if 300 <= status < 400:
        problem = "something at the address of llama.cpp sends requests elsewhere"
        return RouterError(ErrorReason.BACKEND_UNAVAILABLE, problem)
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return RouterError(ErrorReason.QUEUE_FULL, "llama.cpp takes no more requests now", retry_after=RETRY_AFTER)
    try:
        return reported_error(_object(content).get("error"), request)
    except RouterError as unreadable:
        return unreadable


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        raise broken_stream() from None
    if not isinstance(value, dict):
        raise broken_stream()
    return value
