"""Settings of backends: one table for each kind."""

from __future__ import annotations

import os
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from router.settings.table import Table

BUILT_IN_BACKENDS = ("llama_cpp", "mlx")
KINDS_BY_NAME = (*BUILT_IN_BACKENDS, "ollama")  # backends of these names need not say their kind
KINDS = (*KINDS_BY_NAME, "llama_server")


class LlamaCppSettings(Table):
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


class MlxSettings(Table):
    """`[backends.NAME]` with kind "mlx": the engine, in a process of its own. One at most."""

    kind: Literal["mlx"] = "mlx"
    allow_cpu: bool = Field(False, description="serve on a machine with neither Metal nor CUDA, where it is slow")
    openblas: bool = Field(False, description="fast fp32 matmuls on a Linux CPU; replays are then best effort")
    cpu_nice: int = Field(
        10,
        ge=0,
        le=19,
        description="how much decoding on a CPU yields to serving, steps of nice(2); 0: they compete as equals",
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


class _ServerElsewhere(Table):
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


BackendSettings = Annotated[
    LlamaCppSettings | MlxSettings | OllamaSettings | LlamaServerSettings, Field(discriminator="kind")
]
