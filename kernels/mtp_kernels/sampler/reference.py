"""What the sampler computes, in plain MLX operations: a full sort, then the definitions one after another."""

from __future__ import annotations

import mlx.core as mx

WORDS = 8
"""Of a row's parameters: key (2), position, temperature, top-k, top-p, min-p, purpose; fractions as float bits."""


def reference(logits: mx.array, parameters: mx.array) -> mx.array:
    """The definition of right for `sample`: same arguments, same result but where two scores or a border are within
    rounding."""
    vocab_size = logits.shape[1]
    values = logits.astype(mx.float32)
    temperature, top_p, min_p = (parameters[:, word : word + 1].view(mx.float32) for word in (3, 5, 6))
    top_k = parameters[:, 4:5]
    rank = mx.arange(vocab_size, dtype=mx.uint32)
    order = mx.argsort(_falling(values), axis=-1)
    sorted_values = mx.take_along_axis(values, order, axis=-1)
    top = sorted_values[:, :1]
    kept = (rank < top_k) | (top_k == 0)
    mass = mx.where(kept, mx.exp(sorted_values - top), 0)
    before = mx.cumsum(mass, axis=-1, inclusive=False)
    kept &= (before < top_p * mx.sum(mass, axis=-1, keepdims=True)) | (top_p >= 1)
    kept &= sorted_values >= top + mx.log(min_p)
    draws = philox(parameters[:, :2], parameters[:, 2:3], parameters[:, 7:8], order.astype(mx.uint32))
    uniform = mx.minimum((draws.astype(mx.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    score = mx.log(-mx.log1p(-uniform)) - (sorted_values - top) / temperature
    score = mx.where(kept & (sorted_values > -mx.inf), score, mx.inf)
    best = mx.min(score, axis=-1, keepdims=True)
    winners = mx.where(score == best, order.astype(mx.int32), vocab_size - 1)
    return mx.min(winners, axis=-1)


def _falling(values: mx.array) -> mx.array:
    """Keys that rise as values fall, and with the id where values are equal: uint64 [R, V]."""
    pattern = (values + 0.0).view(mx.uint32)  # + 0.0 makes -0.0 equal to 0.0
    falling = mx.where(pattern >> 31 == 1, pattern, ~pattern ^ 0x80000000)
    return (falling.astype(mx.uint64) << 32) | mx.arange(values.shape[1]).astype(mx.uint64)


def philox(key: mx.array, position: mx.array, purpose: mx.array, tokens: mx.array) -> mx.array:
    """Philox4x32-10 (Salmon et al. 2011) at counter (token // 4, position, purpose, 0): word token % 4 of it.

    Args:
        key: uint32 [R, 2].
        position, purpose: uint32 [R, 1].
        tokens: uint32 [R, V].

    Returns:
        uint32 [R, V].
    """
    a, b = tokens >> 2, mx.broadcast_to(position, tokens.shape)
    c, d = mx.broadcast_to(purpose, tokens.shape), mx.zeros(tokens.shape, mx.uint32)
    k, m = key[:, :1], key[:, 1:]
    for _ in range(10):
        low, high = a.astype(mx.uint64) * 0xD2511F53, c.astype(mx.uint64) * 0xCD9E8D57
        a, c = (high >> 32).astype(mx.uint32) ^ b ^ k, (low >> 32).astype(mx.uint32) ^ d ^ m
        b, d = high.astype(mx.uint32), low.astype(mx.uint32)
        k, m = k + 0x9E3779B9, m + 0xBB67AE85
    word = tokens & 3
    return mx.where(word < 2, mx.where(word == 0, a, b), mx.where(word == 2, c, d))
