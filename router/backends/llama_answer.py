"""What llama-server sends: its event stream as the router's events and errors. Pure: no I/O, no clock."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from router.backends.llama_request import invalid
from router.domain import (
    Delta,
    DraftSource,
    ErrorReason,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Prefilling,
    Replay,
    RouterError,
    SpeculationStatistics,
    Started,
    TokenLogprob,
    ToolCall,
    Usage,
)

MAX_EVENT_BYTES = 32 * 2**20  # the last event of a chat repeats the prompt, escaped

Json = dict[str, Any]


class EventParser:
    """Splits a byte stream into events. Comments, which llama-server sends to keep a connection open, are dropped."""

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Json]:
        """The events that end in `data`.

        Raises:
            RouterError: BACKEND_FAILED for an event that is too long or is not a JSON object.
        """
        searched = len(self._rest)
        self._rest += data
        start = 0
        while (end := self._rest.find(b"\n", max(start, searched))) >= 0:
            line = bytes(self._rest[start:end])
            start = end + 1
            if line.startswith(b"data:") and (payload := line[5:].strip()) != b"[DONE]":
                yield self._event(payload)
        del self._rest[:start]
        if len(self._rest) > self._max_bytes:
            raise broken_stream()

    def _event(self, payload: bytes) -> Json:
        try:
            event = json.loads(payload)
        except (ValueError, RecursionError):
            raise broken_stream() from None
        if not isinstance(event, dict):
            raise broken_stream()
        return event


def broken_stream() -> RouterError:
    """The error for a stream that does not follow the protocol."""
    return RouterError(ErrorReason.BACKEND_FAILED, "llama.cpp sent a reply that cannot be read")


class Answer:
    """Turns the events of one stream into the router's, and remembers enough to end it early.

    Args:
        request: what was asked.
        seed: the seed in force, None for greedy sampling.
        source: what drafts; UNKNOWN where llama.cpp was started by others.

    Attributes:
        fingerprint: what the child's numerics depend on, once there is a child.
        started: whether `Started` was given out.
        finished: whether `Finished` was given out.
    """

    def __init__(self, request: GenerationRequest, seed: int | None, source: DraftSource) -> None:
        self.request = request
        self.seed = seed
        self._source = source
        self.fingerprint = ""
        self._timings: Json = {}
        self._calls: dict[int, list[str]] = {}  # id, name and arguments, by index
        self._prompt_tokens = 0
        self._reported_tokens = 0
        self.started = False
        self.finished = False

    def take(self, event: Json) -> Iterator[Event]:
        """Progress, Started, Delta and Finished out of one event. Raises RouterError for an error event."""
        try:
            yield from self._take(event)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise broken_stream() from None

    def _take(self, event: Json) -> Iterator[Event]:
        if "error" in event:
            raise reported_error(event["error"], self.request)
        if "prompt_progress" in event:
            progress = event["prompt_progress"]
            self._prompt_tokens = progress["total"]
            yield Prefilling(progress["processed"], progress["total"])
            return
        if "choices" in event and not event["choices"]:
            return  # usage, which the last event told before
        choice = event["choices"][0] if "choices" in event else None
        final = event.get("__verbose", {}) if choice and choice["finish_reason"] else event
        if "timings" not in final:
            return  # a chat opens with the assistant's role, before any token
        self._timings = final["timings"]
        self._prompt_tokens = self._timings["cache_n"] + self._timings["prompt_n"]
        yield from self._start()
        yield from self._delta(choice["delta"] if choice else event, choice or event)
        if choice:
            self._collect(choice["delta"].get("tool_calls") or ())
        if final.get("stop"):
            if self._calls and final["stop_type"] != "limit":
                yield Delta(tool_calls=tuple(ToolCall(*parts) for parts in self._calls.values()))
            if final["stop_type"] == "limit" and self._output_tokens > self._reported_tokens:  # cut inside a character
                yield Delta(token_count=self._output_tokens - self._reported_tokens)
            yield self._finish(*self._reason(final))
        elif choice and choice["finish_reason"]:
            raise broken_stream()

    def _start(self) -> Iterator[Event]:
        if not self.started:
            self.started = True
            yield Started(self._prompt_tokens or None)  # none was counted yet where the time ran out first

    def _delta(self, piece: Json, carrier: Json) -> Iterator[Event]:
        text, thought = piece.get("content") or "", piece.get("reasoning_content") or ""
        logprobs = self._logprobs(carrier)
        if text or thought or logprobs:
            tokens = self._output_tokens
            yield Delta(text, thought, tokens - self._reported_tokens, logprobs)
            self._reported_tokens = tokens

    def _collect(self, pieces: Iterable[Json]) -> None:
        """Function calls arrive in pieces: first id and name, then the arguments bit by bit."""
        for piece in pieces:
            function = piece["function"]
            call = self._calls.setdefault(piece["index"], ["", "", ""])
            call[0] = call[0] or piece.get("id") or f"call_{piece['index']}"
            call[1] += function.get("name") or ""
            call[2] += function.get("arguments") or ""

    def _logprobs(self, carrier: Json) -> tuple[TokenLogprob, ...]:
        if self.request.top_logprobs is None:
            return ()
        entries = (carrier.get("logprobs") or {}).get("content") or carrier.get("completion_probabilities") or ()
        return tuple(_logprob(entry, self.request.top_logprobs) for entry in entries)

    def cut(self) -> Iterator[Event]:
        """The end of an answer whose time is up: what was said so far stands."""
        yield from self._start()
        yield self._finish(FinishReason.TIME_LIMIT, None)

    def _reason(self, final: Json) -> tuple[FinishReason, str | None]:
        kind = final["stop_type"]
        if self._calls and kind in ("word", "eos"):
            return FinishReason.TOOL_CALLS, None
        if kind == "word":
            return FinishReason.STOP_SEQUENCE, final["stopping_word"]
        if kind == "limit":
            full = final["tokens_predicted"] < self.request.stop.max_output_tokens
            return (FinishReason.CONTEXT_LIMIT if full else FinishReason.MAX_TOKENS), None
        if kind == "eos":
            return FinishReason.END_OF_GENERATION, None
        raise ValueError(kind)

    def _finish(self, reason: FinishReason, matched: str | None) -> Finished:
        self.finished = True
        timings = self._timings
        return Finished(
            reason,
            Usage(self._prompt_tokens, self._output_tokens, timings.get("cache_n", 0)),
            self._speculation(),
            matched_sequence=matched,
            seed=self.seed,
            replay=Replay.BEST_EFFORT,
            numerics_fingerprint=self.fingerprint,
            prefill=timings["prompt_ms"] / 1000 if timings else None,
            decode=timings["predicted_ms"] / 1000 if timings else None,
        )

    def _speculation(self) -> SpeculationStatistics:
        if self._source is DraftSource.NONE or "draft_n" not in self._timings:
            return SpeculationStatistics(self._source)
        drafted, accepted = self._timings.get("draft_n", 0), self._timings.get("draft_n_accepted", 0)
        # The first token comes from prefill; every pass after it commits one token besides the accepted drafts.
        rounds = max(0, self._output_tokens - 1 - accepted)
        return SpeculationStatistics(self._source, rounds, drafted, accepted)

    @property
    def _output_tokens(self) -> int:
        return int(self._timings.get("predicted_n", 0))


def _logprob(entry: Json, top_count: int) -> TokenLogprob:
    top = [TokenLogprob(item["id"], bytes(item["bytes"]), item["logprob"]) for item in entry["top_logprobs"]]
    # The entry's own bytes may be those of a whole character; the token's are among the alternatives if it is there.
    own = next((item.token_bytes for item in top if item.token_id == entry["id"]), bytes(entry["bytes"]))
    return TokenLogprob(entry["id"], own, entry["logprob"], tuple(top[:top_count]))


def reported_error(error: Any, request: GenerationRequest | None) -> RouterError:
    """The router's error for one that llama-server reported; its text stays here."""
    kind = error.get("type") if isinstance(error, dict) else None
    if kind == "exceed_context_size_error":
        try:
            return prompt_too_long(int(error["n_prompt_tokens"]), int(error["n_ctx"]))
        except (KeyError, TypeError, ValueError):
            return broken_stream()
    if kind == "unavailable_error":
        return RouterError(ErrorReason.BACKEND_UNAVAILABLE, "llama.cpp is still loading the model", retry_after=1.0)
    if kind == "invalid_request_error":
        if request is not None and request.response_format is not None:
            field = f"response_format.{request.response_format.kind.value}"
            return invalid(field, "llama.cpp cannot follow this rule")
        return RouterError(ErrorReason.INVALID_REQUEST, "llama.cpp refused the request")
    return RouterError(ErrorReason.BACKEND_FAILED, "llama.cpp reported a failure")


def prompt_too_long(prompt_tokens: int, context_length: int) -> RouterError:
    """The error for a prompt that leaves no room to answer."""
    return RouterError(
        ErrorReason.PROMPT_TOO_LONG,
        f"the prompt has {prompt_tokens} tokens; the context takes {context_length}, answer included",
        metadata={"prompt_tokens": str(prompt_tokens), "context_length": str(context_length)},
    )
