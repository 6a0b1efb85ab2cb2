"""The breaker and the retries."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from support.scripted import ScriptedBackend, answer, entry

from router.domain import BackendKind, Delta, ErrorReason, Event, GenerationRequest, RouterError, Started, TextPrompt
from router.resilience import Breaker, BreakerState, Resilience
from router.settings import ResilienceSettings

REQUEST = GenerationRequest("tiny", TextPrompt("Hi"))
DOWN = RouterError(ErrorReason.BACKEND_UNAVAILABLE, "down", retry_after=0.1)
STATE = RouterError(ErrorReason.BACKEND_UNAVAILABLE, "wants a key")
FULL = RouterError(ErrorReason.QUEUE_FULL, "full", retry_after=0.1)
BROKEN = RouterError(ErrorReason.BACKEND_FAILED, "broke off")


class Flaky(ScriptedBackend):
    """Fails as told, one request after the other, then answers."""

    def __init__(self, *failures: RouterError | list[Event | BaseException | float]) -> None:
        super().__init__(kind=BackendKind.OLLAMA)
        self.failures = list(failures)

    def generate(self, model, request):  # type: ignore[no-untyped-def]
        todo = self.failures.pop(0) if self.failures else None
        self.script = [todo] if isinstance(todo, RouterError) else todo or list(answer("Hello"))
        return super().generate(model, request)


async def ask(resilience: Resilience, backend: ScriptedBackend, request: GenerationRequest = REQUEST) -> list[Event]:
    async with aclosing(resilience.generate(backend, entry(), request)) as events:
        return [event async for event in events]


async def reason(resilience: Resilience, backend: ScriptedBackend) -> RouterError:
    with pytest.raises(RouterError) as caught:
        await ask(resilience, backend)
    return caught.value


def test_it_opens_after_failures_in_a_row_lets_one_try_and_pauses_longer_each_time() -> None:
    breaker = Breaker(limit=3, pause=1.0, longest_pause=3.0)
    breaker.failed(0.0)
    breaker.failed(0.0)
    breaker.succeeded()  # not in a row
    for _ in range(3):
        assert breaker.refusal(0.0) is None
        breaker.failed(0.0)
    assert breaker.state(0.5) is BreakerState.OPEN
    assert breaker.refusal(0.4) == pytest.approx(0.6)
    assert breaker.refusal(1.0) is None  # the one that tries
    assert breaker.refusal(1.0) is not None
    breaker.undecided()  # it left
    assert breaker.refusal(1.0) is None
    breaker.failed(0.9)  # of a request from before
    assert breaker.refusal(1.0) is not None
    breaker.failed(1.0, probe=True)
    assert breaker.refusal(2.9) == pytest.approx(0.1)
    assert breaker.refusal(3.0) is None
    breaker.failed(3.0, probe=True)
    assert breaker.length == 3.0  # not four
    breaker.recovered(3.1)
    assert breaker.refusal(3.1) is None
    breaker.succeeded()
    assert [breaker.refusal(3.1) for _ in range(3)] == [None] * 3


async def test_a_request_is_retried_before_its_first_token_and_the_caller_does_not_see() -> None:
    noted: list[tuple[str, str]] = []
    backend = Flaky(DOWN, DOWN)
    events = await ask(Resilience(noted=lambda *what: noted.append(what)), backend)
    assert events == answer("Hello")
    assert noted == [("retry", "scripted")] * 2
    assert len(backend.requests) == 3


@pytest.mark.parametrize("error", [STATE, FULL, BROKEN, RouterError(ErrorReason.BACKEND_STALLED, "silent")])
async def test_what_another_try_would_not_help_is_told_at_once(error: RouterError) -> None:
    backend = Flaky(error)
    assert await reason(Resilience(), backend) is error
    assert len(backend.requests) == 1


async def test_nothing_is_retried_once_tokens_have_come() -> None:
    backend = Flaky([Started(), Delta("x"), DOWN])
    assert await reason(Resilience(), backend) is DOWN
    assert len(backend.requests) == 1


async def test_retries_end_and_a_backend_that_asks_for_time_gets_it() -> None:
    backend = Flaky(*[DOWN] * 5)
    assert await reason(Resilience(ResilienceSettings(retries=1)), backend) is DOWN
    assert len(backend.requests) == 2
    later = RouterError(ErrorReason.BACKEND_UNAVAILABLE, "restarting", retry_after=20.0)
    backend = Flaky(later)
    assert await reason(Resilience(), backend) is later
    assert len(backend.requests) == 1


async def test_a_retry_has_what_is_left_of_the_time_budget() -> None:
    backend = Flaky(DOWN)
    await ask(Resilience(), backend, GenerationRequest("tiny", TextPrompt("Hi"), time_budget=10.0))
    first, second = (request.time_budget for request in backend.requests)
    assert first == 10.0
    assert second is not None
    assert 5.0 < second < 9.95


async def test_an_open_breaker_spares_the_backend_and_one_request_tries_it() -> None:
    clock = 0.0
    settings = ResilienceSettings(retries=0, failures=2)
    noted: list[str] = []
    resilience = Resilience(settings, lambda what, _: noted.append(what), lambda: clock)
    backend = Flaky(BROKEN, DOWN, [30.0])
    await reason(resilience, backend)
    await reason(resilience, backend)
    refused = await reason(resilience, backend)
    assert (refused.reason, refused.retry_after) == (ErrorReason.BACKEND_UNAVAILABLE, 1.0)
    assert refused.metadata["backend"] == "scripted"
    assert len(backend.requests) == 2
    clock = 1.0
    probe = asyncio.create_task(ask(resilience, backend))
    await asyncio.sleep(0.01)
    assert (await reason(resilience, backend)).metadata["failures"] == "2"
    assert len(backend.requests) == 3
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    assert await ask(resilience, backend) == answer("Hello")  # the next one tries, and closes it
    assert noted == ["open", "half_open", "half_open", "closed"]
    assert resilience.states() == {"scripted": BreakerState.CLOSED}


async def test_who_was_there_before_it_opened_lets_no_second_request_try() -> None:
    clock = 0.0
    resilience = Resilience(ResilienceSettings(retries=0, failures=1), now=lambda: clock)
    backend = Flaky([30.0], BROKEN, [30.0])
    early = asyncio.create_task(ask(resilience, backend))
    await asyncio.sleep(0.01)
    await reason(resilience, backend)
    clock = 1.0
    probe = asyncio.create_task(ask(resilience, backend))
    await asyncio.sleep(0.01)
    early.cancel()
    await asyncio.gather(early, return_exceptions=True)
    assert (await reason(resilience, backend)).metadata["failures"] == "1"
    assert len(backend.requests) == 3
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)


async def test_states_and_full_lines_open_nothing() -> None:
    resilience = Resilience(ResilienceSettings(retries=0, failures=1))
    backend = Flaky(STATE, FULL, FULL)
    for _ in range(3):
        await reason(resilience, backend)
    assert await ask(resilience, backend) == answer("Hello")


async def test_models_with_processes_of_their_own_fail_alone() -> None:
    resilience = Resilience(ResilienceSettings(retries=0, failures=1))
    backend = Flaky(BROKEN)
    backend.kind = BackendKind.LLAMA_CPP
    await reason(resilience, backend)
    async with aclosing(resilience.generate(backend, entry("other"), REQUEST)) as events:
        assert [event async for event in events] == answer("Hello")
    assert (await reason(resilience, backend)).reason is ErrorReason.BACKEND_UNAVAILABLE
