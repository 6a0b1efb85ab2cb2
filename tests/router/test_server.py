"""The server over real gRPC, with a scripted backend behind it."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from mtp_router.generate import v1
from support.scripted import FINISHED, ScriptedBackend, answer, catalog, entry, facts

from router.domain import (
    BackendState,
    Delta,
    ErrorReason,
    Event,
    Finished,
    FinishReason,
    Loading,
    Prefilling,
    Queued,
    RouterError,
    Started,
    Usage,
)
from router.server import ListenError

SECRET = "SECRET exception text"


def given(model: str = "tiny", **fields: object) -> v1.GenerationInput:
    return v1.GenerationInput(**{"model": model, "text": "Hi", **fields})


def stream(channel: grpc.aio.Channel, wire: v1.GenerationInput | None = None, **options: object):  # type: ignore[no-untyped-def]
    request = v1.StreamGenerateRequest(input=wire or given(), include_progress=bool(options.pop("progress", False)))
    return v1.GenerateServiceStub(channel).StreamGenerate(request, **options)


async def remaining(call) -> list[str | None]:  # type: ignore[no-untyped-def]
    """The kinds of the events that are still to come."""
    kinds = []
    while (event := await call.read()) is not grpc.aio.EOF:
        kinds.append(event.WhichOneof("event"))
    return kinds


async def failure(call: object) -> tuple[grpc.aio.AioRpcError, dict[str, object]]:
    """The error that a call ends with, and its details by type name."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "read"):
            await remaining(call)
        else:
            await call  # type: ignore[misc]
    details = {}
    for key, value in caught.value.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for item in status_pb2.Status.FromString(value).details:
                kind = item.TypeName().rpartition(".")[2]
                message = getattr(error_details_pb2, kind)()
                item.Unpack(message)
                details[kind] = message
    return caught.value, details


async def test_a_stream_is_started_deltas_finished(start_server) -> None:  # type: ignore[no-untyped-def]
    backend = ScriptedBackend([Started(prompt_tokens=3), Delta("Hello", token_count=1), 0.2, Delta(" world"), FINISHED])
    _, channel = await start_server(backend, catalog(entry(aliases=["nick"])))
    events = [event async for event in stream(channel, given("nick", correlation_id="c-1"))]
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "delta", "finished"]
    started, finished = events[0].started, events[-1].finished
    assert (started.route.requested_model, started.route.model, started.route.backend) == ("nick", "tiny", "scripted")
    assert started.route.reason
    assert started.correlation_id == "c-1"
    assert started.sampling.temperature == 0.6
    assert started.prompt_tokens == 3
    assert "".join(event.delta.text for event in events) == "Hello world"
    assert finished.reason == v1.FINISH_REASON_END_OF_GENERATION
    assert finished.usage.output_tokens == 2
    assert finished.seed == 7
    assert finished.timings.total.ToMicroseconds() > 0


async def test_unary_is_the_whole_stream(start_server) -> None:  # type: ignore[no-untyped-def]
    script: list[Event] = [Started(), Delta(reasoning_text="hm"), *answer("Hello", " world")[1:]]
    _, channel = await start_server(ScriptedBackend(list(script)))
    response = await v1.GenerateServiceStub(channel).Generate(v1.GenerateRequest(input=given()))
    assert (response.output.text, response.output.reasoning_text) == ("Hello world", "hm")
    assert not response.output.HasField("token_count")  # one piece did not tell
    assert response.finished.usage.output_tokens == 2
    assert response.started.route.model == "tiny"


async def test_progress_is_sent_only_where_asked_for(start_server) -> None:  # type: ignore[no-untyped-def]
    script = [Queued(2), 0.05, Loading(None), 0.05, Prefilling(3, 9), *answer("x")]
    _, channel = await start_server(ScriptedBackend(script))
    quiet = [event.WhichOneof("event") async for event in stream(channel)]
    assert quiet == ["started", "delta", "finished"]
    events = [event async for event in stream(channel, progress=True)]
    assert [event.progress.WhichOneof("stage") for event in events[:3]] == ["queue", "load", "prefill"]
    assert events[0].progress.queue.ahead == 2
    assert not events[1].progress.load.HasField("fraction")
    timings = events[-1].finished.timings
    assert timings.queue.ToMilliseconds() >= 45
    assert timings.load.ToMilliseconds() >= 45
    assert timings.time_to_first_token.ToMilliseconds() >= 90


