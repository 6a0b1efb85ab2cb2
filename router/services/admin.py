"""AdminService: loads and unloads models, and tells how the backends are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing

from mtp_router.generate import v1

from router.dispatch import Dispatcher
from router.domain import ErrorReason, RouterError
from router.refresh import Refreshed
from router.services import render
from router.services.calls import Calls, Context
from router.services.errors import reports_errors
from router.services.models import describe


class AdminService(v1.AdminServiceServicer):
    """Serves AdminService; with `enabled` False every call answers PERMISSION_DENIED.

    Args:
        refresh: looks for models again.
    """

    def __init__(
        self, dispatcher: Dispatcher, calls: Calls, refresh: Callable[[], Awaitable[Refreshed]], *, enabled: bool
    ) -> None:
        self._dispatcher = dispatcher
        self._calls = calls
        self._refresh = refresh
        self._enabled = enabled

    @reports_errors
    async def PreloadModel(  # type: ignore[override]  # grpc.aio also takes a coroutine that writes
        self, request: v1.PreloadModelRequest, context: Context
    ) -> None:
        """Loads a model, streaming progress; leaving the call does not unload it."""
        self._require_enabled()
        async with self._calls.bounded(context):
            entry, _, backend = await self._dispatcher.find(request.name)
            async with aclosing(backend.preload(entry)) as steps:
                async for step in steps:
                    await context.write(v1.PreloadModelResponse(progress=render.load_progress(step)))
        await context.write(v1.PreloadModelResponse(model=await describe(self._dispatcher, entry)))

    @reports_errors
    async def UnloadModel(self, request: v1.UnloadModelRequest, context: Context) -> v1.UnloadModelResponse:
        """Drops a model from memory."""
        self._require_enabled()
        entry, _, backend = self._dispatcher.route(request.name)
        async with self._calls.bounded(context):
            await backend.unload(entry, force=request.force)
        return v1.UnloadModelResponse(model=await describe(self._dispatcher, entry))

    @reports_errors
    async def ListBackends(self, request: v1.ListBackendsRequest, context: Context) -> v1.ListBackendsResponse:
        """Every backend and its health."""
        self._require_enabled()
        backends = sorted(self._dispatcher.backends.values(), key=lambda backend: backend.name)
        return v1.ListBackendsResponse(backends=[render.backend(backend.status()) for backend in backends])

    @reports_errors
    async def RefreshModels(self, request: v1.RefreshModelsRequest, context: Context) -> v1.RefreshModelsResponse:
        """Looks for models again."""
        self._require_enabled()
        async with self._calls.bounded(context):
            done = await self._refresh()
        return v1.RefreshModelsResponse(
            added=done.added,
            removed=done.removed,
            changed=done.changed,
            kept=done.kept,
            needs_restart=done.needs_restart,
        )

    def _require_enabled(self) -> None:
        if not self._enabled:
            raise RouterError(
                ErrorReason.ADMIN_DISABLED, "AdminService is switched off in this server's settings (server.admin)"
            )
