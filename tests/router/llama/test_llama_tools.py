"""Functions through the real llama.cpp: a model that calls one, and one whose template knows none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.generation import collect, counting, entry, finished, text
from support.gguf_files import TOOL_TEMPLATE, Script, write_script_model

from router.backends.llama_cpp import LlamaCppBackend
from router.domain import (
    Capability,
    Delta,
    ErrorReason,
    FinishReason,
    Message,
    MessagesPrompt,
    Role,
    RouterError,
    Stop,
    Tool,
    ToolCall,
)
from router.policy import check_request

MakeBackend = Callable[..., LlamaCppBackend]

CALL = [
    "<tool_call>", "\n", '{"name": ', '"weather"', ', "arguments": ', '{"city": ', '"Lisbon"', "}}\n ", "</tool_call>",
]  # fmt: skip
WEATHER = Tool("weather", "Weather of a city", '{"type":"object","properties":{"city":{"type":"string"}}}')


@pytest.fixture(scope="session")
def tool_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every answer calls `weather`."""
    path = tmp_path_factory.mktemp("gguf") / "tools.gguf"
    write_script_model(path, {"<|assistant|>": Script(CALL)}, template=TOOL_TEMPLATE)
    return path


def asking(*messages: Message) -> MessagesPrompt:
    return MessagesPrompt((Message(Role.USER, "weather?"), *messages))


async def test_a_call_comes_whole_and_ends_the_answer(make_backend: MakeBackend, tool_file: Path) -> None:
    model = entry(tool_file, context_length=2048)
    assert model.facts.can(Capability.TOOLS)
    events = await collect(make_backend(), model, counting(prompt=asking(), tools=(WEATHER,)))
    (call,) = [call for event in events if isinstance(event, Delta) for call in event.tool_calls]
    assert (call.name, json.loads(call.arguments_json)) == ("weather", {"city": "Lisbon"})
    assert call.id
    assert text(events) == ""
    assert finished(events).reason is FinishReason.TOOL_CALLS


async def test_a_call_that_was_cut_is_not_given_out(make_backend: MakeBackend, tool_file: Path) -> None:
    request = counting(prompt=asking(), tools=(WEATHER,), stop=Stop(max_output_tokens=6))
    events = await collect(make_backend(), entry(tool_file, context_length=2048), request)
    assert not any(event.tool_calls for event in events if isinstance(event, Delta))
    assert finished(events).reason is FinishReason.MAX_TOKENS


async def test_calls_and_their_results_reach_the_template(make_backend: MakeBackend, tool_file: Path) -> None:
    backend, model = make_backend(), entry(tool_file, context_length=2048)
    call = ToolCall("call_1", "weather", '{"city": "Lisbon"}')
    turns = asking(Message(Role.ASSISTANT, "", tool_calls=(call,)), Message(Role.TOOL, "sunny", tool_call_id=call.id))
    alone = await backend.count_tokens(model, counting(prompt=asking()))
    with_tools = await backend.count_tokens(model, counting(prompt=asking(), tools=(WEATHER,)))
    with_turns = await backend.count_tokens(model, counting(prompt=turns, tools=(WEATHER,)))
    assert alone.prompt_tokens < with_tools.prompt_tokens < with_turns.prompt_tokens
    events = await collect(backend, model, counting(prompt=turns, tools=(WEATHER,)))
    assert finished(events).usage.prompt_tokens == with_turns.prompt_tokens


def test_a_template_that_knows_no_tools_is_told_by_name(script_file: Path, make_backend: MakeBackend) -> None:
    model = entry(script_file)
    backend = make_backend()
    request = replace(counting(prompt=asking()), tools=(WEATHER,))
    with pytest.raises(RouterError) as caught:
        check_request(request, model, backend.fields, None)
    assert caught.value.reason is ErrorReason.CAPABILITY_UNAVAILABLE
    assert "knows no tools" in caught.value.message
