"""One llama.cpp child process: started, listened to, ended without leaving anything behind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import secrets
import sys
from collections import deque
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from router.backends import llama_child
from router.backends.llama_child import ChildConfig
from router.domain import ErrorReason, RouterError

log = logging.getLogger(__name__)

STDERR_LINES = 60
STDERR_LINE_BYTES = 2**16  # more of one line than this is thrown away
TERMINATE_GRACE = 2.0  # seconds between SIGTERM and SIGKILL


@functools.cache
def engine_version() -> str:
    """The llama.cpp build inside the installed xllamacpp, such as "llama.cpp b11549"; "" if it is not installed."""
    try:
        return f"llama.cpp b{version('xllamacpp').rpartition('.')[2]}"
    except PackageNotFoundError:
        return ""


class LlamaProcess:
    """A running child. Made by `start_child`; `close` must be awaited at the end.

    Attributes:
        address: base URL of its HTTP routes, "http://127.0.0.1:PORT".
        api_key: what they ask for.
        fingerprint: what its numerics depend on.
    """

    def __init__(self, process: asyncio.subprocess.Process, config: ChildConfig) -> None:
        self.address = ""
        self.fingerprint = ""
        self.api_key = config.api_key
        self.config = config
        self._process = process
        self._last_words: deque[str] = deque(maxlen=STDERR_LINES)
        self._drain = asyncio.create_task(self._drain_stderr(), name="llama.cpp stderr")

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not been seen to end."""
        return self._process.returncode is None

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.returncode

    def last_words(self) -> str:
        """The end of its stderr."""
        return "\n".join(self._last_words)

    async def wait(self) -> None:
        """Waits for its end."""
        await self._process.wait()

    async def kill(self) -> None:
        """Ends it with SIGKILL and waits for its end; `close` is still to be awaited."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def close(self) -> None:
        """Ends it: SIGTERM, then SIGKILL. Safe to call twice and in a cancelled task."""
        await asyncio.shield(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()  # the child ends at the end of its stdin
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), TERMINATE_GRACE)
            except TimeoutError:
                await self.kill()
        await asyncio.wait({self._drain}, timeout=1.0)  # its last words
        self._drain.cancel()
        await asyncio.gather(self._drain, return_exceptions=True)

    async def _drain_stderr(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None
        while True:
            try:
                line = await stderr.readuntil(b"\n")
            except asyncio.IncompleteReadError as end:
                if end.partial:
                    self._last_words.append(end.partial.decode(errors="replace"))
                return
            except asyncio.LimitOverrunError as overrun:
                await stderr.readexactly(overrun.consumed)
                continue
            text = line.decode(errors="replace").rstrip()
            self._last_words.append(text)
            log.debug("llama.cpp %d: %s", self.pid, text)


async def start_child(config: ChildConfig, load_timeout: float) -> LlamaProcess:
    """Starts a child and waits until its model is loaded.

    Args:
        config: its `api_key` is ignored: each child gets a fresh one.
        load_timeout: seconds.

    Raises:
        RouterError: MODEL_LOAD_FAILED; the child is gone then, as it is when the task is cancelled.
    """
    config = replace(config, api_key=secrets.token_urlsafe(32))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # the script's folder holds modules named as installed packages are
        llama_child.__file__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=STDERR_LINE_BYTES,
        start_new_session=True,
    )
    child = LlamaProcess(process, config)
    try:
        report = await asyncio.wait_for(_handshake(process, config), load_timeout)
    except TimeoutError:
        await child.close()
        raise _load_failed(config, f"it did not load within {load_timeout:g} s") from None
    except BaseException:
        await child.close()
        raise
    if "address" not in report:
        await process.wait()  # so that stderr is complete
        await child.close()
        log.error("llama.cpp could not load %s:\n%s", config.model_path, child.last_words())
        raise _load_failed(config, "llama.cpp refused it; the router's log has the details")
    child.address = str(report["address"])
    child.fingerprint = _fingerprint(config, report)
    return child


async def _handshake(process: asyncio.subprocess.Process, config: ChildConfig) -> dict[str, object]:
    """The child's report; empty if it ended without one."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(asdict(config)).encode() + b"\n")
    with contextlib.suppress(ConnectionError):  # it died at once; the missing report says so
        await process.stdin.drain()
    line = await process.stdout.readline()
    report = json.loads(line) if line.endswith(b"\n") else {}
    return report if isinstance(report, dict) else {}


def _fingerprint(config: ChildConfig, report: dict[str, object]) -> str:
    devices = report.get("devices")
    names = "+".join(map(str, devices)) if isinstance(devices, list) else "unknown device"
    features = "".join(part for part in str(report.get("system", "")).split() if part != "|").replace("=1", " ").strip()
    return (
        f"{engine_version()} {names} [{features}] threads={config.threads} batch={config.batch_tokens} "
        f"parallel={config.parallel} gpu_layers={config.gpu_layers} draft={config.draft_depth}"
    )


def _load_failed(config: ChildConfig, why: str) -> RouterError:
    return RouterError(
        ErrorReason.MODEL_LOAD_FAILED,
        f"the model could not be loaded: {why}",
        metadata={"file": Path(config.model_path).name},
    )
