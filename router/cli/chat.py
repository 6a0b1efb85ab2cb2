"""`mtp-router chat`: a conversation on the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from router.cli.connection import connect
from router.cli.failures import OK, UsageError, describe
from router.cli.fields import generation_fields
from router.cli.generate import start
from router.cli.output import print_answer
from router.client import Client, GenerationFields, RouterCallError

HELP = "/quit ends, /clear forgets the conversation, Ctrl-C stops an answer"


def run(arguments: argparse.Namespace) -> int:
    """Reads turns until /quit or the end of input."""
    fields = generation_fields(arguments)
    person = sys.stdin.isatty()
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
        print(HELP)
    history = _beginning(arguments)
    with connect(arguments) as client:
        while (line := _read(prompt="> " if person else "")) is not None:
            match line.strip():
                case "":
                    continue
                case "/quit":
                    break
                case "/clear":
                    history = _beginning(arguments)
                case unknown if unknown.startswith("/"):
                    print(HELP, file=sys.stderr)
                case _:
                    history = _turn(client, arguments, fields, [*history, {"role": "user", "content": line}])
    return OK


def _beginning(arguments: argparse.Namespace) -> list[Mapping[str, Any]]:
    return [] if arguments.system is None else [{"role": "system", "content": arguments.system}]


def _read(prompt: str) -> str | None:
    """The next line; None at the end of input, "" where Ctrl-C discarded it. Raises UsageError."""
    try:
        return input(prompt)
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise UsageError("standard input is not UTF-8 text") from None
    except KeyboardInterrupt:
        print()
        return ""


def _turn(
    client: Client, arguments: argparse.Namespace, fields: GenerationFields, history: list[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Answers the last message; the history with the answer, or without that message where nothing came of it."""
    turn = GenerationFields(**{**fields, "messages": history})
    with start(client, arguments.model, turn, include_progress=sys.stdout.isatty()) as answer:
        try:
            print_answer(answer)
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)
        except RouterCallError as error:
            print(f"mtp-router: {describe(error, arguments.target, begun=answer.started is not None)}", file=sys.stderr)
            return history[:-1]
    return [*history, {"role": "assistant", "content": answer.text}] if answer.text else history[:-1]
