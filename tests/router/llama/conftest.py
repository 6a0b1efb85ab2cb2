"""Backends that run the real llama.cpp on small models with known answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from support.gguf_files import THINKING_TEMPLATE, Script, write_mtp_model, write_script_model

from router.backends.llama_cpp import LlamaCppBackend
from router.settings import LlamaCppSettings

COUNTING = Script([f" n{i}" for i in range(50)], repeat=True)  # "L" counts for ever

MakeBackend = Callable[..., LlamaCppBackend]


@pytest.fixture(scope="session")
def script_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that thinks before it answers, counts after "L", spells emoji after "U", and babbles after "S"."""
    path = tmp_path_factory.mktemp("gguf") / "script.gguf"
    scripts = {
        "<|assistant|>": Script(
            ["<think>", "Let", " me", " ponder", "</think>", "\n", "The", " answer", " is", " 42", "."]
        ),
        "L": COUNTING,
        "U": Script([b"\xc3", b"\xa9", *(bytes([byte]) for byte in "😀".encode()), "!!"]),
    }
    letters = "abcdef"
    write_script_model(
        path, scripts, choices={"S": letters, **dict.fromkeys(letters, letters)}, template=THINKING_TEMPLATE
    )
    return path


@pytest.fixture(scope="session")
def slow_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counts after "L", at a few milliseconds a token."""
    path = tmp_path_factory.mktemp("gguf") / "slow.gguf"
    write_script_model(path, {"L": COUNTING}, context=16384, layers=2, feed_forward=4096)
    return path


@pytest.fixture(scope="session")
def mtp_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counts after "L"; its head drafts wrongly after every third token."""
    path = tmp_path_factory.mktemp("gguf") / "mtp.gguf"
    write_mtp_model(path, {"L": COUNTING}, wrong_every=3)
    return path


@pytest.fixture
async def make_backend() -> AsyncIterator[MakeBackend]:
    """Makes backends with one thread and small batches; closes them after the test."""
    made: list[LlamaCppBackend] = []

    def make(**settings: Any) -> LlamaCppBackend:
        backend = LlamaCppBackend("llama_cpp", LlamaCppSettings(**{"threads": 1, "batch_tokens": 64, **settings}))
        made.append(backend)
        return backend

    yield make
    for backend in made:
        await backend.close()


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.subprocess.Process]:
    """Every process started from now on."""
    processes: list[asyncio.subprocess.Process] = []
    spawn = asyncio.create_subprocess_exec

    async def noted(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        processes.append(await spawn(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    return processes
