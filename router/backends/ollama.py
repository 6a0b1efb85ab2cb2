"""The Ollama backend: models that an Ollama server keeps."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from ollama import ShowResponse

from router.backends.llama_request import MAX_SEED
from router.backends.ollama_answer import Answer, Piece, another_model, broken_stream
from router.backends.ollama_client import QUESTION_TIMEOUT, failures, interruptions, new_client, unreachable
from router.backends.ollama_facts import own_stops, read_show
from router.backends.ollama_request import generation_body, load_options
from router.backends.ollama_watch import OllamaWatch, Seen, canonical
from router.backends.patience import Patience, TimeIsUpError
from router.catalog import ModelEntry
from router.domain import (
    BackendKind,
    BackendStatus,
    Capability,
    Drafting,
    ErrorReason,
    Event,
    GenerationRequest,
    Loading,
    MessagesPrompt,
    ModelState,
    Offer,
    RouterError,
    TokenCount,
)
from router.lifecycle import Lifecycle, Seat, nothing
from router.line import Ticket
from router.scheduler import Terms
from router.settings import OllamaSettings

UNTOLD_TTL = 60.0  # seconds that what a model shows is believed where its digest is not known
SUSPICIOUS = (ErrorReason.BACKEND_UNAVAILABLE, ErrorReason.BACKEND_FAILED, ErrorReason.BACKEND_STALLED)


@dataclass(frozen=True, slots=True)
class _Shown:
    """What the server showed of a model, the digest it had then, and until when that holds without one."""

    response: ShowResponse
    seen: Seen | None
    until: float


class OllamaBackend:
    """Serves what an Ollama server keeps (see `Backend`).

    Args:
        name: as in the settings.
        settings: `[backends.NAME]`.
        lifecycle: lines requests up; shared with the other backends.
    """

    kind = BackendKind.OLLAMA
    fields = frozenset(
        {
            "sampling.repetition_penalty",
            "sampling.presence_penalty",
            "sampling.frequency_penalty",
            "response_format.json_schema",
            "response_format.json_object",
            "reasoning.mode",
            "logprobs",
            "tools",
        }
    )

    def __init__(self, name: str, settings: OllamaSettings, lifecycle: Lifecycle | None = None) -> None:
        self.name = name
        self._lifecycle = lifecycle or Lifecycle()
        self._settings = settings
        self.parallel = settings.parallel
        self._client = new_client(settings)
        self._watch = OllamaWatch(settings, self._tell)
        self._listeners: list[Callable[[BackendStatus], None]] = []
        self._seats: dict[str, Seat] = {}
        self._tags: dict[str, str] = {}
        self._shown: dict[str, _Shown] = {}
        self._busy: dict[str, int] = {}  # loads in progress by tag
        self._closed = False

    async def start(self) -> None:
        """Begins to look whether the server is there; does not wait for it."""
        self._watch.start()

    async def close(self) -> None:
        """Closes every connection; the server and its models stay."""
        self._closed = True
        await self._watch.close()
        await self._client.close()  # type: ignore[no-untyped-call]

    def offer(self) -> Offer:
        """Always worth a try: a server that is down may be up in a moment."""
        return Offer(self.kind)

    def status(self) -> BackendStatus:
        """As the last look found the server."""
        watch = self._watch
        counts = [self._lifecycle.counts(seat.key) for seat in self._seats.values()]
        return BackendStatus(
            self.name,
            self.kind,
            watch.state,
            version=watch.version,
            error=watch.error,
            active_requests=sum(running for running, _ in counts),
            queued_requests=sum(waiting for _, waiting in counts),
            loaded_models=tuple(name for name, tag in self._tags.items() if tag in watch.loaded),
            retry_after=watch.retry_after,
        )

    def on_status_change(self, listener: Callable[[BackendStatus], None]) -> None:
        """Calls `listener` when the server comes or goes, or loads or drops a model."""
        self._listeners.append(listener)

    def model_state(self, model: ModelEntry) -> ModelState:
        """Whether the server held it at the last look."""
        tag = self._tag(model)
        if tag in self._watch.loaded:
            return ModelState.READY
        return ModelState.LOADING if self._busy.get(tag) else ModelState.COLD

    def drafting(self, model: ModelEntry) -> Drafting | None:
        """A head that the server shows drafts for every request: another depth would have the model loaded again."""
        depth = _draft_depth(model)
        return Drafting(depth) if depth is not None else None

    async def describe(self, model: ModelEntry) -> ModelEntry:
        """The model with what /api/show says of it."""
        shown = await self._show(model)
        tag = self._tag(model)
        seen = self._watch.models.get(tag)
        return replace(model, facts=read_show(tag, shown, seen.size_bytes if seen else None))

    async def generate(self, model: ModelEntry, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Answers one request (see `Backend.generate`); `model` is as `describe` gave it."""
        budget, settings = request.time_budget, self._settings
        deadline = None if budget is None else asyncio.get_running_loop().time() + budget
        patience = Patience(settings.first_token_timeout, settings.token_timeout, deadline, "Ollama")
        seed = _seed(request)
        answer = Answer(request, seed, drafting=_draft_depth(model) is not None)
        body = generation_body(
            request,
            seed=seed,
            context_length=model.context_length,
            facts=model.facts,
            own_stops=own_stops(await self._show(model)),
            draft_depth=_draft_depth(model),
        )
        ticket = self._lifecycle.enter(self._seat(model), request.priority)
        try:
            async with contextlib.aclosing(self._answer(model, body, ticket, answer, patience)) as events:
                async for event in events:
                    yield event
        except TimeIsUpError:
            for event in answer.cut():
                yield event
        except RouterError as error:
            if error.reason in SUSPICIOUS:
                self._watch.suspect()
            raise
        finally:
            self._lifecycle.leave(ticket)

    async def count_tokens(self, model: ModelEntry, request: GenerationRequest) -> TokenCount:
        """Ollama has no such call."""
        raise RouterError(
            ErrorReason.CAPABILITY_UNAVAILABLE,
            f"model {model.name!r}: Ollama cannot count tokens without generating",
            metadata={"model": model.name, "capability": Capability.COUNT_TOKENS.name},
        )

    async def preload(self, model: ModelEntry) -> AsyncGenerator[Loading, None]:
        """Has the server load the model, with the context that requests will ask for."""
        if self.model_state(model) is ModelState.READY:
            return
        yield Loading()
        options = load_options(model.context_length, _draft_depth(model))
        with self._loading(model), failures(self._tag(model)):
            try:
                async with asyncio.timeout(self._settings.load_timeout):
                    await self._client.generate(
                        model=self._tag(model), options=options, keep_alive=self._settings.keep_alive
                    )
            except TimeoutError:
                raise RouterError(
                    ErrorReason.MODEL_LOAD_FAILED,
                    f"Ollama did not load model {model.name!r} in time",
                    metadata={"model": model.name},
                ) from None
        self._watch.note(self._tag(model), loaded=True)

    async def unload(self, model: ModelEntry, *, force: bool) -> None:
        """Has the server drop the model; it ends running answers itself, and others than ours too."""
        if (in_use := sum(self._lifecycle.counts(self._seat(model).key))) and not force:
            raise RouterError(
                ErrorReason.CAPABILITY_UNAVAILABLE,
                f"{in_use} requests use model {model.name!r}",
                metadata={"model": model.name, "requests": str(in_use)},
            )
        with failures(self._tag(model)):
            async with asyncio.timeout(self._settings.load_timeout):
                await self._client.generate(model=self._tag(model), keep_alive=0)
        self._watch.note(self._tag(model), loaded=False)

    async def _answer(
        self, model: ModelEntry, body: dict[str, Any], ticket: Ticket, answer: Answer, patience: Patience
    ) -> AsyncGenerator[Event, None]:
        async with contextlib.aclosing(self._lifecycle.wait(ticket, patience.deadline)) as steps:
            async for step in steps:
                yield step
        tag = self._tag(model)
        answer.fingerprint = self._fingerprint(tag)
        if self.model_state(model) is not ModelState.READY:
            yield Loading()
        async with contextlib.AsyncExitStack() as stack:
            with self._loading(model), failures(tag, answer.request):
                async with patience.for_sign_of_life(started=False):
                    pieces = await stack.enter_async_context(contextlib.aclosing(await self._ask(tag, body, answer)))
                    piece = await anext(pieces, None)
            self._watch.note(tag, loaded=True)
            while piece is not None:
                if piece.model and canonical(piece.model) != tag:
                    raise another_model()
                for event in answer.take(piece):
                    yield event
                if answer.finished:
                    return
                with interruptions(tag) if answer.started else failures(tag, answer.request):
                    async with patience.for_sign_of_life(answer.started):
                        piece = await anext(pieces, None)
        # The stream ended politely, but without saying that it is done.
        raise broken_stream() if answer.started else unreachable()

    async def _ask(self, tag: str, body: dict[str, Any], answer: Answer) -> AsyncGenerator[Piece, None]:
        """The stream of pieces; nothing is sent until the first one is asked for."""
        ask = self._client.chat if isinstance(answer.request.prompt, MessagesPrompt) else self._client.generate
        pieces: AsyncIterator[Piece] = await ask(model=tag, stream=True, keep_alive=self._settings.keep_alive, **body)
        return cast(AsyncGenerator[Piece, None], pieces)

    async def _show(self, model: ModelEntry) -> ShowResponse:
        """What the server shows of a model, asked again when the model has changed there."""
        if self._closed:
            raise RouterError(ErrorReason.DRAINING, "the router is shutting down", retry_after=1.0)
        await self._watch.first_look()
        tag = self._tag(model)
        self._tags[model.name] = tag
        now, seen, known = asyncio.get_running_loop().time(), self._watch.models.get(tag), self._shown.get(tag)
        if known is not None and known.seen == seen and (seen is not None or now < known.until):
            return known.response
        with failures(tag):
            try:
                async with asyncio.timeout(QUESTION_TIMEOUT):
                    response = await self._client.show(tag)
            except TimeoutError:
                raise RouterError(ErrorReason.BACKEND_STALLED, "Ollama does not answer") from None
        self._shown[tag] = _Shown(response, seen, now + UNTOLD_TTL)
        return response

    def _seat(self, model: ModelEntry) -> Seat:
        if model.name not in self._seats:
            terms = Terms(self._settings.parallel, self._settings.max_queued, loads=False)
            self._seats[model.name] = Seat(f"{self.name}/{model.name}", terms, nothing, nothing)
        return self._seats[model.name]

    @contextlib.contextmanager
    def _loading(self, model: ModelEntry) -> Any:
        """Counts a request that may have the model loaded."""
        tag = self._tag(model)
        self._busy[tag] = self._busy.get(tag, 0) + 1
        try:
            yield
        finally:
            self._busy[tag] -= 1

    def _tag(self, model: ModelEntry) -> str:
        return canonical(str(model.settings.ollama))

    def _fingerprint(self, tag: str) -> str:
        seen = self._watch.models.get(tag)
        return f"ollama={self._watch.version} digest={seen.digest[:12] if seen else ''}"

    def _tell(self) -> None:
        status = self.status()
        for listener in self._listeners:
            listener(status)


def _draft_depth(model: ModelEntry) -> int | None:
    """Tokens drafted a round; None where the model shows no head or the settings say not to draft."""
    if model.settings.speculation == "auto" and model.facts.can(Capability.MTP):
        return model.settings.draft_depth
    return None


def _seed(request: GenerationRequest) -> int | None:
    """The seed in force, None for greedy sampling."""
    if request.sampling.greedy:
        return None
    return secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
