"""What an Ollama server has, and holds in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx

from router.backends.ollama_client import MAX_LOGGED, failures, new_client
from router.backends.one_shot import OneShot
from router.backends.watch import LOOK_TIMEOUT, Watch
from router.settings import OllamaSettings

LATEST = "latest"


@dataclass(frozen=True, slots=True)
class Seen:
    """A model that the server has: digest of its manifest, and bytes of its files."""

    digest: str
    size_bytes: int | None


class OllamaWatch(Watch):
    """A watch that also knows the server's models.

    Attributes:
        version: of the server.
        models: what it has, by tag.
        loaded: tags in memory.
    """

    def __init__(self, settings: OllamaSettings, changed: Callable[[], None]) -> None:
        super().__init__(f"Ollama at {settings.host}", self._ask, settings.check_interval, changed)
        self.version = ""
        self.models: Mapping[str, Seen] = {}
        self.loaded: frozenset[str] = frozenset()
        self._client = new_client(settings)
        self._http = httpx.AsyncClient(
            base_url=settings.host,
            trust_env=False,
            timeout=LOOK_TIMEOUT,
            transport=OneShot(httpx.create_ssl_context()),
        )

    async def close(self) -> None:
        """Ends the looking. Safe to call twice."""
        await super().close()
        await self._client.close()  # type: ignore[no-untyped-call]
        await self._http.aclose()

    def note(self, tag: str, *, loaded: bool) -> None:
        """The server has just shown that it holds the model, or that it does not."""
        if (tag in self.loaded) != loaded:
            self.loaded ^= {tag}
            self._changed()

    async def _ask(self) -> bool:
        before = self.loaded
        try:
            with failures("the server"):
                reply = await self._http.get("/api/version")
                reply.raise_for_status()
                version = str(reply.json()["version"])[:MAX_LOGGED]
                listed, held = await self._client.list(), await self._client.ps()
        except BaseException:
            self.loaded = frozenset()
            raise
        self.version = version
        self.models = {
            canonical(model.model): Seen(model.digest or "", int(model.size) if model.size is not None else None)
            for model in listed.models
            if model.model
        }
        self.loaded = frozenset(canonical(model.model) for model in held.models if model.model)
        return self.loaded != before


def canonical(tag: str) -> str:
    """The tag as Ollama lists it."""
    return tag if ":" in tag.rpartition("/")[2] else f"{tag}:{LATEST}"
