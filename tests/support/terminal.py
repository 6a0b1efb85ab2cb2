"""Commands on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import subprocess


def on_a_terminal(arguments: list[str]) -> tuple[int, str]:
    """Runs a command on a pseudo-terminal; its exit status and what the terminal got."""
    near, far = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(arguments, stdin=far, stdout=far, stderr=far, env=environment) as child:
        os.close(far)
        seen = b""
        while True:
            try:
                chunk = os.read(near, 4096)
            except OSError:
                break  # Linux reports the end of a terminal this way
            if not chunk:
                break
            seen += chunk
    os.close(near)
    return child.returncode, seen.decode()
