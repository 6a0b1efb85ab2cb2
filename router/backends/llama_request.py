"""What llama-server is sent: bodies for the router's requests. Pure: no I/O."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from router.backends.llama_schema import SchemaError, checked_schema
from router.domain import (
    ErrorReason,
    FieldViolation,
    FormatKind,
    GenerationRequest,
    Message,
    MessagesPrompt,
    ReasoningMode,
    ResponseFormat,
    RouterError,
    TextPrompt,
    TokensPrompt,
    Tool,
)

CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/completion"
MAX_SEED = 2**32 - 2  # the next one asks llama.cpp to draw a seed of its own
SAMPLERS = ["penalties", "top_k", "top_p", "min_p", "temperature"]  # the router's order, not llama.cpp's own

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a loaded model takes: tokens of context, and entries of the vocabulary."""

    context_length: int
    vocabulary_size: int


def generation_body(request: GenerationRequest, seed: int | None, limits: Limits) -> tuple[str, Json]:
    """Path and body that start a streamed generation.

    Raises:
        RouterError: INVALID_REQUEST for token ids outside the vocabulary and schemas that llama.cpp cannot follow;
            FIELD_NOT_IMPLEMENTED for a response format without messages.
    """
    refuse_foreign_tokens(request, limits)
    body = _common_body(request, seed, limits)
    count = request.top_logprobs
    if isinstance(request.prompt, MessagesPrompt):
        body |= chat_body(request) | {"verbose": True}  # verbose: the last event tells what stopped it
        if count is not None:
            body |= {"logprobs": True, "top_logprobs": max(count, 1)}
        if request.response_format is not None:
            body["response_format"] = _chat_format(request.response_format)
        return CHAT_PATH, body
    if request.response_format is not None:
        # Here llama.cpp generates freely where it cannot compile the schema; for messages it reports an error.
        raise RouterError(
            ErrorReason.FIELD_NOT_IMPLEMENTED,
            "the llama.cpp backend binds answers to a response format for messages only",
            metadata={"field": "response_format"},
        )
    body["prompt"] = request.prompt.text if isinstance(request.prompt, TextPrompt) else list(request.prompt.ids)
    if count is not None:
        body["n_probs"] = max(count, 1)
    return COMPLETION_PATH, body


def chat_body(request: GenerationRequest) -> Json:
    """The part of a body that decides how messages are rendered."""
    assert isinstance(request.prompt, MessagesPrompt)
    body: Json = {"messages": [_message(message) for message in request.prompt.messages]}
    body["reasoning_format"] = "deepseek"  # thoughts in a field of their own
    if request.tools:
        body["tools"] = [tool_body(tool) for tool in request.tools]
    if request.reasoning is not ReasoningMode.AUTO:
        body["chat_template_kwargs"] = {"enable_thinking": request.reasoning is ReasoningMode.ON}
    return body


def _common_body(request: GenerationRequest, seed: int | None, limits: Limits) -> Json:
    sampling, stop = request.sampling, request.stop
    greedy = sampling.greedy  # truncation cannot change the most likely token, and would only cost time
    return {
        "stream": True,
        "return_progress": True,
        "timings_per_token": True,
        "cache_prompt": True,
        "n_predict": stop.max_output_tokens,
        "stop": list(stop.sequences),
        "ignore_eos": stop.ignore_end_of_generation,
        "samplers": SAMPLERS,
        "temperature": sampling.temperature,
        "top_k": 0 if greedy else sampling.top_k,
        "top_p": 1.0 if greedy else sampling.top_p,
        "min_p": 0.0 if greedy else sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_last_n": limits.context_length,
        "dynatemp_range": 0.0,
        "mirostat": 0,
        "min_keep": 0,
        "logit_bias": [[token, bias] for token, bias in sampling.logit_bias.items()],
        "seed": seed or 0,
        "post_sampling_probs": False,
    }


def _message(message: Message) -> Json:
    body: Json = {"role": message.role.value, "content": message.content}
    if message.reasoning_content:
        body["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        body["tool_call_id"] = message.tool_call_id
    return body


def tool_body(tool: Tool) -> Json:
    """A function as chat APIs describe it."""
    parameters = json.loads(tool.parameters_json_schema) if tool.parameters_json_schema else {"type": "object"}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _chat_format(response_format: ResponseFormat) -> Json:
    if response_format.kind is FormatKind.JSON_OBJECT:
        return {"type": "json_object"}
    try:
        schema = checked_schema(response_format.rule)
    except SchemaError as error:
        raise invalid("response_format.json_schema", str(error)) from None
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def refuse_foreign_tokens(request: GenerationRequest, limits: Limits) -> None:
    """Raises RouterError INVALID_REQUEST for token ids that llama.cpp would drop or fail on."""
    size = limits.vocabulary_size
    prompt = request.prompt.ids if isinstance(request.prompt, TokensPrompt) else ()
    for field, ids in (("token_ids", prompt), ("sampling.logit_bias", request.sampling.logit_bias)):
        if any(not 0 <= token < size for token in ids):
            raise invalid(field, f"the model's vocabulary has {size} tokens")


def invalid(field: str, description: str) -> RouterError:
    """An INVALID_REQUEST error that names one field."""
    return RouterError(
        ErrorReason.INVALID_REQUEST,
        f"{field}: {description}",
        metadata={"field": field},
        violations=(FieldViolation(field, description),),
    )
