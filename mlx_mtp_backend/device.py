"""Which fast device MLX has here."""

from __future__ import annotations


def accelerator() -> str | None:
    """ "Metal" or "CUDA" where MLX can use one, else None.

    Imports MLX: where a BLAS is to be interposed, start the engine first.
    """
    import mlx.core as mx

    if mx.metal.is_available():
        return "Metal"
    if mx.cuda.is_available():
        return "CUDA"
    return None
