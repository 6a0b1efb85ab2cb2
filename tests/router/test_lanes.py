"""docs/lanes.md, cell by cell: what each lane does with each feature of the contract, over gRPC and the real lanes.

Ollama alone is a double (see support/ollama_double.py). A probe asks for a feature and checks that it was honoured. It
returns what the table says of such a lane, None for "yes"; a refusal is told by its reason and by words of its message.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mtp_router.generate import v1
from support.lanes import CONTEXT, Lane, serving

from router.client import Client, RouterCallError

TABLE = Path(__file__).parents[2] / "docs" / "lanes.md"
WEATHER = {
    "name": "weather",
    "description": "Weather of a city",
    "parameters_json_schema": '{"type":"object","properties":{"city":{"type":"string"}}}',
}
COLOUR = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}

Router = tuple[Client, dict[str, Lane]]
Probe = Callable[["Asked"], str | None]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with serving(tmp_path_factory.mktemp("lanes")) as (client, lanes):
        yield client, lanes


class Asked:
    """A lane, and ways to ask it."""

    def __init__(self, client: Client, lane: Lane) -> None:
        self.client = client
        self.lane = lane

    def whole(self, **options: Any) -> v1.GenerateResponse:
        """A short answer, greedy and to the lane's prompt unless told otherwise."""
        prompts = ("messages", "prompt", "token_ids")
        prompt = {} if any(name in options for name in prompts) else {"prompt": self.lane.prompt}
        model = options.pop("model", self.lane.name)
        return self.client.generate(model, **{"temperature": 0.0, "max_output_tokens": 12, **prompt, **options})

    def text(self, **options: Any) -> str:
        return str(self.whole(**options).output.text)

    def chat(self, **options: Any) -> v1.GenerateResponse:
        return self.whole(messages=[{"role": "user", "content": self.lane.question}], **options)

    def active(self) -> int:
        return sum(backend.active_requests + backend.queued_requests for backend in self.client.list_backends())


PROBES: dict[str, Probe] = {}


def probe(feature: str) -> Callable[[Probe], Probe]:
    def named(function: Probe) -> Probe:
        PROBES[feature] = function
        return function

    return named


@probe("chat")
def _(asked: Asked) -> None:
    answer = asked.chat(max_output_tokens=60)
    assert answer.output.text.strip()
    assert answer.started.route.backend == asked.lane.name
    assert answer.finished.usage.prompt_tokens > 0


@probe("text")
def _(asked: Asked) -> None:
    answer = asked.whole()
    assert answer.output.text.strip()
    assert answer.finished.reason == v1.FINISH_REASON_MAX_TOKENS
    assert answer.finished.usage.output_tokens == 12


@probe("token ids")
def _(asked: Asked) -> None:
    assert asked.text(token_ids=asked.lane.ids) == asked.text()


@probe("stop sequences")
def _(asked: Asked) -> str | None:
    word = asked.text().split()[3]
    answer = asked.whole(stop=[word])
    assert asked.text().startswith(answer.output.text)
    assert answer.output.text.strip()
    assert word not in answer.output.text
    if answer.finished.reason == v1.FINISH_REASON_END_OF_GENERATION:
        return "yes, told as the model's own end"
    assert (answer.finished.reason, answer.finished.sequence) == (v1.FINISH_REASON_STOP_SEQUENCE, word)
    return None


@probe("stop token ids")
def _(asked: Asked) -> None:
    chosen = asked.lane.ids_of(asked.text())[4]
    answer = asked.whole(stop_token_ids=[chosen])
    assert asked.text().startswith(answer.output.text)
    assert (answer.finished.reason, answer.finished.token_id) == (v1.FINISH_REASON_STOP_TOKEN, chosen)


@probe("ignoring the model's end")
def _(asked: Asked) -> None:
    answer = asked.chat(ignore_end_of_generation=True, max_output_tokens=100)
    assert answer.finished.usage.output_tokens == 100
    assert answer.finished.reason == v1.FINISH_REASON_MAX_TOKENS


@probe("fewest tokens")
def _(asked: Asked) -> None:
    assert asked.chat(min_output_tokens=80, max_output_tokens=100).finished.usage.output_tokens >= 80


@probe("seed")
def _(asked: Asked) -> str:
    prompt = {} if asked.lane.ids_of is not Lane.ids_of or asked.lane.sent else {"prompt": "S"}
    options = {"temperature": 1.0, "max_output_tokens": 40, **prompt}
    first, again, other = (asked.whole(seed=seed, **options) for seed in (5, 5, 6))
    assert first.output.text == again.output.text != other.output.text
    assert first.finished.seed == 5
    return {v1.REPLAY_EXACT: "yes, exact", v1.REPLAY_BEST_EFFORT: "yes, best effort"}[first.finished.replay]


@probe("penalties")
def _(asked: Asked) -> None:
    prompt = {"prompt": "S"} if asked.lane.brace else {}
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        penalised = asked.text(**{name: 2.0, "max_output_tokens": 60, **prompt})
        if asked.lane.sent is not None:
            assert asked.lane.sent()[name.replace("repetition", "repeat")] == 2.0
        else:
            assert penalised != asked.text(max_output_tokens=60, **prompt)


@probe("logit bias")
def _(asked: Asked) -> None:
    forced = asked.lane.ids_of("e")[0]
    assert set(asked.text(logit_bias={forced: 100.0})) == {"e"}


