"""Domain to wire: events, models and backends as messages of the contract."""

from __future__ import annotations

from enum import Enum
from typing import Any

from google.protobuf import duration_pb2
from mtp_router.generate import v1

from router.dispatch import Answer, Look
from router.domain import (
    BackendStatus,
    Delta,
    Finished,
    GenerationRequest,
    HeadFacts,
    Loading,
    Progress,
    Queued,
    Route,
    Started,
    TokenLogprob,
    ToolCall,
)
from router.services.errors import error_info


def _enum(value: Enum, prefix: str) -> Any:
    """The wire's value of a domain enum: same name, with the prefix that protobuf style asks for."""
    return getattr(v1, prefix + value.name)


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds as a protobuf Duration, to the microsecond."""
    result = duration_pb2.Duration()
    result.FromMicroseconds(round(seconds * 1e6))
    return result


def route(value: Route) -> v1.Route:
    """What answers and why."""
    return v1.Route(
        requested_model=value.requested_model,
        model=value.model,
        backend=value.backend,
        backend_kind=_enum(value.kind, "BACKEND_KIND_"),
        reason=value.reason,
        fallback_cause=_enum(value.fallback_cause, "ERROR_REASON_")
        if value.fallback_cause
        else v1.ERROR_REASON_UNSPECIFIED,
    )


def started(answer: Answer, event: Started) -> v1.GenerationStarted:
    """The first event of an answer, with the parameters in force."""
    return v1.GenerationStarted(
        generation_id=answer.generation_id,
        route=route(answer.route),
        sampling=_sampling(answer.request),
        stop=v1.StopConditions(
            max_output_tokens=answer.request.stop.max_output_tokens,
            sequences=answer.request.stop.sequences,
            token_ids=answer.request.stop.token_ids,
            ignore_end_of_generation=answer.request.stop.ignore_end_of_generation,
            min_output_tokens=answer.request.stop.min_output_tokens,
        ),
        correlation_id=answer.request.correlation_id,
        prompt_tokens=event.prompt_tokens,
    )


def _sampling(request: GenerationRequest) -> v1.SamplingParameters:
    sampling = request.sampling
    return v1.SamplingParameters(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=request.seed,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
    )


def delta(event: Delta) -> v1.GenerationDelta:
    """A piece of the answer."""
    if not (event.reasoning_text or event.logprobs or event.tool_calls):  # nearly every one
        return v1.GenerationDelta(text=event.text, token_count=event.token_count)
    return v1.GenerationDelta(
        text=event.text,
        reasoning_text=event.reasoning_text,
        token_count=event.token_count,
        logprobs=[_logprob(item) for item in event.logprobs],
        tool_calls=[_tool_call(call) for call in event.tool_calls],
    )


def _logprob(item: TokenLogprob) -> v1.TokenLogprob:
    return v1.TokenLogprob(
        token_id=item.token_id,
        token_bytes=item.token_bytes,
        logprob=item.logprob,
        top_logprobs=[_logprob(other) for other in item.top],
    )


def _tool_call(call: ToolCall) -> v1.ToolCall:
    return v1.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)


def finished(answer: Answer, event: Finished) -> v1.GenerationFinished:
    """The last event of an answer, with the router's own timings."""
    clock = answer.clock
    timings = v1.Timings(
        queue=duration(clock.queue),
        load=duration(clock.load),
        time_to_first_token=duration(clock.first_token),
        total=duration(clock.total),
    )
    if event.prefill is not None:
        timings.prefill.CopyFrom(duration(event.prefill))
    if event.decode is not None:
        timings.decode.CopyFrom(duration(event.decode))
    usage = event.usage
    message = v1.GenerationFinished(
        reason=_enum(event.reason, "FINISH_REASON_"),
        usage=v1.Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.output_tokens,
            reasoning_tokens=usage.reasoning_tokens,
        ),
        timings=timings,
        speculation=_speculation(event),
        seed=event.seed,
        replay=_enum(event.replay, "REPLAY_"),
        numerics_fingerprint=event.numerics_fingerprint,
    )
    if event.matched_sequence is not None:
        message.sequence = event.matched_sequence
    elif event.matched_token is not None:
        message.token_id = event.matched_token
    return message


def _speculation(event: Finished) -> v1.SpeculationStatistics:
    statistics = event.speculation
    name = "UNSPECIFIED" if statistics.source.name == "UNKNOWN" else statistics.source.name
    message = v1.SpeculationStatistics(
        source=getattr(v1, f"DRAFT_SOURCE_{name}"),
        rounds=statistics.rounds,
        drafted_tokens=statistics.drafted_tokens,
        accepted_tokens=statistics.accepted_tokens,
        positions=[v1.PositionStatistics(drafted=drafted, accepted=kept) for drafted, kept in statistics.positions],
        depths=statistics.depths,
    )
    if statistics.times is not None:
        message.draft.CopyFrom(duration(statistics.times.draft))
        message.verify.CopyFrom(duration(statistics.times.verify))
        message.commit.CopyFrom(duration(statistics.times.commit))
    return message


def progress(event: Progress) -> v1.GenerationProgress:
    """How far a request is before its first token."""
    if isinstance(event, Queued):
        return v1.GenerationProgress(queue=v1.QueueProgress(ahead=event.ahead))
    if isinstance(event, Loading):
        return v1.GenerationProgress(load=load_progress(event))
    return v1.GenerationProgress(
        prefill=v1.PrefillProgress(processed_tokens=event.processed_tokens, total_tokens=event.total_tokens)
    )


def load_progress(event: Loading) -> v1.LoadProgress:
    """How far a load is."""
    return v1.LoadProgress(fraction=event.fraction)


def model(look: Look) -> v1.Model:
    """A configured model as it was found."""
    entry, where, facts = look.entry, look.route, look.entry.facts
    return v1.Model(
        name=entry.name,
        aliases=entry.aliases,
        route=route(where) if where else None,
        state=_enum(look.state, "MODEL_STATE_"),
        capabilities=[
            v1.CapabilityReport(
                capability=_enum(capability, "CAPABILITY_"),
                support=_SUPPORT[fact.supported],
                evidence=fact.evidence,
            )
            for capability, fact in facts.capabilities.items()
        ],
        context_length=None if facts.problem else entry.context_length,
        architecture=facts.architecture,
        quantization=facts.quantization,
        size_bytes=facts.size_bytes,
        problem=look.problem,
        memory_bytes=look.memory_bytes,
        fallbacks=entry.settings.fallbacks,
        mtp_head=_head(facts.head) if facts.head else None,
    )


def _head(head: HeadFacts) -> v1.MtpHead:
    return v1.MtpHead(
        declared_layers=head.declared_layers,
        present=head.present,
        driver=head.driver,
        place=head.place,
        grafted=head.grafted,
        warning=head.warning,
    )


_SUPPORT = {
    None: v1.CAPABILITY_SUPPORT_UNSPECIFIED,
    True: v1.CAPABILITY_SUPPORT_SUPPORTED,
    False: v1.CAPABILITY_SUPPORT_UNSUPPORTED,
}


def backend(status: BackendStatus) -> v1.Backend:
    """A backend and its health."""
    return v1.Backend(
        name=status.name,
        kind=_enum(status.kind, "BACKEND_KIND_"),
        state=_enum(status.state, "BACKEND_STATE_"),
        error=error_info(status.error) if status.error else None,
        version=status.version,
        active_requests=status.active_requests,
        queued_requests=status.queued_requests,
        loaded_models=status.loaded_models,
        restarts=status.restarts,
        retry_after=None if status.retry_after is None else duration(status.retry_after),
    )
