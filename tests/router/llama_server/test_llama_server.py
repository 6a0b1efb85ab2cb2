"""The lane to a running llama-server: what it supports, what it refuses, and how it fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from mtp_router.generate import v1
from pydantic import ValidationError

from router.client import RouterCallError
from router.domain import BackendState
from router.settings import LlamaServerSettings, ModelSettings, Settings

Connect = Callable[..., Any]
HELLO = [{"role": "user", "content": "hi"}]


async def whole(client: Any, model: str = "words", **options: Any) -> tuple[str, Any, list[Any]]:
    answer = client.stream(model, **{"temperature": 0.0, "max_output_tokens": 6, **options})
    deltas = [delta async for delta in answer]
    return "".join(delta.text for delta in deltas), answer.finished, deltas


async def refused(client: Any, model: str = "words", **options: Any) -> RouterCallError:
    with pytest.raises(RouterCallError) as caught:
        await whole(client, model, **options)
    return caught.value


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


# --------------------------------------------------------------------------------------------------------------------
# Features


async def test_chat_and_reasoning(connect: Connect, shared: Any) -> None:
    client, _ = await connect(shared.address)
    text, end, deltas = await whole(client, messages=HELLO, max_output_tokens=50)
    assert "".join(delta.reasoning_text for delta in deltas).strip() == "Let me ponder"
    assert text == "The answer is 42."
    assert end.reason == v1.FINISH_REASON_END_OF_GENERATION
    await whole(client, messages=HELLO, reasoning="off")


async def test_text_tokens_and_stop(connect: Connect, shared: Any) -> None:
    client, _ = await connect(shared.address)
    text, end, _ = await whole(client, prompt="L")
    assert (text, end.reason) == (" n0 n1 n2 n3 n4 n5", v1.FINISH_REASON_MAX_TOKENS)
    assert end.usage.output_tokens == 6
    count = await client.count_tokens("words", prompt="L")
    assert count.context_length == 512
    again, _, _ = await whole(client, token_ids=[76])
    assert isinstance(again, str)
    text, end, _ = await whole(client, prompt="L", stop=["n3"])
    assert (text, end.reason, end.sequence) == (" n0 n1 n2 ", v1.FINISH_REASON_STOP_SEQUENCE, "n3")


async def test_seed_and_logprobs(connect: Connect, shared: Any) -> None:
    client, _ = await connect(shared.address)
    options = {"prompt": "S", "temperature": 1.0, "max_output_tokens": 30}
    first, end, _ = await whole(client, seed=5, **options)
    again, _, _ = await whole(client, seed=5, **options)
    other, _, _ = await whole(client, seed=6, **options)
    assert first == again != other
    assert (end.seed, end.replay) == (5, v1.REPLAY_BEST_EFFORT)
    _, _, deltas = await whole(client, prompt="L", top_logprobs=2, max_output_tokens=3)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert [len(entry.top_logprobs) for entry in entries] == [2, 2, 2]


async def test_a_schema_binds_the_answer(connect: Connect, shared: Any) -> None:
    client, _ = await connect(shared.address)
    schema = {"type": "string", "enum": ["red", "blue"]}
    text, _, _ = await whole(client, messages=HELLO, json_schema=schema, max_output_tokens=60, reasoning="off")
    assert json.loads(text) in ("red", "blue")


async def test_tools_are_refused_where_the_servers_template_knows_none(connect: Connect, shared: Any) -> None:
    client, _ = await connect(shared.address)
    error = await refused(client, messages=HELLO, tools=[{"name": "f"}])
    assert (error.reason, error.metadata["capability"]) == ("CAPABILITY_UNAVAILABLE", "TOOLS")
    assert "supports_tools = False" in error.message


async def test_over_long_prompts_are_refused_with_their_size(connect: Connect, shared: Any) -> None:
    client, _ = await connect(shared.address)
    error = await refused(client, prompt="L" * 600)
    assert error.reason == "PROMPT_TOO_LONG"
    assert error.metadata["context_length"] == "512"


async def test_cancel_frees_the_slot(connect: Connect, shared: Any) -> None:
    client, backend = await connect(shared.address, parallel=1)
    answer = client.stream("words", prompt="L", temperature=0.0, max_output_tokens=100_000)
    await anext(aiter(answer))
    answer.close()
    await until(lambda: backend.status().active_requests == 0)
    assert (await whole(client, prompt="L"))[0].startswith(" n0")


async def test_whether_it_drafts_is_not_claimed_to_be_known(connect: Connect, shared: Any) -> None:
    client, _ = await connect(shared.address)
    _, end, _ = await whole(client, prompt="L")
    assert end.speculation.source == v1.DRAFT_SOURCE_UNSPECIFIED
    for options in ({"speculation": "off"}, {"speculation": "required"}, {"draft_depth": 2}):
        assert (await refused(client, prompt="L", **options)).reason == "CAPABILITY_UNAVAILABLE"


async def test_what_is_known_of_the_model(connect: Connect, shared: Any) -> None:
    client, _ = await connect(shared.address)
    model = await client.get_model("words")
    assert (model.state, model.context_length, model.quantization) == (v1.MODEL_STATE_READY, 512, "all F32")
    assert model.route.backend_kind == v1.BACKEND_KIND_LLAMA_CPP
    assert not model.HasField("mtp_head")
    assert not model.HasField("memory_bytes")  # it does not tell how many heads its caches have
    assert "a llama-server that runs already serves words" in model.route.reason
    assert (await whole(client, "file", prompt="L"))[0].startswith(" n0")
    with pytest.raises(RouterCallError) as caught:
        await client.unload("words")
    assert caught.value.reason == "CAPABILITY_UNAVAILABLE"
    assert (await client.preload("words")).state == v1.MODEL_STATE_READY


# --------------------------------------------------------------------------------------------------------------------
# Failures


async def test_another_model_is_never_served_in_its_place(connect: Connect, shared: Any) -> None:
    client, _ = await connect(shared.address)
    error = await refused(client, "other", prompt="L")
    assert error.reason == "MODEL_LOAD_FAILED"
    assert "not 'another-model'" in error.message


async def test_a_wrong_key_is_told_and_never_shown(connect: Connect, shared: Any) -> None:
    client, backend = await connect(shared.address, api_key="wrong-key-123")
    error = await refused(client, prompt="L")
    assert error.reason == "BACKEND_UNAVAILABLE"
    assert "key" in error.message
    assert "wrong-key-123" not in str(error) + repr(backend._settings)


async def test_a_server_that_dies_in_mid_answer_and_one_that_is_gone(connect: Connect, external: Any) -> None:
    client, backend = await connect(external.address)
    await until(lambda: backend.status().state is BackendState.READY)
    answer = client.stream("words", prompt="L", temperature=0.0, max_output_tokens=100_000)
    with pytest.raises(RouterCallError) as caught:
        async for delta in answer:
            if "n5" in delta.text:
                external.kill()
    assert caught.value.reason == "BACKEND_FAILED"
    error = await refused(client, prompt="L")
    assert (error.reason, error.retry_after) == ("BACKEND_UNAVAILABLE", 1.0)
    await until(lambda: backend.status().state is BackendState.DOWN)
    assert (await client.get_model("words")).state == v1.MODEL_STATE_FAILED


@contextlib.asynccontextmanager
async def answering(status: str, body: str, headers: str = "", *, hang: bool = False) -> AsyncIterator[str]:
    """A server that gives every request the same answer, which no healthy llama-server would."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
            if hang:
                await asyncio.sleep(3600)
            writer.write((head + body).encode())
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("status", "body", "headers", "reason"),
    [
        ("302 Found", "", "Location: http://127.0.0.1:9/\r\n", "BACKEND_UNAVAILABLE"),
        ("503 Busy", '{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}', "",
         "BACKEND_UNAVAILABLE"),
        ("429 Many", "{}", "", "QUEUE_FULL"),
        ("403 No", "{}", "", "BACKEND_UNAVAILABLE"),
        ("404 No", "404 page not found", "", "BACKEND_FAILED"),
        ("200 OK", "<html>", "", "BACKEND_FAILED"),
        ("200 OK", "[]", "", "BACKEND_FAILED"),
        ("200 OK", '{"data": 7}', "", "BACKEND_FAILED"),
        ("200 OK", '{"data": [{"id": "words", "meta": {}}], "default_generation_settings": {}}', "", "BACKEND_FAILED"),
    ],
)  # fmt: skip
async def test_what_is_no_healthy_llama_server(
    connect: Connect, status: str, body: str, headers: str, reason: str
) -> None:
    async with answering(status, body, headers) as url:
        client, _ = await connect(url)
        assert (await refused(client, prompt="L")).reason == reason


