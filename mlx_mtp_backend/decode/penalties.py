"""Repetition, presence and frequency penalties, by llama.cpp's definition over the whole history.

A token that came c > 0 times before its row (in the prompt, the reply or the drafts that the row follows) has its logit
l replaced by l / r if l > 0, else l * r, and then loses c * frequency + presence. Others keep theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from mlx_mtp_backend.api import Sampling


class History:
    """How often each token came so far: two arrays of the tokens seen and their counts, which only grow."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._places: dict[int, int] = {}
        self._ids = np.zeros(1024, dtype=np.int32)
        self._counts = np.zeros(1024, dtype=np.int32)
        self.add(tokens)

    def add(self, tokens: Iterable[int]) -> None:
        for token, count in Counter(tokens).items():
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._ids, self._counts = (np.concatenate([a, np.zeros_like(a)]) for a in (self._ids, self._counts))
            self._ids[place] = token
            self._counts[place] += count

    @property
    def seen(self) -> tuple[mx.array, mx.array]:
        """Tokens and counts, int32 [U]."""
        used = len(self._places)
        return mx.array(self._ids[:used]), mx.array(self._counts[:used])


def penalise(logits: mx.array, sampling: Sampling, history: History, drafts: mx.array) -> mx.array:
    """Logits under the penalties; only those of tokens that came before are touched.

    Args:
        logits: float32 [R, V]; the last row follows all drafts, each row before it one draft less.
        drafts: int32 [E], E >= R - 1; need not be evaluated.
    """
    seen, seen_counts = history.seen
    rows, length = logits.shape[0], drafts.shape[0]
    ids = mx.concatenate([seen, drafts])
    before = mx.sum((drafts[:, None] == seen[None]) * seen_counts[None], axis=-1)
    counts = mx.concatenate([seen_counts, before.astype(mx.int32)])[None]
    # follows[r, e]: row r follows draft e.
    follows = mx.arange(length)[None] < (mx.arange(rows) + (length + 1 - rows))[:, None]
    counts = counts + mx.sum((ids[None, :, None] == drafts[None, None]) * follows[:, None], axis=-1)
    columns = mx.broadcast_to(ids[None], (rows, ids.shape[0]))
    own = mx.take_along_axis(logits, columns, axis=-1)
    repeated = mx.where(own > 0, own / sampling.repetition_penalty, own * sampling.repetition_penalty)
    less = counts * sampling.frequency_penalty + sampling.presence_penalty
    # A token may have several columns; they hold the same value.
    return mx.put_along_axis(logits, columns, mx.where(counts > 0, repeated - less, own), axis=-1)
