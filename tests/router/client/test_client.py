"""Both clients against a real server in this process; every test runs for the synchronous and the asyncio one."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from mtp_router.generate import v1
from support.fake_router import FakeRouter, answer, delta, endless, fail, finished, seconds, started

from router.client import (
    AnswerStatistics,
    AsyncClient,
    CallCancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    ProtocolError,
    RetryPolicy,
    RouterCallError,
)
from router.client.errors import BY_REASON

Connect = Callable[..., Any]
QUICK = RetryPolicy(initial_backoff=0.01, max_backoff=0.02)


def test_stream_yields_the_deltas_and_keeps_the_record(connect: Connect) -> None:
    with connect().stream("tiny", messages=[{"role": "user", "content": "Hi"}]) as answer:
        assert answer.started is None
        assert [piece.text for piece in answer] == ["Hel", "lo"]
    assert answer.text == "Hello"
    assert answer.started.route.reason == "no MTP head"
    assert answer.finished.reason == v1.FINISH_REASON_END_OF_GENERATION
    assert [piece.text for piece in answer] == []


def test_stream_without_a_block(connect: Connect) -> None:
    assert "".join(piece.text for piece in connect().stream("tiny", prompt="Hi")) == "Hello"


def test_thinking_is_kept_apart(connect: Connect, router: FakeRouter) -> None:
    router.script = lambda request, context: iter(
        [started(), delta("", reasoning_text="Hmm. "), delta("Yes."), finished()]
    )
    with connect().stream("tiny", prompt="Hi") as answer:
        list(answer)
    assert (answer.text, answer.reasoning_text) == ("Yes.", "Hmm. ")


def test_events_include_progress_where_asked(connect: Connect, router: FakeRouter) -> None:
    queue = v1.StreamGenerateResponse(progress=v1.GenerationProgress(queue=v1.QueueProgress(ahead=2)))

    def script(request: Any, context: Any) -> Iterator[Any]:
        if request.include_progress:
            yield queue
        yield from answer("Hi")(request, context)

    router.script = script
    client = connect()
    kinds = [e.WhichOneof("event") for e in client.stream("tiny", prompt="Hi", include_progress=True).events()]
    assert kinds == ["progress", "started", "delta", "finished"]
    kinds = [e.WhichOneof("event") for e in client.stream("tiny", prompt="Hi").events()]
    assert kinds == ["started", "delta", "finished"]


def test_leaving_the_block_cancels_the_call(connect: Connect, router: FakeRouter) -> None:
    router.script = endless
    with connect().stream("tiny", prompt="Hi") as answer:
        for _ in answer:
            break
        assert not router.call_ended.is_set()
    assert router.call_ended.wait(2.0)
    assert answer.finished is None


def test_an_exception_in_the_block_cancels_the_call(connect: Connect, router: FakeRouter) -> None:
    router.script = endless
    with pytest.raises(KeyError), connect().stream("tiny", prompt="Hi") as answer:
        for _ in answer:
            raise KeyError
    assert router.call_ended.wait(2.0)


def test_dropping_the_answer_cancels_the_call(connect: Connect, router: FakeRouter) -> None:
    router.script = endless
    client = connect()
    answer = client.stream("tiny", prompt="Hi")
    for _ in answer:
        break
    gc.disable()
    try:
        del answer
        dropped = router.call_ended.wait(2.0)
    finally:
        gc.enable()
    assert dropped, "the call outlived its answer"


def test_reading_a_closed_answer_raises(connect: Connect, router: FakeRouter) -> None:
    router.script = endless
    answer = connect().stream("tiny", prompt="Hi")
    for _ in answer:
        break
    answer.close()
    with pytest.raises(CallCancelledError) as caught:
        list(answer)
    assert caught.value.code is grpc.StatusCode.CANCELLED


def test_the_deadline_ends_a_stream(connect: Connect, router: FakeRouter) -> None:
    router.script = endless
    begun = time.monotonic()
    with pytest.raises(DeadlineExceededError), connect().stream("tiny", prompt="Hi", deadline=0.2) as answer:
        list(answer)
    assert time.monotonic() - begun < 5.0
    assert router.call_ended.wait(2.0)


def test_the_default_deadline_reaches_the_server(connect: Connect, router: FakeRouter) -> None:
    remaining: list[float] = []

    def script(request: Any, context: Any) -> Iterator[Any]:
        remaining.append(context.time_remaining())
        yield from answer("Hi")(request, context)

    router.script = script
    list(connect().stream("tiny", prompt="Hi"))
    list(connect(deadline=50.0).stream("tiny", prompt="Hi"))
    list(connect(deadline=50.0).stream("tiny", prompt="Hi", deadline=7.0))
    assert remaining == [pytest.approx(600.0, abs=5), pytest.approx(50.0, abs=5), pytest.approx(7.0, abs=2)]


# A server that shuts down before it has looked at a call cancels it.
@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_unavailable_is_retried_before_the_first_message(
    connect: Connect, router: FakeRouter, code: grpc.StatusCode
) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        if len(router.requests) < 3:
            fail(context, code, "BACKEND_UNAVAILABLE")
        yield from answer("Hi")(request, context)

    router.script = script
    assert "".join(piece.text for piece in connect(retry=QUICK).stream("tiny", prompt="Hi")) == "Hi"
    assert len(router.requests) == 3


def test_unavailable_is_not_retried_after_the_first_message(connect: Connect, router: FakeRouter) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        yield started()
        yield delta("Hel")
        fail(context, grpc.StatusCode.UNAVAILABLE, "BACKEND_FAILED")

    router.script = script
    answer = connect(retry=QUICK).stream("tiny", prompt="Hi")
    with pytest.raises(BY_REASON["BACKEND_FAILED"]):
        list(answer)
    assert answer.text == "Hel"
    assert len(router.requests) == 1


def test_a_long_request_is_retried_too(connect: Connect, router: FakeRouter) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        if len(router.requests) < 2:
            fail(context, grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE")
        yield from answer("Hi")(request, context)

    router.script = script
    list(connect(retry=QUICK).stream("tiny", prompt="x" * 2**20))
    assert len(router.requests) == 2


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL])
def test_nothing_else_is_retried(connect: Connect, router: FakeRouter, code: grpc.StatusCode) -> None:
    router.script = lambda request, context: fail(context, code, "QUEUE_FULL") or iter(())
    with pytest.raises(RouterCallError):
        list(connect(retry=QUICK).stream("tiny", prompt="Hi"))
    assert len(router.requests) == 1


def test_retries_can_be_switched_off(connect: Connect, router: FakeRouter) -> None:
    router.script = lambda request, context: (
        fail(context, grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE") or iter(())
    )
    with pytest.raises(RouterCallError):
        list(connect(retry=None).stream("tiny", prompt="Hi"))
    assert len(router.requests) == 1


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_every_reason_has_its_exception(connect: Connect, router: FakeRouter, reason: str) -> None:
    delay = error_details_pb2.RetryInfo(retry_delay=seconds(1.5))
    router.script = lambda request, context: (
        fail(context, grpc.StatusCode.ABORTED, reason, "it failed", metadata={"key": "value"}, extra=(delay,))
        or iter(())
    )
    with pytest.raises(BY_REASON[reason]) as caught:
        connect().generate("tiny", prompt="Hi")
    error = caught.value
    assert type(error) is BY_REASON[reason]
    assert (error.code, error.reason, error.message) == (grpc.StatusCode.ABORTED, reason, "it failed")
    assert (error.metadata, error.retry_after) == ({"key": "value"}, 1.5)
    assert isinstance(error.__cause__, grpc.RpcError)


def test_the_exceptions_cover_the_contract() -> None:
    names = {name.removeprefix("ERROR_REASON_") for name in v1.ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert set(BY_REASON) == names
    assert len(set(BY_REASON.values())) == len(names)


def test_violations_are_carried_and_shown(connect: Connect, router: FakeRouter) -> None:
    bad = error_details_pb2.BadRequest(
        field_violations=[error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="is 7")]
    )
    router.script = lambda request, context: (
        fail(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", "bad request", extra=(bad,)) or iter(())
    )
    with pytest.raises(InvalidRequestError, match=r"^bad request; sampling\.top_p: is 7$") as caught:
        list(connect().stream("tiny", prompt="Hi"))
    assert caught.value.violations == (("sampling.top_p", "is 7"),)


@pytest.mark.parametrize(
    ("reason", "domain", "seen"),
    [("SOMETHING_NEW", "mtp-router", "SOMETHING_NEW"), ("MODEL_NOT_FOUND", "a-proxy", "")],
)
def test_an_unknown_reason_or_domain_gives_the_base_class(
    connect: Connect, router: FakeRouter, reason: str, domain: str, seen: str
) -> None:
    router.script = lambda request, context: fail(context, grpc.StatusCode.NOT_FOUND, reason, domain=domain) or iter(())
    with pytest.raises(RouterCallError) as caught:
        list(connect().stream("tiny", prompt="Hi"))
    assert type(caught.value) is RouterCallError
    assert caught.value.reason == seen


def test_nobody_listening_gives_the_base_class(connect: Connect) -> None:
    with pytest.raises(RouterCallError) as caught:
        connect(target="127.0.0.1:1", retry=None).get_model("tiny")
    assert (type(caught.value), caught.value.code) == (RouterCallError, grpc.StatusCode.UNAVAILABLE)
    assert caught.value.reason == ""


def test_unknown_events_are_passed_over(connect: Connect, router: FakeRouter) -> None:
    unknown = v1.StreamGenerateResponse.FromString(b"\xfa\x01\x02hi")  # field 31, length-delimited
    router.script = lambda request, context: iter([unknown, started(), unknown, delta("Hi"), unknown, finished()])
    answer = connect().stream("tiny", prompt="Hi")
    assert [event.WhichOneof("event") for event in answer.events()] == ["started", "delta", "finished"]
    assert answer.text == "Hi"


@pytest.mark.parametrize(
    "events",
    [
        [],
        [started(), delta("Hi")],
        [delta("Hi"), finished()],
        [finished()],
        [started(), started(), finished()],
        [started(), finished(), delta("more")],
    ],
    ids=["nothing", "no finished", "no started", "only finished", "started twice", "delta after finished"],
)
def test_a_stream_that_breaks_the_order_is_an_error(connect: Connect, router: FakeRouter, events: list[Any]) -> None:
    router.script = lambda request, context: iter(events)
    with pytest.raises(ProtocolError):
        list(connect().stream("tiny", prompt="Hi"))


def test_unary_methods(connect: Connect, router: FakeRouter) -> None:
    client = connect()
    whole = client.generate("tiny", prompt="Hi", temperature=0.0)
    assert whole.output.text == "Hello"
    assert router.requests[-1].input.sampling.HasField("temperature")
    assert client.count_tokens("tiny", prompt="Hi").prompt_tokens == 3
    assert client.get_model("model-1").name == "model-1"
    assert client.unload("tiny", force=True).state == v1.MODEL_STATE_COLD
    assert router.requests[-1].force
    assert [backend.name for backend in client.list_backends()] == ["local"]
    with pytest.raises(ModelNotFoundError):
        client.get_model("missing")


def test_list_models_walks_the_pages(connect: Connect, router: FakeRouter) -> None:
    names = [f"model-{number}" for number in range(5)]
    assert [model.name for model in connect().list_models()] == names
    assert [request.page_token for request in router.requests] == ["", "2", "4"]
    assert [model.name for model in connect().list_models(page_size=4)] == names


def test_preload_reports_progress_and_returns_the_model(connect: Connect) -> None:
    seen: list[float] = []
    model = connect().preload("tiny", on_progress=lambda progress: seen.append(progress.fraction))
    assert (model.state, seen) == (v1.MODEL_STATE_READY, [0.5])
    with pytest.raises(ProtocolError):
        connect().preload("vanishing")


def test_statistics(connect: Connect) -> None:
    whole = connect().generate("tiny", prompt="Hi")
    figures = AnswerStatistics.of(whole.started, whole.finished)
    assert (figures.model, figures.backend, figures.why) == ("tiny", "local", "no MTP head")
    assert figures.time_to_first_token == pytest.approx(0.5)
    assert figures.tokens_per_second == pytest.approx(5.0)
    assert figures.acceptance == pytest.approx(0.75)
    bare = AnswerStatistics.of(whole.started, v1.GenerationFinished())
    assert (bare.time_to_first_token, bare.tokens_per_second, bare.acceptance) == (None, None, None)


async def test_cancelling_the_task_cancels_the_call(router: FakeRouter) -> None:
    router.script = endless

    async def read() -> None:
        async with AsyncClient(router.address) as client:
            async for _ in client.stream("tiny", prompt="Hi"):
                pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(router.call_ended.wait, 2.0)


def test_an_async_client_needs_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient("127.0.0.1:1")


def test_the_import_is_light() -> None:
    code = (
        "import sys, router.client; "
        "print(sorted({'mlx', 'mlx_lm', 'xllamacpp', 'pydantic', 'numpy', 'httpx', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
