"""MLX engine that decodes with native Multi-Token-Prediction heads, on a thread or in a process of its own.

Importing the package does not import MLX.
"""

from mlx_mtp_backend.api import (
    Delta,
    EngineOptions,
    Event,
    Finished,
    FinishReason,
    FormatKind,
    GenerateParams,
    LoadOptions,
    LoadProgress,
    Norm,
    Replay,
    ResponseFormat,
    Rule,
    Sampling,
    Started,
    Statistics,
    TokenLogprob,
    WiringPolicy,
)
from mlx_mtp_backend.base import BaseEngine, EngineStatus
from mlx_mtp_backend.checkpoint import CheckpointReport, MTPReport, MTPStatus, inspect_checkpoint
from mlx_mtp_backend.engine import Engine
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.language.text import ModelText
from mlx_mtp_backend.models import LoadedModel
from mlx_mtp_backend.process.parent import EngineProcess
from mlx_mtp_backend.stream import Stream

__all__ = [
    "BaseEngine",
    "CheckpointReport",
    "Delta",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EngineProcess",
    "EngineStatus",
    "ErrorReason",
    "Event",
    "FinishReason",
    "Finished",
    "FormatKind",
    "GenerateParams",
    "LoadOptions",
    "LoadProgress",
    "LoadedModel",
    "MTPReport",
    "MTPStatus",
    "ModelText",
    "Norm",
    "Replay",
    "ResponseFormat",
    "Rule",
    "Sampling",
    "Started",
    "Statistics",
    "Stream",
    "TokenLogprob",
    "WiringPolicy",
    "inspect_checkpoint",
]
