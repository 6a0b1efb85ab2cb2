"""Starts the server again where it ends abnormally, such as by an abort in native code: `mtp-router serve --supervise`.

The parent does nothing but wait, so that what ends the server cannot end it as well. Signals are for the server, which
drains, refreshes or ends by them; a server whose parent has gone drains, too.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds until it starts again; doubles
STEADY = 30.0  # seconds that it must have run for the pause to be the first again
SETTLED = 10.0  # seconds after which the first one that ends by itself has not merely been started wrongly
# What reaches the server by each signal. It drains by SIGTERM and SIGINT alike, but a Python that is still starting
# complains of SIGINT with a traceback.
FORWARDED = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGTERM, signal.SIGHUP: signal.SIGHUP}
LOOK = 0.1  # seconds between looks for a signal while nothing runs


class Supervisor:
    """Runs one command for as long as it is wanted.

    Args:
        command: what to run; it also gets `--lifeline FD`, which ends when the parent does.
        first_pause: seconds.
    """

    def __init__(self, command: Sequence[str], first_pause: float = FIRST_PAUSE) -> None:
        self._command = list(command)
        self._first_pause = first_pause
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: signal.Signals | None = None  # the signal that ended it all

    def run(self) -> int:
        """Runs until it ends in order or was told to. Returns its exit status, 128 and the number for a signal."""
        for number in FORWARDED:
            signal.signal(number, self._signalled)
        restarts, pause = 0, self._first_pause
        while True:
            status, seconds = self._once()
            if self._stop is not None and status == -FORWARDED[self._stop]:  # before it could drain
                return 128 + self._stop
            if status == 0 or self._stop is not None or (status > 0 and not restarts and seconds < SETTLED):
                return status if status >= 0 else 128 - status
            if seconds >= STEADY:
                pause = self._first_pause
            logger.critical("the server %s after %.0f s; it starts again in %g s", _ended(status), seconds, pause)
            self._sleep(pause)
            if self._stop is not None:
                return 128 + self._stop
            restarts, pause = restarts + 1, min(2 * pause, LONGEST_PAUSE)

    def _once(self) -> tuple[int, float]:
        """Its exit status, negative for a signal, and the seconds that it ran."""
        began = time.monotonic()
        reads, writes = os.pipe()
        try:
            # A session of its own: Ctrl-C must reach it once, through here.
            command = [*self._command, "--lifeline", str(reads)]
            self._process = subprocess.Popen(command, pass_fds=(reads,), start_new_session=True)
            os.close(reads)
            if self._stop is not None:  # it came just before
                self._process.send_signal(FORWARDED[self._stop])
            return self._process.wait(), time.monotonic() - began
        finally:
            self._process = None
            os.close(writes)

    def _signalled(self, number: int, frame: object) -> None:
        came = signal.Signals(number)
        if came is not signal.SIGHUP:
            self._stop = came
        if self._process is not None:
            self._process.send_signal(FORWARDED[came])

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._stop is None and time.monotonic() < end:
            time.sleep(LOOK)


def _ended(status: int) -> str:
    """In words."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def supervised(options: Sequence[str]) -> int:
    """Supervises `mtp-router serve` with these options. Returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    command = [sys.executable, "-c", "import sys; from router.cli import main; sys.exit(main())", "serve", *options]
    return Supervisor(command).run()
