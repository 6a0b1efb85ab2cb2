"""The fault matrix's MLX lane: the real engine on synthetic checkpoints. Its process is killed and stopped; and on a
thread of this process faults are planted where real ones happen: in building a round, in evaluating it, in its loop."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import psutil

from benchmarks.fault_cells import (
    ANSWERED,
    FAILED,
    LOAD_FAILED,
    ROOT,
    STAGES,
    STALLED,
    UNAVAILABLE,
    Asked,
    Lane,
    busy,
    router,
)
from benchmarks.paced_engine import PACE, SLICE
from mlx_mtp_backend import Engine, EngineProcess
from mlx_mtp_backend.families.base import Hidden
from mlx_mtp_backend.families.qwen3_5 import Qwen35
from mlx_mtp_backend.process import pulse, spawn
from mlx_mtp_backend.synthetic import Recipe, write
from mlx_mtp_backend.worker import Worker
from router.backends.base import Backend
from router.backends.mlx import MlxBackend
from router.backends.ollama import OllamaBackend
from router.client import AsyncClient, RouterCallError
from router.lifecycle import Lifecycle
from router.settings import MlxSettings, ModelSettings, OllamaSettings

from support.ollama_process import Double  # isort: skip

SICK, WELL = 64, 96  # hidden sizes, by which the faults tell the models apart
PLACES = 2  # of the engine
PACED = "benchmarks.paced_engine"  # the engine's process
SILENT = 6  # looks, a second apart, after which it is taken for dead
FIRST_TOKEN, TOKEN = 4.0, 4.0  # seconds without a sign of life
STALL = 6.0  # seconds
PROMPT = {"prompt": "Once upon a time", "ignore_end_of_generation": True}
LONG = {**PROMPT, "prompt": "Once upon a time " * 60}
BUILD, DEVICE, DIES = "round cannot be built", "device fails", "engine's thread dies"
STALLS, REFUSES = "stalls", "weights cut short"
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}

# A load runs no pass here; the first one after it fails.
_BROKEN = dict.fromkeys(STAGES, FAILED)
_GONE = {"queued": UNAVAILABLE, "loading": UNAVAILABLE, "prefill": UNAVAILABLE, "decode": FAILED}
EXPECTED: dict[str, dict[str, str]] = {
    BUILD: _BROKEN,
    DEVICE: _BROKEN,
    DIES: _GONE,
    STALLS: {"queued": STALLED, "loading": ANSWERED, "prefill": STALLED, "decode": STALLED},
    REFUSES: {"loading": LOAD_FAILED},
    "SIGKILL": _GONE,
    "SIGSTOP": {"queued": STALLED, "loading": UNAVAILABLE, "prefill": STALLED, "decode": STALLED},
}


class Plant:
    """Plants a fault into an engine on a thread; nothing goes wrong until it is `armed`."""

    def __init__(self, fault: str, folder: Path) -> None:
        self.armed = False
        self._stalled = False
        self._fault = fault
        self._folder = folder

    @contextmanager
    def planted(self) -> Any:
        """In this block."""
        places = ((Qwen35, "trunk", self._trunk), (Worker, "_step", self._step), (Worker, "_load_slice", self._slice))
        with ExitStack() as stack:
            for owner, name, wrapped in places:
                stack.enter_context(mock.patch.object(owner, name, wrapped(getattr(owner, name))))
            yield

    def _trunk(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def trunk(model: Qwen35, tokens: mx.array, *arguments: Any) -> Any:
            time.sleep(PACE)
            hits = self.armed and model.hidden_size == SICK
            if hits and self._fault == BUILD:
                raise ValueError("planted")
            out = real(model, tokens, *arguments)
            if hits and self._fault == DEVICE:
                lost = mx.sum(self._unreadable()).astype(out.normed.dtype)
                return Hidden(out.normed + lost, out.carried + lost)
            return out

        return trunk

    def _unreadable(self) -> mx.array:
        """An array whose evaluation really fails: its file is cut short after it was opened."""
        path = self._folder / "cut.safetensors"
        mx.save_safetensors(str(path), {"x": mx.ones((1000,))})
        array = mx.load(str(path))["x"]
        with path.open("r+b") as file:
            file.truncate(200)
        return array

    def _step(self, real: Callable[..., None]) -> Callable[..., None]:
        def step(worker: Worker) -> None:
            if self.armed and self._fault == DIES:
                raise RuntimeError("planted")
            if self.armed and self._fault == STALLS and not self._stalled:
                self._stalled, end = True, time.monotonic() + STALL
                while self.armed and time.monotonic() < end:
                    time.sleep(0.01)
            real(worker)

        return step

    def _slice(self, real: Callable[..., None]) -> Callable[..., None]:
        def load_slice(worker: Worker) -> None:
            real(worker)
            time.sleep(SLICE)

        return load_slice


class MlxScene:
    """See `Scene`."""

    comes_back = True

    def __init__(
        self, client: AsyncClient, backends: Mapping[str, Backend], folder: Path, fault: str, plant: Plant
    ) -> None:
        self.client = client
        self._backends = backends
        self._folder = folder
        self._fault = fault
        self._plant = plant
        self.victim: Mapping[str, Any] = PROMPT
        # Where the engine itself fails, everything on it does; other backends go on.
        self.beside: Mapping[str, Mapping[str, Any]] = {"other": {"messages": [{"role": "user", "content": "count"}]}}
        if fault not in (DIES, STALLS, *SIGNALS):
            self.beside = {**self.beside, "well": PROMPT}

    async def prepare(self, stage: str) -> None:
        """Loaded, but for the stage that loads."""
        if stage == "prefill":
            self.victim = LONG
        if self._fault == REFUSES:
            for file in self._folder.glob("sick/*.safetensors"):
                file.write_bytes(file.read_bytes()[:-1000])
        if stage != "loading":
            await Asked("sick", 1, PROMPT).through(self.client)

    async def ahead(self) -> Callable[[], None]:
        """As many answers that do not end as there are places left."""
        places = PLACES - ("well" in self.beside)
        answers = [self.client.stream("sick", **PROMPT, max_output_tokens=3000) for _ in range(places)]
        for answer in answers:
            await anext(aiter(answer))

        def give_back() -> None:
            for answer in answers:
                answer.close()

        return give_back

    async def reached(self, stage: str, victim: Asked) -> bool:
        """As the router tells. Cut weights are there before the request, which may fail before anybody looks."""
        return self._fault == REFUSES or victim.stage == {"queued": "queue", "loading": "load"}.get(stage, stage)

    async def happen(self, stage: str) -> None:
        """From the engine's next step on, or to its process."""
        if self._fault in SIGNALS:
            (process,) = [child for child in psutil.Process().children() if PACED in child.cmdline()]
            os.kill(process.pid, SIGNALS[self._fault])
        self._plant.armed = True

    async def heal(self) -> None:
        """No fault, a whole checkpoint, nothing loaded."""
        self._plant.armed = False
        if self._fault == REFUSES:
            shutil.copytree(_checkpoint(SICK), self._folder / "sick", dirs_exist_ok=True)
        with suppress(RouterCallError):
            await self.client.unload("sick", force=True)

    def left_over(self) -> str:
        """Requests."""
        return busy(self._backends)


