"""The llama.cpp backend: GGUF models in child processes, one per loaded model."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from router.backends.llama_answer import Answer
from router.backends.llama_child import ChildConfig
from router.backends.llama_process import LlamaProcess, engine_version
from router.backends.llama_request import MAX_SEED, chat_body, generation_body, refuse_foreign_tokens
from router.backends.llama_runner import ModelRunner
from router.backends.llama_stream import ask, new_client, stream_answer
from router.backends.patience import Patience, TimeIsUpError
from router.catalog import ModelEntry
from router.domain import (
    BackendKind,
    BackendState,
    BackendStatus,
    Capability,
    Drafting,
    DraftSource,
    ErrorReason,
    Event,
    GenerationRequest,
    Loading,
    MessagesPrompt,
    ModelState,
    Offer,
    RouterError,
    TokenCount,
    TokensPrompt,
)
from router.lifecycle import Lifecycle, Seat
from router.line import Ticket
from router.scheduler import Phase
from router.settings import LlamaCppSettings

# Failures after which the child is looked at: it may have ended or hang.
SUSPICIOUS = (ErrorReason.BACKEND_UNAVAILABLE, ErrorReason.BACKEND_FAILED, ErrorReason.BACKEND_STALLED)
MAX_COUNTING = 2  # requests to count tokens that a child gets at once


@dataclass(frozen=True, slots=True)
class _Model:
    """A model that has been asked for: its process, and its seat with the scheduler."""

    runner: ModelRunner
    seat: Seat


class LlamaCppBackend:
    """Serves GGUF models through llama.cpp (see `Backend`).

    Args:
        name: as in the settings.
        settings: `[backends.NAME]`.
        lifecycle: has models loaded and dropped; shared with the other backends.
    """

    kind = BackendKind.LLAMA_CPP
    fields = frozenset(
        {
            "sampling.repetition_penalty",
            "sampling.presence_penalty",
            "sampling.frequency_penalty",
            "sampling.logit_bias",
            "stop.ignore_end_of_generation",
            "response_format.json_schema",
            "response_format.json_object",
            "reasoning.mode",
            "logprobs",
            "tools",
        }
    )

    def __init__(self, name: str, settings: LlamaCppSettings, lifecycle: Lifecycle | None = None) -> None:
        self.name = name
        self._settings = settings
        self.parallel = settings.parallel
        self._lifecycle = lifecycle or Lifecycle()
        self._models: dict[str, _Model] = {}
        self._listeners: list[Callable[[BackendStatus], None]] = []
        self._restarts = 0  # of models that were dropped since
        self._closed = False
        self._client = new_client()
        self._counting = asyncio.Semaphore(MAX_COUNTING)

    async def start(self) -> None:
        """Nothing to do: children start with their models."""

    async def close(self) -> None:
        """Ends every child and waits until they are gone."""
        self._closed = True
        await asyncio.gather(*(model.runner.close() for model in self._models.values()))
        await self._client.aclose()

    def offer(self) -> Offer:
        """Always usable where xllamacpp is installed."""
        return Offer(self.kind, "" if engine_version() else "xllamacpp is not installed")

    def status(self) -> BackendStatus:
        """DOWN while a model's process has ended and is being restarted, and no other model is loaded."""
        runners = {name: model.runner for name, model in self._models.items()}
        loaded = tuple(name for name, runner in runners.items() if runner.state is ModelState.READY)
        counts = [self._lifecycle.counts(model.seat.key) for model in self._models.values()]
        restarting = (runner for runner in runners.values() if runner.restarting)
        down = None if loaded else next(restarting, None)
        return BackendStatus(
            self.name,
            self.kind,
            BackendState.DOWN if down or not engine_version() else BackendState.READY,
            version=engine_version(),
            error=down.error if down else None,
            active_requests=sum(running for running, _ in counts),
            queued_requests=sum(waiting for _, waiting in counts),
            loaded_models=loaded,
            restarts=self._restarts + sum(runner.restarts for runner in runners.values()),
            retry_after=down.retry_after if down else None,
        )

    def on_status_change(self, listener: Callable[[BackendStatus], None]) -> None:
        """Calls `listener` with the new status whenever a model loads, fails, ends or is dropped."""
        self._listeners.append(listener)

    def model_state(self, model: ModelEntry) -> ModelState:
        """Whether its child is up."""
        known = self._models.get(model.name)
        return known.runner.state if known else ModelState.COLD

    def child(self, model: ModelEntry) -> LlamaProcess | None:
        """The process that has the model loaded, if one has."""
        known = self._models.get(model.name)
        return known.runner.child if known else None

    def drafting(self, model: ModelEntry) -> Drafting | None:
        """A head in the file drafts for every request: llama.cpp fixes the depth when it starts."""
        depth = fixed_draft_depth(model)
        return Drafting(depth) if depth is not None else None

    async def describe(self, model: ModelEntry) -> ModelEntry:
        """Its file tells everything."""
        return model

    async def generate(self, model: ModelEntry, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Answers one request (see `Backend.generate`)."""
        budget = request.time_budget
        deadline = None if budget is None else asyncio.get_running_loop().time() + budget
        patience = Patience(self._settings.first_token_timeout, self._settings.token_timeout, deadline, "llama.cpp")
        served = self._serve(model)
        source = DraftSource.NONE if self.drafting(model) is None else DraftSource.MTP_HEAD
        answer = Answer(request, _seed(request), source)
        ticket = self._lifecycle.enter(served.seat, request.priority)
        try:
            async with contextlib.aclosing(self._answer(served, ticket, answer, patience)) as events:
                async for event in events:
                    yield event
        except TimeIsUpError:
            for event in answer.cut():
                yield event
        finally:
            self._lifecycle.leave(ticket)

    async def count_tokens(self, model: ModelEntry, request: GenerationRequest) -> TokenCount:
        """Counts by llama.cpp's own template and tokenizer, few requests at a time: a long text takes much memory."""
        async with self._counting, self._lifecycle.held(self._serve(model).seat):
            return await self._count(model, request)

    async def _count(self, model: ModelEntry, request: GenerationRequest) -> TokenCount:
        runner = self._serve(model).runner
        child = await runner.ready()
        refuse_foreign_tokens(request, runner.limits)
        prompt = request.prompt
        if isinstance(prompt, TokensPrompt):
            return TokenCount(len(prompt.ids), runner.limits.context_length)
        if isinstance(prompt, MessagesPrompt):
            rendered = await ask(self._client, child, "/apply-template", chat_body(request), request)
            text = str(rendered.get("prompt", ""))
        else:
            text = prompt.text
        body = {"content": text, "add_special": True, "parse_special": True}
        tokens = (await ask(self._client, child, "/tokenize", body, request)).get("tokens", [])
        return TokenCount(len(tokens), runner.limits.context_length)

    async def preload(self, model: ModelEntry) -> AsyncGenerator[Loading, None]:
        """Loads the model; llama.cpp does not tell how far it is."""
        served = self._serve(model)
        async with contextlib.aclosing(self._lifecycle.preload(served.seat)) as steps:
            async for step in steps:
                yield step
        await self._serve(model).runner.ready()  # it may just be restarting

    async def unload(self, model: ModelEntry, *, force: bool) -> None:
        """Ends the model's child."""
        served = self._models.get(model.name)
        if served is None:
            return
        await self._lifecycle.unload(served.seat.key, model.name, force=force)
        # A request that came meanwhile may have begun to load it again: that goes on.
        if self._lifecycle.phase(served.seat.key) is Phase.COLD and served.runner.state is not ModelState.READY:
            await served.runner.unload()  # it has failed, or restarts: nothing of that is left
        self._forget(model.name)

    async def _unload(self, name: str) -> None:
        await self._models[name].runner.unload()
        self._forget(name)

    def _forget(self, name: str) -> None:
        """The next load starts from the model as it is configured then."""
        served = self._models.get(name)
        if served is None or served.runner.state is not ModelState.COLD:
            return
        if self._lifecycle.idle(served.seat.key):
            del self._models[name]
            self._restarts += served.runner.restarts

    async def _answer(
        self, served: _Model, ticket: Ticket, answer: Answer, patience: Patience
    ) -> AsyncGenerator[Event, None]:
        async with contextlib.aclosing(self._lifecycle.wait(ticket, patience.deadline)) as steps:
            async for step in steps:
                yield step
        if served.runner.state is not ModelState.READY:
            yield Loading()
        async with patience.for_work():
            child = await served.runner.ready()
        answer.fingerprint = child.fingerprint
        path, body = generation_body(answer.request, answer.seed, served.runner.limits)
        try:
            events = stream_answer(self._client, child, path, body, answer, patience)
            async with contextlib.aclosing(events):
                async for event in events:
                    yield event
        except RouterError as error:
            if error.reason in SUSPICIOUS:
                await served.runner.suspect(child)
            raise
        served.runner.succeeded()

    def _serve(self, model: ModelEntry) -> _Model:
        if self._closed:
            raise RouterError(ErrorReason.DRAINING, "the router is shutting down", retry_after=1.0)
        if model.name not in self._models:
            runner = ModelRunner(self._child_config(model), self._settings, self._client, self._tell)
            terms = self._lifecycle.terms(model, self._settings.parallel, self._settings.max_queued)

            async def load() -> None:
                await runner.ready()

            seat = Seat(f"{self.name}/{model.name}", terms, load, functools.partial(self._unload, model.name))
            self._models[model.name] = _Model(runner, seat)
        return self._models[model.name]

    def _child_config(self, model: ModelEntry) -> ChildConfig:
        settings = self._settings
        return ChildConfig(
            model_path=str(model.files),
            api_key="",
            context_length=model.context_length,
            parallel=settings.parallel,
            batch_tokens=settings.batch_tokens,
            threads=settings.threads,
            gpu_layers=-1 if settings.gpu_layers is None else settings.gpu_layers,
            draft_depth=fixed_draft_depth(model) or 0,
        )

    def _tell(self) -> None:
        status = self.status()
        for listener in self._listeners:
            listener(status)


def fixed_draft_depth(model: ModelEntry) -> int | None:
    """Tokens drafted a round for every request; None where the file has no head or the settings say not to draft."""
    if model.settings.speculation == "auto" and model.facts.can(Capability.MTP):
        return model.settings.fixed_draft_depth
    return None


def _seed(request: GenerationRequest) -> int | None:
    """The seed in force, None for greedy sampling."""
    if request.sampling.greedy:
        return None
    return secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
