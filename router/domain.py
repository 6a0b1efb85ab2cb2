"""What the router talks about: requests, events, capabilities and errors, as plain frozen dataclasses.

Nothing here knows protobuf, HTTP or MLX: `services/` translates to and from the wire, `backends/` to and from engines.
Times are seconds, probabilities natural numbers in [0, 1], log-probabilities natural logarithms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum

# --------------------------------------------------------------------------------------------------------------------
# Requests


class Role(StrEnum):
    """Who speaks in a message; the values are those of chat templates."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function by the model; `arguments_json` is a JSON object as text."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters_json_schema` is JSON Schema as text."""

    name: str
    description: str
    parameters_json_schema: str


@dataclass(frozen=True, slots=True)
class MessagesPrompt:
    """A conversation, to be rendered through the model's chat template."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text given to the model as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class TokensPrompt:
    """Token ids given to the model as they are."""

    ids: tuple[int, ...]


Prompt = MessagesPrompt | TextPrompt | TokensPrompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling law of one request, every default filled in (see `SamplingParameters` in the contract)."""

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Stop:
    """When generation ends, besides the model's own end tokens and its context length."""

    max_output_tokens: int = 1024
    sequences: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    ignore_end_of_generation: bool = False
    min_output_tokens: int = 0


class FormatKind(Enum):
    """Which rule the text must follow."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The rule that the text must follow; `rule` is the schema, expression or grammar as text."""

    kind: FormatKind
    rule: str = ""


class ReasoningMode(Enum):
    """Whether the model thinks before it answers."""

    AUTO = "auto"
    OFF = "off"
    ON = "on"


class SpeculationMode(Enum):
    """Whether drafts may be used."""

    AUTO = "auto"
    OFF = "off"
    REQUIRED = "required"


class Priority(Enum):
    """Which waiting requests are served first; smaller values first."""

    INTERACTIVE = 0
    BATCH = 1


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One validated request. `seed` None means that the caller gave none."""

    model: str
    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    stop: Stop = field(default_factory=Stop)
    seed: int | None = None
    response_format: ResponseFormat | None = None
    reasoning: ReasoningMode = ReasoningMode.AUTO
    reasoning_budget: int | None = None
    top_logprobs: int | None = None
    speculation: SpeculationMode = SpeculationMode.AUTO
    draft_depth: int | None = None
    priority: Priority = Priority.INTERACTIVE
    time_budget: float | None = None
    correlation_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    tools: tuple[Tool, ...] = ()


# --------------------------------------------------------------------------------------------------------------------
# Models


class BackendKind(StrEnum):
    """Which kind of backend answers; the values are those of the settings file."""

    MLX = "mlx"
    LLAMA_CPP = "llama_cpp"
    OLLAMA = "ollama"


class Capability(Enum):
    """What a model may be able to do."""

    CHAT = "chat"
    MTP = "mtp"
    REASONING = "reasoning"
    TOOLS = "tools"
    JSON_SCHEMA = "json_schema"
    LOGPROBS = "logprobs"
    COUNT_TOKENS = "count_tokens"
    TOKEN_PROMPT = "token_prompt"


@dataclass(frozen=True, slots=True)
class CapabilityFact:
    """Whether a model can do one thing (None: not known yet), and the file, key or tensor that shows it."""

    supported: bool | None
    evidence: str


class ModelFormat(Enum):
    """What a model's files are."""

    GGUF = "gguf"
    CHECKPOINT = "checkpoint"  # a folder of safetensors files with a config.json
    OLLAMA = "ollama"  # kept by an Ollama server under a tag
    LLAMA_SERVER = "llama_server"  # served by a llama-server that somebody else started


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """A multi-token-prediction head: layers that are declared, whether their tensors are there (None: not told), what
    runs them ("": nothing here), where they lie ("": nowhere), and whether they are another checkpoint's.
    """

    declared_layers: int
    present: bool | None
    driver: str = ""
    place: str = ""
    grafted: bool = False


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model's files without loading them.

    `reasoning_switch` tells whether thinking can be switched on and off; `problem`, why the model cannot be served;
    `cache_bytes`, what a token of context takes in the key and value caches; `experts`, of a layer and how many of them
    a token goes to, None where its layers are dense or not known; `stamp`, when which files were written.
    """

    format: ModelFormat = ModelFormat.GGUF
    architecture: str = ""
    quantization: str = ""
    context_length: int | None = None
    size_bytes: int | None = None
    cache_bytes: int | None = None
    capabilities: Mapping[Capability, CapabilityFact] = field(default_factory=dict)
    reasoning_switch: bool = False
    problem: str = ""
    head: HeadFacts | None = None
    experts: tuple[int, int] | None = None
    stamp: tuple[tuple[str, int, int], ...] = ()

    def can(self, capability: Capability) -> bool:
        """Whether the capability is shown to be there; False where it is not known."""
        fact = self.capabilities.get(capability)
        return fact is not None and fact.supported is True

    def knows_not(self, capability: Capability) -> bool:
        """Whether the capability was asked about and the answer does not tell."""
        fact = self.capabilities.get(capability)
        return fact is not None and fact.supported is None


@dataclass(frozen=True, slots=True)
class Route:
    """What answers a request, and why in one sentence.

    `fallback_cause` tells why the requested model itself could not, where one of its fallbacks answers.
    """

    requested_model: str
    model: str
    backend: str
    kind: BackendKind
    reason: str
    fallback_cause: ErrorReason | None = None


@dataclass(frozen=True, slots=True)
class Drafting:
    """How a backend drafts for a model: `fixed_depth` tokens a round for every request, or, if None, as asked."""

    fixed_depth: int | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What a backend offers to routing: its kind, why it cannot be used here if so, and what to know of it.

    `failed` tells that it could be used before: a restart may help. `external` tells that it serves what it was started
    with, not files of this machine.
    """

    kind: BackendKind
    refusal: str = ""
    remark: str = ""
    failed: bool = False
    external: bool = False

    @property
    def serves(self) -> ModelFormat:
        """The models that it takes."""
        match self.kind:
            case BackendKind.MLX:
                return ModelFormat.CHECKPOINT
            case BackendKind.OLLAMA:
                return ModelFormat.OLLAMA
            case BackendKind.LLAMA_CPP:
                return ModelFormat.LLAMA_SERVER if self.external else ModelFormat.GGUF


class ModelState(Enum):
    """Whether a model is in memory."""

    COLD = "cold"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"


class BackendState(Enum):
    """Whether a backend can take requests."""

    READY = "ready"
    STARTING = "starting"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Health of one backend. `retry_after` is set where it is down and will be tried again."""

    name: str
    kind: BackendKind
    state: BackendState
    version: str = ""
    error: RouterError | None = None
    active_requests: int = 0
    queued_requests: int = 0
    loaded_models: tuple[str, ...] = ()
    restarts: int = 0
    retry_after: float | None = None


# --------------------------------------------------------------------------------------------------------------------
# Events of one generation: progress*, started, delta*, finished


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


# --------------------------------------------------------------------------------------------------------------------
# Errors


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
