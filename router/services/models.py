"""ModelService: which models are configured and what each can do."""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Any

import grpc
from mtp_router.generate import v1

from router.catalog import ModelEntry
from router.dispatch import Dispatcher
from router.domain import ErrorReason, FieldViolation, RouterError
from router.services import render
from router.services.errors import reports_errors

Context = grpc.aio.ServicerContext[Any, Any]
DEFAULT_PAGE, MAX_PAGE = 100, 1000


class ModelService(v1.ModelServiceServicer):
    """Serves ModelService from the dispatcher's catalog."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    @reports_errors
    async def ListModels(self, request: v1.ListModelsRequest, context: Context) -> v1.ListModelsResponse:
        """One page of models, by name. The page token is the last name of the page before."""
        after = _decode_token(request.page_token)
        entries = [entry for entry in self._dispatcher.catalog.entries if entry.name > after]
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        page, rest = entries[:size], entries[size:]
        return v1.ListModelsResponse(
            models=await asyncio.gather(*(describe(self._dispatcher, entry) for entry in page)),
            next_page_token=_encode_token(page[-1].name) if rest else "",
        )

    @reports_errors
    async def GetModel(self, request: v1.GetModelRequest, context: Context) -> v1.GetModelResponse:
        """One model by name or alias."""
        return v1.GetModelResponse(
            model=await describe(self._dispatcher, self._dispatcher.catalog.resolve(request.name))
        )


async def describe(dispatcher: Dispatcher, entry: ModelEntry) -> v1.Model:
    """A model as it stands now."""
    return render.model(await dispatcher.look(entry))


def _encode_token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _decode_token(token: str) -> str:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        violation = FieldViolation("page_token", "is not a token that this service gave out")
        raise RouterError(
            ErrorReason.INVALID_REQUEST,
            f"invalid request: page_token: {violation.description}",
            violations=(violation,),
        ) from None
