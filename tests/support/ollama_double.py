"""A stand-in for an Ollama server, for machines that have none: its HTTP, its error texts, and its failures on demand.

Run as a process of its own; it prints its address, then serves until it is killed. What it sends is held against a
recording of a real server (see tests/router/ollama/golden.json). Answers are scripted, see
ollama_script.py: a chat repeats the last message word by word, sampled text draws words by the seed.

`POST /double` is the double's own: its body sets what goes wrong (see `Faults`), its reply tells every request so far
and how many clients left before their answer ended.
"""

from __future__ import annotations

import itertools
import json
import socket
import sys
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.ollama_script import (
    JSON,
    MODELS,
    PLAIN_JSON,
    Faults,
    Json,
    Model,
    Refused,
    Reply,
    State,
    canonical,
    check,
    prompt_tokens,
    stamp,
)

NDJSON = "application/x-ndjson"
KEEP_ALIVE = 300.0
DETAILS = {"parent_model": "", "format": "gguf", "parameter_size": "134.52M", "quantization_level": "Q4_1"}


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
        model = check(asked, chat)
        if self.state.faults.status is not None:
            self.fail(stream)
            return
        tag, options = canonical(asked["model"]), {**model.parameters, **(asked.get("options") or {})}
        empty = not asked.get("messages") if chat else not asked.get("prompt")
        nothing = Reply(self.state, asked, chat, options, model, prompt=0).piece("")
        if empty and asked.get("keep_alive") == 0:
            self.state.loaded.pop(tag, None)
            self.send_json(nothing | {"done": True, "done_reason": "unload"})
            return
        self.load(tag, options, asked.get("keep_alive"))
        if empty:
            self.send_json(nothing | {"done": True, "done_reason": "load"})
            return
        prompt = prompt_tokens(asked, chat, int(options["num_ctx"]))
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
                self.speak(Reply(self.state, asked, chat, options, model, prompt), stream)
        finally:
            self.state.running -= 1

    def fail(self, stream: bool) -> None:
        faults = self.state.faults
        self.send_json({"error": faults.error}, faults.status or 500, PLAIN_JSON if stream else JSON)

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

    def speak(self, reply: Reply, stream: bool) -> None:
        pieces, started, chat = reply.pieces(), time.monotonic(), reply.chat
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
