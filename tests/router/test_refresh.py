"""Refreshing: models come, go and change while the server runs, and nobody's answer suffers."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mtp_router.generate import v1
from support.gguf_files import Script, write_script_model
from support.ollama_process import Double
from support.scripted import FINISHED, ScriptedBackend, catalog, entry, facts

from mlx_mtp_backend.synthetic import Recipe, write
from router.catalog import Catalog, ModelEntry, read_catalog
from router.client import AsyncClient, Client, ModelNotFoundError, RouterCallError
from router.dispatch import Dispatcher
from router.domain import (
    BackendKind,
    Capability,
    CapabilityFact,
    GenerationRequest,
    ModelFormat,
    ModelState,
    RouterError,
    Started,
    TextPrompt,
)
from router.lifecycle import Lifecycle
from router.refresh import Reader, Refreshed, refresh
from router.server import RouterServer, build_backends
from router.settings import Settings, load_settings

# --------------------------------------------------------------------------------------------------------------------
# One catalog after another


def dispatcher(*entries: ModelEntry, script: Any = None) -> tuple[Dispatcher, ScriptedBackend]:
    backend = ScriptedBackend(script) if script else ScriptedBackend()
    return Dispatcher(Catalog(entries), {"scripted": backend}), backend


HEAD = {item: CapabilityFact(True, "test") for item in Capability}


def rewritten(name: str) -> ModelEntry:
    """The model with other files."""
    return entry(name, model_facts=facts(stamp=((f"{name}.gguf", 1, 1),)))


async def test_models_come_go_and_change() -> None:
    router, backend = dispatcher(entry("same"), entry("goes"), entry("other"))
    done = await refresh(router, catalog(entry("same"), entry("comes"), rewritten("other")), ("server",))
    assert (done.added, done.removed, done.changed, done.kept) == (("comes",), ("goes",), ("other",), ())
    assert done.needs_restart == ("server",)
    assert [item.name for item in router.catalog.entries] == ["comes", "other", "same"]
    assert router.catalog.resolve("other") == rewritten("other")
    assert backend.in_memory == {"goes": ModelState.COLD, "other": ModelState.COLD}
    done = await refresh(router, catalog(entry("same"), entry("comes"), rewritten("other")))
    assert done == Refreshed()


async def test_names_and_defaults_change_without_a_load() -> None:
    router, backend = dispatcher(entry("m", aliases=["old"]))
    changed = entry("m", aliases=["new"], fallbacks=["x"], sampling={"temperature": 0.1})
    assert (await refresh(router, catalog(changed))).changed == ("m",)
    assert backend.in_memory == {}
    assert router.catalog.resolve("new").settings.fallbacks == ("x",)
    with pytest.raises(Exception, match="no model named 'old'"):
        router.catalog.resolve("old")
    await refresh(router, catalog(entry("m", context_length=64)))
    assert backend.in_memory == {"m": ModelState.COLD}


async def test_what_is_in_use_stays_until_it_is_not() -> None:
    router, backend = dispatcher(entry("busy"), entry("goes"), script=[Started(), 60.0, FINISHED])
    answer = await router.generate(GenerationRequest("busy", TextPrompt("x")))
    await anext(answer.events)
    wanted = catalog(rewritten("busy"), entry("comes", aliases=["goes"]))
    done = await refresh(router, wanted)
    assert (done.added, done.removed, done.changed, done.kept) == (("comes",), (), (), ("busy", "goes"))
    assert router.catalog.resolve("busy") == entry("busy")
    assert router.catalog.resolve("goes").name == "goes"  # a name before an alias
    await answer.events.aclose()
    done = await refresh(router, wanted)
    assert (done.removed, done.changed, done.kept) == (("goes",), ("busy",), ())
    assert router.catalog.resolve("goes").name == "comes"
    backend.in_memory["busy"] = ModelState.LOADING
    assert (await refresh(router, catalog(entry("comes", aliases=["goes"])))).kept == ("busy",)


async def test_every_lane_that_may_have_answered_lets_go() -> None:
    checkpoint = replace(
        entry("m", model_facts=facts(format=ModelFormat.CHECKPOINT, capabilities=HEAD)), gguf=entry("m")
    )
    engine, other = ScriptedBackend(name="mlx", kind=BackendKind.MLX), ScriptedBackend(name="llama_cpp")
    router = Dispatcher(Catalog([checkpoint]), {"mlx": engine, "llama_cpp": other})
    assert router.route("m")[2] is engine
    changed = catalog(replace(checkpoint, gguf=rewritten("m")))
    other.running = 1  # it answers since the engine was down
    assert (await refresh(router, changed)).kept == ("m",)
    other.running = 0
    assert (await refresh(router, changed)).changed == ("m",)
    assert (engine.in_memory, other.in_memory) == ({"m": ModelState.COLD}, {"m": ModelState.COLD})


# --------------------------------------------------------------------------------------------------------------------
# A whole server over a settings file


class Home:
    """A settings file and the folder that it lies in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "router.toml"
        self.settle("")

    def settle(self, text: str) -> None:
        backends = "[backends.mlx]\nallow_cpu = true\n[backends.llama_cpp]\nthreads = 1\n"
        self.file.write_text(f'[server]\nlisten = "127.0.0.1:0"\n{text if "[backends" in text else backends + text}')

    def script(self, name: str, *pieces: str) -> Path:
        """Writes a model that says these after "L"."""
        path = self.folder / name
        write_script_model(path, {"L": Script(list(pieces))})
        return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("MTP_ROUTER_HOME", str(tmp_path / "home"))
    return Home(tmp_path)


