"""Looks at everything a service on this machine depends on, and says what to do where something is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router.catalog import HEAD_ADVICE, Catalog, build_catalog
from router.domain import BackendKind, BackendState, ModelFormat
from router.settings import LlamaCppSettings, MlxSettings, Settings, data_home

PROBE_TIMEOUT = 120.0  # seconds; the first import of MLX and mlx-lm on a cold disk takes many
SERVER_TIMEOUT = 2.0
LOW_DISK, LOW_MEMORY = 10e9, 4e9  # bytes below which models hardly fit
_PINNED = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^;,\s]+)\s*$")


class State(StrEnum):
    """How bad a finding is; a problem makes the exit status 1."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `advice` says what to do, empty where nothing has to be done."""

    area: str
    state: State
    what: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings; `facts` is what they rest on, as plain types."""

    findings: tuple[Finding, ...]
    facts: dict[str, Any]

    @property
    def healthy(self) -> bool:
        """Whether there is no problem; notes may remain."""
        return all(finding.state is not State.PROBLEM for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain types for json.dumps."""
        return {"healthy": self.healthy, "findings": [asdict(f) for f in self.findings], "facts": self.facts}


def diagnose(settings: Settings, target: str | None) -> Diagnosis:
    """Looks at packages, disk, memory, devices, kernels, backends, models and the server.

    Args:
        target: address of the server to look for; None to leave it out.
    """
    home = data_home()
    checks = home / "kernel-checks.json"
    engine = probe_engine("--kernel-checks", str(checks))
    with _warnings("router.discovery", "router.catalog") as warnings:
        catalog = build_catalog(settings, home / "models")
    facts: dict[str, Any] = {
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "memory_bytes": {"total": _memory_total(), "available": _memory_available()},
        "disk_free_bytes": _disk_free(home),
        "data_home": str(home),
        "packages": {name: _installed(name) for name, _ in pinned()},
        "engine": engine,
    }
    findings = [
        *_packages(),
        *_room(facts),
        *_engine(engine, settings),
        *_kernels(engine),
        *_backends(settings, engine, catalog),
        *_servers(settings, catalog),
        *(Finding("models", State.NOTE, warning) for warning in warnings),
        *_models(catalog, settings, home / "models"),
        *([] if target is None else [_server(target)]),
    ]
    return Diagnosis(tuple(findings), facts)


def pinned() -> Iterator[tuple[str, str]]:
    """Name and version of every package that this one pins, extras left out."""
    for requirement in requires("mtp-router") or ():
        if match := _PINNED.fullmatch(requirement.strip()):
            yield match[1], match[2]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    wrong = [(name, wanted, _installed(name)) for name, wanted in pinned()]
    wrong = [item for item in wrong if item[1] != item[2]]
    for name, wanted, present in wrong:
        what = f"{name} is {present or 'not installed'}, tested with {wanted}"
        yield Finding("packages", State.NOTE if present else State.PROBLEM, what, f"pip install {name}=={wanted}")
    if not wrong:
        yield Finding("packages", State.OK, "every pinned package is the version that was tested")


def _room(facts: dict[str, Any]) -> Iterator[Finding]:
    memory, disk = facts["memory_bytes"], facts["disk_free_bytes"]
    free = memory["available"] or memory["total"]
    low = free is not None and free < LOW_MEMORY
    advice = "close other programs, or serve smaller models" if low else ""
    yield Finding(
        "memory", State.NOTE if low else State.OK, f"{_gigabytes(free)} of {_gigabytes(memory['total'])} free", advice
    )
    low = disk is not None and disk < LOW_DISK
    advice = f"make room for models, or point MTP_ROUTER_HOME away from {facts['data_home']}" if low else ""
    yield Finding("disk", State.NOTE if low else State.OK, f"{_gigabytes(disk)} free for models", advice)


