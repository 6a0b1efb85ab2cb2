"""The MLX thread: loads, prefills and decodes, one short step at a time, so that no stream waits long for another."""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Generator

import mlx.core as mx
from mtp_kernels.registry import Registry

from mlx_mtp_backend.api import EngineOptions, FinishReason, LoadProgress
from mlx_mtp_backend.decode import rounds
from mlx_mtp_backend.decode.drafters import Draft, Drafter
from mlx_mtp_backend.decode.pacing import paced_round
from mlx_mtp_backend.decode.prefix import PrefixStore, budget_bytes
from mlx_mtp_backend.decode.rounds import Committed, Round
from mlx_mtp_backend.decode.sequence import Sequence
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.host import DeviceFailure
from mlx_mtp_backend.job import Job
from mlx_mtp_backend.load import loading
from mlx_mtp_backend.load.calibration import DepthMemory
from mlx_mtp_backend.load.loading import Resident
from mlx_mtp_backend.mailbox import Board, Call, Close, Command, Inbox, Load, Submit, Unload

log = logging.getLogger(__name__)


class NoDrafter:
    """Plain decoding."""

    def draft(self, sequences: list[Sequence]) -> list[Draft | None]:
        return [None] * len(sequences)


class Worker:
    """Everything that only the MLX thread may touch. Built and run on that thread."""

    def __init__(self, options: EngineOptions, inbox: Inbox, board: Board) -> None:
        self._options = options
        self._inbox = inbox
        self._board = board
        self._registry = Registry(options.kernel_checks)
        self._depth_memory = DepthMemory(options.depth_memory)
        self._prefixes = PrefixStore(budget_bytes(options))
        self._residents: dict[str, Resident] = {}
        self._loads: deque[tuple[Load, Generator[LoadProgress, None, Resident]]] = deque()
        self._waiting: deque[Job] = deque()
        self._prefilling: deque[Job] = deque()
        self._decoding: list[Job] = []
        self._closing = False

    def run(self) -> None:
        """Serve until told to close; every stream gets its last event, whatever happens."""
        if self._options.device is not None:
            mx.set_default_device(mx.Device(mx.gpu if self._options.device == "gpu" else mx.cpu))
        if mx.default_device().type == mx.cpu:
            # On a CPU MLX compiles through g++ at run time: seconds of stall each time, for a few percent.
            mx.disable_compile()
        try:
            while not self._closing:
                for command in self._inbox.take(self._patience()):
                    self._obey(command)
                self._step()
        except Exception:
            log.exception("the engine's loop failed")
            raise
        finally:
            self._end_everything()
            # Without this the process aborts at exit: streams must not outlive their thread.
            mx.clear_streams()

    def _step(self) -> None:
        self._reap()
        self._admit()
        if self._loads:
            self._load_slice()
        ready = next((job for job in self._prefilling if job.paused is None), None)
        if ready is not None:
            self._prefill(ready)
        for resident in list(self._residents.values()):
            jobs = [job for job in self._decoding if job.resident is resident and job.paused is None]
            most = resident.model.most_rows or len(jobs) or 1
            for first in range(0, len(jobs), most):
                self._decode(resident, jobs[first : first + most])
        self._board.decoding = len(self._decoding) + len(self._prefilling)

    def _patience(self) -> float | None:
        """How long the thread may sleep: not at all with work to do, else until some job's time runs out."""
        active = [*self._prefilling, *self._decoding]
        if self._loads or any(job.paused is None for job in active) or (self._waiting and not active):
            return 0.0
        looks = [job.next_look(self._options.slow_reader_limit) for job in [*active, *self._waiting]]
        times = [look for look in looks if look is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _obey(self, command: Command) -> None:
        match command:
            case Submit(params, stream, submitted, grammar):
                self._waiting.append(Job(params, stream, submitted, grammar))
            case Load():
                self._loads.append((command, self._loading(command)))
            case Unload():
                self._unload(command)
            case Call(what):
                what()
            case Close():
                self._closing = True

    def _loading(self, command: Load) -> Generator[LoadProgress, None, Resident]:
        return loading.load(command.name, command.path, command.options, self._registry, self._depth_memory)

    def _reap(self) -> None:
        """End what was cancelled or ran out of time, wherever it stands."""
        now = time.monotonic()
        for job in [*self._waiting, *self._prefilling, *self._decoding]:
            reason = job.cut(now, self._options.slow_reader_limit)
            if reason is not None:
                self._end(job, reason)

    def _admit(self) -> None:
        while self._waiting and len(self._prefilling) + len(self._decoding) < self._options.max_streams:
            job = self._waiting.popleft()
            resident = self._residents.get(job.params.model)
            if resident is None:
                detail = f"{job.params.model!r} was unloaded while the request waited"
                self._end(job, FinishReason.ERROR, EngineError(ErrorReason.MODEL_NOT_LOADED, detail))
                continue
            self._start(job, resident)

    def _start(self, job: Job, resident: Resident) -> None:
        try:
            job.start(resident, self._prefixes)
        except Exception:
            log.exception("a reply could not be started")
            self._end(job, FinishReason.ERROR, _build_failure())
        else:
            self._prefilling.append(job)

    def _load_slice(self) -> None:
        command, steps = self._loads[0]
        try:
            progress = next(steps)
        except StopIteration as done:
            self._loads.popleft()
            self._publish(command, done.value)
        except EngineError as error:
            self._refuse(command, error)
        except Exception as error:
            log.exception("loading %s failed", command.name)
            detail = f"loading failed: {type(error).__name__}"
            self._refuse(command, EngineError(ErrorReason.DEVICE_FAILURE, detail))
        else:
            command.report(progress)

    def _publish(self, command: Load, resident: Resident) -> None:
        self._residents[command.name] = resident
        with self._board.lock:
            self._board.models[command.name] = resident.info
            self._board.loading.discard(command.name)
        command.result.set_result(resident.info)

    def _refuse(self, command: Load, error: EngineError) -> None:
        self._loads.popleft()
        with self._board.lock:
            self._board.loading.discard(command.name)
        command.result.set_exception(error)
        _release_memory()

    def _give_up_load(self, name: str) -> None:
        """End a load that is not wanted any more."""
        for load, steps in [pair for pair in self._loads if pair[0].name == name]:
            self._loads.remove((load, steps))
            steps.close()
            with self._board.lock:
                self._board.loading.discard(name)
            load.result.set_exception(EngineError(ErrorReason.MODEL_NOT_LOADED, f"{name!r} was unloaded as it loaded"))
            _release_memory()

    def _unload(self, command: Unload) -> None:
        self._give_up_load(command.name)
        users = [*self._waiting, *self._prefilling, *self._decoding]
        if command.name not in self._residents:
            detail = f"{command.name!r} is not loaded"
            command.result.set_exception(EngineError(ErrorReason.MODEL_NOT_LOADED, detail))
        elif count := sum(job.params.model == command.name for job in users):
            detail = f"{count} streams use {command.name!r}"
            command.result.set_exception(EngineError(ErrorReason.MODEL_IN_USE, detail))
        else:
            with self._board.lock:
                del self._board.models[command.name]
            self._remember(self._residents.pop(command.name))
            self._prefixes.forget(command.name)
            _release_memory()
            command.result.set_result(None)

    def _remember(self, resident: Resident) -> None:
        """What a model's rounds cost, where its depth is chosen by that."""
        if resident.drafter is not None and resident.options.depth is None:
            info = resident.info
            self._depth_memory.keep(info.path, info.report.identity, info.fingerprint, resident.depths)

    def _prefill(self, job: Job) -> None:
        """One chunk of the first job in line, which then goes to the end of the line."""
        assert job.resident is not None
        assert job.sequence is not None
        self._prefilling.remove(job)
        self._prefilling.append(job)
        chunk = job.resident.options.prefill_chunk
        try:
            done = rounds.prefill_chunk(job.resident.model, job.sequence, chunk)
            if (done is None or done.error is None) and self._prefixes.wants(job.sequence, chunk):
                self._prefixes.keep(job.params.model, job.sequence, chunk)
        except DeviceFailure as error:
            self._lose([job], error)
            return
        except EngineError as error:
            self._end(job, FinishReason.ERROR, error)
            return
        except Exception:
            log.exception("a prefill chunk could not be built")
            self._end(job, FinishReason.ERROR, _build_failure())
            return
        if done is not None:
            job.prefilled = time.monotonic()
            self._prefilling.remove(job)
            self._decoding.append(job)
            self._take(job, done)

    def _decode(self, resident: Resident, jobs: list[Job]) -> None:
        """One round for the jobs of a model. A round that cannot be built is tried again for each job alone, without
        drafts; only a job that fails even so ends."""
        try:
            done = self._round(resident, resident.drafter or NoDrafter(), jobs)
        except DeviceFailure as error:
            self._lose(jobs, error)
        except Exception:
            log.exception("a round could not be built; trying its sequences alone")
            for job in jobs:
                self._decode_alone(resident, job)
        else:
            self._deliver(jobs, done)

    def _decode_alone(self, resident: Resident, job: Job) -> None:
        try:
            done = self._round(resident, NoDrafter(), [job])
        except DeviceFailure as error:
            self._lose([job], error)
        except EngineError as error:
            self._end(job, FinishReason.ERROR, error)
        except Exception:
            log.exception("a sequence cannot go on even alone")
            self._end(job, FinishReason.ERROR, _build_failure())
        else:
            self._deliver([job], done)

    def _round(self, resident: Resident, drafter: Drafter, jobs: list[Job]) -> Round:
        sequences = [job.sequence for job in jobs if job.sequence is not None]
        return paced_round(resident.model, drafter, resident.depths, sequences)

    def _deliver(self, jobs: list[Job], done: Round) -> None:
        """Outside of what is tried again: these tokens are committed."""
        for job, committed in zip(jobs, done.committed, strict=True):
            job.timed(done)
            self._take(job, committed)

    def _take(self, job: Job, committed: Committed) -> None:
        if committed.error is not None:
            self._end(job, FinishReason.ERROR, committed.error)
            return
        try:
            ended = job.emit(committed.tokens, committed.logprobs)
        except Exception:  # the tokenizers library raises plain Exception; no other reply may suffer for it
            log.exception("a reply's text could not be told")
            self._end(job, FinishReason.ERROR, _build_failure())
            return
        if ended:
            self._forget(job)

    def _lose(self, jobs: list[Job], error: DeviceFailure) -> None:
        """A failed evaluation took these sequences' caches with it; the others go on."""
        log.error("the device failed: %s", error)
        for job in jobs:
            detail = "the device failed while it computed this reply"
            self._end(job, FinishReason.ERROR, EngineError(ErrorReason.DEVICE_FAILURE, detail))
        # A device may report a failure one call late: what was stored just before may be junk.
        for model in {job.params.model for job in jobs}:
            self._prefixes.forget(model)
        _release_memory()

    def _end(self, job: Job, reason: FinishReason, error: EngineError | None = None) -> None:
        job.finish(reason, error=error)
        self._forget(job)

    def _forget(self, job: Job) -> None:
        for place in (self._waiting, self._prefilling, self._decoding):
            if job in place:
                place.remove(job)
        job.sequence = None
        self._board.release()

    def _end_everything(self) -> None:
        closed = EngineError(ErrorReason.ENGINE_CLOSED, "the engine is closed")
        with self._board.lock:
            self._board.closed = True
            self._board.models.clear()
        for command in self._inbox.take(0.0):
            if isinstance(command, Submit):
                self._waiting.append(Job(command.params, command.stream, command.submitted))
            elif isinstance(command, Load | Unload):
                command.result.set_exception(closed)
        for load, steps in self._loads:
            steps.close()
            load.result.set_exception(closed)
        for job in [*self._waiting, *self._prefilling, *self._decoding]:
            self._end(job, FinishReason.ERROR, closed)
        self._loads.clear()
        for resident in self._residents.values():
            self._remember(resident)
        self._residents.clear()
        _release_memory()


def _build_failure() -> EngineError:
    return EngineError(ErrorReason.BUILD_FAILURE, "this reply's next step could not be built")


def _release_memory() -> None:
    gc.collect()
    mx.clear_cache()
