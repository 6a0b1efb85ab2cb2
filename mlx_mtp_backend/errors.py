"""Every way the engine can refuse or fail, as one enum that callers match on."""

from __future__ import annotations

import enum


class ErrorReason(enum.StrEnum):
    """Why a call or a stream failed. The values are stable; the texts beside them are not."""

    CHECKPOINT_UNREADABLE = "checkpoint_unreadable"  # missing, truncated, over a limit, not safetensors
    CHECKPOINT_RUNS_CODE = "checkpoint_runs_code"  # asks for a Python file of its own to be imported
    FAMILY_UNSUPPORTED = "family_unsupported"  # no driver for this architecture
    STORAGE_UNSUPPORTED = "storage_unsupported"  # weights in FP8 or packed as another tool packs
    WEIGHTS_MISMATCH = "weights_mismatch"  # names or shapes are not what the family needs
    HEAD_MISSING = "head_missing"  # a head was asked for and there is none
    HEAD_MISWIRED = "head_miswired"  # the wiring check refused the head
    BLAS_TOO_LATE = "blas_too_late"  # MLX was imported before the BLAS could be interposed
    BLAS_MISSING = "blas_missing"  # the package that brings it, or a library that it needs, is not there
    MODEL_NOT_LOADED = "model_not_loaded"
    MODEL_IN_USE = "model_in_use"
    INVALID_PARAMS = "invalid_params"
    PROMPT_EMPTY = "prompt_empty"
    PROMPT_TOO_LONG = "prompt_too_long"
    TOKEN_OUT_OF_RANGE = "token_out_of_range"
    QUEUE_FULL = "queue_full"  # too many streams wait already
    GRAMMAR_LIMIT = "grammar_limit"  # following the response format took more than the limits allow
    NON_FINITE_LOGITS = "non_finite_logits"
    BUILD_FAILURE = "build_failure"  # a round could not be built, not even alone and without drafts
    DEVICE_FAILURE = "device_failure"  # the device reported a failed evaluation
    ENGINE_CLOSED = "engine_closed"


class EngineError(Exception):
    """A typed failure.

    Attributes:
        reason: what happened, for code.
        detail: what happened, for people; never holds prompt text.
        field: the parameter at fault, where one is.
    """

    def __init__(self, reason: ErrorReason, detail: str, field: str | None = None) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail
        self.field = field
