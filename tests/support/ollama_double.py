"""A stand-in for an Ollama server, for machines that have none: its HTTP, its error texts, and its failures on demand.

Run as a process of its own; it prints its address, then serves until it is killed. What it sends is held against a
recording of a real server (see tests/router/ollama/golden.json). Answers are scripted: a chat repeats the last
message word by word, sampled text draws words by the seed.

`POST /double` is the double's own: its body sets what goes wrong (see `Faults`), its reply tells every request so far
and how many clients left before their answer ended.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]

WORDS = ["red", "blue", "green", "one", "two", "three", "sun", "moon", "sea", "hill"]
JSON = "application/json; charset=utf-8"
PLAIN_JSON = "application/json"
NDJSON = "application/x-ndjson"
KEEP_ALIVE = 300.0
DETAILS = {"parent_model": "", "format": "gguf", "parameter_size": "134.52M", "quantization_level": "Q4_1"}


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


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    state: State
    server: ThreadingHTTPServer

    def log_message(self, *_: Any) -> None: ...

    # -- plumbing

    def send(self, status: int, kind: str | None, body: bytes) -> None:
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", kind)
        if self.state.faults.location and 300 <= status < 400:
            self.send_header("Location", self.state.faults.location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_json(self, value: Any, status: int = 200, kind: str = JSON) -> None:
        self.send(status, kind, json.dumps(value, separators=(",", ":")).encode())

    def line(self, value: Any) -> None:
        text = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
        self.wfile.flush()

    def body(self) -> Json:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not raw:
            raise Refused(400, "missing request body")
        try:
            value = json.loads(raw)
        except ValueError:
            raise Refused(400, "invalid character 'b' looking for beginning of object key string") from None
        if not isinstance(value.get("model", ""), str):
            raise Refused(400, "json: cannot unmarshal number into Go struct field ChatRequest.model of type string")
        self.state.requests.append({"path": self.path, "body": value})
        return value

    # -- routes

    def do_GET(self) -> None:
        self.respond({"/": "root", "/api/version": "version", "/api/tags": "tags", "/api/ps": "ps"})

    def do_HEAD(self) -> None:
        self.send(200 if self.path == "/" else 404, "text/plain; charset=utf-8", b"")

    def do_POST(self) -> None:
        self.respond({"/api/chat": "chat", "/api/generate": "generate", "/api/show": "show", "/double": "double"})

    def respond(self, routes: dict[str, str]) -> None:
        known = ("/", "/api/version", "/api/tags", "/api/ps", "/api/chat", "/api/generate", "/api/show", "/double")
        if self.state.faults.hang and self.path != "/double":
            time.sleep(3600)
        if self.path not in routes:
            status, text = (405, b"405 method not allowed") if self.path in known else (404, b"404 page not found")
            self.send(status, "text/plain", text)
            return
        try:
            getattr(self, routes[self.path])()
        except Refused as refusal:
            self.send_json({"error": refusal.text}, refusal.status, refusal.kind)
        except (BrokenPipeError, ConnectionResetError):
            self.state.left += 1
            self.close_connection = True

    def root(self) -> None:
        self.send(200, "text/plain; charset=utf-8", b"Ollama is running")

    def version(self) -> None:
        self.send_json({"version": "0.33.0-rc2"})

    def double(self) -> None:
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "faults" in wanted:
            self.state.faults = Faults(**wanted["faults"])
            if self.state.faults.closed:
                threading.Thread(target=self.close_door).start()
        if "stage" in wanted:
            self.state.stage = wanted["stage"]
        if "digest" in wanted:
            MODELS.setdefault(wanted["tag"], Model()).digest = wanted["digest"]
        if "capabilities" in wanted:
            MODELS[wanted["tag"]].capabilities = tuple(wanted["capabilities"])
        shown = {name: getattr(self.state, name) for name in ("requests", "left", "running", "loads", "stage")}
        self.send_json({**shown, "faults": asdict(self.state.faults)})

    def close_door(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def tags(self) -> None:
        listed = [
            {
                "name": tag,
                "model": tag,
                "modified_at": stamp(),
                "size": 98362775,
                "digest": model.digest,
                "details": {
                    **self.details(model),
                    "context_length": model.context,
                    "embedding_length": 576,
                },
                "capabilities": list(model.capabilities),
            }
            for tag, model in MODELS.items()
        ]
        self.send_json({"models": listed})

    def details(self, model: Model) -> Json:
        shared = dict(itertools.islice(DETAILS.items(), 2)) | {"family": model.family, "families": [model.family]}
        return shared | dict(itertools.islice(DETAILS.items(), 2, None))

    def ps(self) -> None:
        now = datetime.now(UTC)
        for tag in [tag for tag, held in self.state.loaded.items() if held["expires"] < now]:
            del self.state.loaded[tag]
        held = [
            {
                "name": tag,
                "model": tag,
                "size": 161407302,
                "digest": MODELS[tag].digest,
                "details": self.details(MODELS[tag]),
                "expires_at": stamp(held["expires"]),
                "size_vram": 0,
                "context_length": held["options"]["num_ctx"],
            }
            for tag, held in self.state.loaded.items()
        ]
        self.send_json({"models": held})

    def show(self) -> None:
        asked = self.body().get("model", "")
        tag = canonical(asked)
        if tag not in MODELS:
            raise Refused(404, f"model '{tag}' not found")
        model = MODELS[tag]
        info = {
            "general.architecture": model.family,
            "general.parameter_count": 134515008,
            f"{model.family}.attention.head_count": 9,
            f"{model.family}.attention.head_count_kv": 3,
            f"{model.family}.block_count": 30,
            f"{model.family}.context_length": model.context,
            f"{model.family}.embedding_length": 576,
            "tokenizer.ggml.tokens": None,
        }
        if model.heads:
            info[f"{model.family}.nextn_predict_layers"] = model.heads
        lines = [f"{'stop':<31}{json.dumps(stop)}" for stop in model.stops]
        lines += [f"{name:<31}{value}" for name, value in model.parameters.items()]
        shown = {
            "modelfile": '# Modelfile generated by "ollama show"\n',
            "parameters": "\n".join(lines),
            "template": "{{- range .Messages }}{{ .Content }}{{ end }}",
            "details": self.details(model),
            "model_info": info,
            "tensors": [{"name": "output_norm.weight", "type": "F32", "shape": [576]}],
            "capabilities": list(model.capabilities),
            "modified_at": stamp(),
        }
        self.send_json(shown)

    # -- generation

    def chat(self) -> None:
        asked = self.body()
        self.answer(asked, chat=True)

    def generate(self) -> None:
        self.answer(self.body(), chat=False)

    def answer(self, asked: Json, *, chat: bool) -> None:
        stream = asked.get("stream", True)
        model = self.check(asked, chat)
        if self.state.faults.status is not None:
            self.fail(stream)
            return
        tag, options = canonical(asked["model"]), {**model.parameters, **(asked.get("options") or {})}
        empty = not asked.get("messages") if chat else not asked.get("prompt")
        if empty and asked.get("keep_alive") == 0:
            self.state.loaded.pop(tag, None)
            self.send_json(self.piece(asked, chat, "") | {"done": True, "done_reason": "unload"})
            return
        self.load(tag, options, asked.get("keep_alive"))
        if empty:
            self.send_json(self.piece(asked, chat, "") | {"done": True, "done_reason": "load"})
            return
        prompt = self.prompt_tokens(asked, chat, int(options["num_ctx"]))
        self.state.running += 1
        try:
            with self.state.one_at_a_time:
                self.state.stage = "prefill"
                time.sleep(self.state.faults.prefill_seconds)
                if self.state.faults.status is not None:  # it came up meanwhile
                    self.fail(stream)
                    return
                while self.state.faults.silent:
                    time.sleep(0.02)
                    self.notice_departure()
                self.speak(asked, chat, options, model, prompt, stream)
        finally:
            self.state.running -= 1

    def fail(self, stream: bool) -> None:
        faults = self.state.faults
        self.send_json({"error": faults.error}, faults.status or 500, PLAIN_JSON if stream else JSON)

    def check(self, asked: Json, chat: bool) -> Model:
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

    def load(self, tag: str, options: Json, keep_alive: Any) -> None:
        runner = {name: options.get(name) for name in ("num_ctx", "draft_num_predict")}
        held = self.state.loaded.get(tag)
        if held is None or held["options"] != runner:
            self.state.stage = "load"
            time.sleep(self.state.faults.load_seconds)
            self.state.loads += 1
        if isinstance(keep_alive, str):
            units = {"s": 1, "m": 60, "h": 3600}
            if keep_alive[-1:] not in units or not keep_alive[:-1].replace(".", "").isdigit():
                raise Refused(400, f'time: invalid duration "{keep_alive}"')
            keep_alive = float(keep_alive[:-1]) * units[keep_alive[-1]]
        seconds = KEEP_ALIVE if keep_alive is None else keep_alive
        stay = timedelta(days=292 * 365) if seconds < 0 else timedelta(seconds=seconds)
        self.state.loaded[tag] = {"expires": datetime.now(UTC) + stay, "options": runner}

    def prompt_tokens(self, asked: Json, chat: bool, context: int) -> int:
        text = " ".join(str(m.get("content")) for m in asked["messages"]) if chat else str(asked["prompt"])
        count = len(text.split())
        if count <= context:
            return count
        if chat:  # the oldest messages are dropped, and nobody is told
            return context
        inner = {
            "code": 400,
            "message": f"request ({count} tokens) exceeds the available context size ({context} tokens), "
            "try increasing it",
            "type": "exceed_context_size_error",
            "n_prompt_tokens": count,
            "n_ctx": context,
        }
        text = json.dumps({"error": inner}, separators=(",", ":"))
        raise Refused(400, text, PLAIN_JSON if asked.get("stream", True) else JSON)

    def words(self, asked: Json, chat: bool, options: Json) -> Iterator[str]:
        """The reply, word by word."""
        rule = asked.get("format")
        if rule:
            sample = dict.fromkeys(rule.get("required", ()), "blue") if isinstance(rule, dict) else {"ok": True}
            yield from (f"{part} " for part in json.dumps(sample).split(" "))
            return
        said = (str(asked["messages"][-1]["content"]) if chat else str(asked["prompt"])).split()
        if float(options.get("temperature", 0.8)) > 0.0:
            draw = random.Random(options.get("seed"))
            while True:
                yield draw.choice(WORDS) + " "
        elif said[:1] == ["count"]:
            yield from (f"{number} " for number in itertools.count(1))
        else:
            yield from (f"{word} " for word in said)

    def piece(self, asked: Json, chat: bool, text: str) -> Json:
        name = "another:latest" if self.state.faults.other_model else asked["model"]
        shared = {"model": name, "created_at": stamp()}
        return shared | ({"message": {"role": "assistant", "content": text}} if chat else {"response": text})

    def speak(self, asked: Json, chat: bool, options: Json, model: Model, prompt: int, stream: bool) -> None:
        pieces, started = self.pieces(asked, chat, options, model, prompt), time.monotonic()
        if not stream:
            parts = list(pieces)
            text = "".join(part["message"]["content"] if chat else part["response"] for part in parts[:-1])
            last = parts[-1]
            if chat:
                last["message"]["content"] = text
            else:
                last["response"] = text
            self.send_json(last)
            return
        begun = False
        for sent, part in enumerate(pieces):
            faults = self.state.faults
            if faults.die_after is not None and faults.die_after <= sent:
                self.break_off(faults.how, begun)
                return
            if faults.slow:
                time.sleep(faults.slow)
                self.notice_departure()
            if not begun:
                self.begin()
                begun = True
                self.state.stage = "decode"
            part["total_duration"] = round((time.monotonic() - started) * 1e9) if part["done"] else None
            self.line({key: value for key, value in part.items() if value is not None})
        self.wfile.write(b"0\r\n\r\n")

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", NDJSON)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def notice_departure(self) -> None:
        """A closed connection is seen before the next write, as Go's server sees it."""
        self.connection.setblocking(False)
        try:
            if self.connection.recv(1, socket.MSG_PEEK) == b"":
                raise BrokenPipeError
        except BlockingIOError:
            pass
        finally:
            self.connection.setblocking(True)

    def break_off(self, how: str, begun: bool) -> None:
        if not begun:
            self.begin()
        self.close_connection = True
        match how:
            case "error":
                text = "an error was encountered while running the model: unexpected EOF"
                self.line({"error": text})
                self.wfile.write(b"0\r\n\r\n")
            case "reset":
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()
            case "quiet":
                self.wfile.write(b"0\r\n\r\n")
            case "garbage":
                self.line(b"}{ this is no JSON\n")
            case "shape":
                self.line([1, 2, 3])
            case "endless":
                while True:
                    self.line(b"x" * 65536)
            case "stall":
                while True:
                    time.sleep(0.05)
                    self.notice_departure()

    def pieces(self, asked: Json, chat: bool, options: Json, model: Model, prompt: int) -> Iterator[Json]:
        """Every line of the answer."""
        if chat and "thinking" in model.capabilities and asked.get("think") is not False:
            for word in ("Let ", "me ", "ponder."):
                part = self.piece(asked, chat, "")
                part["message"]["thinking"] = word
                yield part | {"done": False}
        if chat and asked.get("tools") and asked["messages"][-1]["role"] != "tool":
            function = {"index": 0, "name": asked["tools"][0]["function"]["name"], "arguments": {"city": "Lisbon"}}
            part = self.piece(asked, chat, "")
            part["message"]["tool_calls"] = [{"id": "call_0a1b2c3d", "function": function}]
            yield part | {"done": False}
            yield self.last(asked, chat, "stop", prompt, 9)
            return
        limit = int(options.get("num_predict", -1))
        stops, text, count = options.get("stop") or list(model.stops), "", 0
        for word in self.words(asked, chat, options):
            if count == limit:
                yield self.last(asked, chat, "length", prompt, count)
                return
            text, count = text + word, count + 1
            if any(stop in text for stop in stops):
                first = min(text.index(stop) for stop in stops if stop in text)
                kept = text[:first]
                yield self.piece(asked, chat, kept[len(text) - len(word) :]) | {"done": False}
                break
            yield self.piece(asked, chat, word) | {"done": False} | self.logprobs(asked, word)
        yield self.last(asked, chat, "stop", prompt, count)

    def logprobs(self, asked: Json, word: str) -> Json:
        if not asked.get("logprobs"):
            return {}
        entry: Json = {"token": word, "logprob": -0.25, "bytes": list(word.encode())}
        others = [{"token": w, "logprob": -2.0 - i, "bytes": list(w.encode())} for i, w in enumerate(WORDS)]
        if top := asked.get("top_logprobs"):
            return {"logprobs": [entry | {"top_logprobs": [dict(entry), *others][:top]}]}
        return {"logprobs": [entry]}

    def last(self, asked: Json, chat: bool, reason: str, prompt: int, count: int) -> Json:
        end = self.piece(asked, chat, "") | {"done": True, "done_reason": reason}
        if not chat and not asked.get("raw"):
            end["context"] = [1, 2, 3]
        figures = {"prompt_eval_count": prompt, "prompt_eval_duration": 14_572_000}
        figures |= {"eval_count": count, "eval_duration": 172_857_000}
        return end | {"total_duration": 190_374_386, "load_duration": 682_190} | figures


class Server(ThreadingHTTPServer):
    """One thread a connection; it says nothing of clients that went away."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None: ...


def main() -> None:
    Handler.state = State()
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    server = Server(("127.0.0.1", port), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
    while True:  # what goes on after the door was closed
        time.sleep(60)


if __name__ == "__main__":
    main()
