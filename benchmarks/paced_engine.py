"""The engine's process at a walking pace, so that a fault can be brought about at a chosen stage: run in place of
`mlx_mtp_backend.process.child`."""

from __future__ import annotations

import time
from typing import Any

from mlx_mtp_backend.families.qwen3_5 import Qwen35
from mlx_mtp_backend.process import child
from mlx_mtp_backend.worker import Worker

PACE = 0.003  # seconds that a pass of a model takes longer
SLICE = 0.02  # seconds that a slice of a load takes longer


def slowed(owner: type, name: str, seconds: float) -> None:
    """Has a method take longer."""
    real = getattr(owner, name)

    def method(*arguments: Any) -> Any:
        time.sleep(seconds)
        return real(*arguments)

    setattr(owner, name, method)


if __name__ == "__main__":
    slowed(Qwen35, "trunk", PACE)
    slowed(Worker, "_load_slice", SLICE)
    child.main()
