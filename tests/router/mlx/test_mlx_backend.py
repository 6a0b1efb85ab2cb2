"""The MLX lane over real gRPC, on synthetic checkpoints and the real engine."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from mtp_router.generate import v1

from mlx_mtp_backend import Engine, EngineProcess
from mlx_mtp_backend.process.spawn import MODULE
from mlx_mtp_backend.synthetic import Recipe, write
from mlx_mtp_backend.worker import Worker
from router.backends.mlx import MlxBackend
from router.backends.mlx_engine import Factory
from router.catalog import read_catalog
from router.client import AsyncClient, RouterCallError
from router.server import RouterServer
from router.settings import MlxSettings, ModelSettings, ServerSettings, Settings

CONTEXT = 256
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder / "words", Recipe(kind="pass-through", acceptance=0.85, layers=2))
    write(folder / "random", Recipe(kind="history", layers=2))
    write(folder / "headless", Recipe(kind="history", layers=2, head="none"))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(checkpoints: Path) -> AsyncIterator[AsyncClient]:
    """Of a router whose engine runs in a process of its own, one for all tests here."""
    async with serving(checkpoints, EngineProcess) as connected:
        yield connected


@pytest_asyncio.fixture(loop_scope="module")
async def near(checkpoints: Path) -> AsyncIterator[AsyncClient]:
    """Of a router with the engine on a thread of this process, into which faults can be planted."""
    async with serving(checkpoints, Engine, cpu_nice=0) as connected:
        yield connected


@contextlib.asynccontextmanager
async def serving(checkpoints: Path, engine: Factory, **changes: Any) -> AsyncIterator[AsyncClient]:
    models = {
        "words": ModelSettings(path=checkpoints / "words", draft_depth=3),
        "paced": ModelSettings(path=checkpoints / "random"),
        "random": ModelSettings(path=checkpoints / "random", context_length=CONTEXT, draft_depth=2),
        "plain": ModelSettings(path=checkpoints / "random", speculation="off"),
        "headless": ModelSettings(path=checkpoints / "headless"),
    }
    settings = MlxSettings(allow_cpu=True, parallel=2, max_queued=2, prefill_chunk=16, **changes)
    backend = MlxBackend("mlx", settings, engine=engine)
    catalog = await read_catalog(Settings(models=models), checkpoints / "none")
    server = RouterServer(ServerSettings(listen="127.0.0.1:0", drain_grace=0.0), catalog, {"mlx": backend})
    await server.start()
    async with AsyncClient(server.address, retry=None) as connected:
        yield connected
    await server.drain()


async def text_of(client: AsyncClient, model: str, **options: Any) -> tuple[str, Any, Any]:
    options = {"prompt": "Once upon a time", "max_output_tokens": 24, **options}
    answer = client.stream(model, **options)
    text = "".join([delta.text async for delta in answer])
    return text, answer.started, answer.finished


async def test_it_drafts_with_the_head_and_says_so(client: AsyncClient) -> None:
    text, started, finished = await text_of(client, "words", prompt=None, messages=[{"role": "user", "content": "Hi"}])
    assert text.strip()
    assert started.route.backend_kind == 1
    assert "mtp.fc.weight" in started.route.reason or "mtp_num_hidden_layers = 1" in started.route.reason
    assert "CPU" in started.route.reason
    statistics = finished.speculation
    assert statistics.accepted_tokens > 0
    assert statistics.drafted_tokens == sum(item.drafted for item in statistics.positions)
    assert statistics.accepted_tokens == sum(item.accepted for item in statistics.positions)
    assert statistics.rounds < finished.usage.output_tokens
    assert "mlx=" in finished.numerics_fingerprint


async def test_a_seed_replays_at_any_depth_and_among_neighbours(client: AsyncClient) -> None:
    options = {"seed": 11, "temperature": 0.8}
    first, _, finished = await text_of(client, "random", **options)
    assert finished.seed == 11
    assert finished.replay == 1  # REPLAY_EXACT
    others = await asyncio.gather(
        text_of(client, "random", **options, speculation="off"),
        text_of(client, "random", **options, draft_depth=4),
        text_of(client, "random", seed=12, temperature=0.8),
    )
    assert others[0][0] == others[1][0] == first
    assert others[2][0] != first
    assert others[0][2].speculation.drafted_tokens == 0


async def test_depths_are_chosen_and_told_where_none_is_set(client: AsyncClient) -> None:
    options = {"seed": 11, "temperature": 0.8, "ignore_end_of_generation": True}
    text, _, finished = await text_of(client, "paced", **options)
    plain, _, _ = await text_of(client, "paced", **options, speculation="off")
    assert text == plain
    statistics = finished.speculation
    if statistics.drafted_tokens:
        assert sum(statistics.depths) == statistics.rounds
        assert statistics.verify.ToTimedelta().total_seconds() > 0
    _, _, finished = await text_of(client, "paced", **options, draft_depth=2)
    assert finished.speculation.depths[2] > 0
    assert len(finished.speculation.depths) == 3


async def test_the_next_turn_and_the_next_chat_start_from_the_cache(client: AsyncClient) -> None:
    system = {"role": "system", "content": "Fold alerts into one incident. " * 3}
    question = {"role": "user", "content": "db-1 is down, db-2 is down, and the queue grows."}
    options = {"prompt": None, "temperature": 0.0}
    text, _, first = await text_of(client, "random", **options, messages=[system, question])
    turn = [system, question, {"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}]
    _, _, second = await text_of(client, "random", **options, messages=turn)
    _, _, other = await text_of(client, "random", **options, messages=[system, {"role": "user", "content": "Hi"}])
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens % 16 == 0
    assert second.usage.cached_tokens > other.usage.cached_tokens > 0


async def test_without_a_seed_nothing_is_promised(client: AsyncClient) -> None:
    _, _, finished = await text_of(client, "random", temperature=1.0)
    assert finished.replay == 3  # REPLAY_NONE
    assert not finished.HasField("seed")
    _, _, finished = await text_of(client, "random", temperature=0.0)
    assert finished.replay == 1


async def test_drafting_that_cannot_be_done_is_refused(client: AsyncClient) -> None:
    for model in ("plain", "headless"):
        for options in ({"speculation": "required"}, {"draft_depth": 2}):
            with pytest.raises(RouterCallError) as caught:
                await text_of(client, model, **options)
            assert caught.value.reason == "CAPABILITY_UNAVAILABLE"
    _, started, finished = await text_of(client, "headless")
    assert "declared but absent" in started.route.reason
    assert finished.speculation.drafted_tokens == 0


async def test_a_format_that_takes_too_much_work_is_the_callers_own_fault(client: AsyncClient) -> None:
    for _ in range(6):  # more than open a breaker
        with pytest.raises(RouterCallError) as caught:
            await client.generate("plain", prompt="x", regex="(a{500}){500}", temperature=0.0, max_output_tokens=20)
        assert caught.value.reason == "INVALID_REQUEST"
        assert [violation.field for violation in caught.value.violations] == ["response_format"]
    assert (await client.generate("plain", prompt="x", max_output_tokens=2)).finished.usage.output_tokens == 2


async def test_stopping(client: AsyncClient) -> None:
    options = {"temperature": 0.0, "max_output_tokens": 12}
    text, _, finished = await text_of(client, "words", **options)
    assert finished.reason == 4  # MAX_TOKENS
    assert finished.usage.output_tokens == 12
    word = text.split()[2]
    cut, _, finished = await text_of(client, "words", **options, stop=[word])
    assert cut == text[: text.index(word)]
    assert (finished.reason, finished.sequence) == (2, word)


async def test_the_context_bounds_prompt_and_answer(client: AsyncClient) -> None:
    options = {"prompt": None, "ignore_end_of_generation": True, "max_output_tokens": 1000}
    _, _, finished = await text_of(client, "random", **options | {"token_ids": [5] * (CONTEXT - 4)})
    assert finished.reason == 5  # CONTEXT_LIMIT
    assert finished.usage.output_tokens == 4
    with pytest.raises(RouterCallError) as caught:
        await text_of(client, "random", **options | {"token_ids": [5] * CONTEXT})
    assert caught.value.reason == "PROMPT_TOO_LONG"
    assert caught.value.metadata["prompt_tokens"] == str(CONTEXT)
    assert caught.value.metadata["context_length"] == str(CONTEXT)


async def test_tokens_are_counted_and_checked(client: AsyncClient) -> None:
    count = await client.count_tokens("random", token_ids=[1, 2, 3])
    assert (count.prompt_tokens, count.context_length) == (3, CONTEXT)
    assert (await client.count_tokens("words", prompt="Once upon a time")).prompt_tokens > 0
    with pytest.raises(RouterCallError) as caught:
        await text_of(client, "random", prompt=None, token_ids=[10**6])
    assert caught.value.reason == "INVALID_REQUEST"


async def test_a_time_budget_keeps_the_text_so_far(client: AsyncClient) -> None:
    await text_of(client, "random")  # loaded
    text, _, finished = await text_of(
        client, "random", time_budget=0.05, max_output_tokens=10_000, ignore_end_of_generation=True, seed=3
    )
    assert finished.reason in (5, 6)  # the context may end it first on a fast machine
    longer, _, _ = await text_of(client, "random", max_output_tokens=240, ignore_end_of_generation=True, seed=3)
    assert longer.startswith(text[:-1])


async def test_a_cancelled_stream_frees_its_place(client: AsyncClient) -> None:
    for _ in range(5):
        answer = client.stream("words", prompt="x", max_output_tokens=5000, ignore_end_of_generation=True)
        async for _ in answer:
            break
        answer.close()
    async with asyncio.timeout(10):
        while (await client.list_backends())[0].active_requests:
            await asyncio.sleep(0.02)
    text, _, _ = await text_of(client, "words")
    assert text


async def test_a_thousand_cancels_leave_nothing(client: AsyncClient) -> None:
    """Cancelled at once, after the first token, or while waiting: tasks, threads, files and queues come back."""
    await text_of(client, "words")

    async def cancelled(number: int) -> None:
        answer = client.stream("words", prompt="x", max_output_tokens=3000, ignore_end_of_generation=True)
        with contextlib.suppress(RouterCallError):  # the line is short, and some are turned away
            if number % 3:
                async for _ in answer:
                    break
        answer.close()

    async def settled() -> tuple[int, int, int]:
        async with asyncio.timeout(20):
            while True:
                backend = (await client.list_backends())[0]
                if not backend.active_requests and not backend.queued_requests:
                    break
                await asyncio.sleep(0.02)
        gc.collect()
        return len(asyncio.all_tasks()), threading.active_count(), len(os.listdir("/dev/fd"))

    for number in range(20):
        await cancelled(number)
    before = await settled()
    for start in range(0, 1000, 4):
        await asyncio.gather(*(cancelled(number) for number in range(start, start + 4)))
    after = await settled()
    assert all(left <= had + 2 for left, had in zip(after, before, strict=True)), (before, after)
    await text_of(client, "words")


async def test_a_full_line_turns_away(client: AsyncClient) -> None:
    await text_of(client, "words")
    options = {"prompt": "x", "max_output_tokens": 5000, "ignore_end_of_generation": True}
    answers = [client.stream("words", **options) for _ in range(4)]
    tasks = [asyncio.ensure_future(anext(aiter(answer), None)) for answer in answers]
    async with asyncio.timeout(10):
        while (await client.list_backends())[0].queued_requests < 2:
            await asyncio.sleep(0.02)
    with pytest.raises(RouterCallError) as caught:
        await text_of(client, "words")
    assert caught.value.reason == "QUEUE_FULL"
    for answer in answers:
        answer.close()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_loading_and_unloading(client: AsyncClient) -> None:
    await client.unload("random", force=True)
    assert (await client.get_model("random")).state == 1  # COLD
    steps: list[float | None] = []
    await client.preload("random", on_progress=steps.append)
    assert steps
    assert (await client.get_model("random")).state == 3  # READY
    answer = client.stream("random", prompt="x", max_output_tokens=200, ignore_end_of_generation=True)
    iterator = aiter(answer)
    await anext(iterator)
    with pytest.raises(RouterCallError) as caught:
        await client.unload("random")
    assert caught.value.reason == "CAPABILITY_UNAVAILABLE"
    await client.unload("random", force=True)
    assert (await client.get_model("random")).state == 1
    with pytest.raises(RouterCallError) as caught:
        while True:
            await anext(iterator)
    assert caught.value.reason == "BACKEND_UNAVAILABLE"
    await text_of(client, "random")  # loads again


async def test_an_abandoned_unload_harms_nothing(client: AsyncClient) -> None:
    for _ in range(10):
        await text_of(client, "random", max_output_tokens=2)
        with contextlib.suppress(RouterCallError):
            await client.unload("random", deadline=0.002)
    await text_of(client, "random")
    await asyncio.gather(*(client.unload("random") for _ in range(3)))  # all succeed: the model is cold
    assert (await client.get_model("random")).state == v1.MODEL_STATE_COLD


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_engine_that_dies_is_told(near: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    await text_of(near, "random")

    def broken(self: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("mlx_mtp_backend.worker.Worker._reap", broken)
    with pytest.raises(RouterCallError):
        await text_of(near, "random")
    async with asyncio.timeout(5):
        while (await near.list_backends())[0].state != v1.BACKEND_STATE_DOWN:
            await asyncio.sleep(0.02)
    with pytest.raises(RouterCallError) as caught:
        await text_of(near, "random")
    assert caught.value.reason == "BACKEND_UNAVAILABLE"
    assert (await near.get_model("random")).state == v1.MODEL_STATE_FAILED
    monkeypatch.undo()  # health, and the next request, come back by themselves
    async with asyncio.timeout(20):
        while (await near.list_backends())[0].state != v1.BACKEND_STATE_READY:
            await asyncio.sleep(0.02)
    await text_of(near, "random")
    assert (await near.list_backends())[0].restarts >= 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("step", ["_load_slice", "_prefill"])
async def test_an_engine_that_dies_before_the_first_token_is_no_shutdown(
    near: AsyncClient, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    if step != "_load_slice":
        await text_of(near, "random")

    def broken(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(Worker, step, broken)
    with pytest.raises(RouterCallError) as caught:
        await text_of(near, "random")
    assert caught.value.reason == "BACKEND_UNAVAILABLE"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_engine_that_dies_in_mid_answer_breaks_the_answer_off(
    near: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = near.stream("random", prompt="x", max_output_tokens=240, ignore_end_of_generation=True)
    deltas = aiter(answer)
    await anext(deltas)

    def broken(self: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("mlx_mtp_backend.worker.Worker._reap", broken)
    with pytest.raises(RouterCallError) as caught:
        async for _ in deltas:
            pass
    assert caught.value.reason == "BACKEND_FAILED"


async def test_a_load_that_nobody_waits_for_is_given_up(near: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    slice_of = Worker._load_slice

    def slow(self: Worker) -> None:
        slice_of(self)
        held.wait(0.05)

    monkeypatch.setattr(Worker, "_load_slice", slow)
    answer = near.stream("random", prompt="x")
    reading = asyncio.ensure_future(anext(aiter(answer), None))
    async with asyncio.timeout(10):
        while (await near.get_model("random")).state != v1.MODEL_STATE_LOADING:
            await asyncio.sleep(0.005)
        answer.close()
        while (await near.get_model("random")).state != v1.MODEL_STATE_COLD:
            await asyncio.sleep(0.005)
    await asyncio.gather(reading, return_exceptions=True)
    assert not (await near.list_backends())[0].loaded_models
    held.set()
    await text_of(near, "random")


async def test_decoding_on_the_cpu_yields_to_serving(client: AsyncClient) -> None:
    await text_of(client, "random")
    children = [child for child in psutil.Process().children() if MODULE in child.cmdline()]
    assert [child.nice() for child in children] == [min(os.nice(0) + MlxSettings().cpu_nice, 19)]
    if sys.platform == "linux":  # each thread has a priority of its own
        threads = [int(thread) for thread in os.listdir(f"/proc/{children[0].pid}/task")]
        assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {children[0].nice()}


async def test_a_cpu_is_refused_unless_allowed(checkpoints: Path) -> None:
    backend = MlxBackend("mlx", MlxSettings())
    await backend.start()
    try:
        assert "allow_cpu" in backend.offer().refusal
        assert backend.status().error is not None
    finally:
        await backend.close()
