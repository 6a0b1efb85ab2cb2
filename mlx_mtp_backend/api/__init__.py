"""What callers hand to the engine and what it hands back: frozen dataclasses, no MLX."""

from mlx_mtp_backend.api.events import (
    Delta,
    Event,
    Finished,
    FinishReason,
    LoadProgress,
    Replay,
    Started,
    Statistics,
    TokenLogprob,
)
from mlx_mtp_backend.api.options import (
    EngineOptions,
    LoadOptions,
    Norm,
    Rule,
    WiringPolicy,
)
from mlx_mtp_backend.api.params import (
    MAX_DEPTH,
    FormatKind,
    GenerateParams,
    ResponseFormat,
    Sampling,
)

__all__ = [
    "MAX_DEPTH",
    "Delta",
    "EngineOptions",
    "Event",
    "FinishReason",
    "Finished",
    "FormatKind",
    "GenerateParams",
    "LoadOptions",
    "LoadProgress",
    "Norm",
    "Replay",
    "ResponseFormat",
    "Rule",
    "Sampling",
    "Started",
    "Statistics",
    "TokenLogprob",
    "WiringPolicy",
]
