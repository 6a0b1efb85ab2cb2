"""Settings: one TOML file, overridden by MTP_ROUTER_* environment variables. Unknown keys are refused.

`MTP_ROUTER_SERVER__LISTEN=127.0.0.1:0` sets `[server] listen`; two underscores go one table down.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import platformdirs
import psutil
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

ENV_PREFIX = "MTP_ROUTER_"
HOME_VARIABLE = "MTP_ROUTER_HOME"
CONFIG_VARIABLE = "MTP_ROUTER_CONFIG"
BUILT_IN_BACKENDS = ("llama_cpp", "mlx")
KINDS_BY_NAME = (*BUILT_IN_BACKENDS, "ollama")  # backends of these names need not say their kind

# Names travel in logs, health names and error metadata, so they are kept plain.
DEFAULT_DRAFT_DEPTH = 3  # where a backend drafts a fixed number of tokens
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}"
OLLAMA_TAG = r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,255}"
ModelName = Annotated[str, StringConstraints(pattern=f"^{MODEL_NAME}$")]
BackendName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]


def data_home() -> Path:
    """Folder of pulled models: $MTP_ROUTER_HOME, else the platform's place for application data."""
    configured = os.environ.get(HOME_VARIABLE)
    return Path(configured) if configured else Path(platformdirs.user_data_dir("mtp-router", appauthor=False))


def default_config_path() -> Path:
    """Settings file where none is named: $MTP_ROUTER_CONFIG, else mtp-router.toml in the platform's config folder."""
    configured = os.environ.get(CONFIG_VARIABLE)
    if configured:
        return Path(configured)
    return Path(platformdirs.user_config_dir("mtp-router", appauthor=False)) / "mtp-router.toml"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(_Table):
    """`[server]`: the gRPC server."""

    listen: str = Field("127.0.0.1:50061", description="host:port; port 0 picks a free one")
    allow_remote: bool = Field(
        False, description="allow an address other than loopback; there is no encryption or authentication yet"
    )
    reflection: bool = Field(True, description="serve gRPC reflection")
    admin: bool = Field(True, description="serve AdminService; off: its calls answer PERMISSION_DENIED")
    max_request_bytes: int = Field(4 * 2**20, ge=1024, le=64 * 2**20, description="largest request message")
    max_metadata_bytes: int = Field(16 * 2**10, ge=1024, le=2**20, description="largest request metadata")
    max_concurrent_calls: int = Field(1000, ge=1, description="calls in flight before new ones are refused")
    min_ping_interval: float = Field(
        10.0, ge=1.0, description="seconds between client keepalive pings that are allowed"
    )
    drain_grace: float = Field(30.0, ge=0.0, description="seconds that running calls get after SIGTERM")
    slow_reader_limit: float = Field(30.0, gt=0.0, description="seconds that an event of a stream may wait unread")
    max_unread_bytes: int = Field(
        256 * 2**10, ge=1024, le=64 * 2**20, description="of one answer that may wait for its reader"
    )
    metrics_listen: str | None = Field(
        None, description="host:port of the page /metrics for Prometheus; port 0 picks a free one; unset: none"
    )
    default_deadline: float = Field(600.0, gt=0.0, description="seconds for a call that comes without a deadline")

    @model_validator(mode="after")
    def _loopback_unless_allowed(self) -> Self:
        if not self.listen.startswith("unix:"):
            self._check_address("listen", self.listen, "without encryption or authentication")
        if self.metrics_listen is not None:
            self._check_address("metrics_listen", self.metrics_listen, "without authentication")
        return self

    def _check_address(self, key: str, address: str, without: str) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            kinds = "host:port or unix:path" if key == "listen" else "host:port"
            raise ValueError(f"{key} must be {kinds}, not {address!r}")
        if not self.allow_remote and not _is_loopback(host):
            raise ValueError(
                f"{key} = {address!r} is reachable from other hosts, {without}; set allow_remote = true to accept that"
            )


