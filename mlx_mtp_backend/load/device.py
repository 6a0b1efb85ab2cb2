"""Which fast device MLX has here, and how much memory."""

from __future__ import annotations

import os
import sys


def prepare_mlx() -> None:
    """Sets what MLX reads at its first use."""
    if sys.platform == "linux":
        # With CUDA MLX would cut a pass over large weights into a graph every few launches.
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "60")
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "100000")


def accelerator(device: str | None = None) -> str | None:
    """ "Metal" or "CUDA" where MLX can use one, else None.

    Imports MLX: where a BLAS is to be interposed, start the engine first.

    Args:
        device: as in EngineOptions; on "cpu" nothing else is used.
    """
    if device == "cpu":
        return None
    prepare_mlx()
    import mlx.core as mx

    if mx.metal.is_available():
        return "Metal"
    if mx.cuda.is_available():
        return "CUDA"
    return None


def memory_bytes() -> int:
    """Memory of MLX's default device, or of the machine where it does not tell. Imports MLX."""
    import mlx.core as mx

    info = mx.device_info()
    for key in ("memory_size", "total_memory"):
        if isinstance(size := info.get(key), int):
            return size
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
