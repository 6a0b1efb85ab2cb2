"""What waits for the reader of one stream. No I/O."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager

from router.domain import Delta, ErrorReason, Event, Loading, Prefilling, Queued, RouterError

BURST_GRACE = 1.0  # seconds that a reader has to make room: a backend may send much at once
PER_LOGPROB = 64  # bytes that one log-probability takes, roughly


class Outbox:
    """The events of an answer, between the backend and a reader who may be slower.

    Deltas that wait are merged when they are taken, so that a reader who falls behind gets fewer and longer ones; of
    progress only the latest waits. What waits is bounded in bytes, so that a backend need not wait for a reader.

    Args:
        max_bytes: of text and log-probabilities that may wait.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._waiting: deque[Event] = deque()
        self._bytes = 0
        self._ended = False
        self._error: BaseException | None = None
        self._taker: asyncio.Future[None] | None = None  # set when something comes; cheaper than an Event
        self._room = asyncio.Event()
        self.merged = 0  # deltas that went into others

    async def put(self, event: Event) -> None:
        """Adds an event. Raises RouterError SLOW_CONSUMER where too much waits, and goes on waiting."""
        if isinstance(event, Delta):
            size = _size(event)
            if self._bytes + size > self._max_bytes and self._waiting:
                await self._wait_for_room(size)
            self._bytes += size
        elif isinstance(event, Queued | Loading | Prefilling) and self._waiting:
            self._waiting.pop()  # nothing but progress can wait before it
        self._waiting.append(event)
        self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes; `error` is raised once everything that waits was taken."""
        self._ended, self._error = True, error
        self._wake()

    async def take(self) -> Event | None:
        """The oldest event, with the deltas that follow it if it is one; None at the end."""
        while not self._waiting:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return None
            self._taker = asyncio.get_running_loop().create_future()
            await self._taker
        event = self._waiting.popleft()
        if not isinstance(event, Delta):
            return event
        pieces = [event]
        while self._waiting and isinstance(following := self._waiting[0], Delta):
            pieces.append(following)
            self._waiting.popleft()
        self._bytes = 0  # deltas stand together
        self._room.set()
        self.merged += len(pieces) - 1
        return event if len(pieces) == 1 else joined(pieces)

    def _wake(self) -> None:
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)

    async def _wait_for_room(self, size: int) -> None:
        try:
            async with asyncio.timeout(BURST_GRACE):
                while self._bytes + size > self._max_bytes and self._waiting:
                    self._room.clear()
                    await self._room.wait()
        except TimeoutError:
            raise RouterError(
                ErrorReason.SLOW_CONSUMER,
                f"more than {self._max_bytes} bytes of the answer waited to be read; the answer is incomplete",
                metadata={"max_unread_bytes": str(self._max_bytes)},
            ) from None


@asynccontextmanager
async def filling(outbox: Outbox, events: AsyncGenerator[Event, None]) -> AsyncIterator[None]:
    """Moves events into the outbox at the backend's pace; leaving the block stops the backend, and waits for that."""

    async def move() -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    await outbox.put(event)
        except Exception as error:  # noqa: BLE001  # it is raised where it is taken
            outbox.end(error)
        else:
            outbox.end()

    task = asyncio.create_task(move())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def joined(pieces: Iterable[Delta]) -> Delta:
    """Several pieces of an answer as one."""
    pieces = list(pieces)
    counts = [piece.token_count for piece in pieces]
    return Delta(
        text="".join(piece.text for piece in pieces),
        reasoning_text="".join(piece.reasoning_text for piece in pieces),
        token_count=None if None in counts else sum(count for count in counts if count is not None),
        logprobs=tuple(item for piece in pieces for item in piece.logprobs),
        tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
    )


def _size(delta: Delta) -> int:
    text = len(delta.text) + len(delta.reasoning_text)
    if not (delta.tool_calls or delta.logprobs):  # nearly every one
        return text
    text += sum(len(call.arguments_json) for call in delta.tool_calls)
    return text + PER_LOGPROB * sum(1 + len(item.top) for item in delta.logprobs)
