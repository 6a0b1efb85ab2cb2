"""Two models and memory for one: real children, loaded and dropped by the scheduler."""

from __future__ import annotations

import asyncio
from pathlib import Path

from support.generation import collect, counting, entry, text

from router.backends.llama_cpp import LlamaCppBackend
from router.catalog import Catalog, ModelEntry
from router.client import AsyncClient
from router.domain import ModelState, Stop
from router.lifecycle import Lifecycle
from router.server import RouterServer
from router.settings import LlamaCppSettings, SchedulerSettings, ServerSettings

SHORT = Stop(max_output_tokens=3)


def named(path: Path, name: str, **settings: object) -> ModelEntry:
    made = entry(path, **settings)
    return ModelEntry(name, made.path, made.settings, made.facts, made.sampling)


def backend_for(model: ModelEntry, models: float) -> LlamaCppBackend:
    """With memory for that many of it."""
    settings = LlamaCppSettings(threads=1, batch_tokens=64, parallel=2)
    memory = model.memory_bytes(2)
    assert memory is not None
    budget = SchedulerSettings.model_validate({"memory_budget": int(models * memory)})
    return LlamaCppBackend("llama_cpp", settings, Lifecycle(budget))


async def test_an_idle_model_makes_room_and_a_busy_one_does_not(slow_file: Path) -> None:
    first, second = named(slow_file, "first"), named(slow_file, "second")
    backend = backend_for(first, 1.5)
    try:
        for model, other in ((first, second), (second, first), (first, second)):
            assert text(await collect(backend, model, counting(stop=SHORT))) == " n0 n1 n2"
            assert backend.model_state(model) is ModelState.READY
            assert backend.model_state(other) is ModelState.COLD
        busy = asyncio.create_task(collect(backend, first, counting(stop=Stop(max_output_tokens=200))))
        while not backend.status().active_requests:
            await asyncio.sleep(0.01)
        answer = await collect(backend, second, counting(stop=SHORT))
        assert busy.done()  # it was waited for, not broken off
        assert len(text(await busy).split()) == 200
        assert text(answer) == " n0 n1 n2"
    finally:
        await backend.close()


async def test_models_are_preloaded_told_of_and_dropped_when_idle(script_file: Path) -> None:
    kept = named(script_file, "kept", preload=True, pin=True)
    brief = named(script_file, "brief", keep_alive=0.2)
    lifecycle = Lifecycle(SchedulerSettings.model_validate({"memory_budget": "1GiB"}), lambda: 0)
    backend = LlamaCppBackend("llama_cpp", LlamaCppSettings(threads=1), lifecycle)
    server = RouterServer(
        ServerSettings(listen="127.0.0.1:0", drain_grace=0.0),
        Catalog([kept, brief]),
        {"llama_cpp": backend},
        lifecycle=lifecycle,
    )
    await server.start()
    try:
        async with AsyncClient(server.address) as client, asyncio.timeout(30):
            while (await client.get_model("kept")).state != 3:  # READY, and nobody asked
                await asyncio.sleep(0.02)
            await client.generate("brief", prompt="L", temperature=0.0, max_output_tokens=2)
            assert (await client.get_model("brief")).state == 3
            while (await client.get_model("brief")).state != 1:  # COLD again
                await asyncio.sleep(0.02)
            assert (await client.get_model("kept")).state == 3
    finally:
        await server.drain()
