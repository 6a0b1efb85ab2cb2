"""Draws through the sampler's kernel: one launch for the rows of any requests, however each of them samples.

Whether a sequence is drawn this way is settled for its whole reply by the model and the request, never by its
neighbours: the stock operations round differently.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np
from mtp_kernels.sampler import row_words

from mlx_mtp_backend.decode.noise import Purpose
from mlx_mtp_backend.decode.sequence import Sequence
from mlx_mtp_backend.families.base import Model


def direct(model: Model, sequence: Sequence) -> bool:
    """Whether the kernel draws the sequence's tokens: it reads logits as the model gives them."""
    return model.sampler is not None and sequence.processors is None


def draw(model: Model, logits: mx.array, places: Iterable[tuple[Sequence, int]], purpose: Purpose) -> mx.array:
    """Tokens by the law of sampling.transform and the race of sampling.choose: int32 [R].

    Args:
        logits: [R, V], as the model gave them.
        places: the sequence of each row, and the absolute position of the row's token.
    """
    assert model.sampler is not None
    words = np.array([_words(sequence, position, purpose) for sequence, position in places], dtype=np.uint32)
    return model.sampler(logits, mx.array(words))


def _words(sequence: Sequence, position: int, purpose: Purpose) -> tuple[int, ...]:
    own = sequence.sampling
    if own.greedy:  # the likeliest token, the lowest id of several
        return row_words(sequence.seed, position, purpose, 1.0, 1, 1.0, 0.0)
    return row_words(sequence.seed, position, purpose, own.temperature, own.top_k, own.top_p, own.min_p)
