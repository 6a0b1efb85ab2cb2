"""An engine in a process of its own, with a model of random weights."""

import subprocess
import sys
import textwrap
from pathlib import Path

import psutil

from mlx_mtp_backend import (
    EngineOptions,
    EngineProcess,
    FormatKind,
    GenerateParams,
    LoadOptions,
    ResponseFormat,
    Sampling,
    WiringPolicy,
)

QUIET = LoadOptions(depth=2, wiring=WiringPolicy.OFF, prefill_chunk=16)
PROMPT = tuple(range(3, 43))
LONG = PROMPT * 90
SCHEMA = ResponseFormat(FormatKind.JSON_SCHEMA, '{"type": "object", "properties": {"n": {"enum": [1, 2]}}}')


def ask(**changes) -> GenerateParams:
    defaults = {"prompt": PROMPT, "max_tokens": 24, "sampling": Sampling(0.8), "seed": 5, "ignore_eos": True}
    return GenerateParams("history", **defaults | changes)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def loaded(history: Path, on_end=None, **options) -> EngineProcess:
    engine = EngineProcess(EngineOptions(**{"device": "cpu", "max_streams": 4} | options), on_end)
    engine.load("history", history, QUIET).result(timeout=60)
    return engine


def python(code: str, *arguments: str) -> subprocess.Popen:
    """A process of its own that runs the code, dedented; its standard input and output are pipes."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
