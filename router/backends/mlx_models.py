"""The models that the MLX engine holds: how they are loaded and dropped."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from mlx_mtp_backend import BaseEngine, EngineError, LoadOptions, LoadProgress, Rule, WiringPolicy
from mlx_mtp_backend import ErrorReason as EngineReason
from mlx_mtp_backend.language.text import ModelText, load_text
from mlx_mtp_backend.models import LoadedModel
from mlx_mtp_backend.stream import Stream
from router.backends.mlx_answer import router_error
from router.catalog import ModelEntry
from router.domain import Capability, ErrorReason, RouterError
from router.settings import MlxSettings

UNLOAD_INTERVAL = 0.02  # seconds between looks at streams that were cancelled


@dataclass(slots=True, eq=False)
class Resident:
    """A model that was asked for: what it is while it is loaded, how far a load is, why the last one failed, and the
    streams that use it.

    `head_warning` is what the last load found amiss with its head, and `checked` the stamp of the files that it read.
    """

    loaded: LoadedModel | None = None
    fraction: float | None = None
    error: RouterError | None = None
    head_warning: str = ""
    checked: tuple[tuple[str, int, int], ...] = ()
    streams: set[Stream] = field(default_factory=set)


class Residents:
    """Models by name.

    Args:
        settings: how to load.
    """

    def __init__(self, settings: MlxSettings) -> None:
        self._settings = settings
        self._residents: dict[str, Resident] = {}
        self._texts: dict[str, ModelText] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models that were asked for."""
        return tuple(self._residents)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the models in memory."""
        return tuple(name for name, resident in self._residents.items() if resident.loaded is not None)

    @property
    def suspect_heads(self) -> tuple[str, ...]:
        """Names of the models in memory whose head looks wrong."""
        return tuple(name for name in self.loaded if self._residents[name].head_warning)

    def described(self, model: ModelEntry) -> ModelEntry:
        """The model with what loading its files, as they are now, found amiss with its head."""
        known, facts = self._residents.get(model.name), model.facts
        if known is None or not known.head_warning or known.checked != facts.stamp or facts.head is None:
            return model
        fact = facts.capabilities[Capability.MTP]
        told = replace(fact, evidence=f"{fact.evidence}; but when it was loaded: {known.head_warning}")
        head = replace(facts.head, warning=known.head_warning)
        capabilities = {**facts.capabilities, Capability.MTP: told}
        return replace(model, facts=replace(facts, head=head, capabilities=capabilities))

    def resident(self, model: ModelEntry) -> Resident:
        """What is known of the model; empty for one that nobody asked for yet."""
        return self._residents.setdefault(model.name, Resident())

    def forget(self) -> None:
        """The engine is gone, and its models with it."""
        self._residents.clear()

    async def load(self, engine: BaseEngine, model: ModelEntry) -> None:
        """Loads the model. Raises RouterError MODEL_LOAD_FAILED."""
        known = self.resident(model)

        def progressed(step: LoadProgress) -> None:
            known.fraction = step.fraction

        settings = self._settings
        options = LoadOptions(
            head_path=model.settings.head_path,
            depth=_depth(model),
            unseeded_rule=None if settings.unseeded_rule == "auto" else Rule(settings.unseeded_rule),
            wiring=WiringPolicy(settings.wiring_check),
            prefill_chunk=settings.prefill_chunk,
        )
        known.error, known.fraction = None, 0.0
        try:
            known.loaded = await asyncio.wrap_future(engine.load(model.name, model.files, options, progressed))
            wiring = known.loaded.wiring
            known.head_warning, known.checked = (wiring and wiring.warning) or "", model.facts.stamp
        except EngineError as error:
            known.error = router_error(error, model.name)
            raise known.error from None
        finally:
            known.fraction = None

    async def unload(self, engine: BaseEngine, model: ModelEntry) -> None:
        """Cancels the model's streams, or its load, until the engine has let go of it."""
        known = self.resident(model)
        while True:
            for stream in known.streams:
                stream.cancel()
            try:
                await asyncio.wrap_future(engine.unload(model.name))
                break
            except EngineError as error:
                if error.reason is not EngineReason.MODEL_IN_USE:  # it is not loaded, or the engine has ended
                    break
                await asyncio.sleep(UNLOAD_INTERVAL)  # a cancelled stream leaves within one round
        known.loaded = None
        self.reread(model)

    def reread(self, model: ModelEntry) -> None:
        """Forgets what was read of a model's files: they may be others the next time."""
        self._texts.pop(model.name, None)
        if (known := self._residents.get(model.name)) is not None:
            known.error = None

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


def _depth(model: ModelEntry) -> int | None:
    """Drafts a round where a request does not say; None: as many as pay."""
    if model.settings.speculation == "off":
        return 0
    return None if model.settings.draft_depth == "auto" else model.settings.draft_depth