async def test_a_server_that_never_answers(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.backends.llama_stream.QUESTION_TIMEOUT", 0.2)
    monkeypatch.setattr("router.backends.watch.LOOK_TIMEOUT", 0.2)
    async with answering("200 OK", "", hang=True) as url:
        client, backend = await connect(url)
        assert (await refused(client, prompt="L")).reason == "BACKEND_STALLED"
        await until(lambda: backend.status().state is BackendState.DOWN)


# --------------------------------------------------------------------------------------------------------------------
# Settings


def test_settings() -> None:
    for url in ("localhost:8080", "http://user:pw@host", "http://host/path", "unix:", "ftp://host"):
        with pytest.raises(ValidationError):
            LlamaServerSettings(url=url)
    secret = LlamaServerSettings(url="unix:/run/llama.sock", api_key="hidden")
    assert "hidden" not in secret.model_dump_json() + str(secret)
    one, two = ({"kind": "llama_server", "url": f"http://h:{port}"} for port in (1, 2))
    Settings(backends={"one": one}, models={"m": ModelSettings(llama_server="x")})
    with pytest.raises(ValidationError, match="must say which of one, two"):
        Settings(backends={"one": one, "two": two}, models={"m": ModelSettings(llama_server="x")})
    with pytest.raises(ValidationError, match="needs one of"):
        ModelSettings(llama_server="x", path=Path("y"))
