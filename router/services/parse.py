"""Wire to domain: validates a GenerationInput and fills in every default.

Every rule of the contract is checked here, and all broken rules of a request are reported together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from enum import Enum
from typing import TypeVar

from google.protobuf import duration_pb2
from google.protobuf.message import Message as WireMessage
from google.protobuf.unknown_fields import UnknownFieldSet
from mtp_router.generate import v1

from router.domain import (
    ErrorReason,
    FieldViolation,
    FormatKind,
    GenerationRequest,
    Message,
    MessagesPrompt,
    Priority,
    Prompt,
    ReasoningMode,
    ResponseFormat,
    Role,
    RouterError,
    Sampling,
    SpeculationMode,
    Stop,
    TextPrompt,
    TokensPrompt,
    Tool,
    ToolCall,
)
from router.settings import SamplingSettings

MAX_OUTPUT_TOKENS = 1_048_576
MAX_SEED = 2**32 - 2  # llama.cpp takes 2**32 - 1 to mean "draw one"
MAX_MESSAGES = 4096
MAX_STOP_SEQUENCES, MAX_STOP_BYTES, MAX_STOP_TOKENS = 16, 256, 64
MAX_LOGIT_BIAS = 1024
MAX_RULE_BYTES = 64 * 2**10
MAX_TOOLS = 128
MAX_TIME_BUDGET = 24 * 3600.0
MAX_LABELS, MAX_LABEL_KEY, MAX_LABEL_VALUE = 16, 64, 256
MAX_CORRELATION_ID = 128
MAX_MODEL_NAME = 128
MAX_VIOLATIONS = 32  # more would not fit the trailing metadata that carries an error
TINY = 1e-6  # below this a division leaves the range of 32-bit floats

ROLES: Mapping[int, Role] = {
    v1.ROLE_SYSTEM: Role.SYSTEM,
    v1.ROLE_USER: Role.USER,
    v1.ROLE_ASSISTANT: Role.ASSISTANT,
    v1.ROLE_TOOL: Role.TOOL,
}
REASONING_MODES: Mapping[int, ReasoningMode] = {
    v1.REASONING_MODE_UNSPECIFIED: ReasoningMode.AUTO,
    v1.REASONING_MODE_AUTO: ReasoningMode.AUTO,
    v1.REASONING_MODE_OFF: ReasoningMode.OFF,
    v1.REASONING_MODE_ON: ReasoningMode.ON,
}
SPECULATION_MODES: Mapping[int, SpeculationMode] = {
    v1.SPECULATION_MODE_UNSPECIFIED: SpeculationMode.AUTO,
    v1.SPECULATION_MODE_AUTO: SpeculationMode.AUTO,
    v1.SPECULATION_MODE_OFF: SpeculationMode.OFF,
    v1.SPECULATION_MODE_REQUIRED: SpeculationMode.REQUIRED,
}
PRIORITIES: Mapping[int, Priority] = {
    v1.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    v1.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    v1.PRIORITY_BATCH: Priority.BATCH,
}

Number = TypeVar("Number", int, float)
Known = TypeVar("Known", bound=Enum)


class Violations:
    """Collects the broken rules of one request."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []
        self._more = 0

    def add(self, field: str, description: str) -> None:
        """Notes that `field` breaks a rule; of very many, the first are kept and the others counted."""
        if len(self._found) < MAX_VIOLATIONS:
            self._found.append(FieldViolation(field, description))
        else:
            self._more += 1

    def require(self, holds: bool, field: str, description: str) -> bool:
        """Notes `description` unless `holds`, which it returns."""
        if not holds:
            self.add(field, description)
        return holds

    def raise_if_any(self) -> None:
        """Raises RouterError INVALID_REQUEST if any rule was broken."""
        if self._found:
            shown = "; ".join(f"{item.field}: {item.description}" for item in self._found[:5])
            unseen = len(self._found) - 5 + self._more
            more = f" (and {unseen} more)" if unseen > 0 else ""
            raise RouterError(
                ErrorReason.INVALID_REQUEST, f"invalid request: {shown}{more}", violations=tuple(self._found)
            )


