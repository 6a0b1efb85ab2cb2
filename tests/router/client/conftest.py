from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.fake_router import FakeRouter, running

from router.client import AsyncClient, Client


class Stepped:
    """Lets a synchronous test drive an asyncio object: its coroutines and iterators are run step by step."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: Any) -> None:
        self._loop, self._target = loop, target

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            result = self._loop.run_until_complete(self._inside(value, *args, **kwargs))
            return Stepped(self._loop, result) if hasattr(result, "__aiter__") else result

        return call

    @staticmethod
    async def _inside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls it while the loop runs, as grpc.aio needs of plain functions too."""
        result = function(*args, **kwargs)
        return await result if inspect.iscoroutine(result) else result

    def __iter__(self) -> Iterator[Any]:
        iterator = self._target.__aiter__()
        while True:
            try:
                yield self._loop.run_until_complete(anext(iterator))
            except StopAsyncIteration:
                return

    def __enter__(self) -> Stepped:
        self._loop.run_until_complete(self._target.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._loop.run_until_complete(self._target.__aexit__(*error))


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with running() as router:
        yield router


@pytest.fixture(params=["sync", "asyncio"])
def connect(request: pytest.FixtureRequest, router: FakeRouter) -> Iterator[Callable[..., Any]]:
    """Makes clients of the fake router: the synchronous one, and its asyncio twin behind the same face."""
    if request.param == "sync":
        clients: list[Client] = []

        def connect_sync(**settings: Any) -> Client:
            clients.append(Client(settings.pop("target", router.address), **settings))
            return clients[-1]

        yield connect_sync
        for client in clients:
            client.close()
        return

    loop = asyncio.new_event_loop()
    stepped: list[Stepped] = []

    def connect_async(**settings: Any) -> Stepped:
        async def make() -> AsyncClient:
            return AsyncClient(settings.pop("target", router.address), **settings)

        stepped.append(Stepped(loop, loop.run_until_complete(make())))
        return stepped[-1]

    yield connect_async
    for client in stepped:
        client.close()
    loop.close()
