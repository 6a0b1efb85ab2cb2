"""The life of llama.cpp children: loading, cancelling, dying, hanging, restarting, leaving nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from support.generation import collect, counting, entry, finished, text

from router.backends.llama_cpp import LlamaCppBackend
from router.catalog import ModelEntry
from router.domain import (
    BackendState,
    BackendStatus,
    Delta,
    ErrorReason,
    Event,
    FinishReason,
    GenerationRequest,
    Loading,
    ModelState,
    Prefilling,
    Queued,
    RouterError,
    Started,
    Stop,
    TextPrompt,
)

SHORT = Stop(max_output_tokens=3)


def pid(backend: LlamaCppBackend, model: ModelEntry) -> int:
    child = backend.child(model)
    assert child is not None
    return child.pid


def gone(process: int) -> bool:
    """Whether it ended; one that its parent has not waited for counts."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


async def eventually(condition, seconds: float = 20.0) -> float:  # type: ignore[no-untyped-def]
    """Seconds until the condition holds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not come about"
        await asyncio.sleep(0.01)
    return time.monotonic() - started


async def busy_slots(backend: LlamaCppBackend, model: ModelEntry) -> int:
    child = backend.child(model)
    assert child is not None
    async with httpx.AsyncClient(trust_env=False) as client:
        reply = await client.get(f"{child.address}/slots", headers={"Authorization": f"Bearer {child.api_key}"})
    return sum(slot["is_processing"] for slot in reply.json())


async def seconds_until_idle(backend: LlamaCppBackend, model: ModelEntry) -> float:
    started = time.monotonic()
    while await busy_slots(backend, model):
        assert time.monotonic() - started < 10, "the slot stays busy"
        await asyncio.sleep(0.01)
    return time.monotonic() - started


async def first(events: AsyncIterator[Event], kind: type[Event]) -> Event:
    async for event in events:
        if isinstance(event, kind):
            return event
    raise AssertionError(f"no {kind.__name__}")


async def error_of(backend: LlamaCppBackend, model: ModelEntry, request: GenerationRequest) -> RouterError:
    with pytest.raises(RouterError) as caught:
        await collect(backend, model, request)
    return caught.value


# --------------------------------------------------------------------------------------------------------------------
# Loading


async def test_concurrent_requests_share_one_load(make_backend, script_file: Path, spawned) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(parallel=4), entry(script_file)
    answers = await asyncio.gather(*(collect(backend, model, counting(stop=SHORT)) for _ in range(8)))
    assert {text(events) for events in answers} == {" n0 n1 n2"}
    assert len(spawned) == 1
    assert all(isinstance(events[0], Loading | Queued) for events in answers)


async def test_a_load_that_nobody_waits_for_is_given_up(make_backend, slow_file: Path, spawned) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(), entry(slow_file)
    waiting = [asyncio.create_task(collect(backend, model, counting())) for _ in range(2)]
    await eventually(lambda: spawned)
    waiting[0].cancel()
    await asyncio.sleep(0)
    assert backend.model_state(model) is ModelState.LOADING  # the other one still waits
    waiting[1].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert backend.model_state(model) is ModelState.COLD
    await eventually(lambda: spawned[0].returncode is not None)
    assert text(await collect(backend, model, counting(stop=SHORT))) == " n0 n1 n2"
    assert len(spawned) == 2


async def test_a_file_that_is_no_model_fails_to_load_and_says_when_to_try_again(make_backend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(1000))
    backend, model = make_backend(restart_backoff=30.0), entry(broken)
    error = await error_of(backend, model, counting())
    assert error.reason is ErrorReason.MODEL_LOAD_FAILED
    assert str(tmp_path) not in error.message
    assert backend.model_state(model) is ModelState.FAILED
    assert backend.status().state is BackendState.READY  # other models may be fine
    again = await error_of(backend, model, counting())
    assert again.reason is ErrorReason.MODEL_LOAD_FAILED
    assert again.retry_after is not None
    assert 0 < again.retry_after <= 30


async def test_a_load_that_takes_too_long_is_ended(make_backend, script_file: Path, spawned) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(load_timeout=0.01), entry(script_file)
    assert (await error_of(backend, model, counting())).reason is ErrorReason.MODEL_LOAD_FAILED
    assert [process.returncode is not None for process in spawned] == [True]


async def test_preload_and_unload(make_backend, script_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(), entry(script_file)
    states: list[BackendStatus] = []
    backend.on_status_change(states.append)
    assert [event async for event in backend.preload(model)] == [Loading()]
    assert backend.model_state(model) is ModelState.READY
    assert [event async for event in backend.preload(model)] == []
    process = pid(backend, model)

    async with aclosing(backend.generate(model, counting())) as events:
        await first(events, Delta)
        with pytest.raises(RouterError) as caught:
            await backend.unload(model, force=False)
        assert caught.value.reason is ErrorReason.CAPABILITY_UNAVAILABLE
        await backend.unload(model, force=True)
        with pytest.raises(RouterError) as caught:
            async for _ in events:
                pass
        assert caught.value.reason is ErrorReason.BACKEND_FAILED
    assert gone(process)
    assert backend.model_state(model) is ModelState.COLD
    assert [status.loaded_models for status in states if status.loaded_models] == [(model.name,)]
    assert text(await collect(backend, model, counting(stop=SHORT))) == " n0 n1 n2"


# --------------------------------------------------------------------------------------------------------------------
# Cancelling


@pytest.mark.parametrize("who", ["count", "answer"])
async def test_who_comes_while_it_is_dropped_has_it_loaded_again_once(make_backend, script_file: Path, spawned, who) -> None:  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    backend, model, request = make_backend(), entry(script_file), counting(stop=SHORT)

    async def ask() -> None:
        await (backend.count_tokens(model, request) if who == "count" else collect(backend, model, request))

    await ask()
    dropping = asyncio.create_task(backend.unload(model, force=False))
    while backend.model_state(model) is not ModelState.UNLOADING:
        await asyncio.sleep(0)
    await ask()
    await dropping
    await ask()
    assert len(spawned) == 2
    await backend.close()
    assert all(gone(child.pid) for child in spawned)


async def test_a_cancel_while_decoding_frees_the_slot(make_backend, slow_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(), entry(slow_file, context_length=4096)
    async with aclosing(backend.generate(model, counting())) as events:
        await first(events, Delta)
        assert await busy_slots(backend, model) == 1
    assert await seconds_until_idle(backend, model) < 0.5
    assert backend.status().active_requests == 0


async def test_a_cancelled_task_frees_the_slot(make_backend, slow_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(), entry(slow_file, context_length=4096)
    task = asyncio.create_task(collect(backend, model, counting()))
    await eventually(lambda: backend.model_state(model) is ModelState.READY)
    await asyncio.sleep(0.2)
    assert await busy_slots(backend, model) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await seconds_until_idle(backend, model) < 0.5


async def test_a_cancel_in_prefill_waits_for_one_batch_at_most(make_backend, slow_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(), entry(slow_file, context_length=8192)
    await collect(backend, model, counting(stop=SHORT))
    started = time.monotonic()
    async with aclosing(backend.generate(model, counting(prompt=TextPrompt("L" * 8000)))) as events:
        batches = []
        async for event in events:
            assert isinstance(event, Prefilling), "the prompt was read before the test could cancel"
            batches.append((event.processed_tokens, time.monotonic() - started))
            if len(batches) == 4:
                break
        assert await busy_slots(backend, model) == 1
    took = await seconds_until_idle(backend, model)
    one_batch = max(later[1] - earlier[1] for earlier, later in pairwise(batches))
    assert batches[-1][0] <= 4 * 64
    assert took < 2 * one_batch + 0.5


async def test_a_thousand_cancels_leave_nothing_behind(make_backend, script_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(parallel=2, max_queued=100), entry(script_file, context_length=4096)
    await collect(backend, model, counting(stop=SHORT))

    async def one(stage: int) -> None:
        async with aclosing(backend.generate(model, counting())) as events:
            if stage % 3 == 0:  # in the line or on the way
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.002):
                        await first(events, Delta)
            elif stage % 3 == 1:
                await first(events, Started)
            else:
                for _ in range(3):
                    await first(events, Delta)

    async def hundred() -> None:
        await asyncio.gather(*(one(stage) for stage in range(100)))

    def counts() -> tuple[int, int, int, int]:
        status = backend.status()
        return (
            len(asyncio.all_tasks()),
            open_files(),
            status.active_requests,
            status.queued_requests,
        )

    before = counts()
    for _ in range(10):
        await hundred()
    gc.collect()
    # What still closed when it was counted first may be gone.
    await eventually(lambda: all(now <= then for now, then in zip(counts(), before, strict=True)))
    assert await seconds_until_idle(backend, model) < 0.5
    assert backend.status().restarts == 0
    assert text(await collect(backend, model, counting(stop=SHORT))) == " n0 n1 n2"


# --------------------------------------------------------------------------------------------------------------------
# Waiting


async def test_the_line_is_bounded_and_tells_positions(make_backend, slow_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(parallel=1, max_queued=1), entry(slow_file)
    async with aclosing(backend.generate(model, counting())) as running:
        await first(running, Delta)
        async with aclosing(backend.generate(model, counting(stop=SHORT))) as waiting:
            assert await anext(waiting) == Queued(0)
            error = await error_of(backend, model, counting())
            assert error.reason is ErrorReason.QUEUE_FULL
            assert error.retry_after
            assert (backend.status().active_requests, backend.status().queued_requests) == (1, 1)
            await running.aclose()
            assert text([event async for event in waiting]) == " n0 n1 n2"


async def test_a_time_budget_ends_waiting(make_backend, slow_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(parallel=1), entry(slow_file)
    async with aclosing(backend.generate(model, counting())) as running:
        await first(running, Delta)
        events = await collect(backend, model, counting(time_budget=0.05))
    assert finished(events).reason is FinishReason.TIME_LIMIT
    assert text(events) == ""


# --------------------------------------------------------------------------------------------------------------------
# Dying


async def test_a_child_killed_in_the_middle_of_an_answer_fails_it_and_comes_back(make_backend, slow_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(restart_backoff=0.05), entry(slow_file)
    async with aclosing(backend.generate(model, counting())) as events:
        await first(events, Delta)
        os.kill(pid(backend, model), signal.SIGKILL)
        with pytest.raises(RouterError) as caught:
            async for _ in events:
                pass
    assert caught.value.reason is ErrorReason.BACKEND_FAILED
    assert text(await collect(backend, model, counting(stop=SHORT))) == " n0 n1 n2"
    assert backend.status().restarts == 1


async def test_a_child_killed_before_the_first_token_makes_the_backend_unavailable(
    make_backend, slow_file: Path
) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(restart_backoff=0.05), entry(slow_file, context_length=8192)
    await collect(backend, model, counting(stop=SHORT))
    async with aclosing(backend.generate(model, counting(prompt=TextPrompt("L" * 8000)))) as events:
        await first(events, Prefilling)
        os.kill(pid(backend, model), signal.SIGKILL)
        with pytest.raises(RouterError) as caught:
            await first(events, Started)
    assert caught.value.reason is ErrorReason.BACKEND_UNAVAILABLE
    assert caught.value.retry_after
    assert text(await collect(backend, model, counting(stop=SHORT))) == " n0 n1 n2"


async def test_a_child_killed_while_idle_is_restarted(make_backend, script_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(restart_backoff=0.05), entry(script_file)
    states: list[BackendState] = []
    backend.on_status_change(lambda status: states.append(status.state))
    await collect(backend, model, counting(stop=SHORT))
    killed = pid(backend, model)
    os.kill(killed, signal.SIGKILL)
    await eventually(lambda: (child := backend.child(model)) is not None and child.pid != killed)
    assert gone(killed)
    assert BackendState.DOWN in states
    assert (backend.status().state, backend.status().restarts) == (BackendState.READY, 1)
    await backend.unload(model, force=False)
    assert backend.status().restarts == 1  # though nothing is left of the model
    assert text(await collect(backend, model, counting(stop=SHORT))) == " n0 n1 n2"


async def test_a_child_that_keeps_dying_is_restarted_ever_more_slowly(make_backend, script_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(restart_backoff=0.1, restart_backoff_max=2.0), entry(script_file)
    await collect(backend, model, counting(stop=SHORT))
    pauses = []
    for _ in range(3):
        killed = pid(backend, model)
        started = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        await eventually(lambda: (child := backend.child(model)) is not None and child.pid != killed)  # noqa: B023
        pauses.append(time.monotonic() - started)
    assert pauses[0] >= 0.1
    assert pauses[1] >= 0.2
    assert pauses[2] >= 0.4


async def test_requests_are_sent_away_while_a_restart_is_far_off(make_backend, script_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(restart_backoff=20.0), entry(script_file)
    await collect(backend, model, counting(stop=SHORT))
    os.kill(pid(backend, model), signal.SIGKILL)
    await eventually(lambda: backend.child(model) is None)
    error = await error_of(backend, model, counting())
    assert error.reason is ErrorReason.BACKEND_UNAVAILABLE
    assert error.retry_after is not None
    assert 15 < error.retry_after <= 20
    assert backend.status().retry_after is not None


async def test_a_stopped_child_stalls_the_answer_and_is_replaced(make_backend, slow_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(token_timeout=0.3, restart_backoff=0.05), entry(slow_file)
    async with aclosing(backend.generate(model, counting())) as events:
        await first(events, Delta)
        stopped = pid(backend, model)
        os.kill(stopped, signal.SIGSTOP)
        with pytest.raises(RouterError) as caught:
            async for _ in events:
                pass
    assert caught.value.reason is ErrorReason.BACKEND_STALLED
    assert gone(stopped)
    assert text(await collect(backend, model, counting(stop=SHORT))) == " n0 n1 n2"


async def test_a_slow_answer_does_not_cost_its_neighbours_their_child(make_backend, slow_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend, model = make_backend(first_token_timeout=0.005), entry(slow_file, context_length=8192)
    [_ async for _ in backend.preload(model)]
    process = pid(backend, model)
    error = await error_of(backend, model, counting(prompt=TextPrompt("L" * 8000)))
    assert error.reason is ErrorReason.BACKEND_STALLED
    assert pid(backend, model) == process


PARENT = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = {path!r}
from support.generation import counting, entry
from router.backends.llama_cpp import LlamaCppBackend
from router.settings import LlamaCppSettings

async def main():
    backend, model = LlamaCppBackend("llama_cpp", LlamaCppSettings(threads=1, batch_tokens=64)), entry(Path({file!r}))
    async for _ in backend.generate(model, counting()):
        child = backend.child(model)
        if child is not None:
            print(child.pid, flush=True)

asyncio.run(main())
"""


