"""How long an answer may take, and what happens when it takes longer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from router.domain import ErrorReason, RouterError


class TimeIsUpError(Exception):
    """The request's time budget is spent."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds: without a sign of life before the first token, between tokens, in all.

    `deadline` is a time of the event loop's clock, None for no limit; `engine` is who is waited for, for messages.
    """

    first_token: float
    token: float
    deadline: float | None
    engine: str

    @contextlib.asynccontextmanager
    async def for_work(self) -> AsyncGenerator[None, None]:
        """Raises TimeIsUpError in the block at the deadline."""
        try:
            async with asyncio.timeout_at(self.deadline):
                yield
        except TimeoutError:
            raise TimeIsUpError from None

    @contextlib.asynccontextmanager
    async def for_sign_of_life(self, started: bool) -> AsyncGenerator[None, None]:
        """Raises RouterError BACKEND_STALLED in the block when the engine is silent for too long."""
        async with self.for_work():
            try:
                async with asyncio.timeout(self.token if started else self.first_token):
                    yield
            except TimeoutError:
                raise RouterError(
                    ErrorReason.BACKEND_STALLED, f"{self.engine} gave no sign of life for too long"
                ) from None
