"""The protocol with llama-server: bodies, the event stream, and replies that a healthy llama.cpp does not send."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.generation import GREEDY, counting

from router.backends.llama_answer import Answer, EventParser
from router.backends.llama_process import LlamaProcess
from router.backends.llama_request import CHAT_PATH, COMPLETION_PATH, Limits, generation_body
from router.backends.llama_stream import new_client, stream_answer
from router.backends.patience import Patience, TimeIsUpError
from router.domain import (
    Delta,
    DraftSource,
    ErrorReason,
    Event,
    Finished,
    Message,
    MessagesPrompt,
    Role,
    RouterError,
    Sampling,
    Started,
    Stop,
    ToolCall,
)

LIMITS = Limits(context_length=512, vocabulary_size=1000)
TIMINGS = {"cache_n": 1, "prompt_n": 2, "prompt_ms": 3.0, "predicted_n": 1, "predicted_ms": 4.0}
TOKEN = {"content": "a", "stop": False, "timings": TIMINGS}
LAST = {"content": "", "stop": True, "stop_type": "eos", "tokens_predicted": 2, "timings": TIMINGS | {"predicted_n": 2}}

Serve = Callable[..., Any]


# --------------------------------------------------------------------------------------------------------------------
# Bodies


def test_every_sampler_value_is_sent_and_in_the_routers_order() -> None:
    sampling = Sampling(0.7, 0.8, 40, 0.05, 1.1, 0.2, 0.3, {5: -1.5})
    path, body = generation_body(
        counting(sampling=sampling, stop=Stop(9, ("x",), ignore_end_of_generation=True)), 77, LIMITS
    )
    assert path == COMPLETION_PATH
    assert body["samplers"] == ["penalties", "top_k", "top_p", "min_p", "temperature"]
    sent = {key: body[key] for key in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")}
    assert sent == {"temperature": 0.7, "top_p": 0.8, "top_k": 40, "min_p": 0.05, "repeat_penalty": 1.1}
    assert (body["presence_penalty"], body["frequency_penalty"], body["repeat_last_n"]) == (0.2, 0.3, 512)
    assert (body["logit_bias"], body["seed"], body["n_predict"]) == ([[5, -1.5]], 77, 9)
    assert (body["stop"], body["ignore_eos"], body["stream"], body["mirostat"]) == (["x"], True, True, 0)


def test_messages_keep_thoughts_and_calls() -> None:
    messages = (
        Message(Role.SYSTEM, "be brief"),
        Message(Role.ASSISTANT, "", "hm", (ToolCall("1", "f", "{}"),)),
        Message(Role.TOOL, "4", tool_call_id="1"),
    )
    path, body = generation_body(replace(counting(), prompt=MessagesPrompt(messages)), None, LIMITS)
    assert path == CHAT_PATH
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert body["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    assert "chat_template_kwargs" not in body  # the template's own default


# --------------------------------------------------------------------------------------------------------------------
# Events

OBJECTS = st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers(), max_size=3), max_size=6)


@given(OBJECTS, st.data())
def test_events_are_the_same_however_the_bytes_arrive(objects: list[dict[str, Any]], data: st.DataObject) -> None:
    stream = (
        b"".join(b"data: " + json.dumps(item).encode() + b"\n\n: ping\n\n" for item in objects) + b"data: [DONE]\n\n"
    )
    parser, seen, at = EventParser(), [], 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream) - at))
        seen += list(parser.feed(stream[at : at + size]))
        at += size
    assert seen == objects


@pytest.mark.parametrize("line", [b"data: {\n", b"data: [1]\n", b"data: " + b"[" * 100_000 + b"\n", b"data: \xff\n"])
def test_what_is_not_a_json_object_breaks_the_stream(line: bytes) -> None:
    with pytest.raises(RouterError) as caught:
        list(EventParser().feed(line))
    assert caught.value.reason is ErrorReason.BACKEND_FAILED


def test_an_endless_line_breaks_the_stream() -> None:
    parser = EventParser(max_bytes=1000)
    with pytest.raises(RouterError):
        for _ in range(20):
            list(parser.feed(b"x" * 100))


KEYS = ["choices", "delta", "content", "stop", "timings", "error", "stop_type", "prompt_progress", "__verbose"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "finish_reason"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*KEYS, "finish_reason"]), JSON, max_size=4))
def test_any_json_gives_events_or_a_router_error(value: dict[str, Any]) -> None:
    answer = Answer(counting(), None, DraftSource.NONE)
    with contextlib.suppress(RouterError):
        list(answer.take(value))


def test_an_unknown_way_to_stop_is_not_guessed_at() -> None:
    answer = Answer(counting(), None, DraftSource.NONE)
    with pytest.raises(RouterError):
        list(answer.take(LAST | {"stop_type": "novel"}))


# --------------------------------------------------------------------------------------------------------------------
# Replies that only a broken server gives, over a real socket


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Answers every connection with the given bytes, then closes it, or hangs."""
    servers = []

    async def start(*pieces: bytes, hang: bool = False) -> LlamaProcess:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            if hang:
                await reader.read()
                await reader.read()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        servers.append(server)
        port = server.sockets[0].getsockname()[1]
        return cast(LlamaProcess, SimpleNamespace(address=f"http://127.0.0.1:{port}", api_key="k"))

    yield start
    for server in servers:
        server.close()


