"""The fault matrix's Ollama lane: a double of the server, in a process of its own."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.fault_cells import (
    ANSWERED,
    FAILED,
    FULL,
    PROMPT,
    STAGES,
    STALLED,
    UNAVAILABLE,
    Asked,
    Lane,
    busy,
    router,
)
from router.backends.ollama import OllamaBackend
from router.client import AsyncClient
from router.lifecycle import Lifecycle
from router.settings import ModelSettings, OllamaSettings

from support.ollama_process import Double  # isort: skip

FIRST_TOKEN, TOKEN = 2.0, 1.5  # seconds without a sign of life
LOAD, PREFILL, WORD = 0.4, 0.4, 0.03  # seconds that the double takes


@dataclass(frozen=True)
class Fault:
    """What happens, and what a caller is told who is before the first token, and after it.

    `early` and `late` set the double's faults; `act` does something to its process. `late_reason` None: it cannot
    happen then. `queued_reason` is for one who waits, where that differs.
    """

    early: Mapping[str, Any]
    early_reason: str
    late: Mapping[str, Any]
    late_reason: str | None
    act: int | None = None  # a signal
    queued_reason: str | None = None

    def expected(self) -> dict[str, str]:
        told: dict[str, str | None] = dict.fromkeys(STAGES, self.early_reason)
        told["decode"] = self.late_reason
        told["queued"] = self.early_reason if self.queued_reason is None else self.queued_reason
        return {stage: reason for stage, reason in told.items() if reason is not None}


def breaks(how: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"die_after": 0, "how": how}, {"die_after": 1, "how": how}


def refused(status: int, text: str, reason: str) -> Fault:
    # A status cannot follow a body: once tokens have come Ollama can only send a line that tells of an error.
    return Fault({"status": status, "error": text}, reason, {"die_after": 1, "how": "error"}, FAILED)


FAULTS = {
    "refuses connections": Fault({"closed": True}, ANSWERED, {"closed": True}, ANSWERED, queued_reason=UNAVAILABLE),
    "stalls before headers": Fault({"silent": True}, STALLED, {}, None),
    "stalls mid-stream": Fault(*[breaks("stall")[1], STALLED] * 2),
    "resets": Fault(breaks("reset")[0], UNAVAILABLE, breaks("reset")[1], FAILED),
    "garbage line": Fault(breaks("garbage")[0], FAILED, breaks("garbage")[1], FAILED),
    "oversize line": Fault(breaks("endless")[0], FAILED, breaks("endless")[1], FAILED),
    "wrong model": Fault(*[{"other_model": True}, FAILED] * 2),
    "401": refused(401, "unauthorized", UNAVAILABLE),
    "429": refused(429, "too many requests", FULL),
    "503": refused(503, "server busy", FULL),
    "closes without final": Fault(breaks("quiet")[0], UNAVAILABLE, breaks("quiet")[1], FAILED),
    "SIGKILL": Fault({}, UNAVAILABLE, {}, FAILED, signal.SIGKILL),
    "SIGSTOP": Fault({}, STALLED, {}, STALLED, signal.SIGSTOP),
}


@asynccontextmanager
async def service(
    doubles: Mapping[str, Double], **options: Any
) -> AsyncIterator[tuple[AsyncClient, dict[str, OllamaBackend]]]:
    """A router over the doubles, with a model for each, of the same name; `options` are the backends'."""
    lifecycle, shared = Lifecycle(), {"first_token_timeout": FIRST_TOKEN, "token_timeout": TOKEN, "check_interval": 0.2}
    configured = {
        name: OllamaSettings.model_validate({"host": double.address, **shared, **options})
        for name, double in doubles.items()
    }
    backends = {name: OllamaBackend(name, settings, lifecycle) for name, settings in configured.items()}
    models = {name: ModelSettings(ollama="smol", backend=name) for name in doubles}
    async with router(backends, models, lifecycle, configured) as client:
        yield client, backends


class OllamaScene:
    """See `Scene`."""

    victim: Mapping[str, Any] = {"messages": PROMPT}
    beside: Mapping[str, Mapping[str, Any]] = {"well": victim}
    comes_back = False  # nobody starts Ollama again

    def __init__(
        self, client: AsyncClient, backends: dict[str, OllamaBackend], doubles: dict[str, Double], fault: Fault
    ) -> None:
        self.client = client
        self._backends = backends
        self._double = doubles["sick"]
        self._well = doubles["well"]
        self._fault = fault
        self._base: dict[str, Any] = {"slow": WORD}

    async def prepare(self, stage: str) -> None:
        """Loaded, but for the stage that loads; slow enough to be met there."""
        if stage == "loading":
            self._base["load_seconds"] = LOAD
        elif stage != "queued":
            await Asked("sick", 1).through(self.client)
            self._base["prefill_seconds"] = PREFILL
        await asyncio.to_thread(self._double.fail, **self._base)
        await asyncio.to_thread(self._well.fail, slow=0.01)
        await asyncio.to_thread(self._double.tell, stage="")

    async def ahead(self) -> Callable[[], None]:
        """An answer that does not end."""
        answer = self.client.stream("sick", messages=PROMPT, temperature=0.0, max_output_tokens=10_000)
        await anext(aiter(answer))
        return answer.close

    async def reached(self, stage: str, victim: Asked) -> bool:
        """As the double tells, for what the router cannot see."""
        if stage == "queued":
            return self._backends["sick"].status().queued_requests == 1
        if stage == "decode":
            return victim.stage == "decode"
        reached = await asyncio.to_thread(self._double.tell)
        return str(reached["stage"]) == ("load" if stage == "loading" else "prefill")

    async def happen(self, stage: str) -> None:
        """To the process, or to what it will do next."""
        if self._fault.act is not None:
            self._double.process.send_signal(self._fault.act)
        else:
            wanted = self._fault.late if stage == "decode" else self._fault.early
            await asyncio.to_thread(self._double.fail, **{**self._base, **wanted})

    async def heal(self) -> None:
        """Ollama's models are its own."""

    def left_over(self) -> str:
        """Requests."""
        return busy(self._backends)


@asynccontextmanager
async def scene(fault: str) -> AsyncIterator[OllamaScene]:
    """Two doubles and a router."""
    doubles = {"sick": Double(), "well": Double()}
    try:
        async with service(doubles) as (client, backends):
            yield OllamaScene(client, backends, doubles, FAULTS[fault])
    finally:
        for double in doubles.values():
            double.process.send_signal(signal.SIGCONT)
            double.kill()


LANE = Lane("Ollama", {name: fault.expected() for name, fault in FAULTS.items()}, scene)
