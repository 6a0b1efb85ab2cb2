"""Folds a storm of alerts into one incident summary, as an alert correlator would, and prints it as it streams.

python examples/incident_summary.py --target 127.0.0.1:50061 --model smollm2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from router.client import DEFAULT_TARGET, Answer, AnswerStatistics, Client, GenerationFields, RouterCallError

STORM = Path(__file__).with_name("alert_storm.json")


def render(storm: Mapping[str, Any]) -> list[dict[str, str]]:
    """The storm as a conversation: one line an alert, oldest first, then the question.

    The question comes last and says how to read the list: small models go by what they read most recently.
    """
    lines = [
        f"{alert['time'][11:19]} {alert['severity']} {alert['host']} {alert['service']}: {alert['message']}"
        for alert in storm["alerts"]
    ]
    question = (
        "The first alerts name the root cause; the later ones are its effects. "
        "Summarize the incident in one sentence: root cause, then effects."
    )
    return [
        {"role": "system", "content": "You are an on-call engineer."},
        {"role": "user", "content": "\n".join(lines) + "\n\n" + question},
    ]


def request(storm: Mapping[str, Any]) -> GenerationFields:
    """What is asked of the model."""
    return {
        "messages": render(storm),
        "temperature": 0.2,
        "seed": 8,
        "max_output_tokens": 80,
        "stop": ["\n\n"],
        "labels": {"incident": storm["incident"]},
        "correlation_id": storm["incident"],
    }


def summarize(client: Client, model: str, storm: Mapping[str, Any]) -> Answer:
    """Streams the summary to standard output and returns the finished answer. Raises RouterCallError."""
    with client.stream(model, **request(storm)) as answer:
        for delta in answer:
            print(delta.text, end="", flush=True)
    print()
    return answer


def describe(answer: Answer) -> str:
    """What answered and why, and how fast."""
    assert answer.started is not None
    assert answer.finished is not None
    figures = AnswerStatistics.of(answer.started, answer.finished)
    rows = {
        "model": figures.model,
        "backend": figures.backend,
        "why": figures.why,
        "prompt": f"{figures.prompt_tokens} tokens",
        "TTFT": _number(figures.time_to_first_token, "s"),
        "speed": _number(figures.tokens_per_second, "tokens/s"),
    }
    if figures.acceptance is not None:
        rows["drafts"] = f"{figures.acceptance:.0%} accepted"
    return "\n".join(f"{name + ':':<9}{value}" for name, value in rows.items())


def _number(value: float | None, unit: str) -> str:
    return "not known" if value is None else f"{value:.2f} {unit}"


def main() -> int:
    """Summarizes one storm. Returns 0, or 1 where the call failed."""
    parser = argparse.ArgumentParser(description="Folds a storm of alerts into one incident summary.")
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="HOST:PORT")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("storm", nargs="?", type=Path, default=STORM, help="JSON file of the alerts")
    arguments = parser.parse_args()
    storm = json.loads(arguments.storm.read_text(encoding="utf-8"))
    try:
        with Client(arguments.target) as client:
            answer = summarize(client, arguments.model, storm)
    except RouterCallError as error:
        print(f"\nno summary: {error}", file=sys.stderr)
        return 1
    print("\n" + describe(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
