"""Validation: every field counts, every broken rule is named."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from google.protobuf import descriptor
from mtp_router.generate import v1

from router.domain import ErrorReason, RouterError, Sampling, Stop
from router.policy import requested_fields
from router.services.parse import parse_input
from router.settings import SamplingSettings

NO_DEFAULTS = SamplingSettings()


def minimal() -> v1.GenerationInput:
    return v1.GenerationInput(model="tiny", text="Hi")


def parse(**fields: object) -> object:
    return parse_input(v1.GenerationInput(**{"model": "tiny", "text": "Hi", **fields}), NO_DEFAULTS)


# A valid value, other than the default, for every field that a request can set.
SETTINGS: dict[str, Callable[[v1.GenerationInput], None]] = {
    "model": lambda wire: setattr(wire, "model", "other"),
    "messages": lambda wire: wire.messages.messages.add(role=v1.ROLE_USER, content="Hi"),
    "text": lambda wire: setattr(wire, "text", "Ho"),
    "token_ids": lambda wire: wire.token_ids.ids.append(1),
    "sampling.temperature": lambda wire: setattr(wire.sampling, "temperature", 0.0),
    "sampling.top_p": lambda wire: setattr(wire.sampling, "top_p", 0.5),
    "sampling.top_k": lambda wire: setattr(wire.sampling, "top_k", 7),
    "sampling.min_p": lambda wire: setattr(wire.sampling, "min_p", 0.1),
    "sampling.seed": lambda wire: setattr(wire.sampling, "seed", 0),
    "sampling.repetition_penalty": lambda wire: setattr(wire.sampling, "repetition_penalty", 1.1),
    "sampling.presence_penalty": lambda wire: setattr(wire.sampling, "presence_penalty", 0.5),
    "sampling.frequency_penalty": lambda wire: setattr(wire.sampling, "frequency_penalty", 0.5),
    "sampling.logit_bias": lambda wire: wire.sampling.logit_bias.update({3: -1.0}),
    "stop.max_output_tokens": lambda wire: setattr(wire.stop, "max_output_tokens", 9),
    "stop.sequences": lambda wire: wire.stop.sequences.append("END"),
    "stop.token_ids": lambda wire: wire.stop.token_ids.append(2),
    "stop.ignore_end_of_generation": lambda wire: setattr(wire.stop, "ignore_end_of_generation", True),
    "stop.min_output_tokens": lambda wire: setattr(wire.stop, "min_output_tokens", 3),
    "response_format.json_schema": lambda wire: setattr(wire.response_format, "json_schema", "{}"),
    "response_format.json_object": lambda wire: setattr(wire.response_format, "json_object", True),
    "response_format.regex": lambda wire: setattr(wire.response_format, "regex", "a+"),
    "response_format.grammar": lambda wire: setattr(wire.response_format, "grammar", 'start: "a"'),
    "reasoning.mode": lambda wire: setattr(wire.reasoning, "mode", v1.REASONING_MODE_ON),
    "reasoning.budget_tokens": lambda wire: setattr(wire.reasoning, "budget_tokens", 0),
    "logprobs.top_count": lambda wire: setattr(wire.logprobs, "top_count", 3),
    "speculation.mode": lambda wire: setattr(wire.speculation, "mode", v1.SPECULATION_MODE_REQUIRED),
    "speculation.depth": lambda wire: setattr(wire.speculation, "depth", 2),
    "priority": lambda wire: setattr(wire, "priority", v1.PRIORITY_BATCH),
    "time_budget": lambda wire: wire.time_budget.FromSeconds(3),
    "correlation_id": lambda wire: setattr(wire, "correlation_id", "incident-7"),
    "labels": lambda wire: wire.labels.update({"tenant": "a"}),
    "tools": lambda wire: wire.tools.add(name="page", parameters_json_schema="{}"),
}


def contract_fields() -> set[str]:
    """Every field of GenerationInput, one level down for its own messages, as dotted names."""
    flat = {"messages", "token_ids", "time_budget", "labels", "tools"}  # checked whole, or by tests of their own
    names = set()
    for field in v1.GenerationInput.DESCRIPTOR.fields:
        if field.name in flat or field.type != descriptor.FieldDescriptor.TYPE_MESSAGE:
            names.add(field.name)
        else:
            names |= {f"{field.name}.{inner.name}" for inner in field.message_type.fields}
    return names


def test_the_table_of_settings_is_complete() -> None:
    assert set(SETTINGS) == contract_fields()


@pytest.mark.parametrize("name", SETTINGS)
def test_no_field_is_accepted_and_ignored(name: str) -> None:
    wire = minimal()
    SETTINGS[name](wire)
    assert parse_input(wire, NO_DEFAULTS) != parse_input(minimal(), NO_DEFAULTS)


# Fields that every backend honours; all others must show up in `requested_fields`, so that a backend can refuse them.
MANDATORY = {
    "model",
    "messages",
    "text",
    "token_ids",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.top_k",
    "sampling.min_p",
    "sampling.seed",
    "stop.max_output_tokens",
    "stop.sequences",
    "speculation.mode",
    "speculation.depth",
    "priority",
    "time_budget",
    "correlation_id",
    "labels",
}


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - MANDATORY))
def test_optional_features_are_announced_to_backends(name: str) -> None:
    wire = minimal()
    SETTINGS[name](wire)
    announced = "logprobs" if name == "logprobs.top_count" else name
    assert requested_fields(parse_input(wire, NO_DEFAULTS)) == {announced}


def test_defaults_come_from_the_model_then_from_the_domain() -> None:
    request = parse_input(minimal(), SamplingSettings(temperature=0.0, max_output_tokens=11))
    assert request.sampling == Sampling(temperature=0.0)
    assert request.stop == Stop(max_output_tokens=11)


def test_zero_means_zero() -> None:
    wire = minimal()
    wire.sampling.temperature = 0.0
    assert parse_input(wire, SamplingSettings(temperature=0.9)).sampling.greedy


def message(**fields: object) -> v1.MessageList:
    return v1.MessageList(messages=[v1.Message(**{"role": v1.ROLE_USER, "content": "Hi", **fields})])


BAD: list[tuple[dict[str, object], str]] = [
    ({"text": ""}, "text"),
    ({"messages": v1.MessageList()}, "messages.messages"),
    ({"messages": message(content="")}, "messages.messages"),
    ({"messages": message(role=v1.ROLE_UNSPECIFIED)}, "messages.messages[0].role"),
    ({"messages": message(role=99)}, "messages.messages[0].role"),
    ({"messages": message(tool_call_id="x")}, "messages.messages[0].tool_call_id"),
    ({"messages": message(reasoning_content="x")}, "messages.messages[0].reasoning_content"),
    ({"token_ids": v1.TokenIdList()}, "token_ids.ids"),
    *[
        ({"sampling": v1.SamplingParameters(**{name: value})}, f"sampling.{name}")
        for name, values in {
            "temperature": (-0.1, 1e-40, 10.5, math.nan, math.inf),
            "top_p": (0.0, 1e-46, -1.0, 1.01, math.nan),
            "top_k": (1_000_001,),
            "min_p": (-0.1, 1.0, math.nan),
            "seed": (2**32 - 1,),
            "repetition_penalty": (0.0, 1e-40, -1.0, 11.0, math.nan),
            "presence_penalty": (-11.0, math.inf),
            "frequency_penalty": (11.0, math.nan),
        }.items()
        for value in values
    ],
    ({"sampling": v1.SamplingParameters(logit_bias={4: math.nan})}, "sampling.logit_bias[4]"),
    ({"sampling": v1.SamplingParameters(logit_bias=dict.fromkeys(range(1025), 1.0))}, "sampling.logit_bias"),
    ({"stop": v1.StopConditions(max_output_tokens=0)}, "stop.max_output_tokens"),
    ({"stop": v1.StopConditions(max_output_tokens=2**31)}, "stop.max_output_tokens"),
    ({"stop": v1.StopConditions(max_output_tokens=5, min_output_tokens=6)}, "stop.min_output_tokens"),
    ({"stop": v1.StopConditions(sequences=["x"] * 17)}, "stop.sequences"),
    ({"stop": v1.StopConditions(sequences=[""])}, "stop.sequences[0]"),
    ({"stop": v1.StopConditions(sequences=["ok", "é" * 129])}, "stop.sequences[1]"),
    ({"stop": v1.StopConditions(token_ids=range(65))}, "stop.token_ids"),
    ({"response_format": v1.ResponseFormat()}, "response_format"),
    ({"response_format": v1.ResponseFormat(json_object=False)}, "response_format.json_object"),
    ({"response_format": v1.ResponseFormat(json_schema="{")}, "response_format.json_schema"),
    ({"response_format": v1.ResponseFormat(json_schema="3")}, "response_format.json_schema"),
    ({"response_format": v1.ResponseFormat(json_schema="[" * 60_000)}, "response_format.json_schema"),
    ({"response_format": v1.ResponseFormat(regex="")}, "response_format.regex"),
    ({"response_format": v1.ResponseFormat(grammar="x" * (64 * 2**10 + 1))}, "response_format.grammar"),
    ({"reasoning": v1.Reasoning(mode=9)}, "reasoning.mode"),
    ({"logprobs": v1.LogprobsOptions(top_count=21)}, "logprobs.top_count"),
    ({"speculation": v1.Speculation(mode=9)}, "speculation.mode"),
    ({"speculation": v1.Speculation(depth=0)}, "speculation.depth"),
    ({"speculation": v1.Speculation(depth=17)}, "speculation.depth"),
    ({"speculation": v1.Speculation(mode=v1.SPECULATION_MODE_OFF, depth=2)}, "speculation.depth"),
    ({"priority": 9}, "priority"),
    ({"time_budget": {"seconds": 0}}, "time_budget"),
    ({"time_budget": {"seconds": -1}}, "time_budget"),
    ({"time_budget": {"seconds": 10**9}}, "time_budget"),
    ({"correlation_id": "x" * 129}, "correlation_id"),
    ({"correlation_id": "line\nbreak"}, "correlation_id"),
    ({"correlation_id": "é"}, "correlation_id"),
    ({"labels": {str(i): "" for i in range(17)}}, "labels"),
    ({"labels": {"": "x"}}, "labels"),
    ({"labels": {"k": "x" * 257}}, "labels"),
    ({"tools": [v1.ToolDefinition()]}, "tools[0].name"),
    ({"tools": [v1.ToolDefinition(name="f", parameters_json_schema="[]")]}, "tools[0].parameters_json_schema"),
]


@pytest.mark.parametrize(("fields", "violated"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_names_the_field(fields: dict[str, object], violated: str) -> None:
    with pytest.raises(RouterError) as caught:
        parse(**fields)
    assert caught.value.reason is ErrorReason.INVALID_REQUEST
    assert violated in [item.field for item in caught.value.violations]


def test_no_prompt_at_all() -> None:
    with pytest.raises(RouterError) as caught:
        parse_input(v1.GenerationInput(model="tiny"), NO_DEFAULTS)
    assert [item.field for item in caught.value.violations] == ["prompt"]


def test_all_broken_rules_are_reported_together() -> None:
    with pytest.raises(RouterError) as caught:
        parse(text="", sampling=v1.SamplingParameters(temperature=-1, top_p=2), priority=5)
    assert {item.field for item in caught.value.violations} == {
        "text",
        "sampling.temperature",
        "sampling.top_p",
        "priority",
    }
