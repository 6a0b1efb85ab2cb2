"""One model's life in a llama.cpp child: loaded once for all who wait, watched, restarted, dropped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import httpx

from router.backends.llama_child import ChildConfig
from router.backends.llama_process import LlamaProcess, start_child
from router.backends.llama_request import Limits
from router.domain import ErrorReason, ModelState, RouterError
from router.settings import LlamaCppSettings

log = logging.getLogger(__name__)

HEALTH_INTERVAL, HEALTH_TIMEOUT, HEALTH_FAILURES = 5.0, 5.0, 3
SUSPECT_TIMEOUT = 1.0
PATIENCE = 1.0  # seconds that a request waits for a restart before it is sent away


class ModelRunner:
    """Keeps at most one child for one model.

    Args:
        config: how to start the child.
        settings: timeouts and backoff.
        client: for health checks.
        changed: called on the event loop after every change of `state`.
    """

    def __init__(
        self, config: ChildConfig, settings: LlamaCppSettings, client: httpx.AsyncClient, changed: Callable[[], None]
    ) -> None:
        self.state = ModelState.COLD
        self.error: RouterError | None = None  # why it is FAILED or restarting
        self.restarts = 0
        self.limits = Limits(config.context_length, 0)
        self._config = config
        self._settings = settings
        self._client = client
        self._changed = changed
        self._child: LlamaProcess | None = None
        self._loading: asyncio.Task[LlamaProcess] | None = None
        self._waiting = 0
        self._wanted = False  # a restart goes on though nobody waits for it
        self._watchers: set[asyncio.Task[None]] = set()
        self._abandoned: set[asyncio.Task[LlamaProcess]] = set()
        self._closed = False
        self._failures = 0  # ends and failed loads since the last success
        self._not_before = 0.0  # when the next load may start

    @property
    def retry_after(self) -> float | None:
        """Seconds until the next load may start, None if it may now."""
        remaining = self._not_before - time.monotonic()
        return remaining if remaining > 0 else None

    @property
    def restarting(self) -> bool:
        """Whether its process ended and another is on the way."""
        return self._wanted

    @property
    def child(self) -> LlamaProcess | None:
        """The loaded child, if there is one."""
        return self._child

    async def ready(self) -> LlamaProcess:
        """The loaded child; loads it if need be, together with whoever else waits.

        Raises:
            RouterError: MODEL_LOAD_FAILED; BACKEND_UNAVAILABLE where it ended and its restart is some time off;
                DRAINING after `close`.
        """
        if self._closed:
            raise RouterError(ErrorReason.DRAINING, "the router is shutting down")
        if self._child is not None:
            if self._child.alive:
                return self._child
            self._restart(self._child)
        self._refuse_while_backing_off()
        if self._loading is None:
            self._begin_load()
        loading = self._loading
        assert loading is not None
        self._waiting += 1
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if loading.cancelled() and task is not None and not task.cancelling():
                raise RouterError(
                    ErrorReason.BACKEND_UNAVAILABLE, "the model was unloaded while it loaded", retry_after=PATIENCE
                ) from None
            raise
        finally:
            self._waiting -= 1
            if not self._waiting and not self._wanted and loading is self._loading and not loading.done():
                self._abandon_load()
                self._become(ModelState.COLD)

    def succeeded(self) -> None:
        """A request was answered in full: the next restart is quick again."""
        self._failures = 0

    async def suspect(self, child: LlamaProcess) -> None:
        """Kills the child if it does not answer: a request has lost it, or had no sign of life from it."""
        if child is self._child and not await self._healthy(child, SUSPECT_TIMEOUT):
            await child.kill()

    async def close(self) -> None:
        """Ends the child for good. Safe to call twice."""
        self._closed = True
        await self.unload()

    async def unload(self) -> None:
        """Ends the child, or the load. A later `ready` loads again."""
        self._become(ModelState.UNLOADING)
        child, self._child = self._child, None
        if self._loading is not None:
            self._abandon_load()
        watchers = set(self._watchers)  # a request may load a new child meanwhile, whose watcher stays
        for watcher in watchers:
            watcher.cancel()
        if child is not None:
            await child.close()
        await asyncio.gather(*watchers, *self._abandoned, return_exceptions=True)
        self._failures, self._not_before, self.error = 0, 0.0, None
        if self._loading is None:  # nobody asked for it meanwhile
            self._become(ModelState.COLD)

    # Loading

    def _refuse_while_backing_off(self) -> None:
        retry_after = self.retry_after
        if retry_after is None or (self._loading is not None and retry_after <= PATIENCE):
            return
        error = self.error
        reason = error.reason if error is not None else ErrorReason.BACKEND_UNAVAILABLE
        message = error.message if error is not None else "the model is restarting"
        raise RouterError(
            reason, message, metadata=error.metadata if error is not None else None, retry_after=retry_after
        )

    def _begin_load(self) -> None:
        self._loading = asyncio.create_task(self._load(), name="llama.cpp load")
        self._loading.add_done_callback(self._load_ended)
        self._become(ModelState.LOADING)

    def _abandon_load(self) -> None:
        assert self._loading is not None
        self._loading.cancel()
        self._abandoned.add(self._loading)
        self._loading.add_done_callback(self._abandoned.discard)
        self._loading = None
        self._wanted = False

    async def _load(self) -> LlamaProcess:
        """Runs as a task of its own; being cancelled ends the child."""
        if self._abandoned:
            await asyncio.wait(set(self._abandoned))  # two copies of a model may not fit
        await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
        child = await start_child(self._config, self._settings.load_timeout)
        try:
            self.limits = await self._ask_limits(child)
        except BaseException:
            await child.close()
            raise
        return child

    def _load_ended(self, task: asyncio.Task[LlamaProcess]) -> None:
        error = None if task.cancelled() else task.exception()
        if task is not self._loading:  # abandoned
            return
        self._loading, self._wanted = None, False
        if task.cancelled():
            self._become(ModelState.COLD)
        elif error is None:
            self._child, self.error = task.result(), None
            watcher = asyncio.create_task(self._watch(self._child), name="llama.cpp watch")
            self._watchers.add(watcher)
            watcher.add_done_callback(self._watchers.discard)
            self._become(ModelState.READY)
        else:
            self.error = error if isinstance(error, RouterError) else _failed_load()
            self._back_off()
            self._become(ModelState.FAILED)

    async def _ask_limits(self, child: LlamaProcess) -> Limits:
        """The child's own numbers: llama.cpp lowers a context that is longer than the model was made for."""
        headers = {"Authorization": f"Bearer {child.api_key}"}
        try:
            props, models = [
                (await self._client.get(child.address + path, headers=headers, timeout=HEALTH_TIMEOUT)).json()
                for path in ("/props", "/v1/models")
            ]
            context_length = int(props["default_generation_settings"]["n_ctx"])
            return Limits(context_length, int(models["data"][0]["meta"]["n_vocab"]))
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
            raise _failed_load() from None

    def _back_off(self) -> None:
        self._failures += 1
        delay = self._settings.restart_backoff * 2.0 ** min(self._failures - 1, 30)
        self._not_before = time.monotonic() + min(delay, self._settings.restart_backoff_max)

    # Watching

    async def _watch(self, child: LlamaProcess) -> None:
        """Sees the child end, and kills one that answers no health checks."""
        misses = 0
        while child.alive:
            try:
                await asyncio.wait_for(child.wait(), HEALTH_INTERVAL)
            except TimeoutError:
                misses = 0 if await self._healthy(child, HEALTH_TIMEOUT) else misses + 1
                if misses >= HEALTH_FAILURES:
                    await child.kill()
        await child.close()
        log.error("llama.cpp child %d ended with status %s:\n%s", child.pid, child.status, child.last_words())
        self._restart(child)

    def _restart(self, child: LlamaProcess) -> None:
        """Replaces a child that ended, once."""
        if child is not self._child:
            return
        self._child = None
        self.restarts += 1
        self.error = RouterError(
            ErrorReason.BACKEND_UNAVAILABLE, "the llama.cpp process of this model ended and is being restarted"
        )
        self._back_off()
        self._wanted = True
        self._begin_load()

    async def _healthy(self, child: LlamaProcess, seconds: float) -> bool:
        try:
            reply = await self._client.get(f"{child.address}/health", timeout=seconds)
        except httpx.HTTPError:
            return False
        return reply.status_code == httpx.codes.OK

    def _become(self, state: ModelState) -> None:
        if state is not self.state:
            self.state = state
            self._changed()


def _failed_load() -> RouterError:
    return RouterError(ErrorReason.MODEL_LOAD_FAILED, "the model could not be loaded: its process did not answer")
