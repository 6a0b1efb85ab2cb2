"""Typed Python client of mtp-router: Client for threads, AsyncClient for asyncio, one shape."""

from router.client.aio import AsyncAnswer, AsyncClient
from router.client.enums import enum_name
from router.client.errors import (
    AdminDisabledError,
    BackendFailedError,
    BackendStalledError,
    BackendUnavailableError,
    CallCancelledError,
    CapabilityUnavailableError,
    DeadlineExceededError,
    DrainingError,
    FieldNotImplementedError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    MemoryBudgetError,
    ModelLoadFailedError,
    ModelNotFoundError,
    NonFiniteLogitsError,
    PromptTooLongError,
    ProtocolError,
    QueueFullError,
    RouterCallError,
    SlowConsumerError,
)
from router.client.options import DEFAULT_DEADLINE, DEFAULT_OPTIONS, DEFAULT_TARGET, RetryPolicy
from router.client.requests import GenerationFields
from router.client.statistics import AnswerStatistics
from router.client.sync import Answer, Client

__all__ = [
    "DEFAULT_DEADLINE",
    "DEFAULT_OPTIONS",
    "DEFAULT_TARGET",
    "AdminDisabledError",
    "Answer",
    "AnswerStatistics",
    "AsyncAnswer",
    "AsyncClient",
    "BackendFailedError",
    "BackendStalledError",
    "BackendUnavailableError",
    "CallCancelledError",
    "CapabilityUnavailableError",
    "Client",
    "DeadlineExceededError",
    "DrainingError",
    "FieldNotImplementedError",
    "FieldViolation",
    "GenerationFields",
    "InternalError",
    "InvalidRequestError",
    "MemoryBudgetError",
    "ModelLoadFailedError",
    "ModelNotFoundError",
    "NonFiniteLogitsError",
    "PromptTooLongError",
    "ProtocolError",
    "QueueFullError",
    "RetryPolicy",
    "RouterCallError",
    "SlowConsumerError",
    "enum_name",
]
