"""The MLX backend: checkpoints on the engine, which runs in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from importlib.metadata import version

from mlx_mtp_backend import EngineError, EngineProcess, GenerateParams
from mlx_mtp_backend.language.text import ModelText
from router.backends.mlx_answer import Answer, Prompt, generate_params, router_error, template_message
from router.backends.mlx_engine import FIRST_RESTART, EngineKeeper, Factory
from router.backends.mlx_format import read_vocabulary, response_format
from router.backends.mlx_models import Resident, Residents
from router.backends.mlx_wake import Waker
from router.backends.patience import Patience, TimeIsUpError
from router.backends.thinking import ThinkSplitter
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
    ReasoningMode,
    RouterError,
    SpeculationMode,
    Started,
    TokenCount,
    TokensPrompt,
    Usage,
)
from router.facts import THINKING_SWITCH
from router.lifecycle import Lifecycle, Seat
from router.line import Ticket
from router.scheduler import Phase
from router.settings import MlxSettings


class MlxBackend:
    """Serves checkpoints on the MLX engine (see `Backend`).

    Args:
        name: as in the settings.
        settings: `[backends.NAME]`.
        lifecycle: has models loaded and dropped; shared with the other backends.
        engine: makes the engine.
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

    def __init__(
        self,
        name: str,
        settings: MlxSettings,
        lifecycle: Lifecycle | None = None,
        engine: Factory = EngineProcess,
    ) -> None:
        self.name = name
        self._settings = settings
        self.parallel = settings.parallel
        self._lifecycle = lifecycle or Lifecycle()
        self._keeper = EngineKeeper(name, settings, engine, self._lost, self._tell)
        self._models = Residents(settings)
        self._listeners: list[Callable[[BackendStatus], None]] = []
        self._waker: Waker | None = None

    async def start(self) -> None:
        """Starts the engine's process, where this machine should use it."""
        self._waker = Waker(asyncio.get_running_loop())
        await self._keeper.start()

    async def close(self) -> None:
        """Ends every stream and the engine's process."""
        await self._keeper.close()

    def _lost(self) -> None:
        """The engine has ended by itself, and everything loaded with it."""
        names = self._models.names
        self._models.forget()
        for name in names:
            self._lifecycle.lost(self._key(name))

    def _tell(self) -> None:
        for listener in self._listeners:
            listener(self.status())

    def offer(self) -> Offer:
        """Refuses on a machine without a fast device, unless the settings allow the CPU."""
        return self._keeper.offer

    def status(self) -> BackendStatus:
        """DOWN where the engine did not start, should not be used here, or has failed."""
        refusal = self._keeper.offer.refusal
        counts = [self._lifecycle.counts(self._key(name)) for name in self._models.names]
        return BackendStatus(
            self.name,
            self.kind,
            BackendState.DOWN if refusal else BackendState.READY,
            version=f"MLX {version('mlx')}",
            error=RouterError(ErrorReason.BACKEND_UNAVAILABLE, refusal) if refusal else None,
            active_requests=sum(running for running, _ in counts),
            queued_requests=sum(waiting for _, waiting in counts),
            loaded_models=self._models.loaded,
            suspect_heads=self._models.suspect_heads,
            restarts=self._keeper.restarts,
            retry_after=FIRST_RESTART if self._keeper.restarting else None,
        )

    def on_status_change(self, listener: Callable[[BackendStatus], None]) -> None:
        """Calls `listener` where the engine fails, and where it is back."""
        self._listeners.append(listener)

    def model_state(self, model: ModelEntry) -> ModelState:
        """Whether it is loaded."""
        phase = self._lifecycle.phase(self._key(model.name))
        if phase is Phase.COLD and self._models.resident(model).error is not None:
            return ModelState.FAILED
        return ModelState[phase.name]

    def drafting(self, model: ModelEntry) -> Drafting | None:
        """At any depth, request by request, where the checkpoint has a head."""
        wanted = model.settings.speculation == "auto" and model.facts.can(Capability.MTP)
        return Drafting() if wanted else None

    async def describe(self, model: ModelEntry) -> ModelEntry:
        """The model with what the check of its head found amiss, once it was loaded."""
        return self._models.described(model)

    async def generate(self, model: ModelEntry, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Answers one request (see `Backend.generate`)."""
        budget = request.time_budget
        deadline = None if budget is None else asyncio.get_running_loop().time() + budget
        ticket, started = self._lifecycle.enter(self._seat(model), request.priority), False
        try:
            async with contextlib.aclosing(self._answer(model, request, ticket, deadline)) as events:
                async for event in events:
                    started |= isinstance(event, Started)
                    yield event
        except RouterError as error:
            raise self._told(error, model, started) from None
        except (TimeoutError, TimeIsUpError):  # the budget ran out before the engine had the request
            yield Started()
            yield Finished(FinishReason.TIME_LIMIT, Usage(0, 0))
        finally:
            self._lifecycle.leave(ticket)

    async def count_tokens(self, model: ModelEntry, request: GenerationRequest) -> TokenCount:
        """Counts with the checkpoint's own tokenizer; loads no weights."""
        prompt = await self._prompt(model, request)
        return TokenCount(len(prompt.tokens), model.context_length)

    async def preload(self, model: ModelEntry) -> AsyncGenerator[Loading, None]:
        """Loads the model, slice by slice."""
        self._keeper.running()
        async with contextlib.aclosing(self._lifecycle.preload(self._seat(model))) as steps:
            async for step in steps:
                yield step

    async def unload(self, model: ModelEntry, *, force: bool) -> None:
        """Drops the model; with `force`, ends its streams first."""
        await self._lifecycle.unload(self._key(model.name), model.name, force=force)
        if self._lifecycle.phase(self._key(model.name)) is Phase.COLD:
            self._models.reread(model)

    def _key(self, name: str) -> str:
        return f"{self.name}/{name}"

    def _seat(self, model: ModelEntry) -> Seat:
        """Models share the engine, and its places."""
        known = self._models.resident(model)

        async def load() -> None:
            try:
                await self._models.load(self._keeper.running(), model)
            except RouterError as error:
                raise self._told(error, model, started=False) from None

        async def unload() -> None:
            if (running := self._keeper.engine) is not None:
                await self._models.unload(running, model)

        terms = self._lifecycle.terms(model, self._settings.parallel, self._settings.max_queued, self.name)
        return Seat(self._key(model.name), terms, load, unload, lambda: known.fraction)

    async def _answer(
        self, model: ModelEntry, request: GenerationRequest, ticket: Ticket, deadline: float | None
    ) -> AsyncGenerator[Event, None]:
        self._keeper.running()
        async with contextlib.aclosing(self._lifecycle.wait(ticket, deadline)) as steps:
            async for step in steps:
                yield step
        async with asyncio.timeout_at(deadline):
            prompt = await self._prompt(model, request)
        known = self._models.resident(model)
        self._require_head(model, known, request)
        context = _fitting_context(model, known, len(prompt.tokens))
        async with asyncio.timeout_at(deadline):
            text = await self._models.text(model)
            if request.top_logprobs is not None:
                await asyncio.to_thread(read_vocabulary, text, model.name)
        wanted = response_format(text, request, prompt.splitter, model.name)
        time_left = None if deadline is None else max(deadline - asyncio.get_running_loop().time(), 1e-3)
        params = generate_params(request, model.name, prompt, context, time_left, wanted)
        context_cut = params.max_tokens < request.stop.max_output_tokens
        answer = Answer(request, prompt.splitter, context_cut=context_cut, token_bytes=text.token_bytes)
        async with contextlib.aclosing(self._stream(known, params, answer)) as events:
            async for event in events:
                yield event

    async def _stream(self, known: Resident, params: GenerateParams, answer: Answer) -> AsyncGenerator[Event, None]:
        """One stream of the engine, from its submission to its last event; leaving cancels it."""
        ready, waker = asyncio.Event(), self._waker or Waker(asyncio.get_running_loop())
        try:
            stream = self._keeper.running().submit(params, lambda: waker.wake(ready))
        except EngineError as error:
            raise answer.failure(error) from None
        known.streams.add(stream)
        # The engine itself ends a stream whose time is up.
        patience = Patience(self._settings.first_token_timeout, self._settings.token_timeout, None, "the MLX engine")
        started = False
        try:
            while True:
                async with patience.for_sign_of_life(started):
                    await ready.wait()
                ready.clear()
                for event in stream.read():
                    for translated in answer.translate(event):
                        if not started and isinstance(translated, Delta | Finished):
                            started = True
                            yield Started(prompt_tokens=len(params.prompt))
                        yield translated
                        if isinstance(translated, Finished):
                            self._keeper.answered()
                            return
        except RouterError as error:
            if error.reason is ErrorReason.BACKEND_STALLED:
                self._keeper.suspect()
            raise
        finally:
            stream.cancel()
            known.streams.discard(stream)

    async def _prompt(self, model: ModelEntry, request: GenerationRequest) -> Prompt:
        if isinstance(request.prompt, TokensPrompt):
            return Prompt(tuple(request.prompt.ids))
        text = await self._models.text(model)
        if not isinstance(request.prompt, MessagesPrompt):
            return Prompt(tuple(await asyncio.to_thread(text.encode, request.prompt.text)))
        switch = (
            {} if request.reasoning is ReasoningMode.AUTO else {THINKING_SWITCH: request.reasoning is ReasoningMode.ON}
        )
        messages = [template_message(item) for item in request.prompt.messages]
        try:
            return await asyncio.to_thread(self._render, model, text, messages, switch)
        except EngineError as error:
            raise router_error(error, model.name) from None

    def _render(
        self, model: ModelEntry, text: ModelText, messages: list[dict[str, object]], switch: dict[str, bool]
    ) -> Prompt:
        rendered = text.render(messages, **switch)
        tokens = text.encode(rendered)
        splitter = ThinkSplitter(rendered) if model.facts.can(Capability.REASONING) else None
        return Prompt(tuple(tokens), text.boundaries(messages, rendered, tokens, **switch), splitter)

    def _told(self, error: RouterError, model: ModelEntry, started: bool) -> RouterError:
        """The error as the caller gets it: an engine that has ended by itself is no shutdown."""
        if error.reason is ErrorReason.DRAINING and not self._keeper.closed:
            return _engine_failed(model.name, started)
        return error

    def _require_head(self, model: ModelEntry, known: Resident, request: GenerationRequest) -> None:
        asked = request.speculation is SpeculationMode.REQUIRED or request.draft_depth is not None
        if asked and not (known.loaded and known.loaded.has_head):
            raise RouterError(
                ErrorReason.CAPABILITY_UNAVAILABLE,
                f"model {model.name!r}: its head could not be used when it was loaded; see the server's log",
                metadata={"model": model.name, "capability": Capability.MTP.name},
            )


def _engine_failed(model: str, started: bool) -> RouterError:
    """The error for a request that the engine took along when it ended."""
    if started:
        message = f"the MLX engine failed in the middle of the answer of model {model!r}"
        return RouterError(ErrorReason.BACKEND_FAILED, message, metadata={"model": model})
    message = f"the MLX engine failed before the first token of model {model!r}"
    return RouterError(ErrorReason.BACKEND_UNAVAILABLE, message, metadata={"model": model}, retry_after=FIRST_RESTART)


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
