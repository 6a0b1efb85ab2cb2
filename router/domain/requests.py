"""What a caller asks for: the prompt, the sampling law, when to stop and what rules hold. Times are seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum


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
