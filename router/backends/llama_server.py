"""The lane to a llama-server that somebody else started."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from router.backends.llama_answer import Answer, broken_stream
from router.backends.llama_request import MAX_SEED, Limits, generation_body, refuse_foreign_tokens
from router.backends.llama_stream import ask, count_prompt, new_client, stream_answer
from router.backends.patience import Patience, TimeIsUpError
from router.backends.watch import Watch
from router.catalog import ModelEntry
from router.domain import (
    BackendKind,
    BackendState,
    BackendStatus,
    Capability,
    CapabilityFact,
    Drafting,
    DraftSource,
    ErrorReason,
    Event,
    GenerationRequest,
    Loading,
    ModelFacts,
    ModelFormat,
    ModelState,
    Offer,
    RouterError,
    TokenCount,
)
from router.facts import THINKING_SWITCH, reasoning_fact
from router.lifecycle import Lifecycle, Seat, nothing
from router.line import Ticket
from router.scheduler import Terms
from router.settings import LlamaServerSettings

MAX_TEXT = 200  # characters of a name, in messages
MAX_COUNTING = 2
SUSPICIOUS = (ErrorReason.BACKEND_UNAVAILABLE, ErrorReason.BACKEND_FAILED, ErrorReason.BACKEND_STALLED)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Server:
    """Where it is (see `llama_stream.Endpoint`)."""

    address: str
    api_key: str


class LlamaServerBackend:
    """Serves the one model of a running llama-server (see `Backend`).

    Args:
        name: as in the settings.
        settings: `[backends.NAME]`.
        lifecycle: lines requests up; shared with the other backends.
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

    def __init__(self, name: str, settings: LlamaServerSettings, lifecycle: Lifecycle | None = None) -> None:
        self.name = name
        self._lifecycle = lifecycle or Lifecycle()
        self._seat = Seat(name, Terms(settings.parallel, settings.max_queued, loads=False), nothing, nothing)
        self._settings = settings
        self.parallel = settings.parallel
        socket = settings.url.removeprefix("unix:") if settings.url.startswith("unix:") else None
        key = settings.api_key.get_secret_value() if settings.api_key else ""
        self._server = Server("http://localhost" if socket else settings.url, key)
        self._client = new_client(connect_timeout=settings.connect_timeout, verify=True, socket=socket)
        self._watch = Watch(f"llama-server at {settings.url}", self._look, settings.check_interval, self._tell)
        self._counting = asyncio.Semaphore(MAX_COUNTING)
        self._listeners: list[Callable[[BackendStatus], None]] = []
        self._served: str | None = None  # name of the configured model that it was last seen to serve
        self._build = ""
        self._limits = Limits(0, 0)
        self._closed = False

    async def start(self) -> None:
        """Begins to look whether the server is there; does not wait for it."""
        self._watch.start()

    async def close(self) -> None:
        """Closes every connection; the server stays."""
        self._closed = True
        await self._watch.close()
        await self._client.aclose()

    def offer(self) -> Offer:
        """Always worth a try: a server that is down may be up in a moment."""
        return Offer(self.kind, external=True)

    def status(self) -> BackendStatus:
        """As the last look found the server."""
        watch = self._watch
        running, waiting = self._lifecycle.counts(self._seat.key)
        up = watch.state is BackendState.READY and self._served is not None
        return BackendStatus(
            self.name,
            self.kind,
            watch.state,
            version=self._build,
            error=watch.error,
            active_requests=running,
            queued_requests=waiting,
            loaded_models=(self._served,) if up and self._served else (),
            retry_after=watch.retry_after,
        )

    def on_status_change(self, listener: Callable[[BackendStatus], None]) -> None:
        """Calls `listener` when the server comes or goes."""
        self._listeners.append(listener)

    def model_state(self, model: ModelEntry) -> ModelState:
        """READY while the server answers: it has its model from its start to its end."""
        return ModelState.READY if self._watch.state is BackendState.READY else ModelState.COLD

    def drafting(self, model: ModelEntry) -> Drafting | None:
        """Nothing that the router decides."""
        return None

    async def describe(self, model: ModelEntry) -> ModelEntry:
        """The model with what the server says of it, once it is sure that it is that one."""
        if self._closed:
            raise RouterError(ErrorReason.DRAINING, "the router is shutting down", retry_after=1.0)
        props, meta = await self._ask("/props"), await self._ask("/v1/models")
        try:
            names, facts, self._limits = _names(props, meta), _facts(props, meta), _limits(props, meta)
            self._build = str(props.get("build_info", ""))[:MAX_TEXT]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise broken_stream() from None
        if model.settings.kept_as not in names:
            self._served = None
            raise _another_model(model, min(names, key=len, default=""))
        self._served = model.name
        return replace(model, facts=facts)

    async def generate(self, model: ModelEntry, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Answers one request (see `Backend.generate`); `model` is as `describe` gave it."""
        budget, settings = request.time_budget, self._settings
        deadline = None if budget is None else asyncio.get_running_loop().time() + budget
        patience = Patience(settings.first_token_timeout, settings.token_timeout, deadline, "llama.cpp")
        answer = Answer(request, _seed(request), DraftSource.UNKNOWN)
        answer.fingerprint = f"llama-server={self._build} model={model.settings.kept_as}"
        ticket = self._lifecycle.enter(self._seat, request.priority)
        try:
            async with contextlib.aclosing(self._answer(ticket, answer, patience)) as events:
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
        """Counts by the server's own template and tokenizer."""
        async with self._counting:
            refuse_foreign_tokens(request, self._limits)
            return TokenCount(await count_prompt(self._client, self._server, request), self._limits.context_length)

    async def preload(self, model: ModelEntry) -> AsyncGenerator[Loading, None]:
        """Nothing to load; tells whether the server serves the model."""
        yield Loading()
        await self.describe(model)

    async def unload(self, model: ModelEntry, *, force: bool) -> None:
        """Refused: the server is somebody else's."""
        raise RouterError(
            ErrorReason.CAPABILITY_UNAVAILABLE,
            f"model {model.name!r} is served by a llama-server that the router did not start and does not end",
            metadata={"model": model.name},
        )

    async def _answer(self, ticket: Ticket, answer: Answer, patience: Patience) -> AsyncGenerator[Event, None]:
        async with contextlib.aclosing(self._lifecycle.wait(ticket, patience.deadline)) as steps:
            async for step in steps:
                yield step
        path, body = generation_body(answer.request, answer.seed, self._limits)
        events = stream_answer(self._client, self._server, path, body, answer, patience)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    async def _look(self) -> bool:
        await self._ask("/health")
        return False

    async def _ask(self, path: str) -> Json:
        return await ask(self._client, self._server, path, None, None)

    def _tell(self) -> None:
        status = self.status()
        for listener in self._listeners:
            listener(status)


def _names(props: Json, models: Json) -> frozenset[str]:
    """Every name by which the server knows its model: aliases, and its file's name with and without the suffix."""
    entry = models["data"][0]
    names = {str(entry["id"]), *map(str, entry.get("aliases", ())), str(props.get("model_alias", ""))}
    file = PurePath(str(props.get("model_path", "")))
    return frozenset(name for name in (*names, file.name, file.stem) if name)


def _limits(props: Json, models: Json) -> Limits:
    return Limits(int(props["default_generation_settings"]["n_ctx"]), int(models["data"][0]["meta"]["n_vocab"]))


def _facts(props: Json, models: Json) -> ModelFacts:
    meta, template = models["data"][0]["meta"], str(props.get("chat_template", ""))
    caps = props.get("chat_template_caps", {})
    has_tools = caps.get("supports_tools") is True
    return ModelFacts(
        format=ModelFormat.LLAMA_SERVER,
        quantization=str(meta.get("ftype", ""))[:MAX_TEXT],
        context_length=_limits(props, models).context_length,
        size_bytes=int(meta["size"]) if "size" in meta else None,
        reasoning_switch=THINKING_SWITCH in template,
        capabilities={
            Capability.CHAT: CapabilityFact(
                bool(template), f"chat_template is {'present' if template else 'absent'} in /props"
            ),
            Capability.MTP: CapabilityFact(None, "llama-server does not tell before an answer whether it drafts"),
            Capability.REASONING: reasoning_fact(template),
            Capability.TOOLS: CapabilityFact(has_tools, f"chat_template_caps.supports_tools = {has_tools} in /props"),
            Capability.JSON_SCHEMA: CapabilityFact(True, "llama.cpp turns JSON Schema into a grammar"),
            Capability.LOGPROBS: CapabilityFact(True, "llama.cpp returns them per token"),
            Capability.COUNT_TOKENS: CapabilityFact(True, "llama.cpp tokenizes without generating"),
            Capability.TOKEN_PROMPT: CapabilityFact(True, "llama.cpp takes token ids"),
        },
    )


def _another_model(model: ModelEntry, served: str) -> RouterError:
    served = served[:MAX_TEXT]
    return RouterError(
        ErrorReason.MODEL_LOAD_FAILED,
        f"model {model.name!r}: its llama-server serves {served!r}, not {model.settings.kept_as!r}",
        metadata={"model": model.name, "served": served},
    )


def _seed(request: GenerationRequest) -> int | None:
    """The seed in force, None for greedy sampling."""
    if request.sampling.greedy:
        return None
    return secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