def _is_loopback(host: str) -> bool:
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class SamplingSettings(_Table):
    """`[sampling]` and `[models.NAME.sampling]`: what a request gets where it leaves a number unset."""

    temperature: float | None = Field(None, ge=0.0, le=10.0)
    top_p: float | None = Field(None, ge=1e-6, le=1.0)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    min_p: float | None = Field(None, ge=0.0, lt=1.0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10.0)
    presence_penalty: float | None = Field(None, ge=-10.0, le=10.0)
    frequency_penalty: float | None = Field(None, ge=-10.0, le=10.0)
    max_output_tokens: int | None = Field(None, ge=1, le=1_048_576)

    @field_validator("temperature")
    @classmethod
    def _not_tiny(cls, value: float | None) -> float | None:
        if value is not None and 0.0 < value < 1e-6:
            raise ValueError("must be 0 or at least 1e-6")
        return value


class LlamaCppSettings(_Table):
    """`[backends.NAME]` with kind "llama_cpp": llama.cpp in child processes, one per loaded model."""

    kind: Literal["llama_cpp"] = "llama_cpp"
    threads: int = Field(
        default_factory=lambda: max(1, (os.cpu_count() or 2) // 2),
        ge=1,
        le=1024,
        description="threads per child; more threads than idle cores make llama.cpp many times slower",
    )
    gpu_layers: int | None = Field(None, ge=0, description="layers kept on the GPU; unset: as many as fit")
    batch_tokens: int = Field(512, ge=16, le=8192, description="prompt tokens per step; a cancel waits for one step")
    parallel: int = Field(2, ge=1, le=64, description="requests that a child decodes at once")
    max_queued: int = Field(64, ge=0, le=100_000, description="requests that may wait for a model")
    load_timeout: float = Field(300.0, gt=0.0, description="seconds a model may take to load")
    first_token_timeout: float = Field(
        300.0, gt=0.0, description="seconds without a sign of life before the first token"
    )
    token_timeout: float = Field(60.0, gt=0.0, description="seconds between tokens")
    restart_backoff: float = Field(0.5, gt=0.0, description="seconds before the first restart; doubles each time")
    restart_backoff_max: float = Field(30.0, gt=0.0, description="longest time between restarts, seconds")


class MlxSettings(_Table):
    """`[backends.NAME]` with kind "mlx": the engine in this process. One at most."""

    kind: Literal["mlx"] = "mlx"
    allow_cpu: bool = Field(False, description="serve on a machine with neither Metal nor CUDA, where it is slow")
    openblas: bool = Field(False, description="fast fp32 matmuls on a Linux CPU; replays are then best effort")
    cpu_nice: int = Field(
        10, ge=0, le=19, description="how much decoding on a Linux CPU yields to serving; 0: they compete as equals"
    )
    parallel: int = Field(8, ge=1, le=256, description="requests that decode together")
    max_queued: int = Field(256, ge=0, le=100_000, description="requests that may wait")
    slow_reader_limit: float = Field(30.0, gt=0.0, description="seconds a stream may wait for its reader")
    first_token_timeout: float = Field(
        300.0, gt=0.0, description="seconds without a sign of life before the first token"
    )
    token_timeout: float = Field(60.0, gt=0.0, description="seconds between tokens")
    prefill_chunk: int = Field(256, ge=16, le=8192, description="prompt tokens per step; a cancel waits for one step")
    unseeded_rule: Literal["auto", "coupling", "rejection"] = Field(
        "auto", description="how drafts are accepted without a seed; auto: what promises more tokens a second"
    )
    prefix_cache_mib: int | None = Field(
        None, ge=0, description="MiB for prompts seen before; unset: an eighth of the memory, at most 4096; 0: none"
    )
    wiring_check: Literal["off", "warn", "refuse"] = Field(
        "warn", description="what to do where a head predicts no better than chance at load"
    )


class _ServerElsewhere(_Table):
    """What every server that somebody else started has in common."""

    max_queued: int = Field(64, ge=0, le=100_000, description="requests that may wait for a model")
    connect_timeout: float = Field(5.0, gt=0.0, description="seconds until the server must have taken a connection")
    first_token_timeout: float = Field(300.0, gt=0.0, description="seconds until the first token, loading included")
    token_timeout: float = Field(60.0, gt=0.0, description="seconds between tokens")
    check_interval: float = Field(10.0, gt=0.0, description="seconds between looks at the server's health")


class OllamaSettings(_ServerElsewhere):
    """`[backends.NAME]` with kind "ollama": an Ollama server, here or elsewhere."""

    kind: Literal["ollama"] = "ollama"
    host: str = Field("http://127.0.0.1:11434", description="address of the server, http or https, without a path")
    keep_alive: float | None = Field(
        None,
        description="seconds a model stays loaded after its last request, negative for ever; unset: as it is set there",
    )
    parallel: int = Field(1, ge=1, le=256, description="requests sent at once; Ollama decodes one by one unless told")
    load_timeout: float = Field(300.0, gt=0.0, description="seconds a model may take to load")

    @field_validator("host")
    @classmethod
    def _an_address(cls, value: str) -> str:
        return _address(value)


class LlamaServerSettings(_ServerElsewhere):
    """`[backends.NAME]` with kind "llama_server": a llama-server that somebody else started, with one model."""

    kind: Literal["llama_server"] = "llama_server"
    url: str = Field(description="http://host:port, https://host:port, or unix:/path/to/socket")
    api_key: SecretStr | None = Field(None, description="what it was started with as --api-key")
    parallel: int = Field(4, ge=1, le=256, description="requests sent at once; what exceeds its slots waits there")

    @field_validator("url")
    @classmethod
    def _an_address(cls, value: str) -> str:
        if value.startswith("unix:") and len(value) > len("unix:"):
            return value
        return _address(value)


def _address(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError("must be like http://127.0.0.1:8080")
    if parts.username or parts.password:
        raise ValueError("must not hold a password: it would be shown in logs")
    return value.rstrip("/")


class DiscoverySettings(_Table):
    """`[discovery]`: where models lie that are not written down."""

    folders: tuple[Path, ...] = Field(
        (),
        description="searched for GGUF files and checkpoints; relative to the settings file, else to the data folder",
    )
    hugging_face_cache: bool = Field(False, description="serve what the Hugging Face cache holds, by repository name")
    ollama: bool = Field(False, description="serve every model that the configured Ollama servers have, by its tag")


class SchedulerSettings(_Table):
    """`[scheduler]`: which models are in memory, and who waits."""

    memory_budget: ByteSize | None = Field(
        default_factory=lambda: ByteSize(psutil.virtual_memory().total * 7 // 10),
        description="memory for all models that the router loads, such as 24GiB; unset: 70 % of the machine's",
    )
    keep_alive: float | None = Field(
        None, ge=0.0, description="seconds that an idle model stays loaded; unset: until its memory is needed"
    )
    interactive_patience: float = Field(
        10.0, ge=0.0, description="seconds that an INTERACTIVE request waits before busy models make room for its own"
    )
    batch_patience: float = Field(60.0, ge=0.0, description="the same for a BATCH request")
    turn: float = Field(10.0, ge=0.0, description="seconds that a model serves before it has to make room")


class ResilienceSettings(_Table):
    """`[resilience]`: what happens where a backend fails."""

    retries: int = Field(2, ge=0, le=10, description="further tries of a request before its first token")
    failures: int = Field(5, ge=1, description="failures in a row after which a backend is left alone")
    pause: float = Field(1.0, gt=0.0, description="seconds until one request tries it again; doubles each time")
    longest_pause: float = Field(30.0, gt=0.0, description="longest time that it is left alone, seconds")


BackendSettings = Annotated[
    LlamaCppSettings | MlxSettings | OllamaSettings | LlamaServerSettings, Field(discriminator="kind")
]


class ModelSettings(_Table):
    """`[models.NAME]`: one model to serve."""

    path: Path | None = Field(
        None,
        description="GGUF file or checkpoint folder; relative to the settings file, else to the data folder",
    )
    ollama: Annotated[str, StringConstraints(pattern=f"^{OLLAMA_TAG}$")] | None = Field(
        None, description="tag of a model that Ollama keeps, instead of a path"
    )
    llama_server: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="alias or file name by which a llama-server serves the model, instead of a path; checked there",
    )
    gguf: Path | None = Field(
        None, description="the same model as GGUF, for where its checkpoint has no head or no fast device"
    )
    head_path: Path | None = Field(
        None, description="where a checkpoint's head lies, if not in it: a safetensors file or the original's folder"
    )
    aliases: tuple[ModelName, ...] = ()
    fallbacks: tuple[ModelName, ...] = Field(
        (), max_length=8, description="models that answer in its place, in this order, where it cannot be served"
    )
    backend: BackendName | None = Field(None, description="backend to use; unset: chosen by what the files can do")
    context_length: int | None = Field(
        None, ge=16, le=2**24, description="tokens of context, at most the model's own; unset: up to 8192"
    )
    speculation: Literal["auto", "off"] = Field("auto", description="draft with the checkpoint's head where it has one")
    draft_depth: Annotated[int, Field(ge=1, le=16)] | Literal["auto"] = Field(
        "auto",
        description="tokens drafted a round where a request does not say; auto: what pays on the MLX engine, else 3",
    )
    keep_alive: float | None = Field(
        None, ge=0.0, description="seconds that it stays loaded while idle, instead of scheduler.keep_alive"
    )
    pin: bool = Field(False, description="once loaded it stays, however much its memory is needed")
    preload: bool = Field(False, description="load it when the server starts")
    sampling: SamplingSettings = SamplingSettings()

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        places = [self.path, self.ollama, self.llama_server]
        if sum(place is not None for place in places) != 1:
            raise ValueError("needs one of path, ollama or llama_server")
        if self.path is None and (self.gguf is not None or self.head_path is not None):
            raise ValueError("gguf and head_path go with a path")
        if self.path is None and (self.keep_alive is not None or self.pin):
            raise ValueError("keep_alive and pin go with a path: another server keeps this model as it is told there")
        return self

    @property
    def fixed_draft_depth(self) -> int:
        """Tokens drafted a round where the backend cannot choose."""
        return DEFAULT_DRAFT_DEPTH if self.draft_depth == "auto" else self.draft_depth

    @property
    def kept_as(self) -> str:
        """The name by which another server keeps it; "" for one with a path."""
        return self.ollama or self.llama_server or ""


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
        pydantic.ValidationError, ValueError, tomllib.TOMLDecodeError: the settings are not valid.
    """
    named = path is not None or CONFIG_VARIABLE in os.environ
    file = path or default_config_path()
    if named and not file.is_file():
        raise FileNotFoundError(f"no settings file {file}")
    _refuse_unknown_variables(os.environ)

    class FromFile(Settings):
        model_config = SettingsConfigDict(**{**Settings.model_config, "toml_file": file if file.is_file() else None})

    settings = FromFile()
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


def describe_problem(error: OSError | ValueError) -> str:
    """Why `load_settings` failed, without the values that stand in the settings: some are secrets."""
    if isinstance(error, ValidationError):
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        return "invalid settings: " + "; ".join(problems)
    if isinstance(error, OSError):
        return f"cannot read the settings: {error.strerror or error}"
    return f"invalid settings: {error}"


def effective_settings(settings: Settings) -> dict[str, Any]:
    """The settings in force as JSON-ready data, for `mtp-router config`."""
    return settings.model_dump(mode="json", exclude_none=True)
