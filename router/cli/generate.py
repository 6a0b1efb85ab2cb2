"""`mtp-router generate`: answers one prompt."""

from __future__ import annotations

import argparse
import sys

from router.cli.connection import connect
from router.cli.failures import OK, UsageError
from router.cli.fields import generation_fields, read_text
from router.cli.output import print_answer, print_events
from router.client import Answer, Client, GenerationFields


def run(arguments: argparse.Namespace) -> int:
    """Streams the answer to standard output."""
    fields = generation_fields(arguments)
    _add_prompt(arguments, fields)
    watched = sys.stdout.isatty() and not arguments.json
    with (
        connect(arguments) as client,
        start(client, arguments.model, fields, include_progress=watched or arguments.progress) as answer,
    ):
        try:
            if arguments.json:
                print_events(answer)
            else:
                print_answer(answer)
        finally:
            arguments.begun = answer.started is not None  # a failure reads differently from here on
    return OK


def _add_prompt(arguments: argparse.Namespace, fields: GenerationFields) -> None:
    if arguments.raw and arguments.system is not None:
        raise UsageError("--raw gives the text to the model as it is, so there is no place for --system")
    source = arguments.file or ("-" if arguments.prompt == "-" else None)
    text = arguments.prompt if source is None else read_text(source)
    if arguments.raw:
        fields["prompt"] = text
        return
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    fields["messages"] = [*system, {"role": "user", "content": text}]


def start(client: Client, model: str, fields: GenerationFields, *, include_progress: bool) -> Answer:
    """Starts an answer. Raises UsageError where the arguments do not fit the types of the contract."""
    try:
        return client.stream(model, include_progress=include_progress, **fields)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