def parse_input(wire: v1.GenerationInput, defaults: SamplingSettings) -> GenerationRequest:
    """Validates `wire` and fills in what it leaves unset, first from `defaults`, then from the domain's own.

    Raises:
        RouterError: INVALID_REQUEST, with every broken rule as a field violation.
    """
    found = Violations()
    sampling, seed = _sampling(wire.sampling, defaults, found)
    request = GenerationRequest(
        model=wire.model,
        prompt=_prompt(wire, found),
        sampling=sampling,
        stop=_stop(wire.stop, defaults, found),
        seed=seed,
        response_format=_response_format(wire, found),
        reasoning=_known(REASONING_MODES, wire.reasoning.mode, "reasoning.mode", found, ReasoningMode.AUTO),
        reasoning_budget=_optional_range(wire.reasoning, "budget_tokens", "reasoning", 0, MAX_OUTPUT_TOKENS, found),
        top_logprobs=_top_logprobs(wire, found),
        speculation=_known(SPECULATION_MODES, wire.speculation.mode, "speculation.mode", found, SpeculationMode.AUTO),
        draft_depth=_optional_range(wire.speculation, "depth", "speculation", 1, 16, found),
        priority=_known(PRIORITIES, wire.priority, "priority", found, Priority.INTERACTIVE),
        time_budget=_time_budget(wire, found),
        correlation_id=_correlation_id(wire.correlation_id, found),
        labels=_labels(wire.labels, found),
        tools=_tools(wire.tools, found),
    )
    if request.speculation is SpeculationMode.OFF and request.draft_depth is not None:
        found.add("speculation.depth", "must be unset where speculation.mode is OFF")
    found.raise_if_any()
    return request


def parse_model_name(wire: v1.GenerationInput) -> str:
    """The name of the model. Raises RouterError INVALID_REQUEST for none or one that cannot be a name."""
    found = Violations()
    if found.require(bool(wire.model), "model", "is required"):
        found.require(len(wire.model) <= MAX_MODEL_NAME, "model", f"must be at most {MAX_MODEL_NAME} characters")
    found.raise_if_any()
    return wire.model


def refuse_unknown_fields(request: WireMessage) -> None:
    """A field of a newer contract would otherwise be accepted and ignored. Raises RouterError INVALID_REQUEST."""
    found = Violations()
    _find_unknown_fields(request, "", found)
    found.raise_if_any()


def _find_unknown_fields(message: WireMessage, path: str, found: Violations) -> None:
    unknown = UnknownFieldSet(message)
    for index in range(len(unknown)):
        found.add(f"{path}{unknown[index].field_number}", "is not a field that this server knows")
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for item in value if field.is_repeated else [value]:
            _find_unknown_fields(item, f"{path}{field.name}.", found)


def _prompt(wire: v1.GenerationInput, found: Violations) -> Prompt:
    which = wire.WhichOneof("prompt")
    if which == "messages":
        return _messages(wire.messages.messages, found)
    if which == "token_ids":
        ids = tuple(wire.token_ids.ids)
        found.require(bool(ids), "token_ids.ids", "must not be empty")
        return TokensPrompt(ids)
    if which == "text":
        found.require(bool(wire.text), "text", "must not be empty")
    else:
        found.add("prompt", "one of messages, text or token_ids is required")
    return TextPrompt(wire.text)


