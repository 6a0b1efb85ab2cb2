"""Starts the engine's process, and tells how it ended."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections import deque

from mlx_mtp_backend.errors import EngineError, ErrorReason

log = logging.getLogger(__name__)

MODULE = "mlx_mtp_backend.process.child"
STDERR_LINES = 60
STDERR_LINE_BYTES = 2**16
LAST_WORDS = 1.0  # seconds that they may take to come
EXIT = 2.0  # seconds between the end of what it says and its own


class ChildProcess:
    """A process in a group of its own, so that a terminal's signals are the parent's alone. It is told nothing but by
    the socket; its standard input is a pipe on which nothing is ever written and whose end it does not survive.

    Attributes:
        connection: to it; closed by `reap`.

    Raises:
        EngineError: ENGINE_CLOSED, where the system starts no process.
    """

    def __init__(self) -> None:
        self.connection, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    # -P: the folder that this process was started in holds no modules for the other.
                    [sys.executable, "-P", "-m", MODULE, str(theirs.fileno())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                    # No session of its own: Linux shares the processor between sessions first, whatever their niceness.
                    process_group=0,
                )
            except OSError as error:
                self.connection.close()
                detail = f"the engine's process cannot be started: {error.strerror}"
                raise EngineError(ErrorReason.ENGINE_CLOSED, detail) from error
        self._last_words: deque[str] = deque(maxlen=STDERR_LINES)
        self._drain = threading.Thread(target=self._drain_stderr, name="mlx-engine-stderr", daemon=True)
        self._drain.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def reap(self) -> str:
        """Waits for its end, which it is brought to if need be. How it ended, with the last words of its stderr."""
        try:
            status = self._process.wait(EXIT)
        except subprocess.TimeoutExpired:
            self.kill()
            status = self._process.wait()
        self._drain.join(LAST_WORDS)
        for file in (self._process.stdin, self.connection):
            if file is not None:
                file.close()
        how = f"was ended by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        return "\n".join([f"process {self.pid} {how}", *self._last_words])

    def _drain_stderr(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            while line := stderr.readline(STDERR_LINE_BYTES):
                text = line.decode(errors="replace").rstrip()
                self._last_words.append(text)
                log.debug("engine's process %d: %s", self.pid, text)


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
