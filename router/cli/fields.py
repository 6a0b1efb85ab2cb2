"""From parsed arguments to the fields of a generation request."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from router.cli.failures import UsageError
from router.client import GenerationFields


def generation_fields(arguments: argparse.Namespace) -> GenerationFields:
    """Every field that the arguments set, except the prompt. Raises UsageError."""
    thinking = {None: None, True: "on", False: "off"}[arguments.thinking]
    return GenerationFields(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        seed=arguments.seed,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        max_output_tokens=arguments.max_output_tokens,
        min_output_tokens=arguments.min_output_tokens,
        stop=arguments.stop,
        time_budget=arguments.time_budget,
        json_schema=None if arguments.schema is None else read_text(arguments.schema),
        json_object=arguments.json_object,
        regex=arguments.regex,
        reasoning=thinking,
        reasoning_budget_tokens=arguments.reasoning_budget_tokens,
        speculation=arguments.speculation,
        draft_depth=arguments.draft_depth,
        top_logprobs=arguments.top_logprobs,
        priority=arguments.priority,
        correlation_id=arguments.correlation_id,
        labels=_labels(arguments.label),
    )


def _labels(pairs: list[str] | None) -> dict[str, str] | None:
    if pairs is None:
        return None
    split = [pair.partition("=") for pair in pairs]
    wrong = [key for key, equals, _ in split if not equals]
    if wrong:
        raise UsageError(f"--label takes KEY=VALUE, not {wrong[0]!r}")
    return {key: value for key, _, value in split}


def read_text(path: Path | str) -> str:
    """The text of a file, of standard input for "-". Raises UsageError."""
    given = str(path) == "-"
    name = "standard input" if given else str(path)
    try:
        data = sys.stdin.buffer.read() if given else Path(path).read_bytes()
        return data.decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text") from None
