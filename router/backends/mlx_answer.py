"""What the MLX engine is asked and what it answers, in the router's words. Pure: no I/O, no MLX."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import mlx_mtp_backend as engine
from router.backends.thinking import ThinkSplitter
from router.domain import (
    Delta,
    DraftSource,
    DraftTimes,
    ErrorReason,
    Event,
    FieldViolation,
    Finished,
    FinishReason,
    GenerationRequest,
    Message,
    Prefilling,
    Replay,
    RouterError,
    SpeculationMode,
    SpeculationStatistics,
    TokenLogprob,
    Usage,
)

logger = logging.getLogger(__name__)

LOAD_FAILURES = {
    engine.ErrorReason.CHECKPOINT_UNREADABLE: "its files cannot be read",
    engine.ErrorReason.CHECKPOINT_RUNS_CODE: "its files ask for code of their own to be run",
    engine.ErrorReason.FAMILY_UNSUPPORTED: "the engine has no driver for its architecture",
    engine.ErrorReason.STORAGE_UNSUPPORTED: "its weights are stored in a way that the engine does not read",
    engine.ErrorReason.WEIGHTS_MISMATCH: "its tensors are not those that its architecture needs",
    engine.ErrorReason.HEAD_MISSING: "its head is missing",
    engine.ErrorReason.HEAD_MISWIRED: "its head predicts no better than chance, and the settings refuse that",
}
# The engine's names of parameters, as dotted fields of the contract.
FIELDS = {
    "prompt": "prompt",
    "messages": "messages.messages",
    "max_tokens": "stop.max_output_tokens",
    "stop_strings": "stop.sequences",
    "stop_tokens": "stop.token_ids",
    "temperature": "sampling.temperature",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "repetition_penalty": "sampling.repetition_penalty",
    "presence_penalty": "sampling.presence_penalty",
    "frequency_penalty": "sampling.frequency_penalty",
    "logit_bias": "sampling.logit_bias",
    "min_tokens": "stop.min_output_tokens",
    "ignore_eos": "stop.ignore_end_of_generation",
    "response_format": "response_format",
    "logprobs": "logprobs.top_count",
    "seed": "sampling.seed",
    "depth": "speculation.depth",
    "time_limit": "time_budget",
}
REASONS = {
    engine.FinishReason.STOP_STRING: FinishReason.STOP_SEQUENCE,
    engine.FinishReason.MAX_TOKENS: FinishReason.MAX_TOKENS,
    engine.FinishReason.CONTEXT_LIMIT: FinishReason.CONTEXT_LIMIT,
    engine.FinishReason.TIME_LIMIT: FinishReason.TIME_LIMIT,
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the engine takes it.

    Attributes:
        boundaries: lengths up to which other prompts are likely to share it.
        splitter: tells thinking from answer; None where the text is all answer.
    """

    tokens: tuple[int, ...]
    boundaries: tuple[int, ...] = ()
    splitter: ThinkSplitter | None = None


def template_message(message: Message) -> dict[str, object]:
    """A message as chat templates read it."""
    plain: dict[str, object] = {"role": message.role.value, "content": message.content}
    if message.reasoning_content:
        plain["reasoning_content"] = message.reasoning_content
    return plain


def generate_params(
    request: GenerationRequest,
    model: str,
    prompt: Prompt,
    context_length: int,
    time_left: float | None,
    wanted: engine.ResponseFormat | None,
) -> engine.GenerateParams:
    """The request as the engine takes it.

    Args:
        model: the name that it was loaded under.
        prompt: fewer tokens than `context_length`.
        time_left: seconds of the time budget that remain.
        wanted: the response format, see `mlx_format.response_format`.

    Raises:
        RouterError: INVALID_REQUEST for parameters that cannot go together.
    """
    sampling, stop = request.sampling, request.stop
    if wanted is not None and stop.ignore_end_of_generation:
        raise invalid("stop.ignore_end_of_generation", "an answer in a response format ends with the model's own token")
    max_tokens = min(stop.max_output_tokens, context_length - len(prompt.tokens))
    return engine.GenerateParams(
        model=model,
        prompt=prompt.tokens,
        max_tokens=max_tokens,
        sampling=engine.Sampling(
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            tuple(sorted(sampling.logit_bias.items())),
        ),
        seed=request.seed,
        depth=0 if request.speculation is SpeculationMode.OFF else request.draft_depth,
        boundaries=prompt.boundaries,
        stop_tokens=frozenset(stop.token_ids),
        ignore_eos=stop.ignore_end_of_generation,
        stop_strings=stop.sequences,
        time_limit=time_left,
        min_tokens=min(stop.min_output_tokens, max_tokens),
        response_format=wanted,
        logprobs=request.top_logprobs,
    )


