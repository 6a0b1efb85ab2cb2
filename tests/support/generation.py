"""Requests to a backend, and what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from router.backends.base import Backend
from router.catalog import ModelEntry, build_entry
from router.domain import Delta, Event, Finished, GenerationRequest, Sampling, Stop, TextPrompt
from router.settings import ModelSettings, SamplingSettings

GREEDY = Sampling(temperature=0.0)


def entry(path: Path, **settings: Any) -> ModelEntry:
    """A model of that file."""
    model = ModelSettings(path=path, **{"context_length": 256, **settings})
    return build_entry(path.stem, model, SamplingSettings())


def counting(**changes: Any) -> GenerationRequest:
    """A greedy request that counts until it is stopped."""
    defaults: dict[str, Any] = {"prompt": TextPrompt("L"), "sampling": GREEDY, "stop": Stop(max_output_tokens=100_000)}
    return GenerationRequest("m", **{**defaults, **changes})


async def collect(backend: Backend, model: ModelEntry, request: GenerationRequest) -> list[Event]:
    """Every event of one answer."""
    return [event async for event in backend.generate(model, request)]


def text(events: list[Event]) -> str:
    """The answer's text."""
    return "".join(event.text for event in events if isinstance(event, Delta))


def finished(events: list[Event]) -> Finished:
    """The last event, which must be Finished, and the only one."""
    assert [isinstance(event, Finished) for event in events] == [False] * (len(events) - 1) + [True]
    last = events[-1]
    assert isinstance(last, Finished)
    return last
