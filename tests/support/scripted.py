"""A backend whose answers are written in the test: for what lies above backends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from router.catalog import Catalog, ModelEntry
from router.domain import (
    BackendKind,
    BackendState,
    BackendStatus,
    Capability,
    CapabilityFact,
    Delta,
    Drafting,
    ErrorReason,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Loading,
    ModelFacts,
    ModelState,
    Offer,
    RouterError,
    Started,
    TokenCount,
    Usage,
)
from router.settings import ModelSettings

ALL_FIELDS = frozenset(
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
        "reasoning.budget_tokens",
        "logprobs",
        "tools",
    }
)

FINISHED = Finished(FinishReason.END_OF_GENERATION, Usage(prompt_tokens=3, output_tokens=2), seed=7)


def answer(*texts: str) -> list[Event]:
    """A whole answer in pieces."""
    return [Started(prompt_tokens=3), *(Delta(text=text, token_count=1) for text in texts), FINISHED]


@dataclass
class ScriptedBackend:
    """Plays `script`; an item is an event to send, an exception to raise, or seconds to wait."""

    script: list[Event | BaseException | float] = field(default_factory=lambda: list(answer("Hello", " world")))
    name: str = "scripted"
    kind: BackendKind = BackendKind.LLAMA_CPP
    fields: frozenset[str] = ALL_FIELDS
    parallel: int = 2
    fixed_depth: int | None = None
    drafts: bool = False
    requests: list[GenerationRequest] = field(default_factory=list)
    running: int = 0
    stopped_early: int = 0
    closed: bool = False
    state: BackendState = BackendState.READY
    listeners: list[Callable[[BackendStatus], None]] = field(default_factory=list)
    in_memory: dict[str, ModelState] = field(default_factory=dict)  # READY where it is not told

    async def start(self) -> None: ...

    async def close(self) -> None:
        self.closed = True

    def offer(self) -> Offer:
        return Offer(self.kind)

    def status(self) -> BackendStatus:
        return BackendStatus(self.name, self.kind, self.state, active_requests=self.running)

    def on_status_change(self, listener: Callable[[BackendStatus], None]) -> None:
        self.listeners.append(listener)

    def become(self, state: BackendState) -> None:
        self.state = state
        for listener in self.listeners:
            listener(self.status())

    def model_state(self, model: ModelEntry) -> ModelState:
        return self.in_memory.get(model.name, ModelState.READY)

    def drafting(self, model: ModelEntry) -> Drafting | None:
        return Drafting(self.fixed_depth) if self.drafts else None

    async def describe(self, model: ModelEntry) -> ModelEntry:
        return model

    async def generate(self, model: ModelEntry, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.running += 1
        done = False
        try:
            for step in self.script:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    done = isinstance(step, Finished)
                    yield step
        finally:
            self.running -= 1
            self.stopped_early += not done

    async def count_tokens(self, model: ModelEntry, request: GenerationRequest) -> TokenCount:
        return TokenCount(5, model.context_length)

    async def preload(self, model: ModelEntry) -> AsyncGenerator[Loading, None]:
        yield Loading(0.5)

    async def unload(self, model: ModelEntry, *, force: bool) -> None:
        if self.running and not force:
            raise RouterError(ErrorReason.CAPABILITY_UNAVAILABLE, "it is in use")
        self.in_memory[model.name] = ModelState.COLD


def facts(**overrides: object) -> ModelFacts:
    """A model that can do everything except draft."""
    capabilities = {item: CapabilityFact(True, "test") for item in Capability}
    capabilities[Capability.MTP] = CapabilityFact(False, "no head")
    values = {
        "architecture": "llama",
        "quantization": "Q4_1",
        "context_length": 2048,
        "size_bytes": 1000,
        "capabilities": capabilities,
        "reasoning_switch": True,
    }
    return ModelFacts(**{**values, **overrides})  # type: ignore[arg-type]


def entry(name: str = "tiny", *, model_facts: ModelFacts | None = None, **settings: object) -> ModelEntry:
    """A catalog entry over no file."""
    settings.setdefault("path", f"/nowhere/{name}.gguf")
    model = ModelSettings.model_validate(settings)
    return ModelEntry(name, model.path, model, model_facts or facts())


def catalog(*entries: ModelEntry) -> Catalog:
    """A catalog of `entries`, or of one model named tiny."""
    return Catalog(entries or (entry(),))
