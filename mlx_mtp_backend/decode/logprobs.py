"""Log-probabilities of emitted tokens under the model's own law: log-softmax of the logits as the model gave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp_backend.api import TokenLogprob
from mlx_mtp_backend.decode.sampling import candidates


@dataclass(frozen=True, slots=True)
class Measured:
    """What R rows say, not evaluated.

    Attributes:
        own: float32 [R], of each row's token.
        ids, top: int32 and float32 [R, C], the likeliest tokens, likeliest first; None without any.
    """

    own: mx.array
    ids: mx.array | None = None
    top: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        return [array for array in (self.own, self.ids, self.top) if array is not None]

    def told(self, tokens: Sequence[int]) -> tuple[TokenLogprob, ...]:
        """Of the first rows, whose tokens these are; waits for the device."""
        own: Any = self.own.tolist()
        ids: Any = [[]] * len(own) if self.ids is None else self.ids.tolist()
        top: Any = [[]] * len(own) if self.top is None else self.top.tolist()
        # zip stops at the last committed token; rows behind it were not kept.
        return tuple(
            TokenLogprob(token, value, tuple(zip(row_ids, row_top, strict=True)))
            for token, value, row_ids, row_top in zip(tokens, own, ids, top, strict=False)
        )


def measure(logits: mx.array, tokens: mx.array, count: int) -> Measured:
    """Log-probabilities of one token per row, and of the `count` likeliest.

    Args:
        logits: [R, V], any float type.
        tokens: int32 [R].
    """
    logits = logits.astype(mx.float32)
    mass = mx.logsumexp(logits, axis=-1, keepdims=True)
    own = (mx.take_along_axis(logits, tokens[:, None], axis=-1) - mass)[:, 0]
    if not count:
        return Measured(own)
    ids = candidates(logits, min(count, logits.shape[-1]))
    return Measured(own, ids, mx.take_along_axis(logits, ids, axis=-1) - mass)
