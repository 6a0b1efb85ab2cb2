"""The events of one generation: progress*, started, delta*, finished.

Times are seconds, probabilities natural numbers in [0, 1], log-probabilities natural logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from router.domain.requests import ToolCall


@dataclass(frozen=True, slots=True)
class Queued:
    """Waiting behind `ahead` other requests."""

    ahead: int


@dataclass(frozen=True, slots=True)
class Loading:
    """The model is loading; `fraction` in [0, 1], None where it is not known."""

    fraction: float | None = None


@dataclass(frozen=True, slots=True)
class Prefilling:
    """The prompt is being read."""

    processed_tokens: int
    total_tokens: int


Progress = Queued | Loading | Prefilling


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token before any sampling transform; `top` holds the most likely tokens in its place.

    `token_id` None: the backend does not tell.
    """

    token_id: int | None
    token_bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """First event of an answer, sent with the first token."""

    prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer; never ends inside a UTF-8 character. `token_count` None: the backend does not tell."""

    text: str = ""
    reasoning_text: str = ""
    token_count: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


class FinishReason(Enum):
    """Why generation ended."""

    END_OF_GENERATION = "end_of_generation"
    STOP_SEQUENCE = "stop_sequence"
    STOP_TOKEN = "stop_token"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LIMIT = "context_limit"
    TIME_LIMIT = "time_limit"
    TOOL_CALLS = "tool_calls"


class DraftSource(Enum):
    """What drafted; UNKNOWN where the backend does not say whether it drafts."""

    UNKNOWN = "unknown"
    NONE = "none"
    MTP_HEAD = "mtp_head"


class Replay(Enum):
    """What the same request with the same seed would give."""

    EXACT = "exact"
    BEST_EFFORT = "best_effort"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written; `cached_tokens` of the prompt came from a prefix cache."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class DraftTimes:
    """Seconds spent on drafting, verifying and committing, of rounds that may have been shared with other requests."""

    draft: float
    verify: float
    commit: float


@dataclass(frozen=True, slots=True)
class SpeculationStatistics:
    """What drafting did.

    Attributes:
        positions: (drafted, accepted) by draft position, empty where it is not told.
        depths: rounds by the number of drafts, from 0 on, empty where it is not told.
        times: None where it is not told.
    """

    source: DraftSource = DraftSource.NONE
    rounds: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    positions: tuple[tuple[int, int], ...] = ()
    depths: tuple[int, ...] = ()
    times: DraftTimes | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of an answer. `prefill` and `decode` are seconds by the backend's clock, None where it has none."""

    reason: FinishReason
    usage: Usage
    speculation: SpeculationStatistics = field(default_factory=SpeculationStatistics)
    matched_sequence: str | None = None
    matched_token: int | None = None
    seed: int | None = None
    replay: Replay = Replay.NONE
    numerics_fingerprint: str = ""
    prefill: float | None = None
    decode: float | None = None


Event = Queued | Loading | Prefilling | Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Tokens a prompt takes, and how many fit the context."""

    prompt_tokens: int
    context_length: int
