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
UNLOAD_INTERVAL = 0.02  # seconds between looks at streams that were cancelled


@dataclass(slots=True, eq=False)
class Resident:
    """A model that was asked for: what is being done with it, and the streams that use it."""

    loading: asyncio.Task[None] | None = None
    dropping: asyncio.Task[None] | None = None
    loaded: LoadedModel | None = None
    fraction: float | None = None
    error: RouterError | None = None
    streams: set[Stream] = field(default_factory=set)


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
        if known.dropping is not None:
            return ModelState.UNLOADING
        if known.loaded is not None:
            return ModelState.READY
        if known.loading is not None:
            return ModelState.LOADING
        return ModelState.FAILED if known.error else ModelState.COLD

    def forget(self) -> None:
        """The engine is gone, and its models with it."""
        self._residents.clear()

    async def load(self, engine: Engine, model: ModelEntry, deadline: float | None) -> AsyncGenerator[Loading, None]:
        """Progress until the model is loaded. Raises RouterError MODEL_LOAD_FAILED, and TimeoutError at `deadline`."""
        known = self.resident(model)
        while known.dropping is not None:
            yield Loading()
            async with asyncio.timeout_at(deadline):
                await asyncio.wait({known.dropping}, timeout=PROGRESS_INTERVAL)
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
            known.loaded = await asyncio.wrap_future(engine.load(model.name, model.files, options, progressed))
        except EngineError as error:
            known.error = router_error(error, model.name)
        finally:
            known.loading = None

    async def unload(self, engine: Engine, model: ModelEntry, *, force: bool) -> None:
        """Drops the model; with `force`, ends its streams first. Does nothing for one that is not loaded.

        Raises:
            RouterError: CAPABILITY_UNAVAILABLE where it is in use or being loaded.
        """
        known = self.resident(model)
        if known.loading is not None:
            raise _in_use(model, "it is being loaded")
        if known.loaded is None:
            return
        if known.streams and not force:
            raise _in_use(model, f"{len(known.streams)} requests use it")
        if known.dropping is None:
            known.dropping = asyncio.create_task(self._drop(engine, model, known), name=f"unload {model.name}")
        await asyncio.shield(known.dropping)  # goes on though the caller leaves

    async def _drop(self, engine: Engine, model: ModelEntry, known: Resident) -> None:
        """Cancels the model's streams until the engine has let go of it; meanwhile new requests wait in `load`."""
        try:
            while known.loaded is not None:
                for stream in known.streams:
                    stream.cancel()
                try:
                    await asyncio.wrap_future(engine.unload(model.name))
                    known.loaded = None
                except EngineError as error:
                    if error.reason is EngineReason.MODEL_NOT_LOADED:
                        known.loaded = None
                    elif error.reason is not EngineReason.MODEL_IN_USE:
                        raise router_error(error, model.name) from None
                    await asyncio.sleep(UNLOAD_INTERVAL)  # a cancelled stream leaves within one round
            self._texts.pop(model.name, None)  # the files may be others the next time
        finally:
            known.dropping = None

    async def text(self, model: ModelEntry) -> ModelText:
        """Tokenizer and template: the engine's own once it has the model, before that read here, without weights.

        Raises:
            RouterError: MODEL_LOAD_FAILED.
        """
        loaded = self.resident(model).loaded
        if loaded is not None and loaded.text is not None:
            return loaded.text
        if model.name not in self._texts:
            try:
                text = await asyncio.to_thread(load_text, model.files)
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


def _in_use(model: ModelEntry, why: str) -> RouterError:
    return RouterError(
        ErrorReason.CAPABILITY_UNAVAILABLE,
        f"model {model.name!r} cannot be unloaded: {why}",
        metadata={"model": model.name, "why": why},
    )
