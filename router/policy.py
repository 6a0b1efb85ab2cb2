"""Pure decisions: which backend answers a model and why, and whether a request asks for what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping

from router.catalog import ModelEntry
from router.domain import (
    BackendKind,
    Capability,
    Drafting,
    ErrorReason,
    GenerationRequest,
    MessagesPrompt,
    ModelFormat,
    Offer,
    ReasoningMode,
    Route,
    RouterError,
    SpeculationMode,
    TokensPrompt,
)


def choose_route(requested: str, entry: ModelEntry, offers: Mapping[str, Offer]) -> tuple[Route, ModelEntry]:
    """What answers `entry`, asked for as `requested`, and why; and the entry in the format that is served.

    A checkpoint with a head goes to the MLX engine. One without, or on a machine where the engine should not be used,
    goes to llama.cpp as the GGUF file that its settings name beside it; the engine decodes plainly where there is none.

    Args:
        offers: the configured backends by name.

    Raises:
        RouterError: MODEL_LOAD_FAILED where the model's files cannot be served, or not by a backend configured here;
            BACKEND_UNAVAILABLE where the backend that could has failed.
    """
    named = entry.settings.backend
    if named is not None:
        return _named_route(requested, entry, named, offers.get(named))
    if entry.path is None:
        return _kept_route(requested, entry, offers)
    if entry.facts.format is ModelFormat.GGUF:
        return _gguf_route(requested, entry, offers, _gguf_reason(entry))
    return _checkpoint_route(requested, entry, offers)


def _named_route(requested: str, entry: ModelEntry, name: str, offer: Offer | None) -> tuple[Route, ModelEntry]:
    formats = {item.facts.format: item for item in (entry.gguf, entry) if item is not None}
    served = formats.get(offer.serves) if offer is not None else None
    if offer is None or served is None:
        raise _no_backend(
            entry, f"the settings name backend {name!r}, which serves no {entry.facts.format.value} models"
        )
    if offer.refusal:
        raise _no_backend(entry, f"the settings name backend {name!r}, but {offer.refusal}", offer)
    _refuse_problem(served)
    match served.facts.format:
        case ModelFormat.GGUF:
            reason = _gguf_reason(served)
        case ModelFormat.CHECKPOINT:
            reason = _checkpoint_reason(served, offer)
        case ModelFormat.OLLAMA | ModelFormat.LLAMA_SERVER:
            reason = _kept_reason(served)
    return Route(requested, entry.name, name, offer.kind, f"the settings name backend {name!r}; {reason}"), served


def _gguf_route(
    requested: str, entry: ModelEntry, offers: Mapping[str, Offer], reason: str
) -> tuple[Route, ModelEntry]:
    _refuse_problem(entry)
    for name, offer in sorted(offers.items()):
        if offer.serves is ModelFormat.GGUF:
            return Route(requested, entry.name, name, offer.kind, reason), entry
    raise _no_backend(entry, "it is a GGUF file and no llama_cpp backend is configured")


def _kept_route(requested: str, entry: ModelEntry, offers: Mapping[str, Offer]) -> tuple[Route, ModelEntry]:
    """Of a model that some server keeps."""
    _refuse_problem(entry)
    for name, offer in sorted(offers.items()):
        if offer.serves is entry.facts.format:
            return Route(requested, entry.name, name, offer.kind, _kept_reason(entry)), entry
    raise _no_backend(entry, f"no backend of kind {entry.facts.format.value} is configured")


def _checkpoint_route(requested: str, entry: ModelEntry, offers: Mapping[str, Offer]) -> tuple[Route, ModelEntry]:
    name, offer = next(((n, o) for n, o in sorted(offers.items()) if o.kind is BackendKind.MLX), ("", None))
    facts = entry.facts
    if offer is None:
        why_not = "no mlx backend is configured"
    elif facts.problem:
        why_not = facts.problem
    elif offer.refusal:
        why_not = offer.refusal
    elif facts.can(Capability.MTP) or entry.gguf is None:
        return Route(requested, entry.name, name, offer.kind, _checkpoint_reason(entry, offer)), entry
    else:
        why_not = f"its checkpoint has no usable head ({facts.capabilities[Capability.MTP].evidence})"
    if entry.gguf is not None:
        return _gguf_route(requested, entry.gguf, offers, f"not on MLX: {why_not}; {_gguf_reason(entry.gguf)}")
    _refuse_problem(entry)
    raise _no_backend(entry, why_not, offer)


def _refuse_problem(entry: ModelEntry) -> None:
    if entry.facts.problem:
        raise RouterError(
            ErrorReason.MODEL_LOAD_FAILED,
            f"model {entry.name!r} cannot be served: {entry.facts.problem}",
            metadata={"model": entry.name, "problem": entry.facts.problem},
        )


def _no_backend(entry: ModelEntry, why: str, offer: Offer | None = None) -> RouterError:
    failed = offer is not None and offer.failed
    reason = ErrorReason.BACKEND_UNAVAILABLE if failed else ErrorReason.MODEL_LOAD_FAILED
    metadata = {"model": entry.name, "problem": why}
    return RouterError(reason, f"model {entry.name!r}: {why}", metadata=metadata, retry_after=1.0 if failed else None)


def _gguf_reason(entry: ModelEntry) -> str:
    if entry.facts.problem:
        return entry.facts.problem
    what = f"{entry.source} is a {entry.facts.architecture} model in GGUF, which llama.cpp runs"
    return f"{what}; {_drafting_reason(entry)}"


def _kept_reason(entry: ModelEntry) -> str:
    if entry.facts.format is ModelFormat.LLAMA_SERVER:
        return f"a llama-server that runs already serves {entry.source}; {_drafting_reason(entry)}"
    cuts = "which drops the oldest messages of a chat that outgrows its context without saying so"
    return f"{entry.source} is kept by Ollama, {cuts}; {_drafting_reason(entry)}"


def _checkpoint_reason(entry: ModelEntry, offer: Offer) -> str:
    what = f"{entry.source} is a {entry.facts.architecture} checkpoint, which the MLX engine runs"
    remark = f"; {offer.remark}" if offer.remark else ""
    return f"{what}; {_drafting_reason(entry)}{remark}"


def _drafting_reason(entry: ModelEntry) -> str:
    head = entry.facts.capabilities[Capability.MTP]
    if head.supported is None:
        return head.evidence
    if not head.supported:
        return f"no drafting: {head.evidence}"
    if entry.settings.speculation == "off":
        return f"the settings switch off its multi-token-prediction head ({head.evidence})"
    return f"it drafts with its own multi-token-prediction head ({head.evidence})"


def requested_fields(request: GenerationRequest) -> frozenset[str]:
    """Dotted names of the optional features that the request uses; a backend must have each in its `fields`."""
    sampling, stop = request.sampling, request.stop
    used = {
        "sampling.repetition_penalty": sampling.repetition_penalty != 1.0,
        "sampling.presence_penalty": sampling.presence_penalty != 0.0,
        "sampling.frequency_penalty": sampling.frequency_penalty != 0.0,
        "sampling.logit_bias": bool(sampling.logit_bias),
        "stop.token_ids": bool(stop.token_ids),
        "stop.ignore_end_of_generation": stop.ignore_end_of_generation,
        "stop.min_output_tokens": stop.min_output_tokens > 0,
        "reasoning.mode": request.reasoning is not ReasoningMode.AUTO,
        "reasoning.budget_tokens": request.reasoning_budget is not None,
        "logprobs": request.top_logprobs is not None,
        "tools": bool(request.tools),
    }
    if request.response_format is not None:
        used[f"response_format.{request.response_format.kind.value}"] = True
    return frozenset(name for name, is_used in used.items() if is_used)


def check_request(
    request: GenerationRequest, entry: ModelEntry, supported: frozenset[str], drafting: Drafting | None
) -> None:
    """Refuses what the chosen backend or the model cannot do, so that nothing is accepted and ignored.

    Args:
        supported: the backend's `fields`.
        drafting: how the backend drafts for this model.

    Raises:
        RouterError: FIELD_NOT_IMPLEMENTED naming the fields; CAPABILITY_UNAVAILABLE naming the capability.
    """
    missing = sorted(requested_fields(request) - supported)
    if missing:
        names = ", ".join(missing)
        raise RouterError(
            ErrorReason.FIELD_NOT_IMPLEMENTED,
            f"the backend of model {entry.name!r} does not implement: {names}",
            metadata={"field": ",".join(missing), "model": entry.name},
        )
    if isinstance(request.prompt, MessagesPrompt):
        _require(entry, Capability.CHAT, "messages need a chat template")
    if isinstance(request.prompt, TokensPrompt):
        _require(entry, Capability.TOKEN_PROMPT, "it takes no token ids")
    if request.reasoning is ReasoningMode.ON:
        _require(entry, Capability.REASONING, "thinking cannot be switched on")
    if request.reasoning is ReasoningMode.OFF and entry.facts.can(Capability.REASONING):
        _require_switch(entry)
    if request.response_format is not None:
        _require(entry, Capability.JSON_SCHEMA, "response_format is not available")
    if request.tools:
        _require(entry, Capability.TOOLS, "it cannot call functions")
    if request.top_logprobs is not None:
        _require(entry, Capability.LOGPROBS, "logprobs are not available")
    _check_speculation(request, entry, drafting)


def _require(entry: ModelEntry, capability: Capability, what: str) -> None:
    if entry.facts.can(capability):
        return
    fact = entry.facts.capabilities.get(capability)
    evidence = fact.evidence if fact else "not known"
    raise _unavailable(entry, capability, f"{what}: {evidence}")


def _require_switch(entry: ModelEntry) -> None:
    if not entry.facts.reasoning_switch:
        evidence = entry.facts.capabilities[Capability.REASONING].evidence
        raise _unavailable(entry, Capability.REASONING, f"thinking cannot be switched off: {evidence}")


def _check_speculation(request: GenerationRequest, entry: ModelEntry, drafting: Drafting | None) -> None:
    asks_to_draft = request.speculation is SpeculationMode.REQUIRED or request.draft_depth is not None
    if drafting is None:
        if asks_to_draft:
            fact = entry.facts.capabilities.get(Capability.MTP)
            why = fact.evidence if fact and not fact.supported else "drafting is switched off in the settings"
            raise _unavailable(entry, Capability.MTP, f"it is served without drafting: {why}")
        if request.speculation is SpeculationMode.OFF and entry.facts.knows_not(Capability.MTP):
            evidence = entry.facts.capabilities[Capability.MTP].evidence
            raise _unavailable(entry, Capability.MTP, f"drafting cannot be ruled out: {evidence}")
        return
    fixed = drafting.fixed_depth
    if fixed is None:
        return
    if request.speculation is SpeculationMode.OFF:
        raise _unavailable(
            entry, Capability.MTP, f"its backend drafts {fixed} tokens a round for every request; OFF is not possible"
        )
    if request.draft_depth not in (None, fixed):
        raise _unavailable(
            entry,
            Capability.MTP,
            f"its backend drafts {fixed} tokens a round for every request; depth {request.draft_depth} is not possible",
        )


def _unavailable(entry: ModelEntry, capability: Capability, why: str) -> RouterError:
    return RouterError(
        ErrorReason.CAPABILITY_UNAVAILABLE,
        f"model {entry.name!r}: {why}",
        metadata={"model": entry.name, "capability": capability.name},
    )
