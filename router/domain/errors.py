"""Why a call can fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class ErrorReason(StrEnum):
    """Every reason a call can fail with: the contract's `ErrorReason` without its prefix (tests hold them equal)."""

    INVALID_REQUEST = "INVALID_REQUEST"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    FIELD_NOT_IMPLEMENTED = "FIELD_NOT_IMPLEMENTED"
    CAPABILITY_UNAVAILABLE = "CAPABILITY_UNAVAILABLE"
    QUEUE_FULL = "QUEUE_FULL"
    SLOW_CONSUMER = "SLOW_CONSUMER"
    MEMORY_BUDGET = "MEMORY_BUDGET"
    BACKEND_UNAVAILABLE = "BACKEND_UNAVAILABLE"
    BACKEND_FAILED = "BACKEND_FAILED"
    BACKEND_STALLED = "BACKEND_STALLED"
    MODEL_LOAD_FAILED = "MODEL_LOAD_FAILED"
    DRAINING = "DRAINING"
    ADMIN_DISABLED = "ADMIN_DISABLED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"
    NON_FINITE_LOGITS = "NON_FINITE_LOGITS"
    SETTINGS_INVALID = "SETTINGS_INVALID"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One broken rule; `field` is the dotted path below `GenerationInput`, such as `sampling.top_p`."""

    field: str
    description: str


class RouterError(Exception):
    """A failure that the caller is told of.

    Args:
        reason: why; it fixes the gRPC status code (see `services/errors.py`).
        message: one sentence for a person. It reaches the wire: never put another exception's text into it.
        metadata: everything variable in the message, by stable keys.
        violations: for INVALID_REQUEST, every field that breaks a rule.
        retry_after: seconds after which the call may succeed; None: do not retry.
    """

    def __init__(
        self,
        reason: ErrorReason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = violations
        self.retry_after = retry_after
