"""Settings of the service as a whole: its server, scheduling, resilience and discovery."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Self

import psutil
from pydantic import ByteSize, Field, model_validator

from router.settings.table import Table


class ServerSettings(Table):
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


class DiscoverySettings(Table):
    """`[discovery]`: where models lie that are not written down."""

    folders: tuple[Path, ...] = Field(
        (),
        description="searched for GGUF files and checkpoints; relative to the settings file, else to the data folder",
    )
    hugging_face_cache: bool = Field(False, description="serve what the Hugging Face cache holds, by repository name")
    ollama: bool = Field(False, description="serve every model that the configured Ollama servers have, by its tag")


class SchedulerSettings(Table):
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


class ResilienceSettings(Table):
    """`[resilience]`: what happens where a backend fails."""

    retries: int = Field(2, ge=0, le=10, description="further tries of a request before its first token")
    failures: int = Field(5, ge=1, description="failures in a row after which a backend is left alone")
    pause: float = Field(1.0, gt=0.0, description="seconds until one request tries it again; doubles each time")
    longest_pause: float = Field(30.0, gt=0.0, description="longest time that it is left alone, seconds")
