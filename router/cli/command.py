"""Runs one command; says in one line why where it fails."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence

# gRPC core reads this once, when it is imported, and would else put lines of its own between ours.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from router.cli.arguments import build_parser
from router.cli.failures import FAILED, USAGE, UsageError, as_json, describe, one_line
from router.client import RouterCallError
from router.pull import PullError


def run(argv: Sequence[str] | None) -> int:
    """Runs one command and returns its exit status. Raises KeyboardInterrupt."""
    arguments = build_parser().parse_args(argv)
    _settle_encodings()
    try:
        status = _command(arguments.command)(arguments)
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _complain(str(error), USAGE)
    except PullError as error:
        return _complain(str(error), FAILED)
    except RouterCallError as error:
        if getattr(arguments, "json", False):
            print(as_json(error), flush=True)
        return _complain(describe(error, arguments.target, begun=getattr(arguments, "begun", False)), FAILED)
    except BrokenPipeError:
        # The reader has enough; without this, Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _settle_encodings() -> None:
    """Pipes and files carry UTF-8, whatever the locale says; a terminal that cannot show a character shows its code."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="strict")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty():
        sys.stdout.reconfigure(errors="backslashreplace")


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """The command of that name. Each is imported only when it runs, which keeps the others quick to start."""
    match name:
        case "serve":
            from router.cli.serve import run
        case "generate":
            from router.cli.generate import run
        case "chat":
            from router.cli.chat import run
        case "models":
            from router.cli.models import run
        case "refresh":
            from router.cli.refresh import run
        case "explain":
            from router.cli.explain import run
        case "inspect":
            from router.cli.inspect import run
        case "doctor":
            from router.cli.doctor import run
        case "verify":
            from router.cli.verify import run
        case "tune":
            from router.cli.tune import run
        case "pull":
            from router.cli.pull import run
        case "top":
            from router.cli.top import run
        case "config":
            from router.cli.config import run
        case _:
            raise AssertionError(name)
    return run


def _complain(message: str, status: int) -> int:
    print(f"mtp-router: {one_line(message)}", file=sys.stderr)
    return status
