"""gRPC streams read as HTTP/2 frames: a client for measurements that leaves the machine to what is measured.

grpc.aio takes as much of a core to read a stream as to send it: on two cores the client would be what is measured. Here
nothing is decoded: whoever calls is given the bytes of each DATA frame. Windows are as large as they may be, so that an
answer meets no flow control until 2 GiB have come over its connection. As much of HTTP/2 as gRPC's own server needs:
small requests, no padding, no waiting for a window. Frames: RFC 9113; header fields: RFC 7541, all literal.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE = 4  # a setting
_LARGEST_WINDOW, _FIRST_WINDOW = 2**31 - 1, 2**16 - 1
_LARGEST_REQUEST = 2**14 - 5  # with what gRPC puts before it
_HEADER = struct.Struct(">HBBBI")  # of a frame: length in 16 and 8 bits, type, flags, stream

Heard = Callable[[bytes], None]


@dataclass(slots=True)
class _Call:
    heard: Heard
    ended: asyncio.Future[bytes]


class Connection(asyncio.Protocol):
    """One connection, of any number of calls. Made by `connect`."""

    def __init__(self) -> None:
        self._calls: dict[int, _Call] = {}
        self._next = 1
        self._rest = b""  # the beginning of a frame
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, _LARGEST_WINDOW)
        window = struct.pack(">I", _LARGEST_WINDOW - _FIRST_WINDOW)
        transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, window))

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._fail(self._calls, f"the connection was lost: {exc or 'it was closed'}")

    async def call(self, path: str, request: bytes, heard: Heard) -> bytes:
        """Calls a method of one request and waits for the end of the answer. Returns its trailers, which have the
        status, as they came.

        Args:
            path: "/package.Service/Method".
            request: the message, of one frame at most.
            heard: takes the bytes of each frame: a message, behind gRPC's five bytes. Each small message is one.

        Raises:
            ConnectionError: the stream was reset, or the connection lost. A status is not decoded: whoever calls looks
                whether the answer is whole.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection is closed")
        if len(request) > _LARGEST_REQUEST:
            raise ValueError(f"a request of {len(request)} bytes takes more than one frame")
        number, ended = self._next, asyncio.get_running_loop().create_future()
        self._next += 2
        self._calls[number] = _Call(heard, ended)
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost"}
        fields |= {"te": "trailers", "content-type": "application/grpc"}
        block = b"".join(b"\0" + _string(name) + _string(value) for name, value in fields.items())
        message = b"\0" + struct.pack(">I", len(request)) + request
        headers = _frame(_HEADERS, _END_HEADERS, number, block)
        self._transport.write(headers + _frame(_DATA, _END_STREAM, number, message))
        try:
            return await ended
        finally:
            self._calls.pop(number, None)

    def close(self) -> None:
        """Ends the connection, and with it whatever is still being read."""
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while end - at >= _HEADER.size:
            high, low, kind, flags, stream = _HEADER.unpack_from(data, at)
            following = at + _HEADER.size + (high << 8 | low)
            if following > end:
                break
            self._take(kind, flags, stream, data[at + _HEADER.size : following])
            at = following
        self._rest = data[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            if stream in self._calls:  # else nobody waits any more
                self._calls[stream].heard(payload)
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            assert self._transport is not None
            self._transport.write(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
        elif kind == _RST_STREAM:
            self._fail([stream], f"the stream was reset: {payload.hex()}")
        elif kind == _GOAWAY:  # nothing that is measured ends this way
            self._fail(self._calls, f"the server closes the connection: {payload[8:]!r}")
            self.close()
        elif kind == _HEADERS and flags & _END_STREAM:
            for ended in self._open([stream]):
                ended.set_result(payload)

    def _fail(self, streams: Iterable[int], why: str) -> None:
        for ended in self._open(streams):
            ended.set_exception(ConnectionError(why))

    def _open(self, streams: Iterable[int]) -> list[asyncio.Future[bytes]]:
        """The ends that are still awaited."""
        calls = [self._calls[stream] for stream in streams if stream in self._calls]
        return [call.ended for call in calls if not call.ended.done()]


async def connect(address: str) -> Connection:
    """A connection to "host:port", an IPv4 address or a name. Raises OSError where nothing listens there."""
    host, _, port = address.rpartition(":")
    _, connection = await asyncio.get_running_loop().create_connection(Connection, host, int(port))
    return connection


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    size = len(payload)
    return _HEADER.pack(size >> 8, size & 0xFF, kind, flags, stream) + payload


def _string(text: str) -> bytes:
    """A string of a header field, shorter than 127 characters."""
    return bytes([len(text)]) + text.encode()
