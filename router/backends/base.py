"""What the router asks of a backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from router.catalog import ModelEntry
from router.domain import (
    BackendKind,
    BackendStatus,
    Drafting,
    Event,
    GenerationRequest,
    Loading,
    ModelState,
    Offer,
    TokenCount,
)


class Backend(Protocol):
    """An engine that serves models. All methods run on the server's event loop and never block it.

    Every failure is a `RouterError`; any other exception is a fault of the backend's code and reaches the caller as
    INTERNAL. A backend never retries a request: the router owns retries.
    """

    name: str
    kind: BackendKind
    # Dotted names (see `policy.requested_fields`) of the optional request fields that this backend honours.
    fields: frozenset[str]
    # Requests that run at once, for each model.
    parallel: int

    async def start(self) -> None:
        """Gets ready without loading a model. Raises nothing for an engine that is merely unreachable: that is DOWN."""

    async def close(self) -> None:
        """Ends every generation and frees everything. Safe to call twice."""

    def offer(self) -> Offer:
        """What routing should know of this backend; valid after `start`."""

    def status(self) -> BackendStatus:
        """Health as last seen; no I/O."""

    def on_status_change(self, listener: Callable[[BackendStatus], None]) -> None:
        """Calls `listener` on the event loop whenever the state in `status()` changes."""

    def model_state(self, model: ModelEntry) -> ModelState:
        """Whether the model is in memory, as last seen."""

    def drafting(self, model: ModelEntry) -> Drafting | None:
        """How the backend drafts for this model; None where it does not draft. No I/O."""

    async def describe(self, model: ModelEntry) -> ModelEntry:
        """The model with what the engine knows of it beyond its files' headers; as it is where they tell everything.

        Raises:
            RouterError: BACKEND_UNAVAILABLE where the engine would have to be asked and does not answer;
                MODEL_LOAD_FAILED where it does not know the model.
        """
        ...

    def generate(self, model: ModelEntry, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Answers one request: any progress, one Started, any Deltas, one Finished.

        Loads the model if it is cold. Closing the generator (`aclose`) or cancelling its task stops the work in the
        engine, at whatever stage it is, before control returns or within one decode step after.

        Raises:
            RouterError: INVALID_REQUEST, PROMPT_TOO_LONG, QUEUE_FULL, MODEL_LOAD_FAILED, BACKEND_UNAVAILABLE or
                DRAINING before `Started`; BACKEND_FAILED after it; BACKEND_STALLED at any time.
        """
        ...

    async def count_tokens(self, model: ModelEntry, request: GenerationRequest) -> TokenCount:
        """Counts the prompt's tokens, chat template included; loads the model if it must."""
        ...

    def preload(self, model: ModelEntry) -> AsyncGenerator[Loading, None]:
        """Loads the model, yielding progress; ends when it is READY. Raises RouterError MODEL_LOAD_FAILED."""
        ...

    async def unload(self, model: ModelEntry, *, force: bool) -> None:
        """Drops the model from memory. Raises RouterError CAPABILITY_UNAVAILABLE where it is in use and not `force`."""
