"""asyncio's event loop, on which gRPC's events do not get stuck.

gRPC's thread tells the loop of each event by a byte in a socket pair, and the loop's callback takes one byte, however
many events it finds. Where a busy loop turns more slowly than events come, the bytes pile up until the pair is full
(278 bytes on Linux) and the thread waits: no call begins or ends until three quarters of them are taken, one a turn.
That was seen to take 0.2 s. (`PollerCompletionQueue` of grpcio 1.85.)
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

_BYTES = 1 << 16
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class EventLoop(asyncio.SelectorEventLoop):
    """Takes all bytes that wait before gRPC's callback takes its one.

    The only loop of its process that may use gRPC: all loops share the socket, and one could take the byte that tells
    of another's event.
    """

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[[*_Ts], Any], *args: *_Ts) -> None:
        """See asyncio."""
        if isinstance(fd, socket.socket) and _is_grpc(callback):
            super().add_reader(fd, _take_all, fd, callback, *args)
        else:
            super().add_reader(fd, callback, *args)


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """`asyncio.run` on that loop."""
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        return runner.run(main)


def _is_grpc(callback: Callable[..., Any]) -> bool:
    """Whether it is a method of a type of gRPC's, or a partial of one; with anything else gRPC is left as it is."""
    method = getattr(callback, "func", callback)
    return type(getattr(method, "__self__", None)).__module__.startswith("grpc.")


def _take_all(wakeups: socket.socket, callback: Callable[[*_Ts], Any], *args: *_Ts) -> None:
    """All but the last, which is the callback's. It finds the events of all: each was there before its byte."""
    waiting = len(wakeups.recv(_BYTES, socket.MSG_PEEK))
    if waiting > 1:
        wakeups.recv(waiting - 1)
    callback(*args)