class Answer:
    """Turns one stream's events into the router's.

    Args:
        request: what was asked.
        splitter: tells thinking from answer; None where the text is all answer.
        context_cut: whether the context, not the request, bounds the answer's length.
        token_bytes: what a token stands for; asked where the request wants log-probabilities.
    """

    def __init__(
        self,
        request: GenerationRequest,
        splitter: ThinkSplitter | None,
        *,
        context_cut: bool,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self._request = request
        self._splitter = splitter
        self._context_cut = context_cut
        self._started: engine.Started | None = None
        self._token_bytes = token_bytes
        self._untold = 0  # tokens whose text has not come yet
        self._logprobs: list[TokenLogprob] = []  # of these

    def translate(self, event: engine.Event) -> list[Event]:
        """The router's events for one of the engine's. Raises RouterError where the stream failed."""
        match event:
            case engine.Started():
                self._started = event
                return [Prefilling(event.cached_tokens, event.prompt_tokens)]
            case engine.Delta():
                return self._delta(event)
            case engine.Finished():
                return self._end(event)

    def _delta(self, event: engine.Delta) -> list[Event]:
        self._untold += len(event.tokens)
        self._logprobs += [self._logprob(entry) for entry in event.logprobs]
        text, thinking = (event.text, "") if self._splitter is None else self._splitter.feed(event.text)
        return [self._piece(text, thinking)] if text or thinking else []

    def _end(self, event: engine.Finished) -> list[Event]:
        if event.reason is engine.FinishReason.ERROR and event.error is not None:
            raise self.failure(event.error)
        if event.reason is engine.FinishReason.SLOW_READER:
            raise RouterError(ErrorReason.SLOW_CONSUMER, "the stream was read too slowly, and its buffer ran over")
        if event.reason is engine.FinishReason.CANCELLED:
            raise RouterError(ErrorReason.BACKEND_UNAVAILABLE, "the model was unloaded", retry_after=1.0)
        text, thinking = ("", "") if self._splitter is None else self._splitter.end()
        last: list[Event] = [self._piece(text, thinking)] if text or thinking or self._untold else []
        return [*last, self._finished(event)]

    def failure(self, error: engine.EngineError) -> RouterError:
        """The error as the caller is told of it."""
        wanted = self._request.response_format
        refused = error.reason is engine.ErrorReason.INVALID_PARAMS and error.field == "response_format"
        if wanted is not None and refused:  # the engine says why in words of its own
            return invalid(f"response_format.{wanted.kind.value}", error.detail)
        return router_error(error, self._request.model)

    def _piece(self, text: str, thinking: str) -> Delta:
        count, self._untold = self._untold, 0
        logprobs, self._logprobs = tuple(self._logprobs), []
        return Delta(text, thinking, token_count=count, logprobs=logprobs)

    def _logprob(self, entry: engine.TokenLogprob) -> TokenLogprob:
        top = tuple(TokenLogprob(token, self._token_bytes(token), value) for token, value in entry.top)
        return TokenLogprob(entry.token, self._token_bytes(entry.token), entry.logprob, top)

    def _finished(self, event: engine.Finished) -> Finished:
        counts, request, started = event.statistics, self._request, self._started
        reason, token = self._reason(event)
        drafted = sum(counts.drafted)
        return Finished(
            reason,
            Usage(counts.prompt_tokens, counts.completion_tokens, counts.cached_tokens),
            SpeculationStatistics(
                DraftSource.MTP_HEAD if drafted else DraftSource.NONE,
                counts.rounds if drafted else 0,
                drafted,
                sum(counts.accepted),
                tuple(zip(counts.drafted, counts.accepted, strict=True)),
                counts.depths if drafted else (),
                DraftTimes(counts.seconds_draft, counts.seconds_verify, counts.seconds_commit) if drafted else None,
            ),
            matched_sequence=event.stop if isinstance(event.stop, str) else None,
            matched_token=token,
            seed=None if request.sampling.greedy else request.seed,
            replay=self._replay(),
            numerics_fingerprint=started.fingerprint if started else "",
            prefill=counts.seconds_prefill,
            decode=counts.seconds_decode,
        )

    def _reason(self, event: engine.Finished) -> tuple[FinishReason, int | None]:
        if event.reason is engine.FinishReason.STOP_TOKEN:
            token = event.stop if isinstance(event.stop, int) else None
            if token in self._request.stop.token_ids:
                return FinishReason.STOP_TOKEN, token
            return FinishReason.END_OF_GENERATION, None
        if event.reason is engine.FinishReason.MAX_TOKENS and self._context_cut:
            return FinishReason.CONTEXT_LIMIT, None
        return REASONS[event.reason], None

    def _replay(self) -> Replay:
        """A request without a seed cannot be asked again with the one that was drawn: no promise."""
        if self._started is None or (self._request.seed is None and not self._request.sampling.greedy):
            return Replay.NONE
        return Replay[self._started.replay.name]


def router_error(error: engine.EngineError, model: str) -> RouterError:
    """An engine's failure as the caller is told of it; the detail goes to the log."""
    logger.info("engine: %s", error)
    reason, metadata = error.reason, {"model": model}
    if reason in LOAD_FAILURES:
        message = f"model {model!r} could not be loaded: {LOAD_FAILURES[reason]}"
        return RouterError(ErrorReason.MODEL_LOAD_FAILED, message, metadata={**metadata, "problem": reason.value})
    match reason:
        case engine.ErrorReason.QUEUE_FULL:
            return RouterError(ErrorReason.QUEUE_FULL, "too many requests wait", metadata=metadata, retry_after=1.0)
        case engine.ErrorReason.NON_FINITE_LOGITS:
            message = f"model {model!r} computed numbers that are not finite"
            return RouterError(ErrorReason.NON_FINITE_LOGITS, message, metadata=metadata)
        case engine.ErrorReason.ENGINE_CLOSED:
            return RouterError(ErrorReason.DRAINING, "the server is shutting down", retry_after=1.0)
        case engine.ErrorReason.MODEL_NOT_LOADED:
            message = f"model {model!r} was unloaded"
            return RouterError(ErrorReason.BACKEND_UNAVAILABLE, message, metadata=metadata, retry_after=1.0)
        case engine.ErrorReason.INVALID_PARAMS | engine.ErrorReason.PROMPT_EMPTY:
            return invalid(FIELDS.get(error.field or "", "prompt"), "the engine refuses this value")
        case engine.ErrorReason.TOKEN_OUT_OF_RANGE:
            return invalid(FIELDS.get(error.field or "", "prompt"), "a token is not in the model's vocabulary")
        case engine.ErrorReason.GRAMMAR_LIMIT:
            # The format's own doing, each time again: nothing to retry, and no sign that the engine is ill.
            return invalid("response_format", "following it takes more work than is allowed for a token")
        case _:
            message = f"the MLX engine failed on model {model!r}"
            return RouterError(ErrorReason.BACKEND_FAILED, message, metadata={**metadata, "problem": reason.value})


def invalid(field: str, description: str) -> RouterError:
    """An INVALID_REQUEST error that names one field."""
    return RouterError(
        ErrorReason.INVALID_REQUEST,
        f"invalid request: {field}: {description}",
        violations=(FieldViolation(field, description),),
    )
