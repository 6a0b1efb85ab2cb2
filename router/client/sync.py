"""The synchronous client. `aio.py` is its asyncio twin: keep the two alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from mtp_router.generate import v1

from router.client import requests
from router.client.errors import ProtocolError, typed_errors
from router.client.options import DEFAULT_DEADLINE, DEFAULT_RETRY, DEFAULT_TARGET, RetryPolicy, channel_options
from router.client.record import AnswerRecord
from router.client.requests import GenerationFields


class Answer(AnswerRecord):
    """A streamed answer: iterate it for its deltas, or `events()` for everything.

    Leaving its `with` block, `close()`, or dropping it cancels the call if it still runs. Iterating raises
    RouterCallError where the call fails.
    """

    def __init__(self, call: Any) -> None:
        super().__init__()
        self._call = call

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the call; does nothing once it has ended. A reader in another thread gets CallCancelledError."""
        self._call.cancel()

    def __iter__(self) -> Iterator[v1.GenerationDelta]:
        return self

    def __next__(self) -> v1.GenerationDelta:
        while (event := self._receive()) is not None:
            if event.WhichOneof("event") == "delta":
                return event.delta
        raise StopIteration

    def events(self) -> Iterator[v1.StreamGenerateResponse]:
        """The events not taken yet, of every kind that this client knows."""
        while (event := self._receive()) is not None:
            yield event

    def _receive(self) -> v1.StreamGenerateResponse | None:
        """The next event of a known kind; None at the end."""
        try:
            with typed_errors():
                while (event := next(self._call, None)) is not None:
                    if self._observe(event):
                        return event  # type: ignore[no-any-return]
        except ProtocolError:
            self._call.cancel()
            raise
        self._end()
        return None


class Client:
    """A connection to a router, for threads. Safe to share between them.

    Args:
        target: gRPC target, such as `host:port` or `unix:/path`.
        deadline: seconds a call may take, where the call itself names none.
        retry: None switches retries off.
        options: gRPC core options by name; they replace the defaults of `router.client.options`.
        credentials: for a TLS endpoint; None connects without encryption.

    Every method raises RouterCallError where the call fails, and ValueError or TypeError where no request can be built.
    A `deadline` argument is in seconds; None takes the client's.
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
        self.target = target
        self._deadline = deadline
        core_options = channel_options(retry, options)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, core_options)
        else:
            self._channel = grpc.secure_channel(target, credentials, core_options)
        self._generate = v1.GenerateServiceStub(self._channel)
        self._models = v1.ModelServiceStub(self._channel)
        self._admin = v1.AdminServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls that still run are cancelled."""
        self._channel.close()

    def stream(
        self,
        model: str,
        *,
        deadline: float | None = None,
        include_progress: bool = False,
        **fields: Unpack[GenerationFields],
    ) -> Answer:
        """Starts generating an answer and streams it.

        Args:
            model: name or alias.
            include_progress: also get `progress` events before the first token, from `Answer.events`; the first one
                ends the channel's retries.
            fields: what to generate; see GenerationFields.
        """
        request = requests.stream_request(model, fields, include_progress=include_progress)
        return Answer(self._generate.StreamGenerate(request, timeout=self._timeout(deadline)))

    def generate(
        self, model: str, *, deadline: float | None = None, **fields: Unpack[GenerationFields]
    ) -> v1.GenerateResponse:
        """Generates an answer and returns it whole."""
        with typed_errors():
            return self._generate.Generate(requests.generate_request(model, fields), timeout=self._timeout(deadline))

    def count_tokens(
        self, model: str, *, deadline: float | None = None, **fields: Unpack[GenerationFields]
    ) -> v1.CountTokensResponse:
        """Counts the tokens of a prompt, chat template included, without generating."""
        request = requests.count_tokens_request(model, fields)
        with typed_errors():
            return self._generate.CountTokens(request, timeout=self._timeout(deadline))

    def list_models(self, *, page_size: int = 0, deadline: float | None = None) -> Iterator[v1.Model]:
        """The configured models by name, one call for each page. `page_size` 0 takes the server's default."""
        token = ""
        while True:
            request = v1.ListModelsRequest(page_size=page_size, page_token=token)
            with typed_errors():
                page = self._models.ListModels(request, timeout=self._timeout(deadline))
            yield from page.models
            token = page.next_page_token
            if not token:
                return

    def get_model(self, name: str, *, deadline: float | None = None) -> v1.Model:
        """One model by name or alias."""
        with typed_errors():
            return self._models.GetModel(v1.GetModelRequest(name=name), timeout=self._timeout(deadline)).model

    def preload(
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
                for response in call:
                    if response.WhichOneof("event") == "model":
                        return response.model
                    if on_progress is not None and response.HasField("progress"):
                        on_progress(response.progress)
        finally:
            call.cancel()
        raise ProtocolError("the server ended PreloadModel without the model")

    def unload(self, name: str, *, force: bool = False, deadline: float | None = None) -> v1.Model:
        """Unloads a model and returns it, cold. `force` also ends the requests that use it."""
        request = v1.UnloadModelRequest(name=name, force=force)
        with typed_errors():
            return self._admin.UnloadModel(request, timeout=self._timeout(deadline)).model

    def list_backends(self, *, deadline: float | None = None) -> Sequence[v1.Backend]:
        """The server's backends and their health."""
        with typed_errors():
            return self._admin.ListBackends(v1.ListBackendsRequest(), timeout=self._timeout(deadline)).backends

    def refresh(self, *, deadline: float | None = None) -> v1.RefreshModelsResponse:
        """Has the server look for models again; tells what is different now."""
        with typed_errors():
            return self._admin.RefreshModels(v1.RefreshModelsRequest(), timeout=self._timeout(deadline))

    def _timeout(self, deadline: float | None) -> float:
        return self._deadline if deadline is None else deadline
