"""One request: prompt, sampler, response format and limits."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from mlx_mtp_backend.api.checks import require
from mlx_mtp_backend.errors import EngineError, ErrorReason

MAX_DEPTH = 16
MAX_TOP_K = 1 << 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_BOUNDARIES = 16
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_RULE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampler's parameters, applied as bias, penalties, response format, top-k, top-p, min-p, temperature.

    Ties fall to the lowest id. Penalties look at every token before the row's own: prompt, reply and the drafts that
    the row follows.

    Attributes:
        temperature: 0 is greedy; at most 100.
        top_k: keep this many tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens that holds this mass; 1 keeps all.
        min_p: drop tokens below this share of the likeliest one's probability; 0 keeps all.
        repetition_penalty: divides positive and multiplies other logits of tokens that came before; 1 is off.
        presence_penalty: taken once from the logit of every token that came before; 0 is off.
        frequency_penalty: taken from a token's logit for each time that it came before; 0 is off.
        logit_bias: (token, what is added to its logit), each token once.

    Raises:
        EngineError: INVALID_PARAMS, naming the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        require(math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "temperature", "in [0, 100]")
        require(0 <= self.top_k <= MAX_TOP_K, "top_k", f"in [0, {MAX_TOP_K}]")
        require(math.isfinite(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        require(math.isfinite(self.min_p) and 0 <= self.min_p < 1, "min_p", "in [0, 1)")
        require(0.01 <= self.repetition_penalty <= 100, "repetition_penalty", "in [0.01, 100]")
        require(-100 <= self.presence_penalty <= 100, "presence_penalty", "in [-100, 100]")
        require(-100 <= self.frequency_penalty <= 100, "frequency_penalty", "in [-100, 100]")
        require(len(self.logit_bias) <= MAX_BIASES, "logit_bias", f"at most {MAX_BIASES} tokens")
        require(all(-100 <= bias <= 100 for _, bias in self.logit_bias), "logit_bias", "in [-100, 100] for each token")
        require(len({token for token, _ in self.logit_bias}) == len(self.logit_bias), "logit_bias", "one per token")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class FormatKind(enum.StrEnum):
    """The notation of a response format's rule."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"  # of the Rust crate of that name, without look-around; matches the whole reply
    LARK = "lark"  # llguidance's dialect of Lark; the rule `start` is the whole reply


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What the whole reply must look like.

    Attributes:
        rule: the schema (as JSON), expression or grammar.
        after: the format binds what follows the first such token, and the reply cannot end before it: for models that
            are made to think first. None binds the reply from its beginning.

    Raises:
        EngineError: INVALID_PARAMS, naming the field.
    """

    kind: FormatKind
    rule: str
    after: int | None = None

    def __post_init__(self) -> None:
        size_ok = 0 < len(self.rule.encode("utf-8", "replace")) <= MAX_RULE_BYTES
        require(size_ok, "response_format", f"1 to {MAX_RULE_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class GenerateParams:
    """One request.

    Attributes:
        model: the name given at load.
        prompt: token ids, at least one.
        max_tokens: new tokens at most.
        sampling: see Sampling.
        seed: 0 <= seed < 2**64; None draws one, which Started reports.
        depth: drafts per round; 0 decodes plainly, None takes the model's default.
        boundaries: lengths of the prompt up to which later prompts are likely to share it, such as the end of the
            system message; the prefix cache keeps what it needs to start there.
        stop_tokens: ids that end the reply (not emitted), besides the model's own end-of-sequence ids.
        ignore_eos: do not stop at the model's own end-of-sequence ids.
        stop_strings: texts that end the reply; neither they nor a beginning of them is emitted.
        time_limit: seconds from submission; the tokens by then are the reply. None for no limit.
        min_tokens: new tokens before a token that ends the reply can be drawn, except where the response format allows
            nothing else. A stop string ends the reply all the same.
        response_format: what the reply must look like; None for free text.
        logprobs: log-probabilities with each token and this many of the likeliest in its place; None for none.

    Raises:
        EngineError: INVALID_PARAMS or PROMPT_EMPTY, naming the field.
    """

    model: str
    prompt: tuple[int, ...]
    max_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    depth: int | None = None
    boundaries: tuple[int, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    stop_strings: tuple[str, ...] = ()
    time_limit: float | None = None
    min_tokens: int = 0
    response_format: ResponseFormat | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise EngineError(ErrorReason.PROMPT_EMPTY, "prompt has no tokens", field="prompt")
        require(self.max_tokens >= 1, "max_tokens", "at least 1")
        require(self.seed is None or 0 <= self.seed < 1 << 64, "seed", "in [0, 2**64)")
        require(self.depth is None or 0 <= self.depth <= MAX_DEPTH, "depth", f"in [0, {MAX_DEPTH}]")
        marks = self.boundaries
        in_prompt = len(marks) <= MAX_BOUNDARIES and all(0 <= mark <= len(self.prompt) for mark in marks)
        require(in_prompt, "boundaries", f"at most {MAX_BOUNDARIES} lengths of the prompt")
        require(len(self.stop_strings) <= MAX_STOPS, "stop_strings", f"at most {MAX_STOPS}")
        lengths_ok = all(1 <= len(text) <= MAX_STOP_LENGTH for text in self.stop_strings)
        require(lengths_ok, "stop_strings", f"1 to {MAX_STOP_LENGTH} characters each")
        limit = self.time_limit
        require(limit is None or (math.isfinite(limit) and limit > 0), "time_limit", "a positive number of seconds")
        require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "in [0, max_tokens]")
        count_ok = self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS
        require(count_ok, "logprobs", f"in [0, {MAX_TOP_LOGPROBS}]")
        format_ends = self.response_format is None or not self.ignore_eos
        require(format_ends, "ignore_eos", "off with a response format, whose end is the model's")
