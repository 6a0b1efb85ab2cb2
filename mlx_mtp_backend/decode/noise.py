"""Counter-based noise: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").

Every draw is a pure function of (seed, absolute position, token, purpose), so it does not matter which rows share a
pass, which device computes it or how often. The 32-bit integers are equal on every device; the floats made from them
are equal wherever the device's log is.

Layout: key = (low, high word of the seed); counter = (token // 4, position, purpose, 0); the draw of a token is word
token % 4 of that block, so a dense row costs one block per four tokens.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable

import mlx.core as mx

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LARGEST_BELOW_ONE = 1 - 2.0**-24


class Purpose(enum.IntEnum):
    """Independent draws at one position."""

    TARGET = 0  # the race that picks the target's token; the coupled draft shares it
    DRAFT = 1  # the race that picks an uncoupled draft
    ACCEPT = 2  # the uniform that accepts or rejects it
    RESIDUAL = 3  # the race over what a rejection leaves


def philox4x32(counter: tuple[mx.array, mx.array, mx.array, mx.array], key: mx.array) -> mx.array:
    """Ten rounds of Philox4x32.

    Args:
        counter: four uint32 arrays of one shape S.
        key: uint32 S + [2], or what broadcasts to it.

    Returns:
        uint32 S + [4].
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key[..., 0], key[..., 1]
    for _ in range(_ROUNDS):
        low = c0.astype(mx.uint64) * _MULTIPLIERS[0]
        high = c2.astype(mx.uint64) * _MULTIPLIERS[1]
        c0, c2 = (high >> 32).astype(mx.uint32) ^ c1 ^ k0, (low >> 32).astype(mx.uint32) ^ c3 ^ k1
        c1, c3 = high.astype(mx.uint32), low.astype(mx.uint32)
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return mx.stack([c0, c1, c2, c3], axis=-1)


# Ten rounds are a hundred small operations; compiled they are one kernel.
_philox: Callable[..., mx.array] = mx.compile(philox4x32)


def keys(seeds: Iterable[int]) -> mx.array:
    """Seeds, 0 <= seed < 2**64, as Philox keys: uint32 [R, 2]."""
    return mx.array([[seed & 0xFFFFFFFF, seed >> 32] for seed in seeds], dtype=mx.uint32)


def _block(keys: mx.array, positions: mx.array, blocks: mx.array, purpose: Purpose) -> mx.array:
    shape = mx.broadcast_shapes(positions.shape, blocks.shape)
    word = mx.broadcast_to(blocks.astype(mx.uint32), shape)
    position = mx.broadcast_to(positions.astype(mx.uint32), shape)
    return _philox((word, position, mx.full(shape, int(purpose), mx.uint32), mx.zeros(shape, mx.uint32)), keys[:, None])


def bits(keys: mx.array, positions: mx.array, tokens: mx.array, purpose: Purpose) -> mx.array:
    """The integer draws of chosen tokens.

    Args:
        keys: uint32 [R, 2], see `keys`.
        positions: integers [R].
        tokens: integers [R, M].

    Returns:
        uint32 [R, M].
    """
    block = _block(keys, positions[:, None], tokens >> 2, purpose)
    return mx.take_along_axis(block, (tokens & 3)[..., None], axis=-1)[..., 0]


def row_bits(keys: mx.array, positions: mx.array, vocab_size: int, purpose: Purpose) -> mx.array:
    """The integer draws of every token: uint32 [R, vocab_size], equal to `bits` of arange(vocab_size)."""
    block = _block(keys, positions[:, None], mx.arange((vocab_size + 3) // 4)[None], purpose)
    return block.reshape(positions.shape[0], -1)[:, :vocab_size]


def uniform(draws: mx.array) -> mx.array:
    """(k + 0.5) / 2**32 as float32, below 1: rounding must not make an event of probability 1 fail."""
    return mx.minimum((draws.astype(mx.float32) + 0.5) * 2.0**-32, _LARGEST_BELOW_ONE)


def log_exponential(draws: mx.array) -> mx.array:
    """log of an Exp(1) draw, -log1p(-uniform): fine near 0, which is the end that wins a race.

    Its smallest value is log(2**-33), so a race resolves tokens of probability down to about 1e-10.
    """
    return mx.log(-mx.log1p(-uniform(draws)))
