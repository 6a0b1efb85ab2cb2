"""What the Ollama lane supports and what it refuses, over real gRPC and real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from mtp_router.generate import v1
from support.ollama_process import Double

from router.client import RouterCallError

Connect = Callable[..., Any]

HELLO = [{"role": "user", "content": "good morning to you"}]
COUNT = [{"role": "user", "content": "count"}]
WEATHER = {
    "name": "weather",
    "description": "Weather of a city",
    "parameters_json_schema": '{"type":"object","properties":{"city":{"type":"string"}}}',
}


async def whole(client: Any, model: str, **options: Any) -> tuple[list[Any], Any]:
    """Every delta of one answer, and its end."""
    answer = client.stream(model, **{"temperature": 0.0, "max_output_tokens": 8, **options})
    deltas = [delta async for delta in answer]
    return deltas, answer.finished


def text(deltas: list[Any]) -> str:
    return "".join(delta.text for delta in deltas)


async def refused(client: Any, model: str, **options: Any) -> RouterCallError:
    with pytest.raises(RouterCallError) as caught:
        await whole(client, model, **options)
    return caught.value


async def test_chat(connect: Connect, double: Double) -> None:
    client, _ = await connect()
    history = [{"role": "system", "content": "be kind"}, *HELLO, {"role": "assistant", "content": "yes"}, *COUNT]
    deltas, end = await whole(client, "smol", messages=history, max_output_tokens=3)
    assert text(deltas) == "1 2 3 "
    assert end.reason == v1.FINISH_REASON_MAX_TOKENS
    assert (end.usage.prompt_tokens, end.usage.output_tokens) == (8, 3)
    (sent,) = double.asked("/api/chat")
    assert [(m["role"], m["content"]) for m in sent["messages"]] == [(m["role"], m["content"]) for m in history]
    assert sent["model"] == "smol:latest"
    assert sent["stream"] is True


async def test_text_goes_without_the_models_template(connect: Connect, double: Double) -> None:
    client, _ = await connect()
    deltas, end = await whole(client, "smol", prompt="one two")
    assert text(deltas) == "one two "
    assert end.reason == v1.FINISH_REASON_END_OF_GENERATION
    (sent,) = double.asked("/api/generate")
    assert sent["raw"] is True


async def test_token_prompts_are_refused(connect: Connect) -> None:
    client, _ = await connect()
    error = await refused(client, "smol", token_ids=[1, 2, 3])
    assert (error.reason, error.metadata["capability"]) == ("CAPABILITY_UNAVAILABLE", "TOKEN_PROMPT")


async def test_an_empty_text_is_refused_for_ollama_would_only_load(connect: Connect) -> None:
    client, _ = await connect()
    assert (await refused(client, "smol", prompt="")).reason == "INVALID_REQUEST"


async def test_stop_sequences_are_added_to_the_models_own(connect: Connect, double: Double) -> None:
    client, _ = await connect()
    deltas, end = await whole(client, "smol", messages=COUNT, stop=["4 "])
    assert text(deltas) == "1 2 3 "
    # Ollama does not tell a stop sequence from the model's own end.
    assert end.reason == v1.FINISH_REASON_END_OF_GENERATION
    assert double.asked("/api/chat")[0]["options"]["stop"] == ["4 ", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    "option", [{"stop_token_ids": [5]}, {"min_output_tokens": 2}, {"ignore_end_of_generation": True}]
)
async def test_stops_that_ollama_lacks_are_refused(connect: Connect, option: dict[str, Any]) -> None:
    client, _ = await connect()
    assert (await refused(client, "smol", messages=HELLO, **option)).reason == "FIELD_NOT_IMPLEMENTED"


async def test_a_seed_repeats_and_is_reported(connect: Connect) -> None:
    client, _ = await connect()
    options = {"messages": HELLO, "temperature": 1.0}
    first, end = await whole(client, "smol", seed=11, **options)
    again, _ = await whole(client, "smol", seed=11, **options)
    other, _ = await whole(client, "smol", seed=12, **options)
    assert text(first) == text(again) != text(other)
    assert (end.seed, end.replay) == (11, v1.REPLAY_BEST_EFFORT)
    assert "ollama=0.33.0-rc2 digest=9ae86aa77261" in end.numerics_fingerprint
    _, drawn = await whole(client, "smol", **options)
    repeated, _ = await whole(client, "smol", seed=drawn.seed, **options)
    assert text(repeated) == text((await whole(client, "smol", seed=drawn.seed, **options))[0])


async def test_every_sampler_value_is_sent(connect: Connect, double: Double) -> None:
    client, _ = await connect()
    sampling = {"temperature": 0.7, "top_p": 0.8, "top_k": 40, "min_p": 0.05}
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3}
    await whole(client, "smol", messages=HELLO, seed=5, **sampling, **penalties)
    options = double.asked("/api/chat")[0]["options"]
    names = {"repetition_penalty": "repeat_penalty"}
    for name, value in (sampling | penalties).items():
        assert options[names.get(name, name)] == pytest.approx(value)
    assert (options["seed"], options["num_predict"], options["num_ctx"], options["typical_p"]) == (5, 8, 8192, 1.0)


async def test_logit_bias_is_refused(connect: Connect) -> None:
    client, _ = await connect()
    error = await refused(client, "smol", messages=HELLO, logit_bias={4: 1.0})
    assert (error.reason, error.metadata["field"]) == ("FIELD_NOT_IMPLEMENTED", "sampling.logit_bias")


async def test_logprobs(connect: Connect) -> None:
    client, _ = await connect()
    deltas, _ = await whole(client, "smol", messages=COUNT, top_logprobs=3, max_output_tokens=2)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert [entry.token_bytes for entry in entries] == [b"1 ", b"2 "]
    assert not entries[0].HasField("token_id")
    assert [len(entry.top_logprobs) for entry in entries] == [3, 3]
    assert entries[0].logprob == pytest.approx(-0.25)
    plain, _ = await whole(client, "smol", messages=COUNT)
    assert not any(delta.logprobs for delta in plain)


async def test_a_schema_is_passed_on_and_bad_ones_are_refused(connect: Connect, double: Double) -> None:
    client, _ = await connect()
    schema = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}
    deltas, _ = await whole(client, "smol", messages=HELLO, json_schema=schema)
    assert json.loads(text(deltas)) == {"colour": "blue"}
    assert double.asked("/api/chat")[0]["format"]["required"] == ["colour"]
    deltas, _ = await whole(client, "smol", messages=HELLO, json_object=True)
    assert json.loads(text(deltas)) == {"ok": True}
    error = await refused(client, "smol", messages=HELLO, json_schema={"type": "string", "pattern": "a+"})
    assert error.reason == "INVALID_REQUEST"
    assert (await refused(client, "smol", messages=HELLO, regex="a+")).reason == "FIELD_NOT_IMPLEMENTED"


async def test_tools_there_and_back(connect: Connect, double: Double) -> None:
    client, _ = await connect()
    deltas, end = await whole(client, "thinker", messages=HELLO, tools=[WEATHER])
    (call,) = [call for delta in deltas for call in delta.tool_calls]
    assert (call.name, json.loads(call.arguments_json)) == ("weather", {"city": "Lisbon"})
    assert end.reason == v1.FINISH_REASON_TOOL_CALLS
    turns = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny there", "tool_call_id": call.id},
    ]
    deltas, end = await whole(client, "thinker", messages=turns, tools=[WEATHER])
    assert text(deltas) == "sunny there "
    assert end.reason == v1.FINISH_REASON_END_OF_GENERATION
    asked, answered = double.asked("/api/chat")[1]["messages"][1:]
    assert asked["tool_calls"] == [{"function": {"name": "weather", "arguments": {"city": "Lisbon"}}}]
    assert answered["tool_name"] == "weather"
    assert double.asked("/api/chat")[0]["tools"][0]["function"]["parameters"]["type"] == "object"


async def test_tools_are_refused_for_a_model_without(connect: Connect) -> None:
    client, _ = await connect()
    error = await refused(client, "smol", messages=HELLO, tools=[WEATHER])
    assert (error.reason, error.metadata["capability"]) == ("CAPABILITY_UNAVAILABLE", "TOOLS")


async def test_reasoning_is_apart_and_can_be_switched(connect: Connect) -> None:
    client, _ = await connect()
    deltas, _ = await whole(client, "thinker", messages=HELLO, reasoning="on")
    assert "".join(delta.reasoning_text for delta in deltas) == "Let me ponder."
    assert text(deltas) == "good morning to you "
    deltas, _ = await whole(client, "thinker", messages=HELLO, reasoning="off")
    assert "".join(delta.reasoning_text for delta in deltas) == ""
    error = await refused(client, "smol", messages=HELLO, reasoning="on")
    assert (error.reason, error.metadata["capability"]) == ("CAPABILITY_UNAVAILABLE", "REASONING")


async def test_counting_is_refused(connect: Connect) -> None:
    client, _ = await connect()
    with pytest.raises(RouterCallError) as caught:
        await client.count_tokens("smol", messages=HELLO)
    assert (caught.value.reason, caught.value.metadata["capability"]) == ("CAPABILITY_UNAVAILABLE", "COUNT_TOKENS")


async def test_an_over_long_text_is_refused_with_its_size(connect: Connect) -> None:
    client, _ = await connect()
    error = await refused(client, "small", prompt="x " * 20)
    assert error.reason == "PROMPT_TOO_LONG"
    assert (error.metadata["prompt_tokens"], error.metadata["context_length"]) == ("20", "16")


async def test_an_over_long_chat_is_cut_by_ollama_and_the_route_says_so(connect: Connect) -> None:
    client, _ = await connect()
    _, end = await whole(client, "small", messages=[{"role": "user", "content": "x " * 20}], max_output_tokens=2)
    assert end.usage.prompt_tokens == 16
    model = await client.get_model("small")
    assert "drops the oldest messages" in model.route.reason


async def test_cancel_closes_the_connection(connect: Connect, double: Double) -> None:
    double.fail(slow=0.02)
    client, backend = await connect()
    answer = client.stream("smol", messages=COUNT, temperature=0.0, max_output_tokens=1000)
    async for _ in answer:
        break
    answer.close()
    while double.tell()["running"]:
        await asyncio.sleep(0.01)
    assert double.tell()["left"] == 1
    assert (backend.status().active_requests, backend.status().queued_requests) == (0, 0)


async def test_a_head_is_used_only_where_ollama_shows_one(connect: Connect, double: Double) -> None:
    client, _ = await connect()
    _, end = await whole(client, "drafter", messages=HELLO, speculation="required")
    await whole(client, "plain-drafter", messages=HELLO)
    await whole(client, "smol", messages=HELLO)
    depths = [sent["options"].get("draft_num_predict") for sent in double.asked("/api/chat")]
    assert depths == [2, None, None]
    # Ollama does not tell what came of it.
    assert end.speculation.source == v1.DRAFT_SOURCE_UNSPECIFIED
    drafter = await client.get_model("drafter")
    assert "qwen35.nextn_predict_layers = 1" in drafter.route.reason
    assert (drafter.mtp_head.declared_layers, drafter.mtp_head.driver) == (1, "Ollama")
    assert not drafter.mtp_head.HasField("present")  # Ollama does not tell of tensors
    assert (await client.get_model("smol")).mtp_head.driver == ""
    assert (await refused(client, "smol", messages=HELLO, speculation="required")).reason == "CAPABILITY_UNAVAILABLE"
    assert (await refused(client, "drafter", messages=HELLO, speculation="off")).reason == "CAPABILITY_UNAVAILABLE"
    assert (await refused(client, "drafter", messages=HELLO, draft_depth=5)).reason == "CAPABILITY_UNAVAILABLE"


async def test_time_budget_ends_the_answer(connect: Connect, double: Double) -> None:
    double.fail(slow=0.02)
    client, _ = await connect()
    deltas, end = await whole(client, "smol", messages=COUNT, max_output_tokens=1000, time_budget=0.3)
    assert end.reason == v1.FINISH_REASON_TIME_LIMIT
    assert text(deltas).startswith("1 ")


async def test_what_is_known_of_a_model(connect: Connect) -> None:
    client, _ = await connect()
    model = await client.get_model("wise")
    facts = {item.capability: (item.support, item.evidence) for item in model.capabilities}
    assert facts[v1.CAPABILITY_TOOLS][0] == v1.CAPABILITY_SUPPORT_SUPPORTED
    assert "completion, thinking, tools" in facts[v1.CAPABILITY_TOOLS][1]
    assert facts[v1.CAPABILITY_COUNT_TOKENS][0] == v1.CAPABILITY_SUPPORT_UNSUPPORTED
    assert (model.name, model.architecture, model.quantization) == ("thinker", "qwen3", "Q4_1")
    assert model.context_length == 8192
    # 30 layers x 3 heads x 64 wide x keys and values x 2 bytes, for one request and its whole context
    assert model.memory_bytes == model.size_bytes + 8192 * 30 * 3 * 64 * 2 * 2
    listed = {item.name: item for item in [model async for model in client.list_models()]}
    assert set(listed) == {"smol", "thinker", "drafter", "plain-drafter", "small", "absent"}
    assert "ollama pull never/pulled:latest" in listed["absent"].problem