def _engine(engine: dict[str, Any], settings: Settings) -> Iterator[Finding]:
    if "error" in engine:
        yield Finding(
            "mlx", State.PROBLEM, f"MLX does not start: {engine['error']}", "pip install --force-reinstall mlx"
        )
        return
    device = f"MLX {engine['mlx']} on {engine['platform']} ({engine['device']})"
    if engine["platform"] != "cpu":
        yield Finding("mlx", State.OK, device)
        return
    advice = "install mlx[cuda13] on a machine with an NVIDIA GPU" if platform.system() == "Linux" else ""
    yield Finding("mlx", State.NOTE, f"{device}: the engine is slow there", advice)
    if platform.system() != "Linux":
        return
    wanted = any(isinstance(backend, MlxSettings) and backend.openblas for backend in settings.backends.values())
    problem = probe_engine("--openblas").get("blas_problem")
    if problem is None:
        what = "OpenBLAS takes the place of MLX's BLAS" if wanted else "MLX's reference BLAS is in use"
        advice = "" if wanted else "backends.mlx.openblas = true is much faster; replays are then best effort"
        yield Finding("blas", State.OK if wanted else State.NOTE, what, advice)
    else:
        state = State.PROBLEM if wanted else State.NOTE
        yield Finding("blas", state, f"OpenBLAS cannot be used: {problem}", "pip install 'mtp-router[openblas]'")


def _kernels(engine: dict[str, Any]) -> Iterator[Finding]:
    checks: list[dict[str, Any]] = engine.get("kernel_checks", [])
    if engine.get("platform") in (None, "cpu"):
        yield Finding("kernels", State.NOTE, "no GPU: MLX's own operations run")
        return
    if not checks:
        how = "tune PATH measures" if engine["platform"] == "metal" else "verify PATH checks"
        advice = f"mtp-router {how} them with a model of yours"
        yield Finding("kernels", State.NOTE, "no kernel has been checked on this device yet", advice)
        return
    failed = [check for check in checks if check["implementation"] == "fallback"]
    for check in failed:
        what = f"{check['kernel']} ({check['shape']}): {check['reason']}; MLX's own operations run instead"
        yield Finding("kernels", State.PROBLEM, what, "report it with the output of mtp-router verify --json")
    if not failed:
        yield Finding("kernels", State.OK, f"{len(checks)} kernels and shapes passed their checks on this device")


def _backends(settings: Settings, engine: dict[str, Any], catalog: Catalog) -> Iterator[Finding]:
    for name, backend in sorted(settings.backends.items()):
        area = f"backend {name}"
        if isinstance(backend, LlamaCppSettings):
            present = _run([sys.executable, "-c", "import xllamacpp"])
            broken = present.returncode != 0
            what = f"embedded llama.cpp {_installed('xllamacpp')}" + (" does not start" if broken else "")
            advice = "pip install --force-reinstall xllamacpp" if broken else ""
            yield Finding(area, State.PROBLEM if broken else State.OK, what, advice)
        elif isinstance(backend, MlxSettings):
            yield _mlx_backend(area, name, backend, engine, catalog)


def _servers(settings: Settings, catalog: Catalog) -> Iterator[Finding]:
    """Servers that others started. One that is down is a problem where a model is wanted from it."""
    from router.doctor_servers import ask_servers  # loads the clients

    reports, homeless = asyncio.run(ask_servers(settings, catalog))
    for report in reports:
        status, area = report.status, f"backend {report.status.name}"
        if status.state is not BackendState.READY:
            what = status.error.message if status.error else "it does not answer"
            advice = f"start it, or mend or remove backends.{status.name}"
            yield Finding(area, State.PROBLEM if report.models else State.NOTE, what, advice)
            continue
        name = "Ollama" if status.kind is BackendKind.OLLAMA else "a llama-server"
        yield Finding(area, State.OK, f"{name} answers{f', version {status.version}' if status.version else ''}")
        for model, problem in report.problems.items():
            yield Finding(area, State.PROBLEM, f"{model}: {problem}", f"fetch it there, or mend models.{model}")
    for model, problem in homeless.items():
        yield Finding("models", State.PROBLEM, problem, f"mend models.{model}, or add a backend for it")


