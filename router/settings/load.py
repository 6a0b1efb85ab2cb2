"""Reads the settings: the file, overridden by the environment; what both say must agree."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from router.settings.backends import (
    BUILT_IN_BACKENDS,
    KINDS_BY_NAME,
    BackendSettings,
    LlamaServerSettings,
    MlxSettings,
)
from router.settings.models import ModelSettings, SamplingSettings
from router.settings.places import CONFIG_VARIABLE, ENV_PREFIX, HOME_VARIABLE, data_home, default_config_path
from router.settings.service import DiscoverySettings, ResilienceSettings, SchedulerSettings, ServerSettings
from router.settings.table import BackendName, ModelName


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__", toml_file=None
    )

    server: ServerSettings = ServerSettings()
    sampling: SamplingSettings = SamplingSettings()
    discovery: DiscoverySettings = DiscoverySettings()
    scheduler: SchedulerSettings = Field(default_factory=SchedulerSettings)
    resilience: ResilienceSettings = ResilienceSettings()
    backends: dict[BackendName, BackendSettings] = Field(default_factory=dict, validate_default=True)
    models: dict[ModelName, ModelSettings] = Field(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @field_validator("backends", mode="before")
    @classmethod
    def _built_in_backends(cls, value: Any) -> Any:
        """`llama_cpp` and `mlx` are there without being written down; their names and `ollama` imply their kinds."""
        if not isinstance(value, Mapping):
            return value
        built_in = {name: {"kind": name} for name in BUILT_IN_BACKENDS}
        for name, table in value.items():
            implied = {"kind": name} if name in KINDS_BY_NAME else {}
            built_in[name] = {**implied, **table} if isinstance(table, Mapping) else table
        return built_in

    @field_validator("backends")
    @classmethod
    def _one_engine(cls, value: dict[str, Any]) -> dict[str, Any]:
        engines = [name for name, backend in value.items() if isinstance(backend, MlxSettings)]
        if len(engines) > 1:
            raise ValueError(f"only one backend can be of kind 'mlx', not {', '.join(engines)}")
        return value

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        names: dict[str, str] = {}
        for model, entry in self.models.items():
            for name in (model, *entry.aliases):
                if name in names:
                    raise ValueError(f"the name {name!r} stands for both {names[name]!r} and {model!r}")
                names[name] = model
            if {model, *entry.aliases} & set(entry.fallbacks):
                raise ValueError(f"models.{model}.fallbacks: {model!r} cannot answer in its own place")
            if entry.backend is not None and entry.backend not in self.backends:
                known = ", ".join(sorted(self.backends))
                raise ValueError(f"models.{model}.backend: no backend {entry.backend!r}; there are: {known}")
            servers = [name for name, backend in self.backends.items() if isinstance(backend, LlamaServerSettings)]
            if entry.llama_server is not None and entry.backend is None and len(servers) > 1:
                raise ValueError(f"models.{model}.backend: must say which of {', '.join(servers)} serves it")
        return self


def load_settings(path: Path | None = None) -> Settings:
    """Reads the settings from `path` (default: `default_config_path()`, if it exists) and the environment.

    Raises:
        FileNotFoundError: `path`, or the file that $MTP_ROUTER_CONFIG names, does not exist.
        OSError: it cannot be read.
        pydantic.ValidationError, ValueError: the settings are not valid.
    """
    named = path is not None or CONFIG_VARIABLE in os.environ
    file = path or default_config_path()
    if named and not file.is_file():
        raise FileNotFoundError(f"no settings file {file}")
    _refuse_unknown_variables(os.environ)

    class FromFile(Settings):
        model_config = SettingsConfigDict(**{**Settings.model_config, "toml_file": file if file.is_file() else None})

    try:
        settings = FromFile()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text, from byte {error.start} on") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from None
    base = file.parent if file.is_file() else data_home() / "models"
    models = {name: _absolute(model, base) for name, model in settings.models.items()}
    folders = tuple(base / folder.expanduser() for folder in settings.discovery.folders)
    discovery = settings.discovery.model_copy(update={"folders": folders})
    return settings.model_copy(update={"models": models, "discovery": discovery})


def _absolute(model: ModelSettings, base: Path) -> ModelSettings:
    paths = {"path": model.path, "gguf": model.gguf, "head_path": model.head_path}
    return model.model_copy(update={key: base / path.expanduser() for key, path in paths.items() if path is not None})


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """A misspelt variable would otherwise be ignored, since pydantic-settings reads only names that it knows."""
    tables = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for variable in environment:
        if not variable.startswith(ENV_PREFIX) or variable in (HOME_VARIABLE, CONFIG_VARIABLE):
            continue
        if variable.upper().split("__")[0] not in tables:
            raise ValueError(f"unknown environment variable {variable}; tables are {', '.join(sorted(tables))}")


def effective_settings(settings: Settings) -> dict[str, Any]:
    """The settings in force as JSON-ready data, for `mtp-router config`."""
    return settings.model_dump(mode="json", exclude_none=True)