async def test_what_matched_is_told(start_server) -> None:  # type: ignore[no-untyped-def]
    usage = Usage(1, 1)
    by_text = Finished(FinishReason.STOP_SEQUENCE, usage, matched_sequence="END")
    _, channel = await start_server(ScriptedBackend([Started(), by_text]))
    events = [event async for event in stream(channel)]
    assert events[-1].finished.WhichOneof("matched_stop") == "sequence"
    by_token = Finished(FinishReason.STOP_TOKEN, usage, matched_token=0)
    _, channel = await start_server(ScriptedBackend([Started(), by_token]))
    events = [event async for event in stream(channel)]
    assert events[-1].finished.WhichOneof("matched_stop") == "token_id"


async def test_an_unknown_model_names_the_known_ones(start_server) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server()
    error, details = await failure(stream(channel, given("absent")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "tiny" in error.details()
    info = details["ErrorInfo"]
    assert (info.reason, info.domain) == ("MODEL_NOT_FOUND", "mtp-router")
    assert dict(info.metadata) == {"model": "absent", "known_models": "tiny"}


async def test_a_missing_model_name(start_server) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server()
    error, details = await failure(stream(channel, v1.GenerationInput(text="Hi")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "model"


async def test_bad_input_carries_field_violations(start_server) -> None:  # type: ignore[no-untyped-def]
    backend = ScriptedBackend()
    _, channel = await start_server(backend)
    wire = given(sampling=v1.SamplingParameters(temperature=float("nan"), top_p=3))
    for call in (stream(channel, wire), v1.GenerateServiceStub(channel).Generate(v1.GenerateRequest(input=wire))):
        error, details = await failure(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert {item.field for item in details["BadRequest"].field_violations} == {
            "sampling.temperature",
            "sampling.top_p",
        }
    assert not backend.requests


@pytest.mark.parametrize("reason", list(ErrorReason))
async def test_every_reason_reaches_the_caller(start_server, reason: ErrorReason) -> None:  # type: ignore[no-untyped-def]
    raised = RouterError(reason, "a sentence", metadata={"k": "v"}, retry_after=1.5)
    _, channel = await start_server(ScriptedBackend([Started(), Delta("x"), raised]))
    error, details = await failure(stream(channel))
    assert error.details() == "a sentence"
    assert details["ErrorInfo"].reason == reason.value
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1500
    assert error.code() is not grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize(
    "script",
    [
        [ValueError(SECRET)],
        [Started(), Delta("x"), KeyError(SECRET)],
        [Delta("before started")],
        [Started(), FINISHED, Delta("after finished")],
        [Started(), Started()],
    ],
    ids=["at once", "in the stream", "delta first", "after the end", "started twice"],
)
async def test_a_fault_of_ours_is_internal_and_says_nothing(start_server, script, caplog) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level(logging.CRITICAL, logger="router")
    _, channel = await start_server(ScriptedBackend(script))
    error, details = await failure(stream(channel))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in error.details()
    assert details["ErrorInfo"].reason == "INTERNAL"


async def test_an_answer_that_just_ends_is_an_error(start_server) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server(ScriptedBackend([Started(), Delta("x")]))
    error, details = await failure(stream(channel))
    assert details["ErrorInfo"].reason == "BACKEND_FAILED"
    assert error.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("stage", [[Queued(1)], [Loading(None)], [Started()], [Started(), Delta("x")]])
async def test_cancelling_stops_the_backend_at_every_stage(start_server, stage) -> None:  # type: ignore[no-untyped-def]
    backend = ScriptedBackend([*stage, 30.0, FINISHED])
    server, channel = await start_server(backend)
    call = stream(channel, progress=True)
    await call.read()
    call.cancel()
    async with asyncio.timeout(2):
        while backend.running:
            await asyncio.sleep(0.01)
    assert backend.stopped_early == 1
    assert server._calls.active == 0


async def test_a_deadline_of_the_caller_stops_the_backend(start_server) -> None:  # type: ignore[no-untyped-def]
    backend = ScriptedBackend([Started(), 30.0])
    _, channel = await start_server(backend)
    error, _ = await failure(stream(channel, timeout=0.3))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(2):
        while backend.running:
            await asyncio.sleep(0.01)


async def test_a_call_without_deadline_gets_the_default(start_server) -> None:  # type: ignore[no-untyped-def]
    backend = ScriptedBackend([Started(), 30.0])
    _, channel = await start_server(backend, default_deadline=0.3)
    error, details = await failure(stream(channel))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details["ErrorInfo"].reason == "DEADLINE_EXCEEDED"
    assert backend.running == 0


async def test_a_reader_that_stops_is_cut_off(start_server) -> None:  # type: ignore[no-untyped-def]
    backend = ScriptedBackend([Started(), *[Delta("x" * 60_000)] * 1000, FINISHED])
    _, channel = await start_server(backend, slow_reader_limit=0.3)
    call = stream(channel)
    await call.read()
    async with asyncio.timeout(10):
        while backend.running:
            await asyncio.sleep(0.05)
    error, details = await failure(call)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details["ErrorInfo"].reason == "SLOW_CONSUMER"


async def test_required_speculation_without_a_head(start_server) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server()
    required = v1.Speculation(mode=v1.SPECULATION_MODE_REQUIRED)
    error, details = await failure(stream(channel, given(speculation=required)))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details["ErrorInfo"].metadata["capability"] == "MTP"


async def test_an_unimplemented_field_is_named(start_server) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server(ScriptedBackend(fields=frozenset()))
    error, details = await failure(stream(channel, given(tools=[v1.ToolDefinition(name="f")])))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert details["ErrorInfo"].metadata["field"] == "tools"


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x03\x0a\x01\xff"], ids=["garbage", "not UTF-8"])
@pytest.mark.parametrize("method", ["GenerateService/Generate", "GenerateService/StreamGenerate"])
async def test_bytes_that_are_no_message_are_refused(start_server, data: bytes, method: str) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server()
    kind = channel.unary_stream if "Stream" in method else channel.unary_unary
    error, details = await failure(kind(f"/mtp_router.generate.v1.{method}")(data))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details["ErrorInfo"].reason == "INVALID_REQUEST"
    assert "Exception" not in error.details()
    assert "decode" not in error.details().lower()


async def test_fields_of_a_newer_contract_are_refused(start_server) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server()
    newer = given(sampling=v1.SamplingParameters.FromString(b"\xf8\x3f\x01")).SerializeToString()
    error, details = await failure(stream(channel, v1.GenerationInput.FromString(newer)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "input.sampling.1023"


async def test_errors_fit_their_frame_however_much_is_wrong(start_server) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server()
    bad = [
        given(sampling=v1.SamplingParameters(logit_bias=dict.fromkeys(range(1000), 999.0))),
        given(messages=v1.MessageList(messages=[v1.Message(role=99, content="x")] * 4000)),
        given("y" * 10_000),
    ]
    for wire in bad:
        error, details = await failure(stream(channel, wire))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details["ErrorInfo"].reason == "INVALID_REQUEST"


async def test_an_oversize_request_is_refused(start_server) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server(max_request_bytes=2048)
    error, _ = await failure(stream(channel, given(text="x" * 4096)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_count_tokens(start_server) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server()
    stub = v1.GenerateServiceStub(channel)
    count = await stub.CountTokens(v1.CountTokensRequest(input=given()))
    assert (count.model, count.prompt_tokens, count.context_length) == ("tiny", 5, 2048)


async def test_models_are_listed_in_pages(start_server) -> None:  # type: ignore[no-untyped-def]
    broken = entry("broken", model_facts=facts(problem="broken.gguf does not exist"))
    _, channel = await start_server(models=catalog(broken, *(entry(f"m{i}") for i in range(5))))
    stub = v1.ModelServiceStub(channel)
    names, token = [], ""
    for _ in range(3):
        page = await stub.ListModels(v1.ListModelsRequest(page_size=2, page_token=token))
        names += [model.name for model in page.models]
        token = page.next_page_token
    assert names == ["broken", "m0", "m1", "m2", "m3", "m4"]
    assert token == ""
    broken_model = (await stub.GetModel(v1.GetModelRequest(name="broken"))).model
    assert broken_model.state == v1.MODEL_STATE_FAILED
    assert "does not exist" in broken_model.problem
    good = (await stub.GetModel(v1.GetModelRequest(name="m1"))).model
    assert good.state == v1.MODEL_STATE_READY
    assert {item.support for item in good.capabilities} == {
        v1.CAPABILITY_SUPPORT_SUPPORTED,
        v1.CAPABILITY_SUPPORT_UNSUPPORTED,
    }
    error, _ = await failure(stub.ListModels(v1.ListModelsRequest(page_token="%%%")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    error, _ = await failure(stub.GetModel(v1.GetModelRequest(name="absent")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_admin(start_server) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server()
    stub = v1.AdminServiceStub(channel)
    steps = [step async for step in stub.PreloadModel(v1.PreloadModelRequest(name="tiny"))]
    assert [step.WhichOneof("event") for step in steps] == ["progress", "model"]
    assert (await stub.UnloadModel(v1.UnloadModelRequest(name="tiny"))).model.name == "tiny"
    backends = (await stub.ListBackends(v1.ListBackendsRequest())).backends
    assert [(item.name, item.state) for item in backends] == [("scripted", v1.BACKEND_STATE_READY)]


async def test_admin_can_be_switched_off(start_server) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server(admin=False)
    stub = v1.AdminServiceStub(channel)
    for call in (
        stub.PreloadModel(v1.PreloadModelRequest(name="tiny")),
        stub.UnloadModel(v1.UnloadModelRequest(name="tiny")),
        stub.ListBackends(v1.ListBackendsRequest()),
        stub.RefreshModels(v1.RefreshModelsRequest()),
    ):
        error, details = await failure(call)
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert details["ErrorInfo"].reason == "ADMIN_DISABLED"


async def test_health_follows_the_backends(start_server) -> None:  # type: ignore[no-untyped-def]
    backend = ScriptedBackend(state=BackendState.STARTING)
    _, channel = await start_server(backend)
    stub = health_pb2_grpc.HealthStub(channel)

    async def status(name: str) -> int:
        return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

    async def until(name: str, wanted: int) -> None:
        async with asyncio.timeout(2):
            while await status(name) != wanted:
                await asyncio.sleep(0.01)

    response = health_pb2.HealthCheckResponse
    await until("", response.NOT_SERVING)
    backend.become(BackendState.READY)
    await until("", response.SERVING)
    await until("backend/scripted", response.SERVING)
    assert await status("mtp_router.generate.v1.GenerateService") == response.SERVING
    backend.become(BackendState.DOWN)
    await until("backend/scripted", response.NOT_SERVING)
    await until("", response.NOT_SERVING)


async def test_health_can_be_watched_through_a_drain(start_server) -> None:  # type: ignore[no-untyped-def]
    server, channel = await start_server(drain_grace=1.0)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="backend/scripted"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    draining = asyncio.create_task(server.drain())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    await draining


async def test_reflection_lists_the_services(start_server) -> None:  # type: ignore[no-untyped-def]
    _, channel = await start_server()
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    names = {item.name for item in (await call.read()).list_services_response.service}
    assert {
        "mtp_router.generate.v1.GenerateService",
        "mtp_router.generate.v1.ModelService",
        "mtp_router.generate.v1.AdminService",
        "grpc.health.v1.Health",
    } <= names


async def test_draining_lets_calls_finish(start_server) -> None:  # type: ignore[no-untyped-def]
    backend = ScriptedBackend([Started(), 0.5, Delta("late"), FINISHED])
    server, channel = await start_server(backend, drain_grace=5.0)
    call = stream(channel)
    await call.read()
    draining = asyncio.create_task(server.drain())
    assert await remaining(call) == ["delta", "finished"]
    await draining
    assert backend.closed
    error, _ = await failure(stream(channel, timeout=2))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_calls_that_outlast_the_grace_are_told(start_server) -> None:  # type: ignore[no-untyped-def]
    backend = ScriptedBackend([Started(), 30.0])
    server, channel = await start_server(backend, drain_grace=0.3)
    call = stream(channel)
    await call.read()
    draining = asyncio.create_task(server.drain())
    error, details = await failure(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details["ErrorInfo"].reason == "DRAINING"
    await draining
    assert backend.running == 0


async def test_a_second_server_on_the_port_fails(start_server) -> None:  # type: ignore[no-untyped-def]
    server, _ = await start_server()
    with pytest.raises(ListenError, match="cannot listen"):
        await start_server(listen=server.address)