def test_children_die_with_a_parent_killed_by_sigkill(slow_file: Path) -> None:
    script = PARENT.format(path=[path for path in sys.path if path], file=str(slow_file))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    started = time.monotonic()
    while not gone(child):
        assert time.monotonic() - started < 2.0
        time.sleep(0.01)


def test_a_child_whose_interpreter_is_blocked_by_native_code_dies_at_the_end_of_stdin_too() -> None:
    """Loading a model holds the interpreter's lock, so no Python thread could see its stdin end."""
    script = (
        "import ctypes, os; from router.backends.llama_child import _die_with_parent; _die_with_parent();"
        "os.write(1, b'armed'); ctypes.PyDLL(None).sleep(30)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.read(5) == b"armed"
        time.sleep(0.1)
        child.stdin.close()
        assert child.wait(2.0) == -signal.SIGIO


async def test_close_ends_children_answers_and_everything_else(make_backend, slow_file: Path, spawned) -> None:  # type: ignore[no-untyped-def]
    fds = open_files()
    tasks = len(asyncio.all_tasks())
    backend, model = make_backend(parallel=1), entry(slow_file)
    async with aclosing(backend.generate(model, counting())) as events:
        await first(events, Delta)
        waiting = asyncio.create_task(error_of(backend, model, counting()))
        await eventually(lambda: backend.status().queued_requests)
        process = pid(backend, model)
        await backend.close()
        with pytest.raises(RouterError):
            async for _ in events:
                pass
    assert (await waiting).reason is ErrorReason.DRAINING
    await backend.close()
    assert gone(process)
    assert spawned[0].returncode is not None  # waited for, not a zombie
    assert (await error_of(backend, model, counting())).reason is ErrorReason.DRAINING
    assert len(spawned) == 1  # the one that waited started none
    gc.collect()
    await eventually(lambda: len(asyncio.all_tasks()) == tasks)
    await eventually(lambda: open_files() <= fds)
