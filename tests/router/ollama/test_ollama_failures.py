"""Everything that is known to go wrong with an Ollama server, and what the caller is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mtp_router.generate import v1
from support.ollama_process import Double

from router.backends import ollama_client
from router.catalog import read_catalog
from router.client import RouterCallError
from router.domain import BackendState
from router.settings import Settings

Connect = Callable[..., Any]

HELLO = [{"role": "user", "content": "good morning to you"}]
COUNT = [{"role": "user", "content": "count"}]
SECRET = "/home/somebody/private-path"


async def failure(client: Any, model: str = "smol", **options: Any) -> tuple[RouterCallError, str]:
    """The error of one answer, and the text before it."""
    answer = client.stream(model, **{"messages": COUNT, "temperature": 0.0, "max_output_tokens": 50, **options})
    text = ""
    with pytest.raises(RouterCallError) as caught:
        async for delta in answer:
            text += delta.text
    return caught.value, text


async def hello(client: Any, model: str = "smol") -> str:
    return str((await client.generate(model, messages=HELLO, temperature=0.0)).output.text)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("status", "error", "reason", "retry"),
    [
        (503, "server busy, please try again.  maximum pending requests exceeded", "QUEUE_FULL", True),
        (429, "too many requests", "QUEUE_FULL", True),
        (401, "unauthorized", "BACKEND_UNAVAILABLE", False),
        (403, "forbidden", "BACKEND_UNAVAILABLE", False),
        (302, "moved", "BACKEND_UNAVAILABLE", False),
        (404, "model 'smol' not found", "MODEL_LOAD_FAILED", False),
        (400, f"something about {SECRET}", "INVALID_REQUEST", False),
        (500, 'option "temperature" must be of type float32', "INVALID_REQUEST", False),
        (500, f"llama runner process has terminated: {SECRET}", "MODEL_LOAD_FAILED", False),
        (500, "model requires more system memory (9.1 GiB) than is available (3.2 GiB)", "MEMORY_BUDGET", False),
        (400, '{"error":{"type":"exceed_context_size_error"}}', "BACKEND_FAILED", False),
    ],
)
async def test_a_refusal_before_the_first_token(
    connect: Connect, double: Double, status: int, error: str, reason: str, retry: bool
) -> None:
    client, _ = await connect()
    double.fail(status=status, error=error, location="http://127.0.0.1:9/elsewhere")
    told, text = await failure(client)
    assert (told.reason, text) == (reason, "")
    assert (told.retry_after is not None) == retry
    assert SECRET not in str(told)
    double.fail()
    assert await hello(client) == "good morning to you "


async def test_a_rule_that_ollama_cannot_follow_is_the_callers_fault(connect: Connect, double: Double) -> None:
    client, _ = await connect()
    double.fail(status=500, error='invalid format: "x"; expected "json" or a valid JSON Schema object')
    told, _ = await failure(client, json_schema={"type": "object"})
    assert (told.reason, told.metadata["field"]) == ("INVALID_REQUEST", "response_format.json_schema")


@pytest.mark.parametrize("how", ["error", "reset", "quiet", "garbage", "shape"])
async def test_an_answer_that_breaks_off_is_never_taken_for_a_whole_one(
    connect: Connect, double: Double, how: str
) -> None:
    client, backend = await connect()
    double.fail(die_after=2, how=how)
    told, text = await failure(client)
    assert (told.reason, told.retry_after) == ("BACKEND_FAILED", None)
    assert text == "1 2 "
    assert backend.status().active_requests == 0
    double.fail()
    assert await hello(client) == "good morning to you "


@pytest.mark.parametrize("how", ["error", "reset", "quiet"])
async def test_a_failure_before_the_first_token_may_be_tried_again(connect: Connect, double: Double, how: str) -> None:
    client, _ = await connect()
    double.fail(die_after=0, how=how)
    told, text = await failure(client)
    assert (told.reason, text) == ("BACKEND_UNAVAILABLE", "")
    assert told.retry_after is not None


async def test_a_line_without_an_end_is_given_up(
    connect: Connect, double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama_client, "MAX_LINE_BYTES", 2**20)
    client, _ = await connect()
    double.fail(die_after=1, how="endless")
    told, _ = await failure(client)
    assert told.reason == "BACKEND_FAILED"


async def test_silence_is_bounded_before_and_after_the_first_token(connect: Connect, double: Double) -> None:
    client, _ = await connect(first_token_timeout=0.4, token_timeout=0.3)
    double.fail(die_after=2, how="stall")
    told, text = await failure(client)
    assert (told.reason, text) == ("BACKEND_STALLED", "1 2 ")
    double.fail(load_seconds=30.0)
    told, _ = await failure(client, "small")
    assert told.reason == "BACKEND_STALLED"
    await until(lambda: double.tell()["running"] == 0)


async def test_a_server_that_is_killed_in_mid_answer_and_comes_back(connect: Connect, double: Double) -> None:
    client, backend = await connect()
    double.fail(slow=0.02)
    answer = client.stream("smol", messages=COUNT, temperature=0.0, max_output_tokens=10_000)
    with pytest.raises(RouterCallError) as caught:
        async for delta in answer:
            if delta.text == "3 ":
                double.kill()
    assert caught.value.reason == "BACKEND_FAILED"
    await until(lambda: backend.status().state is BackendState.DOWN)
    status = backend.status()
    assert status.error is not None
    assert status.retry_after is not None
    told, _ = await failure(client)
    assert (told.reason, told.retry_after) == ("BACKEND_UNAVAILABLE", 1.0)
    again = Double(int(double.address.rpartition(":")[2]))
    try:
        await until(lambda: backend.status().state is BackendState.READY)
        assert await hello(client) == "good morning to you "
    finally:
        again.kill()


async def test_a_server_that_is_not_there_is_listed_honestly(connect: Connect) -> None:
    client, backend = await connect(host="http://127.0.0.1:9")
    told, _ = await failure(client)
    assert told.reason == "BACKEND_UNAVAILABLE"
    model = await client.get_model("smol")
    assert (model.state, model.problem) == (v1.MODEL_STATE_FAILED, "Ollama cannot be reached")
    (listed,) = await client.list_backends()
    assert listed.name == "ollama"
    assert backend.status().state is BackendState.DOWN


async def test_a_server_that_never_answers_is_down(
    connect: Connect, double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.backends.watch.LOOK_TIMEOUT", 0.2)
    monkeypatch.setattr("router.backends.ollama.QUESTION_TIMEOUT", 0.2)
    double.fail(hang=True)
    client, backend = await connect()
    told, _ = await failure(client)
    assert told.reason == "BACKEND_STALLED"
    assert backend.status().state is BackendState.DOWN


async def test_a_model_that_was_never_pulled(connect: Connect) -> None:
    client, _ = await connect()
    told, _ = await failure(client, "absent")
    assert told.reason == "MODEL_LOAD_FAILED"
    assert "ollama pull never/pulled:latest" in told.message


async def test_one_answer_at_a_time_and_the_rest_in_line(connect: Connect, double: Double) -> None:
    client, backend = await connect(max_queued=1)
    double.fail(slow=0.02)
    first = client.stream("smol", messages=COUNT, temperature=0.0, max_output_tokens=1000)
    await anext(aiter(first))
    second = asyncio.create_task(hello(client))
    await until(lambda: backend.status().queued_requests == 1)
    told, _ = await failure(client)
    assert told.reason == "QUEUE_FULL"
    first.close()
    assert await second == "good morning to you "


async def test_loading_unloading_and_keeping(connect: Connect, double: Double) -> None:
    client, backend = await connect(keep_alive=77.0)
    double.fail(load_seconds=0.2)
    model = await client.preload("small")
    assert model.state == v1.MODEL_STATE_READY
    assert double.asked("/api/generate")[0]["options"] == {"num_ctx": 16}
    assert double.asked("/api/generate")[0]["keep_alive"] == 77.0
    loads = double.tell()["loads"]
    assert await hello(client, "small") == "good morning to you "
    assert double.tell()["loads"] == loads  # the request did not have it loaded a second time
    assert double.asked("/api/chat")[0]["keep_alive"] == 77.0
    await until(lambda: "small" in backend.status().loaded_models)
    model = await client.unload("small")
    assert model.state == v1.MODEL_STATE_COLD
    assert double.asked("/api/generate")[-1]["keep_alive"] == 0


async def test_a_model_in_use_is_unloaded_only_by_force(connect: Connect, double: Double) -> None:
    client, _ = await connect()
    double.fail(slow=0.02)
    answer = client.stream("smol", messages=COUNT, temperature=0.0, max_output_tokens=1000)
    await anext(aiter(answer))
    with pytest.raises(RouterCallError) as caught:
        await client.unload("smol")
    assert caught.value.reason == "CAPABILITY_UNAVAILABLE"
    await client.unload("smol", force=True)
    answer.close()


async def test_progress_says_that_a_cold_model_loads(connect: Connect, double: Double) -> None:
    client, backend = await connect()
    answer = client.stream("smol", messages=HELLO, temperature=0.0, include_progress=True)
    kinds = [event.WhichOneof("event") async for event in answer.events()]
    assert kinds[0] == "progress"
    await until(lambda: "smol" in backend.status().loaded_models)
    answer = client.stream("smol", messages=HELLO, temperature=0.0, include_progress=True)
    kinds = [event.WhichOneof("event") async for event in answer.events()]
    assert kinds[0] == "started"


async def test_a_model_that_changed_is_looked_at_again(connect: Connect, double: Double) -> None:
    client, _ = await connect()
    assert not any(
        c.support == 1 and c.capability == v1.CAPABILITY_TOOLS for c in (await client.get_model("smol")).capabilities
    )
    asked = len(double.asked("/api/show"))
    await client.get_model("smol")
    assert len(double.asked("/api/show")) == asked  # believed while the digest stays
    double.tell(tag="smol:latest", digest="e" * 64, capabilities=["completion", "tools"])
    async with asyncio.timeout(10.0):
        while True:
            model = await client.get_model("smol")
            if any(c.capability == v1.CAPABILITY_TOOLS and c.support == 1 for c in model.capabilities):
                break
            await asyncio.sleep(0.02)


async def test_cancels_leave_nothing(connect: Connect, double: Double) -> None:
    client, backend = await connect(parallel=8, max_queued=100)
    before = len(asyncio.all_tasks())

    async def one(number: int) -> None:
        answer = client.stream("smol", messages=COUNT, temperature=0.0, max_output_tokens=1000)
        if number % 2:
            await anext(aiter(answer))
        else:
            await asyncio.sleep(0.001 * (number % 7))
        answer.close()

    double.fail(slow=0.005)
    for start in range(0, 200, 20):
        await asyncio.gather(*(one(number) for number in range(start, start + 20)))
    await until(lambda: backend.status().active_requests + backend.status().queued_requests == 0)
    await until(lambda: len(asyncio.all_tasks()) <= before + 1)
    double.fail()
    assert await hello(client) == "good morning to you "


async def test_tags_are_discovered_and_a_silent_server_has_none(double: Double, tmp_path: Path) -> None:
    backends = {"ollama": {"host": double.address}, "gone": {"kind": "ollama", "host": "http://127.0.0.1:9"}}
    settings = Settings(discovery={"ollama": True}, backends=backends, models={"mine": {"ollama": "smol"}})
    catalog = await read_catalog(settings, tmp_path)
    assert [entry.name for entry in catalog.entries] == ["drafter:latest", "mine", "smol:latest", "thinker:8b"]
    assert catalog.resolve("thinker:8b").settings.backend == "ollama"
