"""What a stream and a load tell."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from mlx_mtp_backend.api.options import Rule
from mlx_mtp_backend.errors import EngineError


class Replay(enum.StrEnum):
    """Whether the same call gives the same tokens again, at any depth and beside any neighbours."""

    EXACT = "exact"
    BEST_EFFORT = "best_effort"
    NONE = "none"


class FinishReason(enum.StrEnum):
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LIMIT = "context_limit"
    TIME_LIMIT = "time_limit"
    SLOW_READER = "slow_reader"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Started:
    """The request left the queue; prefill begins.

    Attributes:
        seed: the effective seed.
        rule: the acceptance rule in force.
        depth: drafts per round; None where it is chosen round by round.
        cached_tokens: tokens of the prompt that the prefix cache holds.
        replay, replay_reason: what a repetition will give, and why not EXACT when it is not.
        fingerprint: what the bits depend on besides model files, prompt, parameters and seed.
    """

    prompt_tokens: int
    seed: int
    rule: Rule
    depth: int | None
    cached_tokens: int
    replay: Replay
    replay_reason: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token under the model's own law, before bias, penalties, format and sampler.

    Attributes:
        top: (token, logprob) of the likeliest in its place, likeliest first, ties by lowest id.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New output. `text` is empty while a character or a possible stop string is incomplete, or where the model has
    no tokenizer; the texts of all deltas, joined, are the reply. `logprobs` has one entry per token if asked for."""

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of one request.

    Attributes:
        rounds: verify passes.
        depths: rounds by the number of drafts, from 0 on.
        drafted, accepted: per draft position, 0-based; a position counts as drafted when it was verified.
        cached_tokens: of the prompt, not run again.
        seconds_queued, seconds_prefill, seconds_decode: wall time; queued is from submission to start.
        seconds_draft, seconds_verify, seconds_commit: of the rounds it took part in, whoever else did: building the
            drafts; building the verify pass and computing both; taking over the outcome.
    """

    prompt_tokens: int
    completion_tokens: int
    rounds: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    seconds_queued: float
    seconds_prefill: float
    seconds_decode: float
    depths: tuple[int, ...] = ()
    cached_tokens: int = 0
    seconds_draft: float = 0.0
    seconds_verify: float = 0.0
    seconds_commit: float = 0.0

    @property
    def tokens_per_round(self) -> float:
        """Mean committed tokens of a verify pass (acceptance length, the correction or bonus token included)."""
        return (self.rounds + sum(self.accepted)) / self.rounds if self.rounds else 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a stream. `error` is set exactly when reason is ERROR."""

    reason: FinishReason
    statistics: Statistics
    stop: str | int | None = None
    error: EngineError | None = None


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """One slice of a load is done. `fraction` runs to 1."""

    stage: str
    fraction: float
