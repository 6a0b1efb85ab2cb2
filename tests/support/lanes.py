"""One router over all four lanes, each with models that show what the lane can do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.gguf_files import THINKING_TEMPLATE, TOOL_TEMPLATE, Script, write_script_model
from support.llama_process import KEY, LlamaServer
from support.ollama_process import Double
from tokenizers import Tokenizer

from mlx_mtp_backend.synthetic import Recipe, write
from router.catalog import read_catalog
from router.client import Client
from router.lifecycle import Lifecycle
from router.server import RouterServer, build_backends
from router.settings import Settings

THOUGHT = ["<think>", "Let", " me", " ponder", "</think>", "\n", "The", " answer", " is", " 42", "."]
CALL = [
    "<tool_call>", "\n", '{"name": ', '"weather"', ', "arguments": ', '{"city": ', '"Lisbon"', "}}\n ", "</tool_call>",
]  # fmt: skip
# As templates of models that always begin in thought, unless they are told not to.
OPENS_A_THOUGHT = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)
CONTEXT, TOOL_CONTEXT = 256, 2048


@dataclass(frozen=True)
class Lane:
    """What to ask a lane.

    Attributes:
        name: of the lane, its backend, and the model that talks; `thinker` and `caller` think and call functions.
        prompt: text that a long answer follows; `question` is the same as a message's content.
        ids: tokens of `prompt`.
        ids_of: token ids of a text, where the lane takes any.
        sent: the sampler's values in the last request, where nothing but the wire can show them.
        brace: what has the lane begin a JSON object, where its model has no reason to.
    """

    name: str
    thinker: str
    caller: str
    prompt: str
    question: str
    ids: tuple[int, ...] = (1,)
    ids_of: Callable[[str], list[int]] = lambda text: list(text.encode())
    sent: Callable[[], Mapping[str, float]] | None = None
    brace: Mapping[int, float] = field(default_factory=dict)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Client, dict[str, Lane]]]:
    """A client of a router with every lane, and the lanes by name."""
    with ExitStack() as stack:
        double = Double()
        stack.callback(double.kill)
        lanes = {lane.name: lane for lane in (_mlx(folder), *_llamas(), _ollama(double))}
        _write_files(folder)
        contexts = {"talks": CONTEXT, "calls": TOOL_CONTEXT}
        servers = {name: LlamaServer(folder / f"{name}.gguf", context) for name, context in contexts.items()}
        for server in servers.values():
            stack.callback(server.kill)
        settings = Settings(
            backends={
                "mlx": {"allow_cpu": True, "prefill_chunk": 16},
                "llama_cpp": {"threads": 1, "batch_tokens": 64},
                "llama_server": {"kind": "llama_server", "url": servers["talks"].address, "api_key": KEY},
                "caller": {"kind": "llama_server", "url": servers["calls"].address, "api_key": KEY},
                "ollama": {"host": double.address},
            },
            models={
                "mlx": {"path": folder / "mlx", "context_length": CONTEXT},
                "mlx-thinker": {"path": folder / "thinks", "context_length": CONTEXT},
                "llama_cpp": {"path": folder / "talks.gguf", "context_length": CONTEXT},
                "llama_cpp-caller": {"path": folder / "calls.gguf", "context_length": TOOL_CONTEXT},
                "llama_server": {"llama_server": "talks", "backend": "llama_server"},
                "llama_server-caller": {"llama_server": "calls", "backend": "caller"},
                "ollama": {"ollama": "smol", "context_length": CONTEXT},
                "ollama-thinker": {"ollama": "thinker:8b", "context_length": CONTEXT},
            },
        )
        address = stack.enter_context(_running(settings, folder))
        yield stack.enter_context(closing(Client(address, retry=None, deadline=60.0))), lanes


def _mlx(folder: Path) -> Lane:
    write(folder / "mlx", Recipe(kind="pass-through", layers=2))
    write(folder / "thinks", Recipe(layers=2))
    (folder / "thinks" / "chat_template.jinja").write_text(OPENS_A_THOUGHT)
    tokenizer = Tokenizer.from_file(str(folder / "mlx" / "tokenizer.json"))

    def ids_of(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    prompt = "No data was lost."
    return Lane("mlx", "mlx-thinker", "mlx", prompt, prompt, tuple(ids_of(prompt)), ids_of)


def _llamas() -> tuple[Lane, Lane]:
    brace = {ord("{"): 60.0}
    names = ("llama_cpp", "llama_server")
    cpp, server = (Lane(name, name, f"{name}-caller", "L", "hi", (ord("L"),), brace=brace) for name in names)
    return cpp, server


def _ollama(double: Double) -> Lane:
    def sent() -> dict[str, float]:
        bodies = [request["body"] for request in double.tell()["requests"]]
        return dict([body for body in bodies if body and "options" in body][-1]["options"])

    return Lane("ollama", "ollama-thinker", "ollama-thinker", "count", "count", sent=sent)


def _write_files(folder: Path) -> None:
    """talks.gguf thinks before a chat's answer, counts after "L" and babbles after "S"; calls.gguf calls `weather`."""
    scripts = {"<|assistant|>": Script(THOUGHT), "L": Script([f" n{i}" for i in range(50)], repeat=True)}
    letters = "abcdef"
    choices = {"S": letters, **dict.fromkeys(letters, letters)}
    write_script_model(folder / "talks.gguf", scripts, choices=choices, template=THINKING_TEMPLATE)
    write_script_model(folder / "calls.gguf", {"<|assistant|>": Script(CALL)}, template=TOOL_TEMPLATE)


@contextmanager
def _running(settings: Settings, folder: Path) -> Iterator[str]:
    """A router in a thread of its own."""
    ready, ended, address = threading.Event(), asyncio.Event(), ""
    loop = asyncio.new_event_loop()

    async def run() -> None:
        nonlocal address
        server_settings = settings.server.model_copy(update={"listen": "127.0.0.1:0", "drain_grace": 0.0})
        catalog = await read_catalog(settings, folder / "none")
        backends = build_backends(settings, catalog, Lifecycle(settings.scheduler))
        server = RouterServer(server_settings, catalog, backends)
        await server.start()
        address = server.address
        ready.set()
        await ended.wait()
        await server.drain()

    def main() -> None:
        try:
            loop.run_until_complete(run())
        finally:
            loop.close()
            ready.set()

    thread = threading.Thread(target=main, name="router")
    thread.start()
    try:
        ready.wait()
        assert address, "the router did not start"
        yield address
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(ended.set)
        thread.join()
