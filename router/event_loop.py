"""asyncio's event loop, on which gRPC's events do not get stuck.

gRPC's thread tells the loop of each event by a byte in a socket pair, and the loop's callback takes one byte, however
many events it finds. Where a busy loop turns more slowly than events come, the bytes pile up until the pair is full
(278 bytes on Linux) and the thread waits: no call begins or ends until three quarters of them are taken, one a turn.
That was seen to take 0.2 s. (`PollerCompletionQueue` of grpcio 1.85.)
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVarTuple

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

_BYTES = 4096  # more than a socket pair holds
Ts = TypeVarTuple("Ts")


class EventLoop(asyncio.SelectorEventLoop):
    """Takes all bytes that wait before gRPC's callback takes its one."""

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[[*Ts], Any], *args: *Ts) -> None:
        """See asyncio."""
        if isinstance(fd, socket.socket) and _is_grpc(callback):
            super().add_reader(fd, _take_all, fd, callback, *args)
        else:
            super().add_reader(fd, callback, *args)


def run(main: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run` on that loop."""
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(main)


def _is_grpc(callback: Callable[..., Any]) -> bool:
    method = getattr(callback, "func", callback)  # a partial's
    return type(getattr(method, "__self__", None)).__module__.startswith("grpc.")


def _take_all(wakeups: socket.socket, callback: Callable[[*Ts], Any], *args: *Ts) -> None:
    """All but the last, which is the callback's. It finds the events of all: each was there before its byte."""
    with contextlib.suppress(BlockingIOError):  # another loop was faster
        waiting = len(wakeups.recv(_BYTES, socket.MSG_PEEK))
        if waiting > 1:
            wakeups.recv(waiting - 1)
    callback(*args)
