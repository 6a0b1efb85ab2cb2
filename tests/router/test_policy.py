"""Routing and refusals: pure decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.scripted import ALL_FIELDS, entry, facts

from router.domain import (
    BackendKind,
    Capability,
    CapabilityFact,
    Drafting,
    ErrorReason,
    FormatKind,
    GenerationRequest,
    Message,
    MessagesPrompt,
    ReasoningMode,
    ResponseFormat,
    Role,
    RouterError,
    SpeculationMode,
    TextPrompt,
    TokensPrompt,
)
from router.policy import check_request, choose_route

TEXT = GenerationRequest("tiny", TextPrompt("Hi"))
CHAT = GenerationRequest("tiny", MessagesPrompt((Message(Role.USER, "Hi"),)))
BACKENDS = {"b": BackendKind.LLAMA_CPP, "a": BackendKind.LLAMA_CPP, "o": BackendKind.OLLAMA}


def without(capability: Capability) -> object:
    base = facts()
    return replace(base, capabilities={**base.capabilities, capability: CapabilityFact(False, "for the test")})


def reason_of(request: GenerationRequest, model: object, drafting: Drafting | None = None) -> RouterError:
    with pytest.raises(RouterError) as caught:
        check_request(request, model, ALL_FIELDS, drafting)  # type: ignore[arg-type]
    return caught.value


def test_a_gguf_goes_to_llama_cpp_and_says_why() -> None:
    route = choose_route("alias", entry(), BACKENDS)
    assert (route.requested_model, route.model, route.backend, route.kind) == (
        "alias",
        "tiny",
        "a",
        BackendKind.LLAMA_CPP,
    )
    assert "tiny.gguf is a llama model in GGUF" in route.reason
    assert "no drafting: no head" in route.reason


@pytest.mark.parametrize(("speculation", "said"), [("auto", "drafting 5 tokens a round"), ("off", "switch off")])
def test_the_reason_tells_of_a_head(speculation: str, said: str) -> None:
    base = facts()
    model = entry(
        model_facts=replace(base, capabilities={**base.capabilities, Capability.MTP: CapabilityFact(True, "nextn")}),
        speculation=speculation,
        draft_depth=5,
    )
    assert said in choose_route("tiny", model, BACKENDS).reason


def test_the_settings_may_name_the_backend() -> None:
    route = choose_route("tiny", entry(backend="b"), BACKENDS)
    assert route.backend == "b"
    assert "settings" in route.reason


def test_no_backend_for_the_file() -> None:
    with pytest.raises(RouterError) as caught:
        choose_route("tiny", entry(), {"o": BackendKind.OLLAMA})
    assert caught.value.reason is ErrorReason.BACKEND_UNAVAILABLE


def test_a_broken_file_is_refused_with_its_problem() -> None:
    with pytest.raises(RouterError) as caught:
        choose_route("tiny", entry(model_facts=facts(problem="tiny.gguf does not exist")), BACKENDS)
    assert caught.value.reason is ErrorReason.MODEL_LOAD_FAILED
    assert "does not exist" in caught.value.message


def test_what_the_backend_does_not_implement_is_named() -> None:
    request = replace(TEXT, top_logprobs=2, reasoning_budget=5)
    with pytest.raises(RouterError) as caught:
        check_request(request, entry(), frozenset({"logprobs"}), None)
    assert caught.value.reason is ErrorReason.FIELD_NOT_IMPLEMENTED
    assert caught.value.metadata["field"] == "reasoning.budget_tokens"


@pytest.mark.parametrize(
    ("request_", "capability"),
    [
        (CHAT, Capability.CHAT),
        (replace(TEXT, prompt=TokensPrompt((1,))), Capability.TOKEN_PROMPT),
        (replace(TEXT, reasoning=ReasoningMode.ON), Capability.REASONING),
        (replace(TEXT, response_format=ResponseFormat(FormatKind.JSON_OBJECT)), Capability.JSON_SCHEMA),
        (replace(TEXT, top_logprobs=0), Capability.LOGPROBS),
    ],
    ids=lambda value: value.name if isinstance(value, Capability) else "",
)
def test_a_missing_capability_is_refused_with_evidence(request_: GenerationRequest, capability: Capability) -> None:
    error = reason_of(request_, entry(model_facts=without(capability)))  # type: ignore[arg-type]
    assert error.reason is ErrorReason.CAPABILITY_UNAVAILABLE
    assert error.metadata["capability"] == capability.name
    assert "for the test" in error.message
    check_request(request_, entry(), ALL_FIELDS, None)


def test_thinking_off() -> None:
    off = replace(TEXT, reasoning=ReasoningMode.OFF)
    check_request(off, entry(), ALL_FIELDS, None)
    check_request(off, entry(model_facts=without(Capability.REASONING)), ALL_FIELDS, None)  # type: ignore[arg-type]
    always = entry(model_facts=facts(reasoning_switch=False))
    assert reason_of(off, always).metadata["capability"] == "REASONING"


REQUIRED = replace(TEXT, speculation=SpeculationMode.REQUIRED)
OFF = replace(TEXT, speculation=SpeculationMode.OFF)


@pytest.mark.parametrize(
    ("request_", "drafting", "accepted"),
    [
        (TEXT, None, True),
        (OFF, None, True),
        (REQUIRED, None, False),
        (replace(TEXT, draft_depth=2), None, False),
        (TEXT, Drafting(3), True),
        (REQUIRED, Drafting(3), True),
        (OFF, Drafting(3), False),
        (replace(TEXT, draft_depth=3), Drafting(3), True),
        (replace(TEXT, draft_depth=2), Drafting(3), False),
        (OFF, Drafting(None), True),
        (replace(TEXT, draft_depth=2), Drafting(None), True),
    ],
)
def test_speculation_is_honoured_or_refused(
    request_: GenerationRequest, drafting: Drafting | None, accepted: bool
) -> None:
    if accepted:
        check_request(request_, entry(), ALL_FIELDS, drafting)
    else:
        error = reason_of(request_, entry(), drafting)
        assert error.reason is ErrorReason.CAPABILITY_UNAVAILABLE
        assert error.metadata["capability"] == "MTP"
