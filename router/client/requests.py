"""Builds request messages from plain Python values; what is not given, or given as None, stays unset."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypedDict

from google.protobuf.duration_pb2 import Duration
from mtp_router.generate import v1

from router.client.enums import enum_number


class GenerationFields(TypedDict, total=False):
    """Keyword arguments of `stream`, `generate` and `count_tokens`; the contract's GenerationInput explains each.

    Enums are taken by short lower-case name ("user", "off", "batch") or as a value of the generated enum.
    """

    # The prompt: at most one of the three.
    messages: Iterable[v1.Message | Mapping[str, Any]] | None  # rendered through the model's chat template
    prompt: str | None  # text given to the model as it is, without a chat template
    token_ids: Iterable[int] | None
    # Sampling.
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    # Stop conditions.
    max_output_tokens: int | None
    stop: Iterable[str] | None
    stop_token_ids: Iterable[int] | None
    ignore_end_of_generation: bool | None
    min_output_tokens: int | None
    # Response format: at most one of the four.
    json_schema: str | Mapping[str, Any] | None
    json_object: bool | None
    regex: str | None
    grammar: str | None
    # Everything else.
    reasoning: v1.ReasoningMode | str | None
    reasoning_budget_tokens: int | None
    top_logprobs: int | None  # 0: of the chosen tokens only
    speculation: v1.SpeculationMode | str | None
    draft_depth: int | None
    priority: v1.Priority | str | None
    time_budget: float | timedelta | None  # seconds
    correlation_id: str | None
    labels: Mapping[str, str] | None
    tools: Iterable[v1.ToolDefinition | Mapping[str, Any]] | None


def generation_input(model: str, fields: GenerationFields) -> v1.GenerationInput:
    """The body shared by every generation request.

    Raises:
        TypeError: an unknown keyword, or a value of a wrong type.
        ValueError: more than one prompt or response format, an unknown enum name, a number out of its type's range.
            Both name the keyword.
    """
    unknown = fields.keys() - GenerationFields.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown keyword arguments: {', '.join(sorted(unknown))}")
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    body = v1.GenerationInput(
        model=model,
        sampling=_part(v1.SamplingParameters, given, _SAMPLING),
        stop=_part(v1.StopConditions, given, _STOP),
    )
    _set_prompt(body, given)
    _set_response_format(body, given)
    _set_others(body, given)
    return body


@contextlib.contextmanager
def _naming(keyword: str) -> Iterator[None]:
    """Has errors say which keyword they are about: protobuf's own do not."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{keyword}: {error}") from None
    except (TypeError, AttributeError) as error:
        raise TypeError(f"{keyword}: {error}") from None


_SAMPLING = {
    name: name
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
    )
}
_STOP = {
    "max_output_tokens": "max_output_tokens",
    "stop": "sequences",
    "stop_token_ids": "token_ids",
    "ignore_end_of_generation": "ignore_end_of_generation",
    "min_output_tokens": "min_output_tokens",
}


def _part(message: Any, given: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """A sub-message of the given fields; None, which leaves it unset, where none is given."""
    if isinstance(given.get("stop"), str):
        raise TypeError("stop is a list of strings, not one string")
    whole: Any = None
    for keyword in (name for name in names if name in given):
        with _naming(keyword):
            part = message(**{names[keyword]: given[keyword]})
        whole = whole or message()
        whole.MergeFrom(part)
    return whole


def _only_one(given: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    chosen = [name for name in names if name in given]
    if len(chosen) > 1:
        raise ValueError(f"give one of {', '.join(names)}, not {' and '.join(chosen)}")
    return chosen[0] if chosen else None


def _set_prompt(body: v1.GenerationInput, given: Mapping[str, Any]) -> None:
    keyword = _only_one(given, ("messages", "prompt", "token_ids"))
    if keyword is None:
        return
    with _naming(keyword):
        match keyword, given[keyword]:
            case "messages", messages:
                body.messages.CopyFrom(v1.MessageList(messages=[_message(message) for message in messages]))
            case "prompt", text:
                body.text = text
            case "token_ids", ids:
                body.token_ids.CopyFrom(v1.TokenIdList(ids=ids))


def _message(message: v1.Message | Mapping[str, Any]) -> v1.Message:
    if isinstance(message, v1.Message):
        return message
    if "role" not in message:
        raise ValueError("a message has no role")
    calls = [call if isinstance(call, v1.ToolCall) else v1.ToolCall(**call) for call in message.get("tool_calls", ())]
    return v1.Message(**{**message, "role": enum_number(v1.Role, message["role"]), "tool_calls": calls})


def _tool(tool: v1.ToolDefinition | Mapping[str, Any]) -> v1.ToolDefinition:
    return tool if isinstance(tool, v1.ToolDefinition) else v1.ToolDefinition(**tool)


def _set_response_format(body: v1.GenerationInput, given: Mapping[str, Any]) -> None:
    keyword = _only_one(given, ("json_schema", "json_object", "regex", "grammar"))
    if keyword is None:
        return
    with _naming(keyword):
        value = given[keyword]
        as_text = keyword == "json_schema" and not isinstance(value, str)
        setattr(body.response_format, keyword, json.dumps(value) if as_text else value)


def _set_others(body: v1.GenerationInput, given: Mapping[str, Any]) -> None:
    for keyword in given:
        with _naming(keyword):
            match keyword, given[keyword]:
                case "reasoning", mode:
                    body.reasoning.mode = enum_number(v1.ReasoningMode, mode)
                case "reasoning_budget_tokens", tokens:
                    body.reasoning.budget_tokens = tokens
                case "top_logprobs", count:
                    body.logprobs.CopyFrom(v1.LogprobsOptions(top_count=count))
                case "speculation", mode:
                    body.speculation.mode = enum_number(v1.SpeculationMode, mode)
                case "draft_depth", depth:
                    body.speculation.depth = depth
                case "priority", priority:
                    body.priority = enum_number(v1.Priority, priority)
                case "time_budget", value:
                    body.time_budget.CopyFrom(_duration(value))
                case "correlation_id", text:
                    body.correlation_id = text
                case "labels", labels:
                    body.labels.update(labels)
                case "tools", tools:
                    body.tools.extend(_tool(tool) for tool in tools)


def _duration(value: float | timedelta) -> Duration:
    duration = Duration()
    try:
        duration.FromTimedelta(value if isinstance(value, timedelta) else timedelta(seconds=value))
    except OverflowError:
        raise ValueError(f"{value} is out of range") from None
    return duration


def generate_request(model: str, fields: GenerationFields) -> v1.GenerateRequest:
    """Request of Generate; raises as `generation_input` does."""
    return v1.GenerateRequest(input=generation_input(model, fields))


def stream_request(model: str, fields: GenerationFields, *, include_progress: bool) -> v1.StreamGenerateRequest:
    """Request of StreamGenerate; raises as `generation_input` does."""
    return v1.StreamGenerateRequest(input=generation_input(model, fields), include_progress=include_progress)


def count_tokens_request(model: str, fields: GenerationFields) -> v1.CountTokensRequest:
    """Request of CountTokens; raises as `generation_input` does."""
    return v1.CountTokensRequest(input=generation_input(model, fields))
