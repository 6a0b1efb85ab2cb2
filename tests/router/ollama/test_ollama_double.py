"""The double against a recording of a real server: same statuses, content types, keys, order of keys and types."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.ollama_process import Double

GOLDEN: list[dict[str, Any]] = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
FREE = {"model_info", "details"}  # as many keys as the model has; the double's must be among the recording's


@pytest.fixture(scope="module")
def answers() -> dict[str, httpx.Response]:
    """The recording's requests in its order, put to one double: the later ones see what the earlier ones loaded."""
    double = Double()
    try:
        with httpx.Client(base_url=double.address, trust_env=False) as client:
            return {
                item["name"]: client.request(
                    item["method"], item["path"], content=None if item["body"] is None else json.dumps(item["body"])
                )
                for item in GOLDEN
            }
    finally:
        double.kill()


@pytest.mark.parametrize("item", GOLDEN, ids=lambda item: item["name"])
def test_it_answers_as_the_recorded_server(item: dict[str, Any], answers: dict[str, httpx.Response]) -> None:
    answer = answers[item["name"]]
    assert (answer.status_code, answer.headers["content-type"]) == (item["status"], item["type"])
    if item["type"].startswith("text/plain"):
        assert answer.text == item["lines"][0]
        return
    sent = [json.loads(line) for line in answer.text.splitlines()]
    if item["type"] == "application/x-ndjson":
        assert answer.headers["transfer-encoding"] == "chunked"
        sent = [sent[0], sent[-1]]
    for mine, real in zip(sent, item["lines"], strict=True):
        if item["status"] != 200:
            # Errors are read by their text, so it must be the real one, but for numbers.
            assert list(mine) == list(real)
            assert re.sub(r"\d+", "N", mine["error"]) == re.sub(r"\d+", "N", real["error"])
        else:
            _alike(mine, real, item["name"])


def test_it_tells_an_over_long_prompt_as_the_real_server_does(answers: dict[str, httpx.Response]) -> None:
    inner = json.loads(answers["over-long raw prompt"].json()["error"])["error"]
    assert (inner["type"], inner["n_prompt_tokens"], inner["n_ctx"]) == ("exceed_context_size_error", 5001, 2048)


def _alike(mine: Any, real: Any, where: str) -> None:
    if isinstance(real, dict):
        assert isinstance(mine, dict), where
        if where.rpartition(".")[2] in FREE:
            assert set(mine) <= set(real), where
        else:
            # The recording of /api/show ends within `tensors`.
            own = list(mine)[: len(real)] if where == "show" else list(mine)
            assert own == list(real), where
        for key in set(mine) & set(real):
            _alike(mine[key], real[key], f"{where}.{key}")
    elif isinstance(real, list):
        assert isinstance(mine, list), where
        assert bool(mine) == bool(real), where
        for item in mine:
            _alike(item, real[0], where)
    elif isinstance(real, bool) or real is None or isinstance(real, str):
        assert type(mine) is type(real), where
    else:
        assert isinstance(mine, int | float), where