def reply(status: str, *events: dict[str, Any]) -> bytes:
    head = f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n".encode()
    if not status.startswith("200"):
        return head + b"".join(json.dumps(event).encode() for event in events)
    return head + b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


PATIENT = Patience(5.0, 5.0, None, "llama.cpp")


async def outcome(child: LlamaProcess, patience: Patience = PATIENT) -> tuple[list[Event], RouterError | None]:
    request = counting(sampling=GREEDY)
    answer = Answer(request, None, DraftSource.NONE)
    path, body = generation_body(request, None, LIMITS)
    events: list[Event] = []
    async with new_client() as client:
        try:
            async for event in stream_answer(client, child, path, body, answer, patience):
                events.append(event)
        except RouterError as error:
            return events, error
    return events, None


async def test_a_whole_stream_is_read(serve: Serve) -> None:
    events, error = await outcome(await serve(reply("200 OK", TOKEN, LAST)))
    assert error is None
    assert [type(event) for event in events] == [Started, Delta, Finished]


CASES = {
    "stream without an end": (reply("200 OK", TOKEN), ErrorReason.BACKEND_FAILED),
    "nothing at all": (reply("200 OK"), ErrorReason.BACKEND_UNAVAILABLE),
    "closed at once": (b"", ErrorReason.BACKEND_UNAVAILABLE),
    "no HTTP": (b"hello\r\n\r\n", ErrorReason.BACKEND_UNAVAILABLE),
    "loading": (
        reply("503 x", {"error": {"type": "unavailable_error", "message": "secret"}}),
        ErrorReason.BACKEND_UNAVAILABLE,
    ),
    "refused": (
        reply("400 x", {"error": {"type": "invalid_request_error", "message": "secret"}}),
        ErrorReason.INVALID_REQUEST,
    ),
    "failure": (reply("500 x", {"error": {"type": "server_error", "message": "secret"}}), ErrorReason.BACKEND_FAILED),
    "error that is no object": (reply("500 x", {"error": "secret"}), ErrorReason.BACKEND_FAILED),
    "error page": (b"HTTP/1.1 404 x\r\nConnection: close\r\n\r\n<html>secret", ErrorReason.BACKEND_FAILED),
    "error in the middle": (
        reply("200 OK", TOKEN, {"error": {"type": "server_error", "message": "secret"}}),
        ErrorReason.BACKEND_FAILED,
    ),
    "too long by nobody knows what": (
        reply("400 x", {"error": {"type": "exceed_context_size_error"}}),
        ErrorReason.BACKEND_FAILED,
    ),
    "too long": (
        reply("400 x", {"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 8}}),
        ErrorReason.PROMPT_TOO_LONG,
    ),
}


@pytest.mark.parametrize(("content", "reason"), CASES.values(), ids=CASES.keys())
async def test_every_failure_has_its_reason_and_shows_no_foreign_text(
    serve: Serve, content: bytes, reason: ErrorReason
) -> None:
    _, error = await outcome(await serve(content))
    assert error is not None
    assert error.reason is reason
    assert "secret" not in error.message + str(error.metadata)


async def test_a_port_that_nobody_listens_on_makes_the_backend_unavailable() -> None:
    _, error = await outcome(cast(LlamaProcess, SimpleNamespace(address="http://127.0.0.1:9", api_key="k")))
    assert error is not None
    assert error.reason is ErrorReason.BACKEND_UNAVAILABLE
    assert error.retry_after is not None


@pytest.mark.parametrize("content", [b"", reply("200 OK"), reply("200 OK", TOKEN)])
async def test_silence_stalls(serve: Serve, content: bytes) -> None:
    _, error = await outcome(await serve(content, hang=True), Patience(0.1, 0.1, None, "llama.cpp"))
    assert error is not None
    assert error.reason is ErrorReason.BACKEND_STALLED


async def test_the_deadline_wins_over_patience(serve: Serve) -> None:
    child = await serve(reply("200 OK", TOKEN), hang=True)
    with pytest.raises(TimeIsUpError):
        await outcome(child, Patience(5.0, 5.0, asyncio.get_running_loop().time() + 0.1, "llama.cpp"))
