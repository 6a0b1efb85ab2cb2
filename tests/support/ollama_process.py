"""Starts the double of an Ollama server, and talks to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from support import ollama_double


class Double:
    """The process, and what it tells of itself."""

    def __init__(self, port: int = 0) -> None:
        command = [sys.executable, "-m", ollama_double.__name__, str(port)]
        tests = Path(ollama_double.__file__).parents[1]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tests)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def tell(self, **wanted: Any) -> dict[str, Any]:
        """Sets what goes wrong from now on; returns what was asked so far."""
        told: dict[str, Any] = httpx.post(f"{self.address}/double", json=wanted, trust_env=False).json()
        return told

    def fail(self, **faults: Any) -> None:
        """Sets what goes wrong; without arguments, nothing."""
        self.tell(faults=faults)

    def asked(self, path: str) -> list[dict[str, Any]]:
        """Bodies of the requests to that path."""
        return [request["body"] for request in self.tell()["requests"] if request["path"] == path]

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
