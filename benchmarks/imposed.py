"""Acceptance to order, without the luck of the draw: how many drafts each round keeps.

Independent draws let 48 rounds stray by 6 % from the law that they stand for. Here every stretch of rounds has each
outcome as often as the law says, to within one round, and only the order is random. No MLX here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

_CARDS = 10  # rounds in which a stream of unknown length meets the law once
_GOLDEN = (5**0.5 - 1) / 2


def kept_drafts(law: Sequence[float], rounds: int, *, seed: int = 0, offset: float = 0.5) -> list[int]:
    """How many drafts each of so many rounds keeps; draft i survives in `rounds * law[i]` of them, rounded.

    Args:
        law: probability that draft i and all before it are kept, falling.
        offset: in [0, 1), where the rounding falls; 0.5 is to the nearest.
    """
    kept = [sum(chance > (card + offset) / rounds for chance in law) for card in range(rounds)]
    random.Random(seed).shuffle(kept)
    return kept


class Decks:
    """The same for streams that draw when they draft, each from decks of its own, made anew when used up.

    Args:
        law: as in kept_drafts; of the deepest draft that anybody makes.
    """

    def __init__(self, law: Sequence[float]) -> None:
        self._law = law
        self._left: dict[int, list[int]] = {}
        self._dealt: Counter[int] = Counter()

    def draw(self, stream: int, depth: int) -> int:
        """How many of `depth` drafts this stream's round keeps."""
        left = self._left.setdefault(stream, [])
        if not left:
            self._dealt[stream] += 1
            # Offsets spread evenly, so that the rounding of several decks evens out.
            offset = self._dealt[stream] * _GOLDEN % 1
            left += kept_drafts(self._law, _CARDS, seed=1_000_003 * stream + self._dealt[stream], offset=offset)
        return min(left.pop(), depth)
