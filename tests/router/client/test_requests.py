from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from mtp_router.generate import v1

from router.client.enums import enum_name, enum_number
from router.client.options import DEFAULT_OPTIONS, RetryPolicy, channel_options
from router.client.requests import GenerationFields, generation_input

EVERY_FIELD: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {7: -1.0},
    "max_output_tokens": 5,
    "stop": ["\n"],
    "stop_token_ids": [3],
    "ignore_end_of_generation": True,
    "min_output_tokens": 0,
    "reasoning": "off",
    "reasoning_budget_tokens": 0,
    "top_logprobs": 2,
    "speculation": "required",
    "draft_depth": 2,
    "priority": "batch",
    "time_budget": 1.5,
    "correlation_id": "c-1",
    "labels": {"incident": "7"},
    "tools": [{"name": "page", "description": "Pages someone.", "parameters_json_schema": "{}"}],
}
PROMPTS: list[dict[str, Any]] = [
    {
        "messages": [
            {
                "role": "assistant",
                "content": "x",
                "reasoning_content": "y",
                "tool_calls": [{"id": "1", "name": "page", "arguments_json": "{}"}],
                "tool_call_id": "1",
            }
        ]
    },
    {"prompt": "x"},
    {"token_ids": [1, 2]},
]
FORMATS: list[dict[str, Any]] = [
    {"json_schema": {"type": "object"}},
    {"json_object": True},
    {"regex": "a+"},
    {"grammar": "start: /a/"},
]


def declared(descriptor: Descriptor, prefix: str = "") -> set[str]:
    """Dotted paths of every leaf field below a message."""
    paths: set[str] = set()
    for field in descriptor.fields:
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry or inner.full_name.startswith("google."):
            paths.add(prefix + field.name)
        else:
            paths |= declared(inner, f"{prefix}{field.name}.")
    return paths


def filled(message: Message, prefix: str = "") -> set[str]:
    """Dotted paths of every leaf field that is set below a message."""
    paths: set[str] = set()
    for field, value in message.ListFields():
        path = prefix + field.name
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry or inner.full_name.startswith("google."):
            paths.add(path)
        else:
            for item in value if not isinstance(value, Message) else [value]:
                paths |= filled(item, path + ".")
    return paths


def build(**fields: Any) -> v1.GenerationInput:
    return generation_input("tiny", GenerationFields(**fields))  # type: ignore[typeddict-item]


def test_every_field_of_the_contract_can_be_set() -> None:
    reached: set[str] = set()
    for case in [*PROMPTS, *FORMATS, EVERY_FIELD]:
        reached |= filled(build(**case))
    # top_count 0 is a value of its own, told apart by the presence of LogprobsOptions
    assert reached == declared(v1.GenerationInput.DESCRIPTOR)


def test_keywords_and_examples_agree() -> None:
    keywords = set(EVERY_FIELD) | {name for case in [*PROMPTS, *FORMATS] for name in case}
    assert keywords == set(GenerationFields.__annotations__)


def test_what_is_not_given_stays_unset() -> None:
    assert filled(build()) == {"model"}
    assert filled(build(**dict.fromkeys(EVERY_FIELD), prompt="x", regex=None)) == {"model", "text"}
    assert not build(prompt="x").HasField("sampling")
    assert filled(build(temperature=0.0)) == {"model", "sampling.temperature"}
    assert build(top_logprobs=0).HasField("logprobs")


def test_plain_values_become_the_contract_s() -> None:
    body = build(**EVERY_FIELD, messages=[v1.Message(role=v1.ROLE_USER, content="a"), {"role": "tool", "content": "b"}])
    assert [message.role for message in body.messages.messages] == [v1.ROLE_USER, v1.ROLE_TOOL]
    assert body.reasoning.mode == v1.REASONING_MODE_OFF
    assert body.priority == v1.PRIORITY_BATCH
    assert body.time_budget.ToTimedelta() == timedelta(seconds=1.5)
    assert build(time_budget=timedelta(minutes=1)).time_budget.seconds == 60
    assert build(speculation=v1.SPECULATION_MODE_OFF).speculation.mode == v1.SPECULATION_MODE_OFF
    assert build(json_schema={"type": "object"}).response_format.json_schema == '{"type": "object"}'


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"prompt": "x", "token_ids": [1]}, ValueError, "prompt and token_ids"),
        ({"regex": "x", "json_object": True}, ValueError, "json_object and regex"),
        ({"reasoning": "sometimes"}, ValueError, "there are: auto, off, on"),
        ({"messages": [{"role": "robot", "content": ""}]}, ValueError, "system, user, assistant, tool"),
        ({"temprature": 1.0}, TypeError, "temprature"),
        ({"stop": "\n"}, TypeError, "list"),
        ({"seed": -1}, ValueError, "seed: .*-1"),
        ({"temperature": "hot"}, TypeError, "temperature: "),
        ({"stop": [1]}, TypeError, "stop: "),
        ({"token_ids": [1, -2]}, ValueError, "token_ids: .*-2"),
        ({"prompt": 3}, TypeError, "prompt: "),
        ({"regex": 3}, TypeError, "regex: "),
        ({"json_schema": {1, 2}}, TypeError, "json_schema: .* not JSON"),
        ({"messages": "hello"}, ValueError, "messages: a message has no role"),
        ({"messages": [None]}, TypeError, "messages: "),
        ({"messages": [{"content": "x"}]}, ValueError, "messages: a message has no role"),
        ({"messages": [{"role": "user", "contents": "x"}]}, ValueError, "messages: .*contents"),
        ({"draft_depth": -1}, ValueError, "draft_depth: .*-1"),
        ({"labels": {"a": 1}}, TypeError, "labels: "),
        ({"tools": [{"name": 1}]}, TypeError, "tools: "),
        ({"time_budget": "3"}, TypeError, "time_budget: "),
    ],
)
def test_what_no_request_can_say_is_refused_here(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**fields)


def test_enum_names_go_both_ways() -> None:
    for number in v1.FinishReason.values():
        name = enum_name(v1.FinishReason, number)
        assert number == 0 or enum_number(v1.FinishReason, name) == number
    assert enum_name(v1.FinishReason, 99) == "99"


def test_channel_options_are_overridable_one_by_one() -> None:
    options = dict(channel_options(None, {"grpc.keepalive_time_ms": 45_000, "grpc.enable_http_proxy": None, "x": 1}))
    assert options["grpc.keepalive_time_ms"] == 45_000
    assert options["x"] == 1
    assert "grpc.enable_http_proxy" not in options
    assert options["grpc.keepalive_timeout_ms"] == DEFAULT_OPTIONS["grpc.keepalive_timeout_ms"]
    assert options["grpc.enable_retries"] == 0
    assert "grpc.service_config" not in options


def test_every_method_is_retried() -> None:
    from mtp_router.generate.v1 import admin_service_pb2, generate_service_pb2, model_service_pb2

    config = RetryPolicy().service_config()["methodConfig"]
    named = {(name["service"], name["method"]) for entry in config for name in entry["name"]}
    assert named == {
        (service.full_name, method.name)
        for module in (admin_service_pb2, generate_service_pb2, model_service_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


@pytest.mark.parametrize("wrong", [{"attempts": 1}, {"attempts": 6}, {"initial_backoff": 0.0}, {"max_tokens": 0}])
def test_a_policy_that_grpc_would_ignore_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        RetryPolicy(**wrong)
