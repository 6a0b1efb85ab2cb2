"""What waits for a reader, what is recorded of a request, and the page for Prometheus."""

from __future__ import annotations

import asyncio
import json
import logging

import httpx
import pytest
from mtp_router.generate import v1
from support.scripted import FINISHED, ScriptedBackend, answer

from router.domain import (
    Delta,
    DraftSource,
    ErrorReason,
    Finished,
    FinishReason,
    Loading,
    Queued,
    RouterError,
    SpeculationStatistics,
    Started,
    Usage,
)
from router.services import outbox as module
from router.services.outbox import Outbox, filling


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "router.requests"]


async def test_deltas_that_wait_are_merged_and_progress_is_only_the_latest() -> None:
    outbox = Outbox(1000)
    for event in (Queued(2), Queued(1), Loading(0.5), Started(3), Delta("a", token_count=1), Delta("b", token_count=2)):
        if isinstance(event, Started):
            assert await outbox.take() == Loading(0.5)
        await outbox.put(event)
    await outbox.put(FINISHED)
    outbox.end()
    assert [await outbox.take() for _ in range(4)] == [Started(3), Delta("ab", token_count=3), FINISHED, None]
    assert outbox.merged == 1


async def test_what_waits_is_bounded_and_a_burst_that_is_read_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox(10)

    async def events():  # type: ignore[no-untyped-def]
        for _ in range(50):
            yield Delta("123456")

    text = ""
    async with filling(outbox, events()):
        while (event := await outbox.take()) is not None:
            assert isinstance(event, Delta)
            text += event.text
    assert text == "123456" * 50
    monkeypatch.setattr(module, "BURST_GRACE", 0.01)
    outbox = Outbox(10)
    await outbox.put(Delta("123456"))
    with pytest.raises(RouterError) as caught:
        await outbox.put(Delta("123456"))
    assert caught.value.reason is ErrorReason.SLOW_CONSUMER
    assert caught.value.metadata == {"max_unread_bytes": "10"}


async def test_an_error_comes_after_what_was_said_before_it_and_leaving_stops_the_backend() -> None:
    outbox, stopped = Outbox(1000), asyncio.Event()

    async def broken():  # type: ignore[no-untyped-def]
        yield Delta("said")
        raise RouterError(ErrorReason.BACKEND_FAILED, "broke off")

    async with filling(outbox, broken()):
        assert await outbox.take() == Delta("said")
        with pytest.raises(RouterError):
            await outbox.take()

    async def endless():  # type: ignore[no-untyped-def]
        try:
            while True:
                yield Delta("x")
                await asyncio.sleep(0.001)
        finally:
            stopped.set()

    async with filling(Outbox(1000), endless()):
        await asyncio.sleep(0.01)
    assert stopped.is_set()


async def test_a_reader_that_stops_holds_no_place(start_server) -> None:  # type: ignore[no-untyped-def]
    """Its answer is cut while the call still hangs in the write, long before the limit of seconds."""
    backend = ScriptedBackend([Started(), *[Delta("x" * 60_000)] * 400, FINISHED])
    _, channel = await start_server(backend, slow_reader_limit=600.0, max_unread_bytes=100_000)
    call = v1.GenerateServiceStub(channel).StreamGenerate(
        v1.StreamGenerateRequest(input=v1.GenerationInput(model="tiny", text="Hi"))
    )
    await call.read()
    async with asyncio.timeout(10):
        while backend.running:
            await asyncio.sleep(0.02)
    assert backend.stopped_early == 1
    call.cancel()


async def test_one_line_of_json_and_the_figures(start_server, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level(logging.INFO, logger="router.requests")
    drafts = SpeculationStatistics(DraftSource.MTP_HEAD, 2, 5, 3, ((3, 2), (2, 1)))
    done = Finished(FinishReason.MAX_TOKENS, Usage(4, 6, cached_tokens=1), drafts)
    backend = ScriptedBackend([Started(4), Delta("a", token_count=1), 0.05, Delta("b", token_count=5), done])
    server, channel = await start_server(backend, metrics_listen="127.0.0.1:0")
    stub = v1.GenerateServiceStub(channel)
    given = v1.GenerationInput(model="tiny", text="secret", correlation_id="c-9", labels={"team": "night"})
    await stub.Generate(v1.GenerateRequest(input=given))
    backend.script = [Started(), RouterError(ErrorReason.BACKEND_FAILED, "broke off")]
    with pytest.raises(Exception, match="broke off"):
        await stub.Generate(v1.GenerateRequest(input=given))
    given.model = "absent"
    with pytest.raises(Exception, match="no model named"):
        await stub.Generate(v1.GenerateRequest(input=given))
    first, second, third = lines(caplog)
    assert (third["model"], third["outcome"]) == ("absent", "MODEL_NOT_FOUND")
    assert (first["outcome"], first["finish"], first["output_tokens"]) == ("ok", "MAX_TOKENS", 6)
    assert (first["correlation_id"], first["labels"], first["accepted"]) == ("c-9", {"team": "night"}, 3)
    assert second["outcome"] == "BACKEND_FAILED"
    assert "secret" not in caplog.text
    async with httpx.AsyncClient(trust_env=False) as client:
        page = (await client.get(f"http://{server.metrics_address}/metrics")).text
    for line in (
        'mtp_router_requests_total{backend="scripted",model="tiny",outcome="ok"} 1.0',
        'mtp_router_requests_total{backend="scripted",model="tiny",outcome="BACKEND_FAILED"} 1.0',
        'mtp_router_requests_total{backend="",model="",outcome="MODEL_NOT_FOUND"} 1.0',
        'mtp_router_generation_tokens_total{backend="scripted",model="tiny"} 6.0',
        'mtp_router_prompt_tokens_cached_total{backend="scripted",model="tiny"} 1.0',
        'mtp_router_spec_decode_num_accepted_tokens_per_pos_total{backend="scripted",model="tiny",position="1"} 1.0',
        'mtp_router_spec_decode_num_draft_tokens_total{backend="scripted",model="tiny"} 5.0',
        'mtp_router_inter_token_latency_seconds_count{backend="scripted",model="tiny"} 1.0',
        'mtp_router_time_to_first_token_seconds_count{backend="scripted",model="tiny"} 2.0',
        'mtp_router_num_requests_running{backend="scripted"} 0.0',
        'mtp_router_backend_up{backend="scripted"} 1.0',
        'mtp_router_cb_state{backend="scripted/tiny"} 0.0',
    ):
        assert line in page.splitlines(), line


async def test_a_cancelled_request_is_recorded_as_such(start_server, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level(logging.INFO, logger="router.requests")
    backend = ScriptedBackend([*answer("a")[:2], 30.0])
    _, channel = await start_server(backend)
    request = v1.StreamGenerateRequest(input=v1.GenerationInput(model="tiny", text="Hi"))
    call = v1.GenerateServiceStub(channel).StreamGenerate(request)
    await call.read()
    call.cancel()
    async with asyncio.timeout(5):
        while not lines(caplog):
            await asyncio.sleep(0.01)
    assert lines(caplog)[0]["outcome"] == "cancelled"
