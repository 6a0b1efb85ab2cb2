"""Fallbacks: who answers for a model that fails before its first token, and what the caller is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from mtp_router.generate import v1
from support.scripted import ALL_FIELDS, FINISHED, ScriptedBackend, answer, catalog, entry, facts

from router.catalog import Catalog, ModelEntry
from router.client.errors import RouterCallError, typed_errors
from router.dispatch import FALLS_BACK
from router.domain import Capability, CapabilityFact, Delta, ErrorReason, Loading, Queued, RouterError, Started
from router.server import RouterServer

StartServer = Callable[..., Any]
DOWN = RouterError(ErrorReason.BACKEND_UNAVAILABLE, "it is down", metadata={"k": "v"}, retry_after=2.0)


def first(name: str = "first", *, fallbacks: tuple[str, ...] = ("second",), **settings: Any) -> ModelEntry:
    return entry(name, backend="one", aliases=[f"the-{name}"], fallbacks=fallbacks, **settings)


def second(name: str = "second", **settings: Any) -> ModelEntry:
    return entry(name, backend="two", **settings)


def one(*script: Any, **fields: Any) -> ScriptedBackend:
    return ScriptedBackend(list(script) or [DOWN], name="one", **fields)


def two(*script: Any, **fields: Any) -> ScriptedBackend:
    return ScriptedBackend(list(script) or list(answer("from", " two")), name="two", **fields)


def given(model: str = "first", **fields: Any) -> v1.StreamGenerateRequest:
    return v1.StreamGenerateRequest(input=v1.GenerationInput(model=model, text="Hi", **fields), include_progress=True)


Outcome = tuple[list[v1.StreamGenerateResponse], Any]


async def ask(
    start_server: StartServer, backends: tuple[ScriptedBackend, ScriptedBackend], models: Catalog, **fields: Any
) -> Outcome:
    """Every event of an answer by gRPC, and the error that it ended with."""
    _, channel = await start_server(backends[0], models, others=backends[1:])
    events: list[v1.StreamGenerateResponse] = []
    try:
        with typed_errors():
            async for event in v1.GenerateServiceStub(channel).StreamGenerate(given(**fields)):
                events.append(event)
    except RouterCallError as error:
        return events, error
    return events, None


@pytest.mark.parametrize("reason", list(ErrorReason))
async def test_failures_of_the_model_are_made_good_and_those_of_the_request_are_not(
    start_server: StartServer, reason: ErrorReason
) -> None:
    backends = one(Loading(None), RouterError(reason, "it failed")), two()
    events, error = await ask(start_server, backends, catalog(first(), second()), model="the-first")
    if reason not in FALLS_BACK:
        assert (error.reason, backends[1].requests) == (reason.value, [])
        return
    assert [*dict.fromkeys(event.WhichOneof("event") for event in events)] == [
        "progress",
        "started",
        "delta",
        "finished",
    ]
    route = events[1].started.route
    assert (route.requested_model, route.model, route.backend) == ("the-first", "second", "two")
    assert route.fallback_cause == getattr(v1, f"ERROR_REASON_{reason.value}")
    assert route.reason.startswith("the-first cannot answer: it failed; its fallback second: ")
    assert "".join(event.delta.text for event in events) == "from two"


async def test_without_a_failure_no_fallback_is_named(start_server: StartServer) -> None:
    backends = one(*answer("mine")), two()
    events, _ = await ask(start_server, backends, catalog(first(), second()))
    assert (events[0].started.route.model, events[0].started.route.fallback_cause) == ("first", 0)
    assert not backends[1].requests


async def test_nothing_answers_for_a_model_that_has_begun(start_server: StartServer) -> None:
    backends = one(Started(), Delta("half"), DOWN), two()
    events, error = await ask(start_server, backends, catalog(first(), second()))
    assert "".join(event.delta.text for event in events) == "half"
    assert (error.reason, backends[1].requests) == ("BACKEND_UNAVAILABLE", [])


async def test_files_that_cannot_be_served_are_made_good_too(start_server: StartServer) -> None:
    broken = first(model_facts=facts(problem="it is cut short"))
    events, _ = await ask(start_server, (one(), two()), catalog(broken, second()))
    route = events[0].started.route
    assert (route.model, route.fallback_cause) == ("second", v1.ERROR_REASON_MODEL_LOAD_FAILED)
    assert "it is cut short" in route.reason


@pytest.mark.parametrize(
    ("fields", "lacking", "why"),
    [
        ({"tools": [v1.ToolDefinition(name="f")]}, {"fields": ALL_FIELDS - {"tools"}}, "FIELD_NOT_IMPLEMENTED"),
        ({"speculation": v1.Speculation(mode=v1.SPECULATION_MODE_REQUIRED)}, {}, "CAPABILITY_UNAVAILABLE"),
    ],
)
async def test_a_fallback_must_be_able_to_do_what_is_asked(
    start_server: StartServer, fields: dict[str, Any], lacking: dict[str, Any], why: str
) -> None:
    can_draft = facts()
    can_draft = replace(
        can_draft, capabilities={**can_draft.capabilities, Capability.MTP: CapabilityFact(True, "a head")}
    )
    backends = one(drafts=True), two(**lacking)
    events, error = await ask(start_server, backends, catalog(first(model_facts=can_draft), second()), **fields)
    assert (events, backends[1].requests) == ([], [])
    assert len(backends[0].requests) == 1
    assert (error.reason, error.retry_after) == ("BACKEND_UNAVAILABLE", 2.0)
    assert error.message == f"it is down; nor could its fallbacks answer: second ({why})"
    assert error.metadata == {"k": "v", "fallbacks": f"second ({why})"}


async def test_they_are_tried_in_order_and_each_once(start_server: StartServer) -> None:
    listed = ("gone", "first-too", "second", "the-second", "third")
    models = catalog(
        first(fallbacks=listed), entry("first-too", backend="one"), second(aliases=["the-second"]), second("third")
    )
    backends = one(), two(Queued(1), DOWN)
    _, error = await ask(start_server, backends, models)
    assert [len(backend.requests) for backend in backends] == [2, 2]
    names = ("gone (MODEL_NOT_FOUND)", "first-too (BACKEND_UNAVAILABLE)", "second (BACKEND_UNAVAILABLE)")
    assert error.metadata["fallbacks"] == ", ".join((*names, "third (BACKEND_UNAVAILABLE)"))


async def test_a_fallbacks_own_fallbacks_do_not_count(start_server: StartServer) -> None:
    models = catalog(first(), second(fallbacks=("third", "first")), second("third"))
    backends = one(), two(DOWN)
    _, error = await ask(start_server, backends, models)
    assert [len(backend.requests) for backend in backends] == [1, 1]
    assert error.metadata["fallbacks"] == "second (BACKEND_UNAVAILABLE)"


async def test_a_fallback_gets_what_is_left_of_the_time_budget(start_server: StartServer) -> None:
    backends = one(0.3, DOWN), two()
    await ask(start_server, backends, catalog(first(), second()), time_budget={"seconds": 5})
    assert backends[0].requests[0].time_budget == 5.0
    left = backends[1].requests[0].time_budget
    assert left is not None
    assert 0.0 < left <= 4.7
    backends = one(0.2, DOWN), two()
    await ask(start_server, backends, catalog(first(), second()), time_budget={"nanos": 100_000_000})
    assert backends[1].requests[0].time_budget == 0.001


async def test_cancelling_stops_the_fallback(start_server: StartServer) -> None:
    backends = one(), two(Started(), 30.0, FINISHED)
    server: RouterServer
    server, channel = await start_server(backends[0], catalog(first(), second()), others=backends[1:])
    call = v1.GenerateServiceStub(channel).StreamGenerate(given())
    await call.read()
    call.cancel()
    async with asyncio.timeout(5):
        while backends[1].running or server._calls.active:
            await asyncio.sleep(0.01)
    assert backends[1].stopped_early == 1


async def test_a_fault_of_ours_is_not_hidden_by_a_fallback(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    backends = one(ValueError("a bug")), two()
    _, error = await ask(start_server, backends, catalog(first(), second()))
    assert (error.reason, backends[1].requests) == ("INTERNAL", [])
    assert "a bug" in caplog.text


async def test_models_tell_their_fallbacks_and_what_they_take(start_server: StartServer) -> None:
    known = first(model_facts=facts(cache_bytes=100))
    _, channel = await start_server(one(), catalog(known, second()), others=[two()])
    stub = v1.ModelServiceStub(channel)
    model = (await stub.GetModel(v1.GetModelRequest(name="first"))).model
    assert list(model.fallbacks) == ["second"]
    assert model.memory_bytes == 1000 + 2 * 2048 * 100  # its files, and two full contexts
    unknown = (await stub.GetModel(v1.GetModelRequest(name="second"))).model
    assert not unknown.HasField("memory_bytes")
