"""The models that the MLX engine holds: loaded once for all who wait, and dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from mlx_mtp_backend import EngineError, LoadOptions, LoadProgress, Rule, WiringPolicy
from mlx_mtp_backend import ErrorReason as EngineReason
from mlx_mtp_backend.engine import Engine
from mlx_mtp_backend.models import LoadedModel
from mlx_mtp_backend.stream import Stream
from mlx_mtp_backend.text import ModelText, load_text
from router.backends.mlx_answer import router_error
from router.catalog import ModelEntry
from router.domain import ErrorReason, Loading, ModelState, RouterError
from router.settings import MlxSettings

PROGRESS_INTERVAL = 0.5  # seconds between reports of a load


@dataclass(slots=True, eq=False)
class Resident:
    """A model that was asked for: its load, and the streams that use it.

    `idle` is set whenever a stream ends.
    """

    loading: asyncio.Task[None] | None = None
    loaded: LoadedModel | None = None
    fraction: float | None = None
    error: RouterError | None = None
    streams: set[Stream] = field(default_factory=set)
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Residents:
    """Models by name. A load goes on though its last waiter leaves.

    Args:
        settings: how to load.
    """

    def __init__(self, settings: MlxSettings) -> None:
        self._settings = settings
        self._residents: dict[str, Resident] = {}
        self._texts: dict[str, ModelText] = {}

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the models in memory."""
        return tuple(name for name, resident in self._residents.items() if resident.loaded is not None)

    def resident(self, model: ModelEntry) -> Resident:
        """What is known of the model; empty for one that nobody asked for yet."""
        return self._residents.setdefault(model.name, Resident())

    def state(self, model: ModelEntry) -> ModelState:
        """Whether it is loaded."""
        known = self._residents.get(model.name, Resident())
        if known.loaded is not None:
            return ModelState.READY
        if known.loading is not None:
            return ModelState.LOADING
        return ModelState.FAILED if known.error else ModelState.COLD

    async def load(self, engine: Engine, model: ModelEntry, deadline: float | None) -> AsyncGenerator[Loading, None]:
        """Progress until the model is loaded. Raises RouterError MODEL_LOAD_FAILED, and TimeoutError at `deadline`."""
        known = self.resident(model)
        if known.loaded is not None:
            return
        if known.loading is None:
            known.loading = asyncio.create_task(self._load(engine, model, known), name=f"load {model.name}")
        task = known.loading
        while not task.done():
            yield Loading(known.fraction)
            async with asyncio.timeout_at(deadline):
                await asyncio.wait({task}, timeout=PROGRESS_INTERVAL)
        task.result()  # a fault that is not the engine's own kind of error surfaces here
        if known.error is not None:
            raise known.error

    async def _load(self, engine: Engine, model: ModelEntry, known: Resident) -> None:
        """Loads once for all who wait; leaves the outcome in `known`."""

        def progressed(step: LoadProgress) -> None:
            known.fraction = step.fraction

        settings = self._settings
        options = LoadOptions(
            head_path=model.settings.head_path,
            depth=model.settings.draft_depth if model.settings.speculation == "auto" else 0,
            unseeded_rule=None if settings.unseeded_rule == "auto" else Rule(settings.unseeded_rule),
            wiring=WiringPolicy(settings.wiring_check),
            prefill_chunk=settings.prefill_chunk,
        )
        known.error = known.fraction = None
        try:
            known.loaded = await asyncio.wrap_future(engine.load(model.name, model.path, options, progressed))
        except EngineError as error:
            known.error = router_error(error, model.name)
        finally:
            known.loading = None

    async def unload(self, engine: Engine, model: ModelEntry, *, force: bool) -> None:
        """Drops the model; with `force`, ends its streams first.

        Raises:
            RouterError: CAPABILITY_UNAVAILABLE where it is in use.
        """
        known = self._residents.get(model.name)
        if known is None or known.loaded is None:
            return
        if known.streams and not force:
            raise _in_use(model, len(known.streams))
        for stream in known.streams:
            stream.cancel()
        while known.streams:
            known.idle.clear()
            await known.idle.wait()
        try:
            await asyncio.wrap_future(engine.unload(model.name))
        except EngineError as error:
            if error.reason is EngineReason.MODEL_IN_USE:
                raise _in_use(model, 1) from None
            raise router_error(error, model.name) from None
        known.loaded = None

    async def text(self, model: ModelEntry) -> ModelText:
        """Tokenizer and template, read once; loads no weights. Raises RouterError MODEL_LOAD_FAILED."""
        if model.name not in self._texts:
            try:
                text = await asyncio.to_thread(load_text, model.path)
            except EngineError as error:
                raise router_error(error, model.name) from None
            if text is None:
                raise RouterError(
                    ErrorReason.MODEL_LOAD_FAILED,
                    f"model {model.name!r} could not be loaded: it has no tokenizer",
                    metadata={"model": model.name},
                )
            self._texts[model.name] = text
        return self._texts[model.name]


def _in_use(model: ModelEntry, count: int) -> RouterError:
    return RouterError(
        ErrorReason.CAPABILITY_UNAVAILABLE,
        f"{count} requests use model {model.name!r}",
        metadata={"model": model.name, "requests": str(count)},
    )
