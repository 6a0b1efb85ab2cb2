"""Looks after an Ollama server: whether it answers, which models it has and holds in memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx
import ollama

from router.backends.ollama_client import MAX_LOGGED, QUESTION_TIMEOUT, failures, new_client
from router.domain import BackendState, ErrorReason, RouterError
from router.settings import OllamaSettings

logger = logging.getLogger(__name__)

FIRST_BACKOFF = 0.5  # seconds after the first failed look; doubles up to the interval of the settings
LATEST = "latest"


@dataclass(frozen=True, slots=True)
class Seen:
    """A model that the server has: digest of its manifest, and bytes of its files."""

    digest: str
    size_bytes: int | None


class Watch:
    """Asks the server at intervals, sooner where it is down or was `suspect`ed.

    Args:
        settings: whom to ask, and how often.
        changed: called on the event loop when `state` or what is loaded has changed.
    """

    def __init__(self, settings: OllamaSettings, changed: Callable[[], None]) -> None:
        self.state = BackendState.STARTING
        self.error: RouterError | None = None
        self.version = ""
        self.models: Mapping[str, Seen] = {}
        self.loaded: frozenset[str] = frozenset()
        self.retry_after: float | None = None
        self._settings = settings
        self._changed = changed
        self._client = new_client(settings)
        self._http = httpx.AsyncClient(base_url=settings.host, trust_env=False, timeout=QUESTION_TIMEOUT)
        self._now = asyncio.Event()
        self._looked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to look."""
        self._task = asyncio.create_task(self._look_for_ever(), name="watch ollama")

    async def close(self) -> None:
        """Ends the looking. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await self._client.close()  # type: ignore[no-untyped-call]
        await self._http.aclose()

    async def first_look(self) -> None:
        """Waits until the server was asked once, whatever came of it."""
        await self._looked.wait()

    def suspect(self) -> None:
        """Something went wrong: look now."""
        self._now.set()

    def note(self, tag: str, *, loaded: bool) -> None:
        """The server has just shown that it holds the model, or that it does not."""
        if (tag in self.loaded) != loaded:
            self.loaded ^= {tag}
            self._changed()

    async def _look_for_ever(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            self._now.clear()
            before = (self.state, self.loaded)
            try:
                async with asyncio.timeout(QUESTION_TIMEOUT):
                    await self._look()
            except (RouterError, TimeoutError) as error:
                self._down(error, backoff)
            else:
                self.state, self.error, self.retry_after, backoff = BackendState.READY, None, None, FIRST_BACKOFF
            self._looked.set()
            if before != (self.state, self.loaded):
                self._changed()
            healthy = self.state is BackendState.READY
            pause = self._settings.check_interval if healthy else backoff
            if not healthy:
                backoff = min(2 * backoff, self._settings.check_interval)
            with contextlib.suppress(TimeoutError):
                # While it is down, requests that fail must not speed the asking up.
                await asyncio.wait_for(self._now.wait(), pause) if healthy else await asyncio.sleep(pause)

    async def _look(self) -> None:
        with failures("the server"):
            reply = await self._http.get("/api/version")
            reply.raise_for_status()
            version = str(reply.json()["version"])[:MAX_LOGGED]
            listed, held = await self._client.list(), await self._client.ps()
        self.version = version
        self.models = {
            canonical(model.model): Seen(model.digest or "", int(model.size) if model.size is not None else None)
            for model in listed.models
            if model.model
        }
        self.loaded = frozenset(canonical(model.model) for model in held.models if model.model)

    def _down(self, error: RouterError | TimeoutError, backoff: float) -> None:
        if self.state is not BackendState.DOWN:
            logger.warning("Ollama at %s cannot be used: %s", self._settings.host, error or "it does not answer")
        if isinstance(error, TimeoutError):
            error = RouterError(ErrorReason.BACKEND_STALLED, "Ollama does not answer")
        self.state, self.error, self.retry_after, self.loaded = BackendState.DOWN, error, backoff, frozenset()


def canonical(tag: str) -> str:
    """The tag as Ollama lists it."""
    return tag if ":" in tag.rpartition("/")[2] else f"{tag}:{LATEST}"


async def list_tags(client: ollama.AsyncClient) -> dict[str, int | None]:
    """Tags that the server has, with the bytes of their files. Raises RouterError BACKEND_UNAVAILABLE."""
    with failures("the server"):
        async with asyncio.timeout(QUESTION_TIMEOUT):
            listed = await client.list()
    return {model.model: int(model.size) if model.size else None for model in listed.models if model.model}
