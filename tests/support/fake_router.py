"""A gRPC server with scripted answers, for tests of the client and the command line: real sockets, no backend."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from mtp_router.generate import v1

ROUTE = v1.Route(
    requested_model="tiny", model="tiny", backend="local", backend_kind=v1.BACKEND_KIND_LLAMA_CPP, reason="no MTP head"
)
Script = Callable[[Any, grpc.ServicerContext], Iterator[Any]]


def seconds(value: float) -> Duration:
    """A protobuf duration."""
    duration = Duration()
    duration.FromMilliseconds(round(value * 1000))
    return duration


def started() -> v1.StreamGenerateResponse:
    """First event of a stream."""
    return v1.StreamGenerateResponse(started=v1.GenerationStarted(generation_id="g1", route=ROUTE, prompt_tokens=7))


def delta(text: str, **fields: Any) -> v1.StreamGenerateResponse:
    """A piece of text."""
    return v1.StreamGenerateResponse(delta=v1.GenerationDelta(text=text, token_count=1, **fields))


def finished() -> v1.StreamGenerateResponse:
    """Last event: 11 tokens, the first after 0.5 s, the other ten in 2 s; 3 of 4 drafts accepted."""
    return v1.StreamGenerateResponse(
        finished=v1.GenerationFinished(
            reason=v1.FINISH_REASON_END_OF_GENERATION,
            usage=v1.Usage(prompt_tokens=7, output_tokens=11),
            timings=v1.Timings(time_to_first_token=seconds(0.5), total=seconds(2.5)),
            speculation=v1.SpeculationStatistics(
                source=v1.DRAFT_SOURCE_MTP_HEAD, rounds=2, drafted_tokens=4, accepted_tokens=3
            ),
        )
    )


def answer(*pieces: str) -> Script:
    """A script that says these pieces and finishes."""

    def script(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield started()
        yield from (delta(piece) for piece in pieces)
        yield finished()

    return script


def endless(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    """A script that goes on until its call ends."""
    yield started()
    while context.is_active():
        yield delta("more ")
        time.sleep(0.005)


def fail(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    reason: str,
    message: str = "it failed",
    *,
    domain: str = "mtp-router",
    metadata: dict[str, str] | None = None,
    extra: tuple[Any, ...] = (),
) -> None:
    """Ends the call with a google.rpc.Status that carries the reason."""
    status = status_pb2.Status(code=getattr(code_pb2, code.name), message=message)
    for detail in (error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata or {}), *extra):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    context.abort_with_status(rpc_status.to_status(status))


class FakeRouter(v1.GenerateServiceServicer, v1.ModelServiceServicer, v1.AdminServiceServicer):
    """Servicer of all three services; `script` answers StreamGenerate and Generate."""

    def __init__(self) -> None:
        self.script: Script = answer("Hel", "lo")
        self.requests: list[Any] = []
        self.call_ended = threading.Event()
        self.address = ""
        self.refreshed = v1.RefreshModelsResponse()
        self.models = [
            v1.Model(
                name=f"model-{number}",
                route=ROUTE,
                state=v1.MODEL_STATE_READY,
                context_length=8192,
                architecture="llama",
                quantization="Q4_1",
                size_bytes=98_362_432,
                memory_bytes=475_849_728,
                fallbacks=["spare"],
                capabilities=[
                    v1.CapabilityReport(
                        capability=v1.CAPABILITY_CHAT,
                        support=v1.CAPABILITY_SUPPORT_SUPPORTED,
                        evidence="tokenizer.chat_template present",
                    )
                ],
            )
            for number in range(5)
        ]

    def StreamGenerate(self, request: Any, context: Any) -> Iterator[Any]:
        self.requests.append(request)
        context.add_callback(self.call_ended.set)
        yield from self.script(request, context)

    def Generate(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        events = list(self.script(request, context))
        text = "".join(event.delta.text for event in events)
        return v1.GenerateResponse(
            started=events[0].started, output=v1.GenerationDelta(text=text), finished=events[-1].finished
        )

    def CountTokens(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return v1.CountTokensResponse(model="tiny", prompt_tokens=3, context_length=8192)

    def ListModels(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        first, size = int(request.page_token or 0), request.page_size or 2
        rest = str(first + size) if first + size < len(self.models) else ""
        return v1.ListModelsResponse(models=self.models[first : first + size], next_page_token=rest)

    def GetModel(self, request: Any, context: Any) -> Any:
        for model in self.models:
            if model.name == request.name:
                return v1.GetModelResponse(model=model)
        fail(context, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", f"no model named {request.name!r}")

    def PreloadModel(self, request: Any, context: Any) -> Iterator[Any]:
        yield v1.PreloadModelResponse(progress=v1.LoadProgress(fraction=0.5))
        if request.name != "vanishing":
            yield v1.PreloadModelResponse(model=v1.Model(name=request.name, state=v1.MODEL_STATE_READY))

    def UnloadModel(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return v1.UnloadModelResponse(model=v1.Model(name=request.name, state=v1.MODEL_STATE_COLD))

    def RefreshModels(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return self.refreshed

    def ListBackends(self, request: Any, context: Any) -> Any:
        return v1.ListBackendsResponse(backends=[v1.Backend(name="local", kind=v1.BACKEND_KIND_LLAMA_CPP)])


@contextmanager
def running() -> Iterator[FakeRouter]:
    """A FakeRouter that listens at `address` until the block ends."""
    router = FakeRouter()
    server = grpc.server(futures.ThreadPoolExecutor(8))
    v1.add_GenerateServiceServicer_to_server(router, server)
    v1.add_ModelServiceServicer_to_server(router, server)
    v1.add_AdminServiceServicer_to_server(router, server)
    router.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield router
    finally:
        server.stop(grace=None).wait()
