"""One token a row from its logits, in one launch: top-k, top-p, min-p, temperature and an exponential race.

Which tokens are kept is counted in integers, by value, and sums run over values in falling order: a row's token depends
on that row alone.
"""

from __future__ import annotations

import struct

import mlx.core as mx

from ..launch import CUDA_TYPES, cuda_launch, platform, source_text, version_of
from . import metal
from .reference import WORDS, reference

__all__ = ["VERSION", "WORDS", "check", "reference", "row_words", "sample"]

_THREADS = 512
VERSION = version_of(*(source_text(__file__, name) for name in ("kernel.cu", "kernel.metal", "metal.py")))


def row_words(
    seed: int, position: int, purpose: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[int, ...]:
    """A row's parameters as WORDS words.

    Args:
        seed: 0 <= seed < 2**64; with the position, the purpose and the token it determines the noise.
        position: absolute position of the row's token, below 2**32.
        purpose: which of the independent draws at a position.
        temperature: above 0.
        top_k: tokens to keep; 0 keeps all.
        top_p: mass to keep, of what top-k leaves; 1 keeps all.
        min_p: share of the likeliest token's probability that a token must have; 0 keeps all.
    """
    floats = struct.unpack("<3I", struct.pack("<3f", temperature, top_p, min_p))
    return (seed & 0xFFFFFFFF, seed >> 32, position, floats[0], top_k, floats[1], floats[2], purpose)


def check(logits: mx.array, parameters: mx.array) -> None:
    """Raises ValueError when shapes or dtypes do not fit together."""
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits are {logits.shape}, expected [R, V]")
    if parameters.shape != (logits.shape[0], WORDS) or parameters.dtype != mx.uint32:
        raise ValueError(f"parameters are {parameters.shape} {parameters.dtype}, expected [R, {WORDS}] uint32")
    if logits.dtype not in (mx.bfloat16, mx.float16):
        raise ValueError(f"dtype {logits.dtype} is neither bfloat16 nor float16")


def sample(logits: mx.array, parameters: mx.array) -> mx.array:
    """Draws each row's token.

    Top-k, then top-p and min-p on what is left at temperature 1, temperature last; of equal values the lowest ids come
    first. Then a race: the least -log1p(-u) / p wins, u from Philox4x32-10 at counter (token // 4, position, purpose,
    0), word token % 4.

    Args:
        logits: `[R, V]` bfloat16 or float16.
        parameters: `[R, 8]` uint32, see `row_words`.

    Returns:
        `[R]` int32; any token where a row has a NaN or no finite value.

    Raises:
        ValueError: shapes or dtypes that do not fit together or that the kernel does not have.
    """
    check(logits, parameters)
    if platform() == "metal":
        return metal.launch(logits, parameters)
    rows, vocab_size = logits.shape
    body = f"""
  sampler::run<{CUDA_TYPES[logits.dtype]}, {vocab_size}>(logits, parameters, tokens);
"""
    kernel = cuda_launch("sampler", __file__, body, ("logits", "parameters"), ("tokens",))
    (tokens,) = kernel(
        inputs=[logits, parameters],
        output_shapes=[(rows,)],
        output_dtypes=[mx.int32],
        grid=(rows * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
    )
    return tokens
