"""What callers hand to the engine and what it hands back: frozen dataclasses, no MLX."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from pathlib import Path

from mlx_mtp_backend.errors import EngineError, ErrorReason

MAX_DEPTH = 16
MAX_TOP_K = 1 << 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_BOUNDARIES = 16
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_RULE_BYTES = 64 * 1024


class Rule(enum.StrEnum):
    """How drafts are accepted; both leave the output law at p."""

    COUPLING = "coupling"  # Gumbel-max coupling, arXiv 2408.07978; tokens depend on the seed alone
    REJECTION = "rejection"  # speculative sampling, arXiv 2211.17192; accepts more, tokens depend on the drafts


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


def _require(ok: bool, field_name: str, wants: str) -> None:
    if not ok:
        raise EngineError(ErrorReason.INVALID_PARAMS, f"{field_name} must be {wants}", field=field_name)


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
        _require(math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "temperature", "in [0, 100]")
        _require(0 <= self.top_k <= MAX_TOP_K, "top_k", f"in [0, {MAX_TOP_K}]")
        _require(math.isfinite(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        _require(math.isfinite(self.min_p) and 0 <= self.min_p < 1, "min_p", "in [0, 1)")
        _require(0.01 <= self.repetition_penalty <= 100, "repetition_penalty", "in [0.01, 100]")
        _require(-100 <= self.presence_penalty <= 100, "presence_penalty", "in [-100, 100]")
        _require(-100 <= self.frequency_penalty <= 100, "frequency_penalty", "in [-100, 100]")
        _require(len(self.logit_bias) <= MAX_BIASES, "logit_bias", f"at most {MAX_BIASES} tokens")
        _require(all(-100 <= bias <= 100 for _, bias in self.logit_bias), "logit_bias", "in [-100, 100] for each token")
        _require(len({token for token, _ in self.logit_bias}) == len(self.logit_bias), "logit_bias", "one per token")

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
        _require(size_ok, "response_format", f"1 to {MAX_RULE_BYTES} bytes")


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
        _require(self.max_tokens >= 1, "max_tokens", "at least 1")
        _require(self.seed is None or 0 <= self.seed < 1 << 64, "seed", "in [0, 2**64)")
        _require(self.depth is None or 0 <= self.depth <= MAX_DEPTH, "depth", f"in [0, {MAX_DEPTH}]")
        marks = self.boundaries
        in_prompt = len(marks) <= MAX_BOUNDARIES and all(0 <= mark <= len(self.prompt) for mark in marks)
        _require(in_prompt, "boundaries", f"at most {MAX_BOUNDARIES} lengths of the prompt")
        _require(len(self.stop_strings) <= MAX_STOPS, "stop_strings", f"at most {MAX_STOPS}")
        lengths_ok = all(1 <= len(text) <= MAX_STOP_LENGTH for text in self.stop_strings)
        _require(lengths_ok, "stop_strings", f"1 to {MAX_STOP_LENGTH} characters each")
        limit = self.time_limit
        _require(limit is None or (math.isfinite(limit) and limit > 0), "time_limit", "a positive number of seconds")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "in [0, max_tokens]")
        count_ok = self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS
        _require(count_ok, "logprobs", f"in [0, {MAX_TOP_LOGPROBS}]")
        format_ends = self.response_format is None or not self.ignore_eos
        _require(format_ends, "ignore_eos", "off with a response format, whose end is the model's")


class WiringPolicy(enum.StrEnum):
    """What a failed wiring check does."""

    OFF = "off"
    WARN = "warn"
    REFUSE = "refuse"


class Norm(enum.StrEnum):
    """Which hidden feeds the head: after ("post") or before ("pre") the final norm."""

    POST = "post"
    PRE = "pre"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load one checkpoint.

    Attributes:
        head_path: where the head's tensors lie when not in the checkpoint itself: a file, or the folder of the
            original checkpoint beside an MLX-quantised trunk.
        depth: drafts per round where a request does not say; None: as many as pay, found round by round from measured
            costs and acceptance (see depth.py).
        unseeded_rule: the acceptance rule without a seed; None takes the one that promises more tokens a second.
        wiring: what a failed wiring check does.
        seed_norm, recycle_norm: which hidden seeds the head and which of its outputs it is fed again; None takes
            the family's choice.
        prefill_chunk: rows of one prefill pass; part of the numerics fingerprint.
    """

    head_path: Path | None = None
    depth: int | None = None
    unseeded_rule: Rule | None = None
    wiring: WiringPolicy = WiringPolicy.WARN
    seed_norm: Norm | None = None
    recycle_norm: Norm | None = None
    prefill_chunk: int = 256

    def __post_init__(self) -> None:
        _require(self.depth is None or 0 <= self.depth <= MAX_DEPTH, "depth", f"in [0, {MAX_DEPTH}]")
        _require(16 <= self.prefill_chunk <= 8192, "prefill_chunk", "in [16, 8192]")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engine runs.

    Attributes:
        device: "cpu", "gpu" or None for MLX's default.
        interpose_blas: put OpenBLAS (package ngsolve-openblas) in place of MLX's BLAS on a Linux CPU. Fast, but it
            breaks row invariance, so replies say BEST_EFFORT; must happen before anything imports MLX.
        max_streams: sequences decoded together.
        max_waiting: further streams accepted; beyond, submit raises QUEUE_FULL.
        stream_buffer: tokens that wait unread before a stream is paused.
        slow_reader_limit: seconds a stream may stay paused before it is cut.
        kernel_checks: JSON file that keeps what the kernels' checks found on this device; None checks at every start.
        depth_memory: JSON file that keeps what rounds cost and how drafts fared, by model and numerics fingerprint;
            None measures after every load.
        prefix_cache_bytes: memory for prompts that were seen before; None: an eighth of the machine's, at most 4 GiB.
        cpu_nice: by how much MLX's own threads yield to others where it computes on a Linux CPU; by that system's
            measure from 0, not at all, to 19.
    """

    device: str | None = None
    interpose_blas: bool = False
    max_streams: int = 8
    max_waiting: int = 256
    stream_buffer: int = 1024
    slow_reader_limit: float = 30.0
    kernel_checks: Path | None = None
    depth_memory: Path | None = None
    prefix_cache_bytes: int | None = None
    cpu_nice: int = 0

    def __post_init__(self) -> None:
        _require(self.device in (None, "cpu", "gpu"), "device", "cpu, gpu or None")
        _require(self.max_streams >= 1, "max_streams", "at least 1")
        _require(self.max_waiting >= 0, "max_waiting", "at least 0")
        _require(self.stream_buffer >= 1, "stream_buffer", "at least 1")
        _require(self.slow_reader_limit > 0, "slow_reader_limit", "positive")
        budget = self.prefix_cache_bytes
        _require(budget is None or budget >= 0, "prefix_cache_bytes", "at least 0")
        _require(0 <= self.cpu_nice <= 19, "cpu_nice", "from 0 to 19")


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
