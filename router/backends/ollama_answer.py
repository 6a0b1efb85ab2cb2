"""What Ollama sends: the pieces of its stream as the router's events. Pure: no I/O, no clock."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ollama import ChatResponse, GenerateResponse

from router.domain import (
    Delta,
    DraftSource,
    ErrorReason,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Replay,
    RouterError,
    SpeculationStatistics,
    Started,
    TokenLogprob,
    ToolCall,
    Usage,
)

NANOSECOND = 1e-9

Piece = ChatResponse | GenerateResponse


class Answer:
    """Turns the pieces of one stream into the router's events, and remembers enough to end it early.

    Args:
        request: what was asked.
        seed: the seed in force, None for greedy sampling.
        drafting: whether Ollama was told to draft; it does not say what came of that.
    """

    def __init__(self, request: GenerationRequest, seed: int | None, *, drafting: bool) -> None:
        self.request = request
        self._seed = seed
        self._drafting = drafting
        self._calls = 0
        self.fingerprint = ""
        self.started = False
        self.finished = False

    def take(self, piece: Piece) -> Iterator[Event]:
        """Started, Delta, Finished out of one piece. Raises RouterError BACKEND_FAILED at an end without a reason."""
        delta = self._delta(piece)
        if delta is not None or piece.done:
            yield from self._start()
        if delta is not None:
            yield delta
        if piece.done:
            yield self._finish(self._reason(piece), piece)

    def cut(self) -> Iterator[Event]:
        """The end of an answer whose time is up: what was said so far stands."""
        yield from self._start()
        yield self._finish(FinishReason.TIME_LIMIT, None)

    def _start(self) -> Iterator[Event]:
        if not self.started:
            self.started = True
            yield Started()

    def _delta(self, piece: Piece) -> Delta | None:
        if isinstance(piece, ChatResponse):
            text, thought = piece.message.content or "", piece.message.thinking or ""
            calls = tuple(self._call(call.function) for call in piece.message.tool_calls or ())
        else:
            text, thought, calls = piece.response or "", piece.thinking or "", ()
        logprobs = tuple(_logprob(entry) for entry in piece.logprobs or ()) if self._wants_logprobs else ()
        if text or thought or calls or logprobs:
            return Delta(text, thought, len(logprobs) or None, logprobs, calls)
        return None

    @property
    def _wants_logprobs(self) -> bool:
        return self.request.top_logprobs is not None

    def _call(self, function: Any) -> ToolCall:
        self._calls += 1
        # The client drops Ollama's own ids; these tell the calls of one answer apart, which is what ids are for.
        return ToolCall(f"call_{self._calls}", function.name, json.dumps(dict(function.arguments)))

    def _reason(self, piece: Piece) -> FinishReason:
        match piece.done_reason:
            case "length":
                full = (piece.eval_count or 0) < self.request.stop.max_output_tokens
                return FinishReason.CONTEXT_LIMIT if full else FinishReason.MAX_TOKENS
            case "stop":
                return FinishReason.TOOL_CALLS if self._calls else FinishReason.END_OF_GENERATION
        raise broken_stream()

    def _finish(self, reason: FinishReason, last: Piece | None) -> Finished:
        self.finished = True
        source = DraftSource.UNKNOWN if self._drafting else DraftSource.NONE
        return Finished(
            reason,
            Usage((last.prompt_eval_count or 0) if last else 0, (last.eval_count or 0) if last else 0),
            SpeculationStatistics(source),
            seed=self._seed,
            replay=Replay.BEST_EFFORT,
            numerics_fingerprint=self.fingerprint,
            prefill=(last.prompt_eval_duration or 0) * NANOSECOND if last else None,
            decode=(last.eval_duration or 0) * NANOSECOND if last else None,
        )


def broken_stream() -> RouterError:
    """The error for a stream that does not follow the protocol."""
    return RouterError(ErrorReason.BACKEND_FAILED, "Ollama sent a reply that cannot be read")


def another_model() -> RouterError:
    """The error for an answer that a model gave which was not asked."""
    return RouterError(ErrorReason.BACKEND_FAILED, "Ollama answered with another model than the one that was asked")


def _logprob(entry: Any) -> TokenLogprob:
    # The client's class drops the bytes that Ollama sends; the text is what is left of them.
    top = tuple(TokenLogprob(None, item.token.encode(), item.logprob) for item in entry.top_logprobs or ())
    return TokenLogprob(None, entry.token.encode(), entry.logprob, top)


def nested_error(text: str) -> Mapping[str, Any]:
    """The runner's error that Ollama passes on as text inside its own; empty where there is none."""
    for _ in range(2):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        inner = value.get("error") if isinstance(value, dict) else None
        if isinstance(inner, dict):
            return inner
        if not isinstance(inner, str):
            return {}
        text = inner
    return {}