Serve = Callable[[], Any]


@pytest.fixture
async def serve(home: Home) -> AsyncIterator[Serve]:
    """Starts a server of the settings file as `mtp-router serve` does; gives its client."""
    servers: list[RouterServer] = []
    clients: list[AsyncClient] = []

    async def start() -> AsyncClient:
        settings = load_settings(home.file)
        pulled = home.folder / "home" / "models"
        read = await read_catalog(settings, pulled)
        lifecycle = Lifecycle(settings.scheduler)
        build = functools.partial(build_backends, lifecycle=lifecycle)
        reader = Reader(settings, lambda: load_settings(home.file), pulled, build)
        servers.append(RouterServer(settings.server, read, build(settings, read), reader, lifecycle))
        await servers[-1].start()
        clients.append(AsyncClient(servers[-1].address, retry=None))
        return await clients[-1].__aenter__()

    yield start
    for client in clients:
        await client.__aexit__(None, None, None)
    for server in servers:
        await server.drain()


async def said(client: AsyncClient, model: str) -> str:
    answer = await client.generate(model, prompt="L", temperature=0.0, max_output_tokens=8)
    return str(answer.output.text)


async def test_a_file_that_was_replaced_is_served_anew(
    home: Home, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    home.settle('[discovery]\nfolders = ["."]\n')
    home.script("words.gguf", " old")
    client = await serve()
    assert await said(client, "words") == " old"
    home.script("next.gguf", " new").replace(home.folder / "words.gguf")
    assert await said(client, "words") == " old"
    assert list((await client.refresh()).changed) == ["words"]
    assert await said(client, "words") == " new"
    assert list((await client.refresh()).changed) == []
    assert (await client.get_model("words")).state == v1.MODEL_STATE_READY  # what did not change stays loaded
    (home.folder / "words.gguf").write_bytes(b"junk")
    assert list((await client.refresh()).changed) == ["words"]
    assert "words cannot be served: words.gguf is not a usable GGUF file" in caplog.text
    (home.folder / "words.gguf").unlink()
    assert list((await client.refresh()).removed) == ["words"]
    with pytest.raises(ModelNotFoundError):
        await said(client, "words")
    assert not any(backend.loaded_models for backend in await client.list_backends())


async def test_a_first_checkpoint_brings_its_engine(home: Home, serve: Serve) -> None:
    client = await serve()
    assert [backend.name for backend in await client.list_backends()] == ["llama_cpp"]
    write(home.folder / "tiny", Recipe(layers=2))
    home.settle('[models.tiny]\npath = "tiny"\naliases = ["t"]\n')
    done = await client.refresh()
    assert (list(done.added), list(done.needs_restart)) == (["tiny"], [])
    answer = await client.generate("t", prompt="x", max_output_tokens=2)
    assert answer.started.route.backend_kind == v1.BACKEND_KIND_MLX
    assert {backend.name: backend.state for backend in await client.list_backends()} == {
        "llama_cpp": v1.BACKEND_STATE_READY,
        "mlx": v1.BACKEND_STATE_READY,
    }
    write(home.folder / "tiny", Recipe(layers=3))
    assert list((await client.refresh()).changed) == ["tiny"]
    assert (await client.get_model("tiny")).state == v1.MODEL_STATE_COLD
    await client.generate("tiny", prompt="x", max_output_tokens=2)


async def test_settings_that_take_a_restart_are_named_and_new_backends_are_started(home: Home, serve: Serve) -> None:
    client = await serve()
    home.settle(
        "drain_grace = 1.0\n"
        + "[backends.llama_cpp]\nthreads = 2\n[backends.second]\nkind = 'llama_cpp'\n"
        + "[backends.ollama]\nhost = 'http://127.0.0.1:9'\n[models.tag]\nollama = 'smol'\n"
    )
    done = await client.refresh()
    assert list(done.added) == ["tag"]
    assert list(done.needs_restart) == ["backends.llama_cpp", "backends.second", "server"]
    assert (await client.get_model("tag")).problem == "Ollama cannot be reached"
    assert [backend.name for backend in await client.list_backends()] == ["llama_cpp", "ollama"]
    home.settle("[backends.llama_cpp]\nthreads = 1\n[backends.ollama]\nhost = 'http://127.0.0.1:8'\n")
    done = await client.refresh()
    assert (list(done.removed), list(done.needs_restart)) == (["tag"], ["backends.ollama"])


async def test_settings_that_cannot_be_read_change_nothing(
    home: Home, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    home.settle('[models.words]\npath = "words.gguf"\n')
    home.script("words.gguf", " hi")
    client = await serve()
    secret = "[backends.rack]\nkind = 'llama_server'\nurl = 'x'\napi_key = 'open-sesame'\n"
    for text in ("[models.words\n", "[models.words]\npth = 'x'\n", secret, None):
        home.settle(text) if text else home.file.unlink()
        with pytest.raises(RouterCallError) as caught:
            await client.refresh()
        assert caught.value.reason == "SETTINGS_INVALID"
        assert "pth" not in caught.value.message
    assert "models.words.pth: there is no such setting" in caplog.text
    assert "backends.rack.url: must be like" in caplog.text
    assert "open-sesame" not in caplog.text
    assert await said(client, "words") == " hi"


async def test_nothing_is_refreshed_in_a_drain(home: Home) -> None:
    settings = load_settings(home.file)
    read = await read_catalog(settings, home.folder)
    began, goes_on = asyncio.Event(), asyncio.Event()

    class Slow(ScriptedBackend):
        async def start(self) -> None:
            began.set()
            await goes_on.wait()

    slow = Slow(name="ollama")
    home.settle("[backends.ollama]\nhost = 'http://127.0.0.1:9'\n")
    reader = Reader(settings, lambda: load_settings(home.file), home.folder, lambda *_: {"ollama": slow})
    server = RouterServer(settings.server, read, {}, reader)
    await server.start()
    refreshing = asyncio.create_task(server.refresh())
    await began.wait()
    draining = asyncio.create_task(server.drain())
    goes_on.set()
    await asyncio.gather(refreshing, draining)
    assert slow.closed  # though it was new
    with pytest.raises(RouterError, match="shutting down"):
        await server.refresh()


async def test_tags_are_read_again_and_kept_while_their_server_is_away(tmp_path: Path) -> None:
    double = Double()
    try:
        settings = Settings(backends={"ollama": {"host": double.address}}, discovery={"ollama": True})
        before = await read_catalog(settings, tmp_path)
        double.tell(tag="fresh:1b", digest="f" * 64)
        double.tell(tag="no name" + "!" * 1000, digest="f" * 64)
        after = await read_catalog(settings, tmp_path, before)
        assert {entry.name for entry in after.entries} - {entry.name for entry in before.entries} == {"fresh:1b"}
    finally:
        double.kill()
    away = await read_catalog(settings, tmp_path, after)
    assert away.entries == after.entries
    off = settings.model_copy(update={"discovery": settings.discovery.model_copy(update={"ollama": False})})
    assert (await read_catalog(off, tmp_path, after)).entries == ()


# --------------------------------------------------------------------------------------------------------------------
# The command

COMMAND = [sys.executable, "-c", "import sys; from router.cli import main; sys.exit(main())"]


@pytest.fixture
def process(home: Home) -> Iterator[tuple[subprocess.Popen[str], str]]:
    arguments = ["serve", "--json", "--config", str(home.file)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MTP_ROUTER_")}
    served = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**environment, "MTP_ROUTER_HOME": str(home.folder / "home")},
    )
    assert served.stdout is not None
    yield served, json.loads(served.stdout.readline())["address"]
    served.kill()
    served.wait()
    served.stdout.close()


def test_sighup_refreshes_and_sigterm_still_drains(home: Home, process: tuple[subprocess.Popen[str], str]) -> None:
    served, address = process
    shutil.copy(home.script("words.gguf", " hi"), home.folder / "more.gguf")
    home.settle('[models.words]\npath = "words.gguf"\n')
    served.send_signal(signal.SIGHUP)
    with Client(address) as client:
        while not list(client.list_models()):
            assert served.poll() is None
    served.send_signal(signal.SIGTERM)
    assert served.wait(10) == 0


def test_a_server_says_at_its_start_what_it_cannot_serve(home: Home) -> None:
    home.settle('[models.words]\npath = "gone.gguf"\n')
    arguments = [*COMMAND, "serve", "--config", str(home.file)]
    with subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as served:
        assert served.stderr is not None
        first = served.stderr.readline()
        served.send_signal(signal.SIGTERM)
        served.communicate(timeout=60)
    assert "WARNING" in first
    assert "words cannot be served: gone.gguf does not exist" in first
