"""RouterError to gRPC status, and the one place where handlers turn failures into statuses."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from router.domain import ErrorReason, RouterError

DOMAIN = "mtp-router"
logger = logging.getLogger(__name__)

CODES: dict[ErrorReason, grpc.StatusCode] = {
    ErrorReason.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.PROMPT_TOO_LONG: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.FIELD_NOT_IMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    ErrorReason.CAPABILITY_UNAVAILABLE: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.SLOW_CONSUMER: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.MEMORY_BUDGET: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.BACKEND_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.BACKEND_FAILED: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.BACKEND_STALLED: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.MODEL_LOAD_FAILED: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.ADMIN_DISABLED: grpc.StatusCode.PERMISSION_DENIED,
    ErrorReason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorReason.INTERNAL: grpc.StatusCode.INTERNAL,
    ErrorReason.NON_FINITE_LOGITS: grpc.StatusCode.INTERNAL,
    ErrorReason.SETTINGS_INVALID: grpc.StatusCode.FAILED_PRECONDITION,
}


def error_info(error: RouterError) -> error_details_pb2.ErrorInfo:
    """The typed reason of an error."""
    return error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=error.metadata)


def to_status(error: RouterError) -> status_pb2.Status:
    """The google.rpc.Status of an error: ErrorInfo always, BadRequest and RetryInfo where they apply."""
    status = status_pb2.Status(code=CODES[error.reason].value[0], message=error.message)
    details: list[Any] = [error_info(error)]
    if error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=item.field, description=item.description)
                    for item in error.violations
                ]
            )
        )
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: RouterError) -> NoReturn:
    """Ends the call with the status of `error`."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("abort_with_status returned")


Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


def reports_errors(handler: Handler) -> Handler:
    """Wraps a servicer method `(self, request, context)`: a RouterError becomes its status, anything else INTERNAL.

    grpc.aio would put the text of an unknown exception on the wire; here it goes to the log only.
    """

    @functools.wraps(handler)
    async def wrapped(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await handler(self, request, context)
        except RouterError as error:
            await abort(context, error)
        except grpc.aio.BaseError:
            raise  # the call has ended already: there is nobody to tell
        except Exception:
            logger.exception("unexpected failure in %s", handler.__name__)
            await abort(context, RouterError(ErrorReason.INTERNAL, "internal error; see the server's log"))

    return wrapped  # type: ignore[return-value]