def _mlx_backend(area: str, name: str, backend: MlxSettings, engine: dict[str, Any], catalog: Catalog) -> Finding:
    if not any(entry.facts.format is ModelFormat.CHECKPOINT for entry in catalog.entries):
        return Finding(area, State.NOTE, "not started: no checkpoint is configured")
    if engine.get("platform") == "cpu" and not backend.allow_cpu:
        advice = f"backends.{name}.allow_cpu = true, where slow is good enough"
        return Finding(area, State.NOTE, "not used: there is neither Metal nor CUDA", advice)
    return Finding(area, State.OK, f"in a process of its own, on {engine.get('platform', 'nothing')}")


def _models(catalog: Catalog, settings: Settings, pulled: Path) -> Iterator[Finding]:
    for entry in catalog.entries:
        problems = [item.facts.problem for item in (entry, entry.gguf) if item is not None and item.facts.problem]
        for problem in problems:
            advice = (
                f"mend or remove models.{entry.name}" if entry.name in settings.models else f"remove {entry.source}"
            )
            yield Finding("models", State.PROBLEM, f"{entry.name}: {problem}", advice)
        if entry.lacks_head:
            what = f"{entry.name} declares a prediction head that its files lack, so that nothing is drafted"
            yield Finding("models", State.NOTE, what, f"models.{entry.name}.{HEAD_ADVICE}")
    taken = {name for model, entry in settings.models.items() for name in (model, *entry.aliases)}
    for file in sorted(pulled.glob("*.gguf")):
        if file.stem in taken:
            what = f"{file.name} in {pulled} is hidden by the settings' model of that name"
            yield Finding("models", State.NOTE, what, "rename one of them to serve both")
    served = sum(not entry.facts.problem for entry in catalog.entries)
    advice = "" if served else "mtp-router pull smollm2 fetches one"
    yield Finding("models", State.OK if served else State.NOTE, f"{served} can be served", advice)


def _server(target: str) -> Finding:
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=SERVER_TIMEOUT)
        except grpc.RpcError as error:
            code = error.code().name if isinstance(error, grpc.Call) else "UNKNOWN"
            what = f"no server answers at {target} ({code})"
            return Finding("server", State.NOTE, what, "mtp-router serve starts one")
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return Finding("server", State.OK, f"serving at {target}")
    return Finding("server", State.PROBLEM, f"the server at {target} is not serving", "see its log")


@contextlib.contextmanager
def _warnings(*loggers: str) -> Iterator[list[str]]:
    """What these loggers warn of meanwhile; nothing of it is printed."""
    told: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    collector = Collector(logging.WARNING)
    for name in loggers:
        logging.getLogger(name).addHandler(collector)
    try:
        yield told
    finally:
        for name in loggers:
            logging.getLogger(name).removeHandler(collector)


def probe_engine(*arguments: str) -> dict[str, Any]:
    """What mlx_mtp_backend.load.probe says, or {"error": why it says nothing}."""
    try:
        done = _run([sys.executable, "-m", "mlx_mtp_backend.load.probe", *arguments])
        facts: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {PROBE_TIMEOUT:g} s"}
    except ValueError:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"error": last[0][:200]}
    return facts


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT, check=False)


def _quietly(look: Callable[[], int]) -> int | None:
    try:
        return look()
    except (OSError, ValueError, KeyError):
        return None


def _memory_total() -> int | None:
    return _quietly(lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _memory_available() -> int | None:
    """What Linux says that new programs may take, caches given up; elsewhere it is not known."""

    def read() -> int:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {key: value.split()[0] for key, _, value in (line.partition(":") for line in lines)}
        return int(kilobytes["MemAvailable"]) * 1024

    return _quietly(read)


def _disk_free(folder: Path) -> int | None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return _quietly(lambda: shutil.disk_usage(folder).free)


def _gigabytes(count: int | None) -> str:
    return "an unknown amount" if count is None else f"{count / 1e9:.1f} GB"
