"""Messages on their way to the other process."""

from __future__ import annotations

import socket
import threading
from collections import deque

from mlx_mtp_backend.process.wire import ToChild, ToParent, encode

MOST_WAITING = 1000  # frames, above which those that may be lost are


class Outbox:
    """Sends on a thread of its own, in order: who puts a message never waits, whatever the other process does.

    Args:
        connection: to the other process; closed by the caller.
        name: of the thread.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._connection = connection
        self._changed = threading.Condition(threading.RLock())
        self._frames: deque[bytes] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begins to send."""
        self._thread.start()

    def put(self, message: ToChild | ToParent, *, may_be_lost: bool = False) -> None:
        """Nothing is sent after `close`, or to a process that is gone. Raises WireError."""
        self.put_frame(encode(message), may_be_lost=may_be_lost)

    def put_frame(self, frame: bytes, *, may_be_lost: bool = False) -> None:
        """A message that was encoded before."""
        with self._changed:
            if self._closed or (may_be_lost and len(self._frames) >= MOST_WAITING):
                return
            self._frames.append(frame)
            self._changed.notify()

    def close(self, patience: float) -> None:
        """Sends what waits, for at most that many seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(patience)

    def waits(self) -> bool:
        """Whether there is something to send. Called with the lock held."""
        return bool(self._frames)

    def take(self) -> bytes:
        """What is sent next, in one go. Called without the lock."""
        with self._changed:
            frames = b"".join(self._frames)
            self._frames.clear()
        return frames

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.waits())
                if not self.waits():
                    return
            try:
                self._connection.sendall(self.take())
            except OSError:  # the other process is gone, which who reads from it finds out
                with self._changed:
                    self._closed = True
                    self._frames.clear()
                return
