"""The MLX lane's sampling fields, formats and log-probabilities over real gRPC: each does something, or is refused."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from mtp_router.generate import v1

from mlx_mtp_backend.synthetic import Recipe, write
from mlx_mtp_backend.synthetic.text import CHAT_TEMPLATE
from router.backends.mlx import MlxBackend
from router.catalog import read_catalog
from router.client import AsyncClient, RouterCallError
from router.server import RouterServer
from router.settings import MlxSettings, ModelSettings, ServerSettings, Settings

END = 2
pytestmark = pytest.mark.asyncio(loop_scope="module")
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"enum": ["ab", "cd"]}},
    "required": ["n", "s"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder / "random", Recipe(kind="history", layers=2))
    thinker = write(folder / "thinker", Recipe(kind="history", layers=2))
    settings = json.loads((thinker / "tokenizer_config.json").read_text())
    opened = CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n").replace("<think>\n\n</think>", "</think>")
    (thinker / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": opened}))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(checkpoints: Path) -> AsyncIterator[AsyncClient]:
    models = {name: ModelSettings(path=checkpoints / name, draft_depth=2) for name in ("random", "thinker")}
    backend = MlxBackend("mlx", MlxSettings(allow_cpu=True, parallel=2, prefill_chunk=16, wiring_check="off"))
    catalog = await read_catalog(Settings(models=models), checkpoints / "none")
    server = RouterServer(ServerSettings(listen="127.0.0.1:0", drain_grace=0.0), catalog, {"mlx": backend})
    await server.start()
    async with AsyncClient(server.address, retry=None) as connected:
        yield connected
    await server.drain()


@dataclass(frozen=True)
class Said:
    text: str
    reasoning_text: str
    logprobs: list[v1.TokenLogprob]
    finished: v1.GenerationFinished


async def ask(client: AsyncClient, model: str = "random", **options: Any) -> Said:
    given = {"prompt": "Once upon a time", "max_output_tokens": 16, "seed": 3, "temperature": 0.9, **options}
    answer = client.stream(model, **given)
    deltas = [delta async for delta in answer]
    for delta in deltas:
        assert len(delta.logprobs) == (delta.token_count if "top_logprobs" in options else 0)
    return Said(
        "".join(delta.text for delta in deltas),
        "".join(delta.reasoning_text for delta in deltas),
        [entry for delta in deltas for entry in delta.logprobs],
        answer.finished,
    )


async def refusal(client: AsyncClient, **options: Any) -> RouterCallError:
    with pytest.raises(RouterCallError) as caught:
        await ask(client, **options)
    return caught.value


async def test_every_field_of_the_lane_does_something(client: AsyncClient) -> None:
    free = {"ignore_end_of_generation": True}
    plain = await ask(client, **free)
    tokens = [entry.token_id for entry in (await ask(client, **free, top_logprobs=0)).logprobs]

    async def same(**options: Any) -> bool:
        return (await ask(client, **{**free, **options})).text == plain.text

    ending = {"logit_bias": {END: 100.0}}
    binding = {"max_output_tokens": 200, "temperature": 1.0}
    does = {
        "sampling.repetition_penalty": not await same(repetition_penalty=0.01),
        "sampling.presence_penalty": not await same(presence_penalty=-10.0),
        "sampling.frequency_penalty": not await same(frequency_penalty=-10.0),
        "sampling.logit_bias": (await ask(client, **free, logit_bias={40: 100.0})).text
        == (await ids(client, [40])) * 16,
        "stop.token_ids": (await ask(client, **free, stop_token_ids=[tokens[5]])).finished.token_id == tokens[5],
        "stop.ignore_end_of_generation": (await ask(client, **free, **ending)).finished.usage.output_tokens == 16,
        "stop.min_output_tokens": (await ask(client, **ending, min_output_tokens=5)).finished.usage.output_tokens == 5,
        "response_format.json_schema": json.loads((await ask(client, **binding, json_schema=SCHEMA)).text).keys()
        == {"n", "s"},
        "response_format.json_object": isinstance(json.loads(await an_object(client)), dict),
        "response_format.regex": (await ask(client, **binding, regex="yes|no")).text in ("yes", "no"),
        "response_format.grammar": (await ask(client, **binding, grammar='start: "x" ("+" "x")~2')).text == "x+x+x",
        "reasoning.mode": await switches(client),
        "logprobs": len(tokens) == 16,
    }
    assert does.keys() == MlxBackend.fields
    assert [field for field, did in does.items() if not did] == []
    assert await same()


async def ids(client: AsyncClient, tokens: list[int]) -> str:
    """The text of these tokens, as the model says them."""
    bias = {"logit_bias": {tokens[0]: 100.0}, "ignore_end_of_generation": True}
    return str((await ask(client, **bias, max_output_tokens=len(tokens))).text)


async def an_object(client: AsyncClient) -> str:
    """A bias towards the closing brace ends it soon."""
    return str(
        (await ask(client, json_object=True, max_output_tokens=400, temperature=0.0, logit_bias={95: 50.0})).text
    )


async def switches(client: AsyncClient) -> bool:
    messages = [{"role": "user", "content": "Hi"}]
    answers = [await ask(client, "thinker", prompt=None, messages=messages, reasoning=mode) for mode in ("on", "off")]
    return bool(answers[0].reasoning_text and not answers[1].reasoning_text)


async def test_a_format_replays_drafted_or_not(client: AsyncClient) -> None:
    options = {"json_schema": SCHEMA, "max_output_tokens": 200, "repetition_penalty": 1.1, "top_logprobs": 2}
    drafted, plain = (await ask(client, **options, draft_depth=3), await ask(client, **options, speculation="off"))
    assert drafted.finished.speculation.drafted_tokens > 0 == plain.finished.speculation.drafted_tokens
    assert drafted.finished.replay == 1  # REPLAY_EXACT
    assert drafted.text == plain.text
    assert [entry.logprob for entry in drafted.logprobs] == [entry.logprob for entry in plain.logprobs]


async def test_logprobs_are_told_with_their_bytes(client: AsyncClient) -> None:
    answer = await ask(client, top_logprobs=3, ignore_end_of_generation=True)
    assert len(answer.logprobs) == 16
    assert (
        b"".join(entry.token_bytes for entry in answer.logprobs).decode(errors="replace").startswith(answer.text[:-1])
    )
    for entry in answer.logprobs:
        assert len(entry.top_logprobs) == 3
        assert sum(math.exp(other.logprob) for other in entry.top_logprobs) < 1
        assert entry.top_logprobs[0].logprob >= entry.logprob


async def test_a_format_binds_the_answer_and_not_the_thought(client: AsyncClient) -> None:
    close = {"logit_bias": {680: 6.0}}  # </think>, the last token of the vocabulary
    messages = {"prompt": None, "messages": [{"role": "user", "content": "Hi"}], "max_output_tokens": 300}
    answer = await ask(client, "thinker", **messages, **close, regex="yes|no")
    assert answer.text in ("yes", "no")
    assert len(answer.reasoning_text) > 3
    at_once = await ask(client, "thinker", **messages, reasoning="off", regex="yes|no")
    assert (at_once.text in ("yes", "no"), at_once.reasoning_text) == (True, "")
    # The other model's template leaves it to the model to open a thought: in a format it could not.
    refused = await refusal(client, **messages, reasoning="on", regex="yes|no")
    assert (refused.reason, refused.metadata["capability"]) == ("CAPABILITY_UNAVAILABLE", "REASONING")


@pytest.mark.parametrize(
    ("options", "field", "says"),
    [
        ({"json_schema": {"type": "object", "not": {}}}, "response_format.json_schema", "'not'"),
        ({"regex": "(?=a)b"}, "response_format.regex", "look-around"),
        ({"grammar": "start: missing"}, "response_format.grammar", "not a grammar"),
        ({"regex": "a", "ignore_end_of_generation": True}, "stop.ignore_end_of_generation", "end"),
        ({"logit_bias": {100_000: 1.0}}, "sampling.logit_bias", "vocabulary"),
        ({"stop_token_ids": [100_000]}, "stop.token_ids", "vocabulary"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    client: AsyncClient, options: dict[str, Any], field: str, says: str
) -> None:
    refused = await refusal(client, **options)
    assert refused.reason == "INVALID_REQUEST"
    assert [(violation.field, says in violation.description) for violation in refused.violations] == [(field, True)]


async def test_what_the_lane_does_not_do_is_refused(client: AsyncClient) -> None:
    for options, field in (
        ({"reasoning_budget_tokens": 5}, "reasoning.budget_tokens"),
        ({"tools": [{"name": "f"}]}, "tools"),
    ):
        refused = await refusal(client, **options)
        assert (refused.reason, refused.metadata["field"]) == ("FIELD_NOT_IMPLEMENTED", field)
