"""How the Metal few-row matmul is cut up: a few numbers by Apple GPU, and those that tuning found better here.

Numbers that share `words` and `splits` give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import mlx.core as mx

from .reference import Matrix


@dataclass(frozen=True)
class Variant:
    """One way to cut up the product; see kernel.metal.

    Attributes:
        streams: most weight rows that a simdgroup takes at once.
        accumulators: most sums that a lane keeps, 24 to 32; with many rows it takes fewer weight rows.
        words: neighbouring 32-bit words of a weight row that a lane reads at once: 1, 2 or 4.
        splits: simdgroups that share a tile, each with its part of the inputs: 1 to 16.
        tiles: tiles in a threadgroup; tiles * splits is at most 16.

    Raises:
        ValueError: numbers outside of these.
    """

    streams: int
    accumulators: int
    words: int
    splits: int
    tiles: int

    def __post_init__(self) -> None:
        if self.words not in (1, 2, 4) or not 24 <= self.accumulators <= 32 or self.streams < 1:
            raise ValueError(f"no such variant: {self}")
        if self.splits < 1 or self.tiles < 1 or self.splits * self.tiles > 16:
            raise ValueError(f"no such variant: {self}")

    def outputs(self, rows: int, *, norm: bool, swiglu: bool) -> int:
        """Output features of a tile of that many rows; the norm needs a sum a row, SwiGLU two weight rows a feature."""
        streams = min(self.streams, self.accumulators // rows - norm)
        return max(1, streams // (2 if swiglu else 1))

    def __str__(self) -> str:
        return ".".join(str(number) for number in astuple(self))


WIDE = 32_768
"""Features from which a matrix is cut up as an LM head is."""

# Starting values, (layers, LM heads), from what others report of verify-width kernels: splitting the inputs wins on the
# shapes of layers, many tiles and no barrier on LM heads, wider loads lose, and 24 sums a lane is the most that pays.
# GPUs from the M3 on (g15) hand out registers as they are used, so there more are tried. Not one was measured by us.
_BEFORE_M3 = (Variant(4, 24, 1, 4, 1), Variant(4, 24, 1, 1, 8))
_FROM_M3 = (Variant(4, 32, 1, 4, 1), Variant(4, 32, 1, 1, 8))
START = {"applegpu_g13": _BEFORE_M3, "applegpu_g14": _BEFORE_M3}

CANDIDATES = tuple(
    Variant(streams, accumulators, words, splits, 8 if splits == 1 else 1)
    for words in (1, 2)
    for splits in (1, 2, 4)
    for streams, accumulators in ((2, 24), (4, 32))
)
"""What tuning tries."""

_tuned: dict[str, Variant] = {}


def use(tuned: Mapping[str, Variant]) -> None:
    """Puts these variants, by `form`, in place of starting values in this process."""
    _tuned.clear()
    _tuned.update(tuned)


def form(matrices: Sequence[Matrix], *, norm: bool = False, swiglu: bool = False, residual: bool = False) -> str:
    """A product's shape and what is fused into it, as text."""
    first = matrices[0]
    sizes = "+".join(str(m.features) for m in matrices)
    fused = "".join(f" {name}" for name, on in (("norm", norm), ("swiglu", swiglu), ("residual", residual)) if on)
    return f"{sizes}x{first.inputs} {first.bits}b g{first.group_size}{fused}"


def variant_for(
    matrices: Sequence[Matrix], *, norm: bool = False, swiglu: bool = False, residual: bool = False
) -> Variant:
    """What runs on this device for this product."""
    tuned = _tuned.get(form(matrices, norm=norm, swiglu=swiglu, residual=residual)) if _tuned else None
    return tuned or start(str(mx.device_info().get("architecture", "")), max(m.features for m in matrices))


def start(architecture: str, features: int) -> Variant:
    """The starting value for a GPU, such as applegpu_g14s, and a matrix of that many features."""
    layers, heads = START.get(architecture[: len("applegpu_g13")], _FROM_M3)
    return heads if features >= WIDE else layers
