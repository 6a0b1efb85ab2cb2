"""Requests to an engine, and what came of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import pytest

from mlx_mtp_backend import Delta, EngineError, ErrorReason, Event


def tokens_of(events: Iterable[Event]) -> tuple[int, ...]:
    """The reply's tokens."""
    return tuple(token for event in events if isinstance(event, Delta) for token in event.tokens)


def until(holds: Callable[[], object], seconds: float = 20) -> None:
    """Waits for something, and not for ever."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def reason_of(call: Callable[[], object]) -> ErrorReason:
    """Why it is refused."""
    with pytest.raises(EngineError) as caught:
        call()
    return caught.value.reason
