"""A head that its check at load finds wrong is told to callers and to whoever runs the server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from mtp_router.generate import v1

from mlx_mtp_backend.synthetic import Recipe, write
from router.backends.mlx import MlxBackend
from router.catalog import read_catalog
from router.client import AsyncClient
from router.lifecycle import Lifecycle
from router.refresh import Reader
from router.server import RouterServer
from router.settings import MlxSettings, ModelSettings, ServerSettings, Settings

WRONG = "head looks wrong: acceptance 0.0"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RouterServer]:
    """Serves `right`, whose head predicts its chain, and `wrong`, whose head was drawn by chance."""
    models = {
        "right": ModelSettings(path=write(tmp_path / "right", Recipe(kind="pass-through", acceptance=0.9, layers=2))),
        "wrong": ModelSettings(path=write(tmp_path / "wrong", Recipe(layers=2))),
    }
    listen = ServerSettings(listen="127.0.0.1:0", drain_grace=0.0, metrics_listen="127.0.0.1:0")
    settings = Settings(server=listen, models=models)
    lifecycle = Lifecycle()
    backends = {"mlx": MlxBackend("mlx", MlxSettings(allow_cpu=True), lifecycle)}
    reader = Reader(settings, lambda: settings, tmp_path / "none", lambda settings, catalog: {})
    server = RouterServer(listen, await read_catalog(settings, tmp_path / "none"), backends, reader, lifecycle)
    await server.start()
    yield server
    await server.drain()


@pytest.fixture
async def client(server: RouterServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, retry=None) as client:
        yield client


def mtp_evidence(model: v1.Model) -> str:
    (report,) = (item for item in model.capabilities if item.capability == v1.CAPABILITY_MTP)
    assert report.support == v1.CAPABILITY_SUPPORT_SUPPORTED
    return report.evidence


async def reason_of_an_answer(client: AsyncClient, model: str) -> str:
    answer = client.stream(model, prompt="x", max_output_tokens=2)
    async for _ in answer:
        pass
    assert answer.started is not None
    return answer.started.route.reason


async def test_a_head_that_looks_wrong_is_told_once_it_was_loaded(server: RouterServer, client: AsyncClient) -> None:
    model = await client.get_model("wrong")
    assert model.mtp_head.present
    assert not model.mtp_head.warning  # nothing is known before it is loaded
    for name in ("wrong", "right"):
        await reason_of_an_answer(client, name)

    models = {model.name: model async for model in client.list_models()}
    assert models["wrong"].mtp_head.warning.startswith(WRONG)
    assert WRONG in mtp_evidence(models["wrong"])
    assert WRONG in models["wrong"].route.reason
    assert WRONG in await reason_of_an_answer(client, "wrong")
    assert not models["right"].mtp_head.warning
    assert "looks wrong" not in mtp_evidence(models["right"]) + await reason_of_an_answer(client, "right")

    async with httpx.AsyncClient() as web:
        page = (await web.get(f"http://{server.metrics_address}/metrics")).text
    assert 'mtp_router_model_suspect_head{backend="mlx",model="wrong"} 1.0' in page
    assert page.count("mtp_router_model_suspect_head{") == 1
    assert 'mtp_router_model_state{backend="mlx",model="wrong",state="ready"} 1.0' in page
    assert 'mtp_router_model_memory_bytes{backend="mlx",model="right"}' in page


async def test_it_is_told_of_the_files_that_were_loaded_alone(client: AsyncClient, tmp_path: Path) -> None:
    await reason_of_an_answer(client, "wrong")
    assert (await client.unload("wrong")).mtp_head.warning.startswith(WRONG)  # its files are as they were
    write(tmp_path / "wrong", Recipe(layers=2, seed=1))
    assert list((await client.refresh()).changed) == ["wrong"]
    assert not (await client.get_model("wrong")).mtp_head.warning
