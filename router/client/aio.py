"""The asyncio client. `sync.py` is its synchronous twin: keep the two alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from mtp_router.generate import v1

from router.client import requests
from router.client.errors import CallCancelledError, ProtocolError, typed_errors
from router.client.options import DEFAULT_DEADLINE, DEFAULT_RETRY, DEFAULT_TARGET, RetryPolicy, channel_options
from router.client.record import AnswerRecord
from router.client.requests import GenerationFields


class AsyncAnswer(AnswerRecord):
    """A streamed answer: iterate it with `async for` for its deltas, or `events()` for everything.

    Leaving its `async with` block, `close()`, dropping it, or cancelling the task that reads it cancels the call if it
    still runs. Iterating raises RouterCallError where the call fails.
    """

    def __init__(self, call: Any) -> None:
        super().__init__()
        self._call = call
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the call; does nothing once it has ended. A reader in another task gets CallCancelledError."""
        self._closed = True
        self._call.cancel()

    def __del__(self) -> None:
        # gRPC's own tasks keep the call alive, so dropping the answer alone would not end it, as it does in sync.py.
        self._call.cancel()

    def __aiter__(self) -> AsyncIterator[v1.GenerationDelta]:
        return self

    async def __anext__(self) -> v1.GenerationDelta:
        while (event := await self._receive()) is not None:
            if event.WhichOneof("event") == "delta":
                return event.delta
        raise StopAsyncIteration

    async def events(self) -> AsyncIterator[v1.StreamGenerateResponse]:
        """The events not taken yet, of every kind that this client knows."""
        while (event := await self._receive()) is not None:
            yield event

    async def _receive(self) -> v1.StreamGenerateResponse | None:
        """The next event of a known kind; None at the end."""
        try:
            with typed_errors():
                while (event := await self._call.read()) is not grpc.aio.EOF:
                    if self._observe(event):
                        return event  # type: ignore[no-any-return]
        except ProtocolError:
            self._call.cancel()
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise CallCancelledError(
                    grpc.StatusCode.CANCELLED, "", "the answer was closed before its end"
                ) from None
            raise
        self._end()
        return None


class AsyncClient:
    """A connection to a router, for asyncio. Create it inside the event loop that uses it.

    Args:
        target: gRPC target, such as `host:port` or `unix:/path`.
        deadline: seconds a call may take, where the call itself names none.
        retry: None switches retries off.
        options: gRPC core options by name; they replace the defaults of `router.client.options`.
        credentials: for a TLS endpoint; None connects without encryption.

    Every method raises RouterCallError where the call fails, and ValueError or TypeError where no request can be built.
    A `deadline` argument is in seconds; None takes the client's.

    Raises:
        RuntimeError: no event loop runs.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        deadline: float = DEFAULT_DEADLINE,
        retry: RetryPolicy | None = DEFAULT_RETRY,
        options: Mapping[str, int | str | None] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        asyncio.get_running_loop()  # a channel made elsewhere would bind itself to the wrong loop
        self.target = target
        self._deadline = deadline
        core_options = channel_options(retry, options)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, core_options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, core_options)
        self._generate = v1.GenerateServiceStub(self._channel)
        self._models = v1.ModelServiceStub(self._channel)
        self._admin = v1.AdminServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls that still run are cancelled."""
        await self._channel.close()

    def stream(
        self,
        model: str,
        *,
        deadline: float | None = None,
        include_progress: bool = False,
        **fields: Unpack[GenerationFields],
    ) -> AsyncAnswer:
        """Starts generating an answer and streams it.

        Args:
            model: name or alias.
            include_progress: also get `progress` events before the first token, from `AsyncAnswer.events`; the first
                one ends the channel's retries.
            fields: what to generate; see GenerationFields.
        """
        request = requests.stream_request(model, fields, include_progress=include_progress)
        return AsyncAnswer(self._generate.StreamGenerate(request, timeout=self._timeout(deadline)))

    async def generate(
        self, model: str, *, deadline: float | None = None, **fields: Unpack[GenerationFields]
    ) -> v1.GenerateResponse:
        """Generates an answer and returns it whole."""
        request = requests.generate_request(model, fields)
        with typed_errors():
            return await self._generate.Generate(request, timeout=self._timeout(deadline))

    async def count_tokens(
        self, model: str, *, deadline: float | None = None, **fields: Unpack[GenerationFields]
    ) -> v1.CountTokensResponse:
        """Counts the tokens of a prompt, chat template included, without generating."""
        request = requests.count_tokens_request(model, fields)
        with typed_errors():
            return await self._generate.CountTokens(request, timeout=self._timeout(deadline))

    async def list_models(self, *, page_size: int = 0, deadline: float | None = None) -> AsyncIterator[v1.Model]:
        """The configured models by name, one call for each page. `page_size` 0 takes the server's default."""
        token = ""
        while True:
            request = v1.ListModelsRequest(page_size=page_size, page_token=token)
            with typed_errors():
                page = await self._models.ListModels(request, timeout=self._timeout(deadline))
            for model in page.models:
                yield model
            token = page.next_page_token
            if not token:
                return

    async def get_model(self, name: str, *, deadline: float | None = None) -> v1.Model:
        """One model by name or alias."""
        with typed_errors():
            response = await self._models.GetModel(v1.GetModelRequest(name=name), timeout=self._timeout(deadline))
        return response.model

    async def preload(
        self,
        name: str,
        *,
        on_progress: Callable[[v1.LoadProgress], None] | None = None,
        deadline: float | None = None,
    ) -> v1.Model:
        """Loads a model and returns it, ready; `on_progress` is called as loading goes on."""
        call = self._admin.PreloadModel(v1.PreloadModelRequest(name=name), timeout=self._timeout(deadline))
        try:
            with typed_errors():
                async for response in call:
                    if response.WhichOneof("event") == "model":
                        return response.model
                    if on_progress is not None and response.HasField("progress"):
                        on_progress(response.progress)
        finally:
            call.cancel()
        raise ProtocolError("the server ended PreloadModel without the model")

    async def unload(self, name: str, *, force: bool = False, deadline: float | None = None) -> v1.Model:
        """Unloads a model and returns it, cold. `force` also ends the requests that use it."""
        request = v1.UnloadModelRequest(name=name, force=force)
        with typed_errors():
            response = await self._admin.UnloadModel(request, timeout=self._timeout(deadline))
        return response.model

    async def list_backends(self, *, deadline: float | None = None) -> Sequence[v1.Backend]:
        """The server's backends and their health."""
        with typed_errors():
            response = await self._admin.ListBackends(v1.ListBackendsRequest(), timeout=self._timeout(deadline))
        return response.backends

    async def refresh(self, *, deadline: float | None = None) -> v1.RefreshModelsResponse:
        """Has the server look for models again; tells what is different now."""
        with typed_errors():
            return await self._admin.RefreshModels(v1.RefreshModelsRequest(), timeout=self._timeout(deadline))

    def _timeout(self, deadline: float | None) -> float:
        return self._deadline if deadline is None else deadline
