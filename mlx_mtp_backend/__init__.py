"""In-process MLX engine that decodes with native Multi-Token-Prediction heads.

Importing the package does not import MLX.
"""

from mlx_mtp_backend.api import (
    Delta,
    EngineOptions,
    Event,
    Finished,
    FinishReason,
    GenerateParams,
    LoadOptions,
    LoadProgress,
    Norm,
    Replay,
    Rule,
    Sampling,
    Started,
    Statistics,
    WiringPolicy,
)
from mlx_mtp_backend.checkpoint import CheckpointReport, MTPReport, MTPStatus, inspect_checkpoint
from mlx_mtp_backend.errors import EngineError, ErrorReason

__all__ = [
    "CheckpointReport",
    "Delta",
    "EngineError",
    "EngineOptions",
    "ErrorReason",
    "Event",
    "FinishReason",
    "Finished",
    "GenerateParams",
    "LoadOptions",
    "LoadProgress",
    "MTPReport",
    "MTPStatus",
    "Norm",
    "Replay",
    "Rule",
    "Sampling",
    "Started",
    "Statistics",
    "WiringPolicy",
    "inspect_checkpoint",
]
