"""Prints answers: live on a terminal, bare text elsewhere, or JSON lines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from mtp_router.generate import v1
from rich.console import Console
from rich.table import Table
from rich.text import Text

from router.cli.failures import SHOWN, one_line
from router.client import Answer, AnswerStatistics, enum_name

CUT_OFF = (v1.FINISH_REASON_MAX_TOKENS, v1.FINISH_REASON_CONTEXT_LIMIT, v1.FINISH_REASON_TIME_LIMIT)


def json_line(message: Message) -> str:
    """A message in protobuf's JSON mapping with the contract's own field names, on one line."""
    return json.dumps(MessageToDict(message, preserving_proto_field_name=True), ensure_ascii=False)


def head_warning(model: v1.Model) -> str | None:
    """What is amiss with a model's prediction head, in one line; None where nothing is."""
    if not model.mtp_head.warning:
        return None
    return one_line(f"{model.name}: {model.mtp_head.warning}; that costs speed, never exactness")


def print_events(answer: Answer) -> None:
    """Prints every event as a line of JSON, as it comes."""
    for event in answer.events():
        print(json_line(event), flush=True)


def print_answer(answer: Answer) -> None:
    """Prints the text as it comes; on a terminal also thinking, progress, and the statistics when it has ended."""
    console = Console(highlight=False, soft_wrap=True)
    logprobs: list[v1.TokenLogprob] = []
    try:
        if console.is_terminal:
            _print_live(answer, console, logprobs)
        else:
            for delta in answer:
                sys.stdout.write(delta.text)
                sys.stdout.flush()
                logprobs.extend(delta.logprobs)
    finally:
        # The prompt or an error message comes next, also after an interrupted answer.
        if answer.text and not answer.text.endswith("\n"):
            print(flush=True)
    if logprobs:
        _print_logprobs(logprobs, console)
    if answer.started is None or answer.finished is None:
        return
    if console.is_terminal:
        console.print(Text(statistics_line(answer.started, answer.finished), style="dim"))
    elif answer.finished.reason in CUT_OFF:
        print(f"mtp-router: the answer was cut off: {_reason(answer.finished)}", file=sys.stderr)


def _print_live(answer: Answer, console: Console, logprobs: list[v1.TokenLogprob]) -> None:
    thought = False
    with console.status("waiting") as status:
        for event in answer.events():
            if event.WhichOneof("event") == "progress":
                status.update(progress_line(event.progress))
                continue
            status.stop()
            if event.delta.reasoning_text:
                thought = True
                console.print(Text(event.delta.reasoning_text.translate(SHOWN), style="dim italic"), end="")
            if event.delta.text:
                if thought:
                    console.print("\n")
                    thought = False
                console.print(Text(event.delta.text.translate(SHOWN)), end="")
            logprobs.extend(event.delta.logprobs)


def progress_line(progress: v1.GenerationProgress) -> str:
    """How far a request is before its first token."""
    match progress.WhichOneof("stage"):
        case "queue":
            return f"waiting behind {progress.queue.ahead} other requests"
        case "load":
            share = f" {progress.load.fraction:.0%}" if progress.load.HasField("fraction") else ""
            return f"loading the model{share}"
        case "prefill":
            return f"reading the prompt: {progress.prefill.processed_tokens} of {progress.prefill.total_tokens} tokens"
    return "waiting"


def statistics_line(started: v1.GenerationStarted, finished: v1.GenerationFinished) -> str:
    """Model, backend, why, and the figures of an answer, in one line."""
    figures = AnswerStatistics.of(started, finished)
    parts = [f"{figures.model} on {figures.backend} ({figures.why})"]
    if figures.time_to_first_token is not None:
        parts.append(f"TTFT {figures.time_to_first_token:.2f} s")
    if figures.tokens_per_second is not None:
        parts.append(f"{figures.tokens_per_second:.1f} tokens/s")
    parts.append(f"{figures.prompt_tokens} + {figures.output_tokens} tokens")
    if figures.acceptance is not None:
        parts.append(f"{figures.acceptance:.0%} of drafts accepted")
    if finished.reason != v1.FINISH_REASON_END_OF_GENERATION:
        parts.append(f"ended by {_reason(finished)}")
    return " | ".join(parts).translate(SHOWN)


def _reason(finished: v1.GenerationFinished) -> str:
    return enum_name(v1.FinishReason, finished.reason).replace("_", " ")


def _print_logprobs(logprobs: Iterable[v1.TokenLogprob], console: Console) -> None:
    table = Table("token", "logprob", "probability", "most likely")
    for entry in logprobs:
        others = ", ".join(f"{_token(other)} {math.exp(other.logprob):.3f}" for other in entry.top_logprobs)
        table.add_row(Text(_token(entry)), f"{entry.logprob:.4f}", f"{math.exp(entry.logprob):.3f}", Text(others))
    console.print(table, soft_wrap=False)


def _token(entry: v1.TokenLogprob) -> str:
    return repr(entry.token_bytes.decode("utf-8", "backslashreplace"))
