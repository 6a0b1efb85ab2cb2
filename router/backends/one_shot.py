"""HTTP to engines over a connection for each request, closed with it, whatever becomes of the request."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator

import httpx

LIMITS = httpx.Limits(max_connections=1, max_keepalive_connections=0)


class OneShot(httpx.AsyncBaseTransport):
    """Opens a connection for each request and closes it at the end of the response.

    A server that restarted does not fail the next request on a dead connection, and llama-server, which closes one
    after a stream without saying so, does no harm. One pool for all requests, told to keep none, would not do: httpcore
    1.0.9 keeps a connection for ever whose request is cancelled after it was made and before it was used.

    Args:
        context: for https.
        socket: path of a UNIX socket to connect to, whatever the address.
    """

    def __init__(self, context: ssl.SSLContext, socket: str | None = None) -> None:
        self._context = context
        self._socket = socket
        self._open: set[httpx.AsyncHTTPTransport] = set()

    @property
    def open(self) -> int:
        """Requests whose connection is open."""
        return len(self._open)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends one request (see `httpx.AsyncBaseTransport`)."""
        single = httpx.AsyncHTTPTransport(verify=self._context, limits=LIMITS, uds=self._socket, trust_env=False)
        self._open.add(single)
        try:
            response = await single.handle_async_request(request)
        except BaseException:
            await self._close(single)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Stream(response.stream, self, single)
        return response

    async def aclose(self) -> None:
        """Closes every connection."""
        await asyncio.gather(*(self._close(single) for single in list(self._open)))

    async def _close(self, single: httpx.AsyncHTTPTransport) -> None:
        self._open.discard(single)
        # A cancellation that comes meanwhile must not leave it open.
        await asyncio.shield(asyncio.ensure_future(single.aclose()))


class _Stream(httpx.AsyncByteStream):
    """A response's body, with whose end its connection ends."""

    def __init__(self, inner: httpx.AsyncByteStream, transport: OneShot, single: httpx.AsyncHTTPTransport) -> None:
        self._inner = inner
        self._transport = transport
        self._single = single

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._inner.__aiter__()

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            await self._transport._close(self._single)