def _messages(wire: Iterable[v1.Message], found: Violations) -> MessagesPrompt:
    messages = []
    for index, message in enumerate(wire):
        at = f"messages.messages[{index}]"
        role = _known(ROLES, message.role, f"{at}.role", found, Role.USER)
        if role is not Role.ASSISTANT:
            found.require(not message.tool_calls, f"{at}.tool_calls", "only an assistant turn calls functions")
            found.require(not message.reasoning_content, f"{at}.reasoning_content", "only an assistant turn thinks")
        if role is not Role.TOOL:
            found.require(not message.tool_call_id, f"{at}.tool_call_id", "only a tool turn answers a call")
        calls = tuple(ToolCall(call.id, call.name, call.arguments_json) for call in message.tool_calls)
        messages.append(Message(role, message.content, message.reasoning_content, calls, message.tool_call_id))
    if found.require(bool(messages), "messages.messages", "must not be empty"):
        found.require(any(item.content for item in messages), "messages.messages", "every message is empty")
    found.require(len(messages) <= MAX_MESSAGES, "messages.messages", f"at most {MAX_MESSAGES} messages")
    return MessagesPrompt(tuple(messages))


def _sampling(
    wire: v1.SamplingParameters, defaults: SamplingSettings, found: Violations
) -> tuple[Sampling, int | None]:
    own = Sampling()
    values = {item.name: getattr(own, item.name) for item in fields(Sampling)}
    values.update(defaults.model_dump(exclude_none=True, exclude={"max_output_tokens"}))
    rules: Mapping[str, tuple[Callable[[float], bool], str]] = {
        "temperature": (lambda value: value == 0.0 or TINY <= value <= 10.0, f"must be 0 or in [{TINY:g}, 10]"),
        "top_p": (lambda value: TINY <= value <= 1.0, f"must be in [{TINY:g}, 1]"),
        "top_k": (lambda value: value <= 1_000_000, "must be at most 1000000"),
        "min_p": (lambda value: 0.0 <= value < 1.0, "must be in [0, 1)"),
        "repetition_penalty": (lambda value: 0.01 <= value <= 10.0, "must be in [0.01, 10]"),
        "presence_penalty": (lambda value: -10.0 <= value <= 10.0, "must be in [-10, 10]"),
        "frequency_penalty": (lambda value: -10.0 <= value <= 10.0, "must be in [-10, 10]"),
    }
    for name, (holds, description) in rules.items():
        if wire.HasField(name):  # type: ignore[arg-type]
            value = getattr(wire, name)
            # NaN fails every comparison, so it is refused like any other number out of range.
            if found.require(holds(value), f"sampling.{name}", f"{description}, not {value}"):
                values[name] = value
    bias = dict(wire.logit_bias)
    found.require(len(bias) <= MAX_LOGIT_BIAS, "sampling.logit_bias", f"at most {MAX_LOGIT_BIAS} entries")
    for token, value in bias.items():
        if not -100.0 <= value <= 100.0:
            found.add(f"sampling.logit_bias[{token}]", f"must be in [-100, 100], not {value}")
    values["logit_bias"] = bias
    return Sampling(**values), _optional_range(wire, "seed", "sampling", 0, MAX_SEED, found)


def _stop(wire: v1.StopConditions, defaults: SamplingSettings, found: Violations) -> Stop:
    limit = _optional_range(wire, "max_output_tokens", "stop", 1, MAX_OUTPUT_TOKENS, found)
    if limit is None:
        limit = defaults.max_output_tokens or Stop().max_output_tokens
    fewest = _optional_range(wire, "min_output_tokens", "stop", 0, limit, found) or 0
    sequences = tuple(wire.sequences)
    found.require(len(sequences) <= MAX_STOP_SEQUENCES, "stop.sequences", f"at most {MAX_STOP_SEQUENCES}")
    for index, sequence in enumerate(sequences[:MAX_STOP_SEQUENCES]):
        size = len(sequence.encode())
        found.require(
            1 <= size <= MAX_STOP_BYTES, f"stop.sequences[{index}]", f"must be 1 to {MAX_STOP_BYTES} bytes, not {size}"
        )
    found.require(len(wire.token_ids) <= MAX_STOP_TOKENS, "stop.token_ids", f"at most {MAX_STOP_TOKENS}")
    return Stop(limit, sequences, tuple(wire.token_ids), wire.ignore_end_of_generation, fewest)