@probe("log-probabilities")
def _(asked: Asked) -> str | None:
    answer = asked.whole(top_logprobs=2)
    entries = answer.output.logprobs
    assert len(entries) == answer.finished.usage.output_tokens == 12
    assert b"".join(entry.token_bytes for entry in entries).decode() == answer.output.text
    assert all(entry.logprob <= 0.0 and len(entry.top_logprobs) == 2 for entry in entries)
    return None if entries[0].HasField("token_id") else "yes, without token ids"


@probe("JSON Schema")
def _(asked: Asked) -> None:
    answer = asked.chat(json_schema=COLOUR, max_output_tokens=200, **_unthinking(asked))
    assert json.loads(answer.output.text)["colour"] in ("red", "blue")


@probe("JSON object")
def _(asked: Asked) -> None:
    bias = {"logit_bias": asked.lane.brace} if asked.lane.brace else {}
    answer = asked.chat(json_object=True, **bias, **_unthinking(asked))
    assert re.match(r"\s*\{[^{]", answer.output.text)


@probe("regular expression")
def _(asked: Asked) -> None:
    assert re.fullmatch(r"[0-9]{3}", asked.chat(regex="[0-9]{3}").output.text)


@probe("grammar")
def _(asked: Asked) -> None:
    assert asked.chat(grammar='start: "red" | "blue"').output.text in ("red", "blue")


@probe("tools")
def _(asked: Asked) -> None:
    answer = asked.chat(model=asked.lane.caller, tools=[WEATHER], max_output_tokens=60)
    (call,) = answer.output.tool_calls
    assert (call.name, json.loads(call.arguments_json)) == ("weather", {"city": "Lisbon"})
    assert answer.finished.reason == v1.FINISH_REASON_TOOL_CALLS


@probe("reasoning, on and off")
def _(asked: Asked) -> None:
    thinking = asked.chat(model=asked.lane.thinker, reasoning="on", max_output_tokens=60)
    silent = asked.chat(model=asked.lane.thinker, reasoning="off", max_output_tokens=60)
    assert thinking.output.reasoning_text.strip()
    assert not silent.output.reasoning_text
    assert silent.output.text.strip()


@probe("thinking budget")
def _(asked: Asked) -> None:
    answer = asked.chat(model=asked.lane.thinker, reasoning="on", reasoning_budget_tokens=1, max_output_tokens=60)
    assert answer.finished.usage.reasoning_tokens <= 1


@probe("cancel")
def _(asked: Asked) -> None:
    before = asked.text()
    answer = asked.client.stream(
        asked.lane.name, prompt=asked.lane.prompt, temperature=0.0, max_output_tokens=200, ignore_end_of_generation=None
    )
    next(answer)
    answer.close()
    until = time.monotonic() + 30
    while asked.active():
        assert time.monotonic() < until, "the request goes on"
        time.sleep(0.01)
    assert asked.text() == before


@probe("token count")
def _(asked: Asked) -> None:
    messages = [{"role": "user", "content": asked.lane.question}]
    count = asked.client.count_tokens(asked.lane.name, messages=messages)
    assert count.prompt_tokens == asked.chat().finished.usage.prompt_tokens
    assert count.context_length == CONTEXT


@probe("over-long text")
def _(asked: Asked) -> None:
    asked.text(prompt="a b " * CONTEXT)


@probe("over-long chat")
def _(asked: Asked) -> str:
    answer = asked.whole(messages=[{"role": "user", "content": "a b " * CONTEXT}])
    assert answer.finished.usage.prompt_tokens <= CONTEXT
    assert "drops the oldest messages" in answer.started.route.reason
    return "cut by the server; the route says so"


def _unthinking(asked: Asked) -> dict[str, Any]:
    """Switches thinking off where the lane's model thinks: rules bind the answer alone."""
    return {"reasoning": "off"} if asked.lane.brace else {}


def read_table() -> dict[tuple[str, str], str]:
    """Cells by lane and feature."""
    rows = [line.strip("|").split("|") for line in TABLE.read_text().splitlines() if line.startswith("|")]
    lanes = [cell.strip().strip("`") for cell in rows[0][1:]]
    return {(lane, row[0].strip()): cell.strip() for row in rows[2:] for lane, cell in zip(lanes, row[1:], strict=True)}


def test_the_table_is_whole(router: Router) -> None:
    cells = read_table()
    assert set(cells) == {(lane, feature) for lane in router[1] for feature in PROBES}


@pytest.mark.parametrize("feature", PROBES)
@pytest.mark.parametrize("name", ["mlx", "llama_cpp", "llama_server", "ollama"])
def test_cell(router: Router, name: str, feature: str) -> None:
    client, lanes = router
    cell = read_table()[name, feature]
    try:
        found = PROBES[feature](Asked(client, lanes[name])) or "yes"
    except RouterCallError as error:
        found = f"refused: `{error.reason}`"
        told = error
    kind, _, words = cell.partition(", ") if cell.startswith("refused") else (cell, "", "")
    assert found == kind
    if words:  # what the table says beside the reason is told to the caller
        assert words in told.message
    if "PROMPT_TOO_LONG" in kind:
        assert int(told.metadata["prompt_tokens"]) > int(told.metadata["context_length"]) == CONTEXT
