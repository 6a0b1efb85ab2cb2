"""The MLX backend: checkpoints on the engine in this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from importlib.metadata import version

from mlx_mtp_backend import EngineError, EngineOptions, GenerateParams, ResponseFormat
from mlx_mtp_backend.device import accelerator
from mlx_mtp_backend.engine import Engine
from router.backends.mlx_answer import (
    Answer,
    format_error,
    generate_params,
    response_format,
    router_error,
    template_message,
)
from router.backends.mlx_models import Resident, Residents
from router.backends.thinking import CLOSE, ThinkSplitter
from router.catalog import ModelEntry
from router.domain import (
    BackendKind,
    BackendState,
    BackendStatus,
    Capability,
    Delta,
    Drafting,
    ErrorReason,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Loading,
    MessagesPrompt,
    ModelState,
    Offer,
    Queued,
    ReasoningMode,
    RouterError,
    SpeculationMode,
    Started,
    TokenCount,
    TokensPrompt,
    Usage,
)
from router.facts import THINKING_SWITCH
from router.scheduler import Admission, Ticket
from router.settings import MlxSettings, data_home

logger = logging.getLogger(__name__)


class MlxBackend:
    """Serves checkpoints on the MLX engine (see `Backend`).

    Args:
        name: as in the settings.
        settings: `[backends.NAME]`.
    """

    kind = BackendKind.MLX
    fields = frozenset(
        {
            "sampling.repetition_penalty",
            "sampling.presence_penalty",
            "sampling.frequency_penalty",
            "sampling.logit_bias",
            "stop.token_ids",
            "stop.ignore_end_of_generation",
            "stop.min_output_tokens",
            "response_format.json_schema",
            "response_format.json_object",
            "response_format.regex",
            "response_format.grammar",
            "reasoning.mode",
            "logprobs",
        }
    )

    def __init__(self, name: str, settings: MlxSettings) -> None:
        self.name = name
        self._settings = settings
        self._engine: Engine | None = None
        self._offer = Offer(self.kind, "the engine has not started")
        self._models = Residents(settings)
        self._admission = Admission(settings.parallel, settings.max_queued)
        self._listeners: list[Callable[[BackendStatus], None]] = []

    async def start(self) -> None:
        """Starts the engine's thread, where this machine should use it."""
        options = EngineOptions(
            interpose_blas=self._settings.openblas,
            max_streams=self._settings.parallel,
            max_waiting=self._settings.parallel,  # the line stands in front of the engine, in order of priority
            slow_reader_limit=self._settings.slow_reader_limit,
            kernel_checks=data_home() / "kernel-checks.json",
        )
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.call_soon_threadsafe(self._engine_ended)

        try:
            self._engine = await asyncio.to_thread(Engine, options, ended)
        except EngineError as error:
            logger.error("the MLX engine did not start: %s", error)
            self._offer = Offer(self.kind, "the MLX engine did not start; see the server's log")
            return
        self._offer = self._assess(await asyncio.to_thread(accelerator))
        if self._offer.refusal:
            await self.close()

    def _assess(self, device: str | None) -> Offer:
        if device is not None:
            return Offer(self.kind, remark=f"on {device}")
        if self._settings.allow_cpu:
            return Offer(self.kind, remark="on the CPU, where it is slow, because the settings allow that")
        return Offer(self.kind, f"MLX has neither Metal nor CUDA here, and backends.{self.name}.allow_cpu is not set")

    async def close(self) -> None:
        """Ends every stream and the engine's thread."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.close)

    def _engine_ended(self) -> None:
        """The engine's thread is gone: nothing more is routed here, and health says so."""
        if self._engine is None:  # closed on purpose
            return
        logger.critical("the MLX engine's thread has ended; no checkpoint can be served until a restart")
        self._offer = Offer(self.kind, "the MLX engine has failed; see the server's log", failed=True)
        self._models.forget()
        for listener in self._listeners:
            listener(self.status())

    def offer(self) -> Offer:
        """Refuses on a machine without a fast device, unless the settings allow the CPU."""
        return self._offer

    def status(self) -> BackendStatus:
        """DOWN where the engine did not start, should not be used here, or has failed."""
        refusal = self._offer.refusal
        return BackendStatus(
            self.name,
            self.kind,
            BackendState.DOWN if refusal else BackendState.READY,
            version=f"MLX {version('mlx')}",
            error=RouterError(ErrorReason.BACKEND_UNAVAILABLE, refusal) if refusal else None,
            active_requests=self._admission.active,
            queued_requests=self._admission.queued,
            loaded_models=self._models.loaded,
        )

    def on_status_change(self, listener: Callable[[BackendStatus], None]) -> None:
        """Calls `listener` where the engine fails."""
        self._listeners.append(listener)

    def model_state(self, model: ModelEntry) -> ModelState:
        """Whether it is loaded."""
        return self._models.state(model)

    def drafting(self, model: ModelEntry) -> Drafting | None:
        """At any depth, request by request, where the checkpoint has a head."""
        wanted = model.settings.speculation == "auto" and model.facts.can(Capability.MTP)
        return Drafting() if wanted else None

    async def describe(self, model: ModelEntry) -> ModelEntry:
        """Its files tell everything."""
        return model

    async def generate(self, model: ModelEntry, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Answers one request (see `Backend.generate`)."""
        budget = request.time_budget
        deadline = None if budget is None else asyncio.get_running_loop().time() + budget
        ticket = self._admission.enter(request.priority)
        try:
            async with contextlib.aclosing(self._answer(model, request, ticket, deadline)) as events:
                async for event in events:
                    yield event
        except TimeoutError:  # the budget ran out before the engine had the request
            yield Started()
            yield Finished(FinishReason.TIME_LIMIT, Usage(0, 0))
        finally:
            self._admission.leave(ticket)

    async def count_tokens(self, model: ModelEntry, request: GenerationRequest) -> TokenCount:
        """Counts with the checkpoint's own tokenizer; loads no weights."""
        ids, _ = await self._prompt(model, request)
        return TokenCount(len(ids), model.context_length)

    async def preload(self, model: ModelEntry) -> AsyncGenerator[Loading, None]:
        """Loads the model, slice by slice."""
        async for progress in self._models.load(self._running(), model, None):
            yield progress

    async def unload(self, model: ModelEntry, *, force: bool) -> None:
        """Drops the model; with `force`, ends its streams first."""
        if self._engine is not None:
            await self._models.unload(self._engine, model, force=force)

    async def _answer(
        self, model: ModelEntry, request: GenerationRequest, ticket: Ticket, deadline: float | None
    ) -> AsyncGenerator[Event, None]:
        while not ticket.running:
            yield Queued(ticket.ahead)
            async with asyncio.timeout_at(deadline):
                await ticket.changed.wait()
            ticket.changed.clear()
        async with contextlib.aclosing(self._models.load(self._running(), model, deadline)) as loading:
            async for progress in loading:
                yield progress
        async with asyncio.timeout_at(deadline):
            prompt, splitter = await self._prompt(model, request)
        known = self._models.resident(model)
        self._require_head(model, known, request)
        context = _fitting_context(model, known, len(prompt))
        async with asyncio.timeout_at(deadline):
            wanted = await self._format(model, request, splitter)
            token_bytes = await self._token_bytes(model, request)
        time_left = None if deadline is None else max(deadline - asyncio.get_running_loop().time(), 1e-3)
        params = generate_params(request, model.name, prompt, context, time_left, wanted)
        context_cut = params.max_tokens < request.stop.max_output_tokens
        answer = Answer(request, splitter, context_cut=context_cut, token_bytes=token_bytes)
        async with contextlib.aclosing(self._stream(known, params, answer)) as events:
            async for event in events:
                yield event

    async def _format(
        self, model: ModelEntry, request: GenerationRequest, splitter: ThinkSplitter | None
    ) -> ResponseFormat | None:
        """The response format as the engine takes it; compiled here, in a thread, so that `submit` finds it at once."""
        if request.response_format is None:
            return None
        text = await self._models.text(model)
        wanted = response_format(request, splitter, text.encode(CLOSE), model.name)
        try:
            await asyncio.to_thread(text.compile, wanted)
        except EngineError as error:
            raise format_error(error, request.response_format.kind) from None
        return wanted

    async def _token_bytes(self, model: ModelEntry, request: GenerationRequest) -> Callable[[int], bytes]:
        """What tells a token's bytes; readied in a thread where log-probabilities will ask for it."""
        text = await self._models.text(model)
        if request.top_logprobs is not None:
            try:
                await asyncio.to_thread(text.token_bytes, 0)
            except EngineError as error:
                raise router_error(error, model.name) from None
        return text.token_bytes

    async def _stream(self, known: Resident, params: GenerateParams, answer: Answer) -> AsyncGenerator[Event, None]:
        """One stream of the engine, from its submission to its last event; leaving cancels it."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(ready.set)

        try:
            stream = self._running().submit(params, wake)
        except EngineError as error:
            raise router_error(error, params.model) from None
        known.streams.add(stream)
        started = False
        try:
            while True:
                await ready.wait()
                ready.clear()
                for event in stream.read():
                    for translated in answer.translate(event):
                        if not started and isinstance(translated, Delta | Finished):
                            started = True
                            yield Started(prompt_tokens=len(params.prompt))
                        yield translated
                        if isinstance(translated, Finished):
                            return
        finally:
            stream.cancel()
            known.streams.discard(stream)

    async def _prompt(self, model: ModelEntry, request: GenerationRequest) -> tuple[list[int], ThinkSplitter | None]:
        """Token ids of the prompt, and what tells thinking from answer where the model thinks."""
        if isinstance(request.prompt, TokensPrompt):
            return list(request.prompt.ids), None
        text = await self._models.text(model)
        if not isinstance(request.prompt, MessagesPrompt):
            return await asyncio.to_thread(text.encode, request.prompt.text), None
        switch = (
            {} if request.reasoning is ReasoningMode.AUTO else {THINKING_SWITCH: request.reasoning is ReasoningMode.ON}
        )
        messages = [template_message(item) for item in request.prompt.messages]
        try:
            rendered = await asyncio.to_thread(text.render, messages, **switch)
        except EngineError as error:
            raise router_error(error, model.name) from None
        splitter = ThinkSplitter(rendered) if model.facts.can(Capability.REASONING) else None
        return await asyncio.to_thread(text.encode, rendered), splitter

    def _running(self) -> Engine:
        if self._engine is None:
            raise RouterError(ErrorReason.BACKEND_UNAVAILABLE, "the MLX engine is not running", retry_after=1.0)
        return self._engine

    def _require_head(self, model: ModelEntry, known: Resident, request: GenerationRequest) -> None:
        asked = request.speculation is SpeculationMode.REQUIRED or request.draft_depth is not None
        if asked and not (known.loaded and known.loaded.has_head):
            raise RouterError(
                ErrorReason.CAPABILITY_UNAVAILABLE,
                f"model {model.name!r}: its head could not be used when it was loaded; see the server's log",
                metadata={"model": model.name, "capability": Capability.MTP.name},
            )


def _fitting_context(model: ModelEntry, known: Resident, prompt_tokens: int) -> int:
    """Tokens of context. Raises RouterError PROMPT_TOO_LONG where the prompt leaves no room for an answer."""
    context = min(model.context_length, known.loaded.context_length) if known.loaded else model.context_length
    if prompt_tokens < context:
        return context
    raise RouterError(
        ErrorReason.PROMPT_TOO_LONG,
        f"the prompt has {prompt_tokens} tokens and the context of model {model.name!r} holds {context}",
        metadata={"prompt_tokens": str(prompt_tokens), "context_length": str(context), "model": model.name},
    )
