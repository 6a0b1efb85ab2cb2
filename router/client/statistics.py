"""The few figures of an answer that people look at first."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from mtp_router.generate import v1


@dataclass(frozen=True, slots=True)
class AnswerStatistics:
    """Figures of one finished answer; None where they are not known.

    Attributes:
        model: the configured model that answered.
        backend: name of the backend in the server's settings.
        why: why that backend, in one sentence.
        time_to_first_token: seconds from acceptance of the call to the first token, by the router's clock.
        tokens_per_second: output tokens after the first, over the time from the first to the end of the answer.
        acceptance: share of the drafted tokens that were accepted; None where nothing was drafted.
        prompt_tokens, output_tokens: as the backend counts them.
    """

    model: str
    backend: str
    why: str
    time_to_first_token: float | None
    tokens_per_second: float | None
    acceptance: float | None
    prompt_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, started: v1.GenerationStarted, finished: v1.GenerationFinished) -> AnswerStatistics:
        """Figures from the first and last event of an answer."""
        timings, usage, drafts = finished.timings, finished.usage, finished.speculation
        first = _seconds(timings.time_to_first_token) if timings.HasField("time_to_first_token") else None
        rate = None
        if first is not None and timings.HasField("total") and usage.output_tokens > 1:
            generating = _seconds(timings.total) - first
            rate = (usage.output_tokens - 1) / generating if generating > 0 else None
        return cls(
            model=started.route.model,
            backend=started.route.backend,
            why=started.route.reason,
            time_to_first_token=first,
            tokens_per_second=rate,
            acceptance=drafts.accepted_tokens / drafts.drafted_tokens if drafts.drafted_tokens else None,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.output_tokens,
        )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
