"""Assembly, health, reflection and drain of the gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from mtp_router.generate import v1
from mtp_router.generate.v1 import admin_service_pb2, generate_service_pb2, model_service_pb2

from router.backends.base import Backend
from router.backends.llama_cpp import LlamaCppBackend
from router.backends.llama_server import LlamaServerBackend
from router.backends.mlx import MlxBackend
from router.backends.ollama import OllamaBackend
from router.catalog import Catalog
from router.dispatch import Dispatcher
from router.domain import BackendState, BackendStatus, ErrorReason, ModelFormat, RouterError
from router.lifecycle import Lifecycle
from router.metrics import Gauge, Metrics, MetricsServer, gauges
from router.refresh import Reader, Refreshed, refresh
from router.resilience import Resilience
from router.services.admin import AdminService
from router.services.calls import Calls, ReadableRequests
from router.services.generate import GenerateService
from router.services.models import ModelService
from router.settings import (
    LlamaCppSettings,
    LlamaServerSettings,
    OllamaSettings,
    ResilienceSettings,
    ServerSettings,
    Settings,
)

logger = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_NAMES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (generate_service_pb2, "GenerateService"),
        (model_service_pb2, "ModelService"),
        (admin_service_pb2, "AdminService"),
    )
)


class ListenError(Exception):
    """The server cannot listen at its address; the message says which."""


def channel_options(settings: ServerSettings) -> list[tuple[str, int]]:
    """gRPC core options.

    The ping interval is `grpc.http2.min_ping_interval_without_data_ms`: the similar name with `_recv_` in it, seen in
    other servers, is no key of gRPC core, and clients that ping through a long prefill are then cut off with
    "too many pings".
    """
    return [
        ("grpc.max_receive_message_length", settings.max_request_bytes),
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", round(settings.min_ping_interval * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        # Two servers on one port would share its calls at random; the second must fail instead.
        ("grpc.so_reuseport", 0),
    ]


class RouterServer:
    """The gRPC server over a catalog and its backends.

    Args:
        settings: of the server itself.
        catalog: the configured models.
        backends: by the names that the settings give them; the server starts and closes them.
        reader: reads the settings again; None: nothing ever changes.
        lifecycle: that the backends share; the server closes it.
        resilience: `[resilience]`.
    """

    def __init__(
        self,
        settings: ServerSettings,
        catalog: Catalog,
        backends: Mapping[str, Backend],
        reader: Reader | None = None,
        lifecycle: Lifecycle | None = None,
        resilience: ResilienceSettings | None = None,
    ) -> None:
        self._settings = settings
        self._metrics = Metrics(self._gauges)
        self._metrics_server: MetricsServer | None = None
        self._resilience = Resilience(resilience, self._metrics.noted)
        self._dispatcher = Dispatcher(catalog, backends, resilience=self._resilience)
        self._reader = reader
        self._lifecycle = lifecycle
        self._preloads: set[asyncio.Task[None]] = set()
        self._refreshing = asyncio.Lock()
        self._health = health.aio.HealthServicer()
        self._calls = Calls(settings.default_deadline)
        self._server = grpc.aio.server(
            interceptors=[ReadableRequests()],
            options=channel_options(settings),
            maximum_concurrent_rpcs=settings.max_concurrent_calls,
        )
        self._health_updates: asyncio.Queue[tuple[str, BackendState]] = asyncio.Queue()
        self._health_task: asyncio.Task[None] | None = None
        self._draining = False
        self.address = ""

    async def start(self) -> None:
        """Starts the backends, then listens; `address` tells where. Raises ListenError."""
        await self._health.set("", NOT_SERVING)
        for name in SERVICE_NAMES:
            await self._health.set(name, NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        v1.add_GenerateServiceServicer_to_server(self._generate_service(), self._server)
        v1.add_ModelServiceServicer_to_server(ModelService(self._dispatcher), self._server)
        v1.add_AdminServiceServicer_to_server(
            AdminService(self._dispatcher, self._calls, self.refresh, enabled=self._settings.admin), self._server
        )
        if self._settings.reflection:
            names = (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self.address = self._bind()
        self._listen_for_metrics()
        self._health_task = asyncio.create_task(self._publish_health())
        for backend in self._dispatcher.backends.values():
            await self._start_backend(backend)
        await self._server.start()
        for name in SERVICE_NAMES:
            await self._health.set(name, SERVING)
        for entry in self._dispatcher.catalog.entries:
            if entry.settings.preload:
                task = asyncio.create_task(self._preload(entry.name), name=f"preload {entry.name}")
                self._preloads.add(task)
                task.add_done_callback(self._preloads.discard)

    async def _preload(self, name: str) -> None:
        try:
            entry, _, backend = await self._dispatcher.find(name)
            async with contextlib.aclosing(backend.preload(entry)) as steps:
                async for _ in steps:
                    pass
        except RouterError as error:
            logger.warning("%s could not be preloaded: %s", name, error)

    async def _start_backend(self, backend: Backend) -> None:
        backend.on_status_change(self._status_changed)
        await backend.start()
        self._status_changed(backend.status())

    async def refresh(self) -> Refreshed:
        """Reads the settings and looks for models again. Raises RouterError SETTINGS_INVALID, DRAINING."""
        if self._reader is None:
            return Refreshed()
        async with self._refreshing:
            if self._draining:
                raise RouterError(ErrorReason.DRAINING, "the server is shutting down")
            found = await self._reader.read(self._dispatcher)
            for name, backend in found.backends.items():
                self._dispatcher.backends[name] = backend
                await asyncio.shield(self._start_backend(backend))  # where the caller leaves, it goes on
            return await refresh(self._dispatcher, found.catalog, found.needs_restart)

    def _generate_service(self) -> GenerateService:
        settings = self._settings
        return GenerateService(
            self._dispatcher, self._calls, self._metrics, settings.slow_reader_limit, settings.max_unread_bytes
        )

    @property
    def metrics_address(self) -> str:
        """Where the page /metrics is; "" where there is none."""
        return self._metrics_server.address if self._metrics_server else ""

    def _listen_for_metrics(self) -> None:
        if self._settings.metrics_listen is None:
            return
        try:
            self._metrics_server = MetricsServer(self._metrics, self._settings.metrics_listen)
        except OSError:
            raise ListenError(f"cannot listen at {self._settings.metrics_listen} for metrics") from None

    def _gauges(self) -> list[Gauge]:
        statuses = [backend.status() for backend in self._dispatcher.backends.values()]
        return gauges(statuses, self._lifecycle, self._resilience)

    def _bind(self) -> str:
        listen = self._settings.listen
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError:
            raise ListenError(f"cannot listen at {listen}: another server may be running there") from None
        return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"

    def _status_changed(self, status: BackendStatus) -> None:
        self._health_updates.put_nowait((status.name, status.state))
        if status.state is BackendState.READY:
            self._resilience.recovered(status.name)

    async def _publish_health(self) -> None:
        """Turns backend states into health: each under `backend/NAME`, and overall while any of them is ready."""
        states: dict[str, BackendState] = {}
        while True:
            name, state = await self._health_updates.get()
            states[name] = state
            await self._health.set(f"backend/{name}", SERVING if state is BackendState.READY else NOT_SERVING)
            await self._health.set("", SERVING if BackendState.READY in states.values() else NOT_SERVING)

    async def drain(self) -> None:
        """Stops: health goes down, new calls are refused, running ones get the grace period, backends close.

        Calls that outlast the grace period end with reason DRAINING. Calling it again does nothing.
        """
        if self._draining:
            return
        self._draining = True
        grace = self._settings.drain_grace
        logger.info("draining: %d calls get up to %g s", self._calls.active, grace)
        if self._health_task is not None:
            self._health_task.cancel()
        await self._health.enter_graceful_shutdown()
        interrupt = asyncio.get_running_loop().call_later(grace, self._calls.interrupt)
        # gRPC's own cut comes a little later, so that the typed status of `interrupt` gets out first.
        await self._server.stop(grace + 1.0)
        interrupt.cancel()
        for task in self._preloads:
            task.cancel()
        async with self._refreshing:  # it may be starting another one
            for backend in self._dispatcher.backends.values():
                await backend.close()
        if self._lifecycle is not None:
            await self._lifecycle.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)


def build_backends(settings: Settings, catalog: Catalog, lifecycle: Lifecycle | None = None) -> dict[str, Backend]:
    """The configured backends by name; the MLX engine only where there is a checkpoint for it.

    Args:
        lifecycle: that they share; None makes one of `[scheduler]`.
    """
    lifecycle = lifecycle or Lifecycle(settings.scheduler)
    has_checkpoint = any(entry.facts.format is ModelFormat.CHECKPOINT for entry in catalog.entries)
    backends: dict[str, Backend] = {}
    for name, backend in settings.backends.items():
        if isinstance(backend, LlamaCppSettings):
            backends[name] = LlamaCppBackend(name, backend, lifecycle)
        elif isinstance(backend, OllamaSettings):
            backends[name] = OllamaBackend(name, backend, lifecycle)
        elif isinstance(backend, LlamaServerSettings):
            backends[name] = LlamaServerBackend(name, backend, lifecycle)
        elif has_checkpoint:
            backends[name] = MlxBackend(name, backend, lifecycle)
    return backends
