"""The MLX engine's life under the router: started, looked at where a stream waits in vain, started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from mlx_mtp_backend import BaseEngine, EngineError, EngineOptions
from router.domain import BackendKind, ErrorReason, Offer, RouterError
from router.settings import MlxSettings, data_home

logger = logging.getLogger(__name__)

FIRST_RESTART, LAST_RESTART = 1.0, 60.0  # seconds until an engine that has failed is started again

# Makes an engine of options and of what it calls as it ends: `EngineProcess`, or `Engine` to have it on a thread here.
Factory = Callable[[EngineOptions, Callable[[], None]], BaseEngine]


class EngineKeeper:
    """At most one engine. Used on the event loop.

    Args:
        name: of the backend.
        settings: `[backends.NAME]`.
        make: makes an engine; runs on a thread.
        lost: called where an engine has ended by itself, with everything that it had loaded.
        changed: called after every change of `offer`.

    Attributes:
        offer: what the engine runs on, or why it cannot be used.
        restarts: engines that took the place of one that had failed.
    """

    def __init__(
        self,
        name: str,
        settings: MlxSettings,
        make: Factory,
        lost: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self.offer = Offer(BackendKind.MLX, "the engine has not started")
        self.restarts = 0
        self._name = name
        self._settings = settings
        self._make = make
        self._lost = lost
        self._changed = changed
        self._engine: BaseEngine | None = None
        self._failures = 0  # ends of the engine since an answer was given
        self._closed = False
        self._restarting: asyncio.Task[None] | None = None

    @property
    def engine(self) -> BaseEngine | None:
        """The one that runs."""
        return self._engine

    @property
    def closed(self) -> bool:
        """Whether it is to stay away."""
        return self._closed

    @property
    def restarting(self) -> bool:
        """Whether it has failed, and another is on the way."""
        return self._restarting is not None

    def running(self) -> BaseEngine:
        """The engine. Raises RouterError BACKEND_UNAVAILABLE."""
        if self._engine is None:
            raise RouterError(
                ErrorReason.BACKEND_UNAVAILABLE, "the MLX engine is not running", retry_after=FIRST_RESTART
            )
        return self._engine

    def answered(self) -> None:
        """A reply came to its end: the next restart is quick again."""
        self._failures = 0

    def suspect(self) -> None:
        """A stream had no sign of life."""
        if self._engine is not None:
            self._engine.suspect()

    async def start(self) -> None:
        """Starts the engine, where this machine should use it."""
        engine = await self._start()
        if engine is None:
            return
        self.offer = self._assess(await asyncio.to_thread(lambda: engine.device))
        if self.offer.refusal:
            await self.close()

    async def close(self) -> None:
        """Ends every stream and the engine. Safe to call twice."""
        self._closed = True
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.close)

    async def _start(self) -> BaseEngine | None:
        loop = asyncio.get_running_loop()

        def ended() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(self._ended)

        starting = asyncio.ensure_future(asyncio.to_thread(self._make, self._options(), ended))
        try:
            engine = await asyncio.shield(starting)
        except EngineError as error:
            logger.error("the MLX engine did not start: %s", error)
            self.offer = Offer(BackendKind.MLX, "the MLX engine did not start; see the server's log")
            return None
        except asyncio.CancelledError:  # a thread cannot be cancelled: what it makes is closed
            with contextlib.suppress(EngineError):
                await asyncio.to_thread((await starting).close)
            raise
        self._engine = engine
        return engine

    def _options(self) -> EngineOptions:
        settings = self._settings
        prefixes = settings.prefix_cache_mib
        return EngineOptions(
            interpose_blas=settings.openblas,
            max_streams=settings.parallel,
            max_waiting=settings.parallel,  # the line stands in front of the engine, in order of priority
            slow_reader_limit=settings.slow_reader_limit,
            kernel_checks=data_home() / "kernel-checks.json",
            depth_memory=data_home() / "depth-memory.json",
            prefix_cache_bytes=None if prefixes is None else prefixes << 20,
            cpu_nice=settings.cpu_nice,
        )

    def _assess(self, device: str | None) -> Offer:
        if device is not None:
            return Offer(BackendKind.MLX, remark=f"on {device}")
        if self._settings.allow_cpu:
            return Offer(BackendKind.MLX, remark="on the CPU, where it is slow, because the settings allow that")
        detail = f"MLX has neither Metal nor CUDA here, and backends.{self._name}.allow_cpu is not set"
        return Offer(BackendKind.MLX, detail)

    def _ended(self) -> None:
        """The engine is gone: health says so, nothing is routed here, and another is started in a while."""
        if self._closed or self._restarting is not None:
            return
        self._restarting = asyncio.create_task(self._restart(self.offer), name="restart the MLX engine")
        self._engine = None
        self.offer = Offer(BackendKind.MLX, "the MLX engine has failed and is being restarted", failed=True)
        self._lost()
        self._changed()

    async def _restart(self, offer: Offer) -> None:
        """Starts an engine anew, more slowly each time that it failed without an answer, until one runs."""
        while True:
            self._failures += 1
            delay = min(FIRST_RESTART * 2.0 ** min(self._failures - 1, 10), LAST_RESTART)
            logger.critical("the MLX engine has ended; it starts again in %g s", delay)
            await asyncio.sleep(delay)
            if await self._start() is not None:
                break
            self._changed()
        self.restarts += 1
        self.offer = offer
        self._restarting = None
        self._changed()
