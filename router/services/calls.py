"""What every call of ours has around it: a deadline, an end when the server drains, and a readable request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from router.domain import ErrorReason, RouterError
from router.services.errors import abort

Context = grpc.aio.ServicerContext[Any, Any]


class Calls:
    """The calls in flight.

    Args:
        default_deadline: seconds for a call that comes without a deadline.
    """

    def __init__(self, default_deadline: float) -> None:
        self._default_deadline = default_deadline
        self._draining = False
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def active(self) -> int:
        """How many are being answered."""
        return len(self._tasks)

    def interrupt(self) -> None:
        """Ends every running call with DRAINING, for the end of the grace period."""
        self._draining = True
        for task in self._tasks:
            task.cancel()

    @asynccontextmanager
    async def bounded(self, context: Context) -> AsyncIterator[None]:
        """Bounds a call by a deadline, and lets `interrupt` end it. Raises RouterError DEADLINE_EXCEEDED, DRAINING."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        limit = None if context.time_remaining() is not None else self._default_deadline
        try:
            async with asyncio.timeout(limit):
                yield
        except TimeoutError:
            raise RouterError(
                ErrorReason.DEADLINE_EXCEEDED,
                f"the call had no deadline and took longer than the server's default of {self._default_deadline:g} s",
                metadata={"default_deadline": f"{self._default_deadline:g}"},
            ) from None
        except asyncio.CancelledError:
            if not self._draining or context.cancelled():
                raise
            task.uncancel()
            raise RouterError(
                ErrorReason.DRAINING, "the server is shutting down; the answer is incomplete", retry_after=1.0
            ) from None
        finally:
            self._tasks.discard(task)


class _Unreadable:
    """Stands for a request whose bytes are no message."""


class ReadableRequests(grpc.aio.ServerInterceptor):
    """Answers INVALID_REQUEST to bytes that are no message; gRPC itself would send the parser's exception text."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of a call, with its request checked; handlers that read a stream stay as they are."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        inner: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        wrap = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return wrap(_checked(inner), _forgiving(handler.request_deserializer), handler.response_serializer)


def _forgiving(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable()

    return read


def _checked(behavior: Callable[[Any, Context], Any]) -> Callable[[Any, Context], Any]:
    async def checked(request: Any, context: Context) -> Any:
        if isinstance(request, _Unreadable):
            await abort(context, RouterError(ErrorReason.INVALID_REQUEST, "the request is no message of this contract"))
        return await behavior(request, context)

    return checked
