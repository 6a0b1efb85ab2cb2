"""The command line, `mtp-router`. Exit status: 0 done, 1 failed, 2 wrong usage or settings, 130 interrupted."""

from __future__ import annotations

from collections.abc import Sequence

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    try:
        from router.cli.command import run  # takes some 0.2 s, in which Ctrl-C may come too

        return run(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
