"""A llama-server that somebody else started: the real llama.cpp in a process of its own, with a key."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from router.backends import llama_child
from router.backends.llama_child import ChildConfig

KEY = "open-sesame"


class LlamaServer:
    """The process; `kill` ends it as a crash would."""

    def __init__(self, path: Path, context: int = 512) -> None:
        config = ChildConfig(str(path), KEY, context, 2, 64, 1, 0, 0)
        command = [sys.executable, llama_child.__file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(config)) + "\n")
        self.process.stdin.flush()
        self.address: str = json.loads(self.process.stdout.readline())["address"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
