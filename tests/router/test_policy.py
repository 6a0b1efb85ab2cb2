"""Routing and refusals: pure decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.scripted import ALL_FIELDS, entry, facts

from router.catalog import ModelEntry
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
    ModelFormat,
    Offer,
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
OFFERS = {"b": Offer(BackendKind.LLAMA_CPP), "a": Offer(BackendKind.LLAMA_CPP), "m": Offer(BackendKind.MLX)}
SLOW = {**OFFERS, "m": Offer(BackendKind.MLX, refusal="there is only a CPU")}


def without(capability: Capability) -> object:
    base = facts()
    return replace(base, capabilities={**base.capabilities, capability: CapabilityFact(False, "for the test")})


def reason_of(request: GenerationRequest, model: object, drafting: Drafting | None = None) -> RouterError:
    with pytest.raises(RouterError) as caught:
        check_request(request, model, ALL_FIELDS, drafting)  # type: ignore[arg-type]
    return caught.value


def test_a_gguf_goes_to_llama_cpp_and_says_why() -> None:
    route, _ = choose_route("alias", entry(), OFFERS)
    assert (route.requested_model, route.model, route.backend, route.kind) == (
        "alias",
        "tiny",
        "a",
        BackendKind.LLAMA_CPP,
    )
    assert "tiny.gguf is a llama model in GGUF" in route.reason
    assert "no drafting: no head" in route.reason


@pytest.mark.parametrize(("speculation", "said"), [("auto", "drafts with its own"), ("off", "switch off")])
def test_the_reason_tells_of_a_head(speculation: str, said: str) -> None:
    base = facts()
    model = entry(
        model_facts=replace(base, capabilities={**base.capabilities, Capability.MTP: CapabilityFact(True, "nextn")}),
        speculation=speculation,
    )
    assert said in choose_route("tiny", model, OFFERS)[0].reason


def test_the_settings_may_name_the_backend() -> None:
    route, _ = choose_route("tiny", entry(backend="b"), OFFERS)
    assert route.backend == "b"
    assert "settings" in route.reason


def test_no_backend_for_the_file() -> None:
    with pytest.raises(RouterError) as caught:
        choose_route("tiny", entry(), {"m": Offer(BackendKind.MLX)})
    assert caught.value.reason is ErrorReason.MODEL_LOAD_FAILED


def checkpoint(*, head: bool = True, gguf: bool = True, **overrides: object) -> ModelEntry:
    base = facts(format=ModelFormat.CHECKPOINT, **overrides)
    head_fact = CapabilityFact(head, "mtp.fc.weight" if head else "declared but absent: mtp_num_hidden_layers = 1")
    base = replace(base, capabilities={**base.capabilities, Capability.MTP: head_fact})
    model = entry("cp", model_facts=base, path="/nowhere/cp")
    return replace(model, gguf=entry("cp") if gguf else None)


@pytest.mark.parametrize(
    ("model", "offers", "backend", "said"),
    [
        (checkpoint(), OFFERS, "m", "mtp.fc.weight"),
        (checkpoint(gguf=False), OFFERS, "m", "mtp.fc.weight"),
        (checkpoint(head=False), OFFERS, "a", "declared but absent"),
        (checkpoint(head=False, gguf=False), OFFERS, "m", "no drafting: declared but absent"),
        (checkpoint(), SLOW, "a", "only a CPU"),
        (checkpoint(problem="cp: config.json is cut short"), OFFERS, "a", "cut short"),
    ],
)
def test_a_checkpoint_goes_where_its_head_can_be_used(
    model: ModelEntry, offers: dict[str, Offer], backend: str, said: str
) -> None:
    route, served = choose_route("cp", model, offers)
    assert route.backend == backend
    assert said in route.reason
    assert served.facts.format is (ModelFormat.CHECKPOINT if backend == "m" else ModelFormat.GGUF)


@pytest.mark.parametrize(
    ("model", "offers", "reason"),
    [
        (checkpoint(gguf=False), SLOW, ErrorReason.MODEL_LOAD_FAILED),
        (checkpoint(gguf=False), {"a": Offer(BackendKind.LLAMA_CPP)}, ErrorReason.MODEL_LOAD_FAILED),
        (checkpoint(gguf=False), {"m": replace(SLOW["m"], failed=True)}, ErrorReason.BACKEND_UNAVAILABLE),
        (checkpoint(gguf=False, problem="broken"), OFFERS, ErrorReason.MODEL_LOAD_FAILED),
    ],
)
def test_a_checkpoint_that_nothing_can_serve(model: ModelEntry, offers: dict[str, Offer], reason: ErrorReason) -> None:
    with pytest.raises(RouterError) as caught:
        choose_route("cp", model, offers)
    assert caught.value.reason is reason


def test_the_settings_cannot_name_a_backend_for_other_files() -> None:
    with pytest.raises(RouterError, match="serves no gguf models"):
        choose_route("tiny", entry(backend="m"), OFFERS)
    with pytest.raises(
        RouterError, match="serves no gguf models"
    ):  # no checkpoint at all: the engine is not even there
        choose_route("tiny", entry(backend="m"), {"a": Offer(BackendKind.LLAMA_CPP)})
    slow = replace(checkpoint(), settings=entry(backend="m").settings)
    with pytest.raises(RouterError, match="only a CPU"):
        choose_route("cp", slow, SLOW)


def test_a_broken_file_is_refused_with_its_problem() -> None:
    with pytest.raises(RouterError) as caught:
        choose_route("tiny", entry(model_facts=facts(problem="tiny.gguf does not exist")), OFFERS)
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