@functools.cache
def _checkpoint(hidden: int) -> Path:
    return write(Path(tempfile.mkdtemp(prefix="faults")) / "model", Recipe(layers=2, hidden=hidden))


@contextmanager
def _in_its_process() -> Any:
    """Engines' processes are slow, and soon taken for dead."""
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, path))
        stack.enter_context(mock.patch.object(spawn, "MODULE", PACED))
        stack.enter_context(mock.patch.object(pulse, "SILENT", SILENT))
        yield


@asynccontextmanager
async def scene(fault: str) -> AsyncIterator[MlxScene]:
    """A router with two checkpoints on the engine, and a double of an Ollama server."""
    lifecycle, double = Lifecycle(), Double()
    # Nothing yields here: a machine that is busy with something else must not look like an engine that stalls.
    settings = MlxSettings(
        allow_cpu=True,
        cpu_nice=0,
        parallel=PLACES,
        prefill_chunk=16,
        first_token_timeout=FIRST_TOKEN,
        token_timeout=TOKEN,
        wiring_check="off",
    )
    backends: dict[str, Backend] = {
        "mlx": MlxBackend("mlx", settings, lifecycle, EngineProcess if fault in SIGNALS else Engine),
        "ollama": OllamaBackend("ollama", OllamaSettings(host=double.address, check_interval=0.2), lifecycle),
    }
    models = {"other": ModelSettings(ollama="smol")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, hidden in (("sick", SICK), ("well", WELL)):
            shutil.copytree(_checkpoint(hidden), folder / model)
            models[model] = ModelSettings(path=folder / model, draft_depth=2)
        plant = Plant(fault, folder)
        try:
            with _in_its_process() if fault in SIGNALS else plant.planted():
                async with router(backends, models, lifecycle) as client:
                    yield MlxScene(client, backends, folder, fault, plant)
        finally:
            double.kill()


LANE = Lane("MLX", EXPECTED, scene)
