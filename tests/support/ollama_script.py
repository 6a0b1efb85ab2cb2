"""What a double of an Ollama server has and says: its models, what goes wrong, and scripted answers. No HTTP here."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

Json = dict[str, Any]

WORDS = ["red", "blue", "green", "one", "two", "three", "sun", "moon", "sea", "hill"]
JSON = "application/json; charset=utf-8"
PLAIN_JSON = "application/json"


@dataclass
class Faults:
    """What goes wrong from now on; unset: nothing.

    Attributes:
        status: of every answer to a generation, with `error` as its text; `location` is sent along.
        die_after: words after which a generation breaks off as `how` says: "error" sends Ollama's error line, "reset"
            cuts the connection, "quiet" ends the body without `done`, "garbage" sends a line that is no JSON,
            "shape" one that is JSON but no piece, "endless" a line that has no end, "stall" nothing any more.
        slow: seconds before each word.
        load_seconds: that a model takes to load.
        prefill_seconds: that a prompt takes.
        silent: a generation is loaded and read, and never answered.
        other_model: answers name another model than the one that was asked.
        closed: new connections are refused; those that stand go on.
        hang: every request but this one gets no answer.
    """

    status: int | None = None
    error: str = ""
    location: str = ""
    die_after: int | None = None
    how: str = "error"
    slow: float = 0.0
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    silent: bool = False
    other_model: bool = False
    closed: bool = False
    hang: bool = False


@dataclass
class Model:
    """A model that the double has."""

    family: str = "llama"
    capabilities: tuple[str, ...] = ("completion",)
    context: int = 8192
    heads: int = 0
    digest: str = "9ae86aa772618312a203e6bc07e2b8d878054d9dbca32b664aeee0983486caaf"
    parameters: dict[str, Any] = field(default_factory=lambda: {"num_ctx": 2048, "num_thread": 1})
    stops: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")


MODELS = {
    "smol:latest": Model(),
    "thinker:8b": Model("qwen3", ("completion", "tools", "thinking"), 40960, digest="b" * 64),
    "drafter:latest": Model("qwen35", heads=1, digest="d" * 64),
}


class State:
    """Everything that requests share."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.requests: list[Json] = []
        self.left = 0  # clients that went before their answer ended
        self.running = 0
        self.loaded: dict[str, Json] = {}  # expires_at, context and runner options by tag
        self.loads = 0
        self.stage = ""  # of the latest generation
        self.one_at_a_time = threading.Lock()


class Refused(Exception):
    """An error answer."""

    def __init__(self, status: int, text: str, kind: str = JSON) -> None:
        super().__init__(text)
        self.status, self.text, self.kind = status, text, kind