def _response_format(wire: v1.GenerationInput, found: Violations) -> ResponseFormat | None:
    if not wire.HasField("response_format"):
        return None
    which = wire.response_format.WhichOneof("format")
    if which is None:
        found.add("response_format", "one of json_schema, json_object, regex or grammar is required")
        return None
    if which == "json_object":
        found.require(wire.response_format.json_object, "response_format.json_object", "must be true")
        return ResponseFormat(FormatKind.JSON_OBJECT)
    rule: str = getattr(wire.response_format, which)
    field = f"response_format.{which}"
    size = len(rule.encode())
    in_bounds = found.require(1 <= size <= MAX_RULE_BYTES, field, f"must be 1 to {MAX_RULE_BYTES} bytes, not {size}")
    if in_bounds and which == "json_schema":
        _check_json_object(rule, field, found)
    return ResponseFormat(FormatKind(which), rule)


def _check_json_object(text: str, field: str, found: Violations) -> None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        found.add(field, "is not valid JSON")
        return
    found.require(isinstance(value, dict), field, "must be a JSON object")


def _top_logprobs(wire: v1.GenerationInput, found: Violations) -> int | None:
    if not wire.HasField("logprobs"):
        return None
    count = wire.logprobs.top_count
    found.require(count <= 20, "logprobs.top_count", f"must be at most 20, not {count}")
    return count


def _time_budget(wire: v1.GenerationInput, found: Violations) -> float | None:
    if not wire.HasField("time_budget"):
        return None
    seconds = _seconds(wire.time_budget)
    holds = math.isfinite(seconds) and 0.0 < seconds <= MAX_TIME_BUDGET
    found.require(holds, "time_budget", f"must be positive and at most {MAX_TIME_BUDGET:.0f} s")
    return seconds


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _correlation_id(value: str, found: Violations) -> str:
    holds = len(value) <= MAX_CORRELATION_ID and value.isascii() and (value.isprintable() or not value)
    found.require(holds, "correlation_id", f"must be at most {MAX_CORRELATION_ID} printable ASCII characters")
    return value


def _labels(labels: Mapping[str, str], found: Violations) -> dict[str, str]:
    found.require(len(labels) <= MAX_LABELS, "labels", f"at most {MAX_LABELS} entries")
    for key, value in labels.items():
        holds = 1 <= len(key) <= MAX_LABEL_KEY and len(value) <= MAX_LABEL_VALUE
        found.require(
            holds, "labels", f"keys must have 1 to {MAX_LABEL_KEY} characters, values at most {MAX_LABEL_VALUE}"
        )
    return dict(labels)


def _tools(wire: Iterable[v1.ToolDefinition], found: Violations) -> tuple[Tool, ...]:
    tools = tuple(Tool(item.name, item.description, item.parameters_json_schema) for item in wire)
    found.require(len(tools) <= MAX_TOOLS, "tools", f"at most {MAX_TOOLS}")
    for index, tool in enumerate(tools):
        found.require(bool(tool.name), f"tools[{index}].name", "is required")
        if tool.parameters_json_schema:
            _check_json_object(tool.parameters_json_schema, f"tools[{index}].parameters_json_schema", found)
    return tools


def _known(table: Mapping[int, Known], value: int, field: str, found: Violations, otherwise: Known) -> Known:
    """The domain's word for an enum value; proto3 enums are open, so any number can arrive."""
    if value in table:
        return table[value]
    found.add(field, "is required" if value == 0 else f"unknown value {value}")
    return otherwise


def _optional_range(
    message: v1.SamplingParameters | v1.StopConditions | v1.Reasoning | v1.Speculation,
    name: str,
    prefix: str,
    low: int,
    high: int,
    found: Violations,
) -> int | None:
    if not message.HasField(name):  # type: ignore[arg-type]
        return None
    value: int = getattr(message, name)
    found.require(low <= value <= high, f"{prefix}.{name}", f"must be {low} to {high}, not {value}")
    return value
