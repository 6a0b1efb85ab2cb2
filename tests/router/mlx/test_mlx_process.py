"""The MLX lane's engine in its process: killed and stopped under a router that goes on, counted by the memory guard."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
from mtp_router.generate import v1

from mlx_mtp_backend import BaseEngine, Engine, EngineError, EngineOptions, ErrorReason
from mlx_mtp_backend.process import pulse
from mlx_mtp_backend.process.spawn import MODULE
from mlx_mtp_backend.synthetic import Recipe, write
from router.backends import mlx_engine
from router.backends.mlx import MlxBackend
from router.catalog import read_catalog
from router.client import AsyncClient, RouterCallError
from router.domain import BackendState
from router.lifecycle import measured_footprint
from router.server import RouterServer
from router.settings import MlxSettings, ModelSettings, ServerSettings, Settings

ENDLESS = {"prompt": "Once upon a time", "max_output_tokens": 3000, "ignore_end_of_generation": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoints") / "random", Recipe(kind="history", layers=2))


@pytest.fixture
async def client(checkpoint: Path) -> AsyncIterator[AsyncClient]:
    models = {"random": ModelSettings(path=checkpoint, draft_depth=2)}
    settings = MlxSettings(allow_cpu=True, prefill_chunk=16, first_token_timeout=2.0, token_timeout=2.0)
    catalog = await read_catalog(Settings(models=models), checkpoint / "none")
    listen = ServerSettings(listen="127.0.0.1:0", drain_grace=0.0)
    server = RouterServer(listen, catalog, {"mlx": MlxBackend("mlx", settings)})
    await server.start()
    async with AsyncClient(server.address, retry=None) as connected:
        await connected.generate("random", prompt="x", max_output_tokens=2)
        yield connected
    await server.drain()
    assert engines() == []


def engines() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if MODULE in child.cmdline()]


async def comes_back(client: AsyncClient) -> None:
    async with asyncio.timeout(40):
        while (await client.list_backends())[0].restarts == 0:
            await asyncio.sleep(0.02)
    assert (await client.list_backends())[0].state == v1.BACKEND_STATE_READY
    answer = await client.generate("random", prompt="x", max_output_tokens=5, ignore_end_of_generation=True)
    assert answer.finished.usage.output_tokens == 5


async def broken_off(client: AsyncClient, number: signal.Signals) -> RouterCallError:
    """The error of an answer in whose middle the engine's process gets a signal."""
    deltas = aiter(client.stream("random", **ENDLESS))
    await anext(deltas)
    (process,) = engines()
    os.kill(process.pid, number)
    with pytest.raises(RouterCallError) as caught:
        async for _ in deltas:
            pass
    return caught.value


async def test_killed_in_mid_answer(client: AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    assert (await broken_off(client, signal.SIGKILL)).reason == "BACKEND_FAILED"
    async with asyncio.timeout(5):
        while (await client.list_backends())[0].state != v1.BACKEND_STATE_DOWN:
            await asyncio.sleep(0.005)
    with pytest.raises(RouterCallError) as caught:
        await client.generate("random", prompt="x")
    assert caught.value.reason == "BACKEND_UNAVAILABLE"
    assert "was ended by SIGKILL" in caplog.text
    await comes_back(client)


async def test_stopped_in_mid_answer(client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream ends by its own patience; then the process, which does not answer, is replaced."""
    monkeypatch.setattr(pulse, "SUSPECTED_SILENT", 1)
    assert (await broken_off(client, signal.SIGSTOP)).reason == "BACKEND_STALLED"
    await comes_back(client)


async def test_killed_as_it_loads_and_as_others_wait(client: AsyncClient) -> None:
    await client.unload("random")
    waiting = [asyncio.ensure_future(client.generate("random", prompt="x")) for _ in range(3)]
    async with asyncio.timeout(10):
        while (await client.get_model("random")).state != v1.MODEL_STATE_LOADING:
            await asyncio.sleep(0.005)
    (process,) = engines()
    process.kill()
    for answer in waiting:
        with pytest.raises(RouterCallError) as caught:
            await answer
        assert caught.value.reason == "BACKEND_UNAVAILABLE"
    await comes_back(client)


async def test_a_restart_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a driver needs a moment after it took the engine along."""
    monkeypatch.setattr(mlx_engine, "FIRST_RESTART", 0.01)
    made: list[Callable[[], None]] = []

    def make(options: EngineOptions, on_end: Callable[[], None]) -> BaseEngine:
        made.append(on_end)
        if len(made) in (2, 3):
            raise EngineError(ErrorReason.ENGINE_CLOSED, "planted")
        return Engine(options, on_end)

    backend = MlxBackend("mlx", MlxSettings(allow_cpu=True, cpu_nice=0), engine=make)
    await backend.start()
    assert backend.status().state is BackendState.READY
    states: list[BackendState] = []
    backend.on_status_change(lambda status: states.append(status.state))
    made[0]()
    async with asyncio.timeout(10):
        while not backend.status().restarts:
            await asyncio.sleep(0.005)
    assert states == [BackendState.DOWN] * 3 + [BackendState.READY]
    assert (len(made), backend.offer().refusal) == (4, "")
    await backend.close()


async def test_the_memory_guard_counts_the_process(client: AsyncClient) -> None:
    (process,) = engines()
    own = psutil.Process().memory_info().rss
    assert measured_footprint() > own + 0.9 * process.memory_info().rss


def test_the_router_does_not_import_mlx(checkpoint: Path) -> None:
    code = f"""
        import asyncio, sys
        from pathlib import Path
        from router.backends.mlx import MlxBackend
        from router.catalog import read_catalog
        from router.client import AsyncClient
        from router.server import RouterServer
        from router.settings import MlxSettings, ModelSettings, ServerSettings, Settings

        async def main():
            models = {{"m": ModelSettings(path=Path({str(checkpoint)!r}), draft_depth=2)}}
            catalog = await read_catalog(Settings(models=models), Path("none"))
            backend = MlxBackend("mlx", MlxSettings(allow_cpu=True, openblas=sys.platform == "linux"))
            server = RouterServer(ServerSettings(listen="127.0.0.1:0", drain_grace=0.0), catalog, {{"mlx": backend}})
            await server.start()
            async with AsyncClient(server.address) as client:
                answer = await client.generate("m", prompt="x", max_output_tokens=3, regex="[a-z]+", top_logprobs=1)
                print(answer.finished.usage.output_tokens > 0)
            await server.drain()

        asyncio.run(main())
        print([name for name in sys.modules if name.split(".")[0] in ("mlx", "mlx_lm")])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "[]"], done.stderr
