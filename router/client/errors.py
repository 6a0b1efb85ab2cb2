"""What a failed call raises: RouterCallError, with a subclass for each reason of the contract's ErrorReason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

DOMAIN = "mtp-router"


class FieldViolation(NamedTuple):
    """A broken rule: `field` is the dotted path below GenerationInput, such as `sampling.top_p`."""

    field: str
    description: str


class RouterCallError(Exception):
    """A call failed. The gRPC error, where there was one, is its `__cause__`.

    Attributes:
        code: status code of the call.
        reason: name of an ErrorReason, such as "MODEL_NOT_FOUND"; "" where the status carries none, as when no server
            answers.
        message: what happened, in one sentence.
        metadata: the variable parts of the message, by stable keys.
        violations: every field that breaks a rule, where the request was invalid.
        retry_after: seconds after which the call may succeed; None where the server does not say.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = violations
        self.retry_after = retry_after

    def __str__(self) -> str:
        """The message and, after it, the violations that it does not already spell out."""
        missing = [f"{item.field}: {item.description}" for item in self.violations if item.field not in self.message]
        return "; ".join([self.message, *missing])


class InvalidRequestError(RouterCallError):
    """INVALID_REQUEST: the request breaks a rule of the contract; `violations` names every field."""


class PromptTooLongError(RouterCallError):
    """PROMPT_TOO_LONG: the prompt does not fit the context; metadata `prompt_tokens` and `context_length`."""


class ModelNotFoundError(RouterCallError):
    """MODEL_NOT_FOUND: no model or alias of that name; metadata `model` and `known_models`."""


class FieldNotImplementedError(RouterCallError):
    """FIELD_NOT_IMPLEMENTED: the chosen backend does not do this field yet; metadata `field`."""


class CapabilityUnavailableError(RouterCallError):
    """CAPABILITY_UNAVAILABLE: the model or its backend cannot do what is required; metadata `capability`."""


class QueueFullError(RouterCallError):
    """QUEUE_FULL: too many requests wait already; see `retry_after`."""


class SlowConsumerError(RouterCallError):
    """SLOW_CONSUMER: the stream was read too slowly."""


class MemoryBudgetError(RouterCallError):
    """MEMORY_BUDGET: the model does not fit the server's memory budget."""


class BackendUnavailableError(RouterCallError):
    """BACKEND_UNAVAILABLE: the backend is down or not ready; nothing was generated; see `retry_after`."""


class BackendFailedError(RouterCallError):
    """BACKEND_FAILED: the backend broke off; the text so far is a prefix, not the answer."""


class BackendStalledError(RouterCallError):
    """BACKEND_STALLED: the backend was silent for longer than its limit."""


class ModelLoadFailedError(RouterCallError):
    """MODEL_LOAD_FAILED: the model's files could not be loaded."""


class DrainingError(RouterCallError):
    """DRAINING: the server is shutting down; see `retry_after`."""


class AdminDisabledError(RouterCallError):
    """ADMIN_DISABLED: the server's settings switch the administrative service off."""


class DeadlineExceededError(RouterCallError):
    """DEADLINE_EXCEEDED: the call's deadline passed; `reason` is "" where this side's clock ended it."""


class InternalError(RouterCallError):
    """INTERNAL: a fault of the router; its log has the details."""


class NonFiniteLogitsError(RouterCallError):
    """NON_FINITE_LOGITS: the model's logits were not finite."""


class SettingsInvalidError(RouterCallError):
    """SETTINGS_INVALID: the server's settings cannot be read any more; everything stays as it was."""


class CallCancelledError(RouterCallError):
    """The call was cancelled, here or by the server, before it ended."""


class ProtocolError(RouterCallError):
    """The server broke the contract's order of events, for example by ending a stream without `finished`."""

    def __init__(self, message: str) -> None:
        super().__init__(grpc.StatusCode.INTERNAL, "", message)


BY_REASON: dict[str, type[RouterCallError]] = {
    "INVALID_REQUEST": InvalidRequestError,
    "PROMPT_TOO_LONG": PromptTooLongError,
    "MODEL_NOT_FOUND": ModelNotFoundError,
    "FIELD_NOT_IMPLEMENTED": FieldNotImplementedError,
    "CAPABILITY_UNAVAILABLE": CapabilityUnavailableError,
    "QUEUE_FULL": QueueFullError,
    "SLOW_CONSUMER": SlowConsumerError,
    "MEMORY_BUDGET": MemoryBudgetError,
    "BACKEND_UNAVAILABLE": BackendUnavailableError,
    "BACKEND_FAILED": BackendFailedError,
    "BACKEND_STALLED": BackendStalledError,
    "MODEL_LOAD_FAILED": ModelLoadFailedError,
    "DRAINING": DrainingError,
    "ADMIN_DISABLED": AdminDisabledError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "INTERNAL": InternalError,
    "NON_FINITE_LOGITS": NonFiniteLogitsError,
    "SETTINGS_INVALID": SettingsInvalidError,
}
# gRPC ends such calls by itself, mostly on this side, so there is no ErrorInfo to go by.
BY_CODE: dict[grpc.StatusCode, type[RouterCallError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
}


@contextmanager
def typed_errors() -> Iterator[None]:
    """Turns a gRPC error of the block, of a sync or an asyncio call, into its RouterCallError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def from_rpc_error(error: grpc.RpcError) -> RouterCallError:
    """The exception for a gRPC error: chosen by the ErrorInfo's reason, else by the status code."""
    details = _details(error)
    info = details.get("ErrorInfo")
    reason = info.reason if info is not None and info.domain == DOMAIN else ""
    code = error.code()
    kind = BY_REASON.get(reason, RouterCallError) if reason else BY_CODE.get(code, RouterCallError)
    bad_request, retry = details.get("BadRequest"), details.get("RetryInfo")
    return kind(
        code,
        reason,
        error.details() or code.name,
        metadata=info.metadata if info is not None and reason else None,
        violations=tuple(FieldViolation(item.field, item.description) for item in bad_request.field_violations)
        if bad_request is not None
        else (),
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() if retry is not None else None,
    )


def _details(error: grpc.RpcError) -> dict[str, Any]:
    """The google.rpc details of an error by message name; empty where there are none or they contradict its status."""
    try:
        # Errors of asyncio calls are finished calls too: their accessors do not wait, so one reader serves both.
        status = rpc_status.from_call(error)
    except ValueError:
        return {}
    found: dict[str, Any] = {}
    for packed in status.details if status is not None else ():
        for message in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if packed.Is(message.DESCRIPTOR):
                found[message.DESCRIPTOR.name] = message.FromString(packed.value)
    return found