def canonical(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


def stamp(moment: datetime | None = None) -> str:
    return (moment or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%S.%f") + "123Z"


def check(asked: Json, chat: bool) -> Model:
    if not asked.get("model"):
        raise Refused(400, "model is required")
    if " " in asked["model"]:
        raise Refused(400, "invalid model name")
    tag = canonical(asked["model"])
    if tag not in MODELS:
        raise Refused(404, f"model '{asked['model']}' not found")
    model = MODELS[tag]
    if not 0 <= asked.get("top_logprobs", 0) <= 20:
        raise Refused(400, "top_logprobs must be between 0 and 20")
    if asked.get("think") and "thinking" not in model.capabilities:
        raise Refused(400, f'"{asked["model"]}" does not support thinking')
    if asked.get("tools") and "tools" not in model.capabilities:
        raise Refused(400, f"registry.ollama.ai/library/{tag} does not support tools")
    for name in ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty"):
        if not isinstance((asked.get("options") or {}).get(name, 0.0), int | float):
            raise Refused(500, f'option "{name}" must be of type float32')
    rule = asked.get("format")
    if rule not in (None, "", "json") and not isinstance(rule, dict):
        shown = json.dumps(json.dumps(rule))
        text = f'invalid format: {shown}; expected "json" or a valid JSON Schema object'
        raise Refused(500, text, PLAIN_JSON if asked.get("stream", True) else JSON)
    return model


def prompt_tokens(asked: Json, chat: bool, context: int) -> int:
    text = " ".join(str(m.get("content")) for m in asked["messages"]) if chat else str(asked["prompt"])
    count = len(text.split())
    if count <= context:
        return count
    if chat:  # the oldest messages are dropped, and nobody is told
        return context
    inner = {
        "code": 400,
        "message": f"request ({count} tokens) exceeds the available context size ({context} tokens), try increasing it",
        "type": "exceed_context_size_error",
        "n_prompt_tokens": count,
        "n_ctx": context,
    }
    text = json.dumps({"error": inner}, separators=(",", ":"))
    raise Refused(400, text, PLAIN_JSON if asked.get("stream", True) else JSON)


@dataclass
class Reply:
    """One answer to a request, piece by piece."""

    state: State
    asked: Json
    chat: bool
    options: Json
    model: Model
    prompt: int  # tokens

    def pieces(self) -> Iterator[Json]:
        """Every line of the answer."""
        if self.chat and "thinking" in self.model.capabilities and self.asked.get("think") is not False:
            for word in ("Let ", "me ", "ponder."):
                part = self.piece("")
                part["message"]["thinking"] = word
                yield part | {"done": False}
        if self.chat and self.asked.get("tools") and self.asked["messages"][-1]["role"] != "tool":
            function = {"index": 0, "name": self.asked["tools"][0]["function"]["name"], "arguments": {"city": "Lisbon"}}
            part = self.piece("")
            part["message"]["tool_calls"] = [{"id": "call_0a1b2c3d", "function": function}]
            yield part | {"done": False}
            yield self.last("stop", 9)
            return
        limit = int(self.options.get("num_predict", -1))
        stops, text, count = self.options.get("stop") or list(self.model.stops), "", 0
        for word in self.words():
            if count == limit:
                yield self.last("length", count)
                return
            text, count = text + word, count + 1
            if any(stop in text for stop in stops):
                first = min(text.index(stop) for stop in stops if stop in text)
                kept = text[:first]
                yield self.piece(kept[len(text) - len(word) :]) | {"done": False}
                break
            yield self.piece(word) | {"done": False} | self.logprobs(word)
        yield self.last("stop", count)

    def words(self) -> Iterator[str]:
        """The reply, word by word."""
        rule = self.asked.get("format")
        if rule:
            sample = dict.fromkeys(rule.get("required", ()), "blue") if isinstance(rule, dict) else {"ok": True}
            yield from (f"{part} " for part in json.dumps(sample).split(" "))
            return
        said = (str(self.asked["messages"][-1]["content"]) if self.chat else str(self.asked["prompt"])).split()
        if float(self.options.get("temperature", 0.8)) > 0.0:
            draw = random.Random(self.options.get("seed"))
            while True:
                yield draw.choice(WORDS) + " "
        elif said[:1] == ["count"]:
            yield from (f"{number} " for number in itertools.count(1))
        else:
            yield from (f"{word} " for word in said)

    def piece(self, text: str) -> Json:
        name = "another:latest" if self.state.faults.other_model else self.asked["model"]
        shared = {"model": name, "created_at": stamp()}
        return shared | ({"message": {"role": "assistant", "content": text}} if self.chat else {"response": text})

    def logprobs(self, word: str) -> Json:
        if not self.asked.get("logprobs"):
            return {}
        entry: Json = {"token": word, "logprob": -0.25, "bytes": list(word.encode())}
        others = [{"token": w, "logprob": -2.0 - i, "bytes": list(w.encode())} for i, w in enumerate(WORDS)]
        if top := self.asked.get("top_logprobs"):
            return {"logprobs": [entry | {"top_logprobs": [dict(entry), *others][:top]}]}
        return {"logprobs": [entry]}

    def last(self, reason: str, count: int) -> Json:
        end = self.piece("") | {"done": True, "done_reason": reason}
        if not self.chat and not self.asked.get("raw"):
            end["context"] = [1, 2, 3]
        figures = {"prompt_eval_count": self.prompt, "prompt_eval_duration": 14_572_000}
        figures |= {"eval_count": count, "eval_duration": 172_857_000}
        return end | {"total_duration": 190_374_386, "load_duration": 682_190} | figures
