"""What Ollama is asked: a request in the words of its API. Pure: no I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from router.backends.llama_request import MAX_SEED, invalid, tool_body
from router.backends.llama_schema import checked_schema
from router.domain import (
    Capability,
    FormatKind,
    GenerationRequest,
    Message,
    MessagesPrompt,
    ModelFacts,
    ReasoningMode,
    TextPrompt,
)

MAX_TOP_LOGPROBS = 20

Json = dict[str, Any]


def generation_body(
    request: GenerationRequest,
    *,
    seed: int | None,
    context_length: int,
    facts: ModelFacts,
    own_stops: tuple[str, ...],
    draft_depth: int | None,
) -> Json:
    """Arguments for the client's `chat`, or for its `generate` where the prompt is text.

    Args:
        seed: the seed in force, None for greedy sampling.
        own_stops: the model's own stop sequences, which those of a request would replace.
        draft_depth: tokens drafted a round, None not to draft.

    Raises:
        RouterError: INVALID_REQUEST for what Ollama does not take.
    """
    body: Json = {"options": _options(request, seed, context_length, own_stops, draft_depth)}
    if request.top_logprobs is not None:
        if request.top_logprobs > MAX_TOP_LOGPROBS:
            raise invalid("logprobs.top_logprobs", f"Ollama gives at most {MAX_TOP_LOGPROBS}")
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if request.response_format is not None:
        body["format"] = _format(request)
    if facts.can(Capability.REASONING) and request.reasoning is not ReasoningMode.AUTO:
        body["think"] = request.reasoning is ReasoningMode.ON
    match request.prompt:
        case TextPrompt(text):
            if not text:
                raise invalid("text", "Ollama takes an empty prompt for a request to load the model")
            # Raw: the text as it is, without the model's template around it.
            return body | {"prompt": text, "raw": True}
        case MessagesPrompt(messages):
            if request.tools:
                body["tools"] = [tool_body(tool) for tool in request.tools]
            return body | {"messages": _messages(messages)}
    raise invalid("token_ids", "Ollama takes no token ids")


def load_options(context_length: int, draft_depth: int | None) -> Json:
    """The options that a model is loaded with: other values in a request would have it loaded again."""
    return {"num_ctx": context_length} | ({} if draft_depth is None else {"draft_num_predict": draft_depth})


def _options(
    request: GenerationRequest, seed: int | None, context_length: int, own_stops: tuple[str, ...], depth: int | None
) -> Json:
    """A plain dict: the client's own class silently drops options that it does not know, such as draft_num_predict."""
    sampling, stop = request.sampling, request.stop
    if seed is not None and seed > MAX_SEED:
        raise invalid("sampling.seed", f"Ollama takes at most {MAX_SEED}")
    options: Json = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "typical_p": 1.0,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_last_n": context_length,
        "num_predict": stop.max_output_tokens,
        **load_options(context_length, depth),
    }
    if seed is not None:
        options["seed"] = seed
    if stop.sequences:
        options["stop"] = [*stop.sequences, *(text for text in own_stops if text not in stop.sequences)]
    return options


def _format(request: GenerationRequest) -> str | Json:
    assert request.response_format is not None
    if request.response_format.kind is FormatKind.JSON_OBJECT:
        return "json"
    try:
        return checked_schema(request.response_format.rule)
    except ValueError as error:
        raise invalid("response_format.json_schema", str(error)) from None


def _messages(messages: tuple[Message, ...]) -> list[Json]:
    names: dict[str, str] = {}  # of called functions by call, for the turns that answer them
    plain = []
    for message in messages:
        names |= {call.id: call.name for call in message.tool_calls if call.id}
        plain.append(_message(message, names))
    return plain


def _message(message: Message, names: Mapping[str, str]) -> Json:
    plain: Json = {"role": message.role.value, "content": message.content}
    if message.reasoning_content:
        plain["thinking"] = message.reasoning_content
    if message.tool_calls:
        plain["tool_calls"] = [
            {"function": {"name": call.name, "arguments": json.loads(call.arguments_json or "{}")}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        plain["tool_name"] = names.get(message.tool_call_id, message.tool_call_id)
    return plain
