"""What a family's driver gives the engine: a trunk, perhaps a head, and their caches.

Rows of all sequences of a pass lie one after another in flat arrays; a Segment says how many belong to which sequence.
No row is padded, and weights are read once for all of them. A faster implementation of a family replaces the whole
object, so the engine knows nothing below these calls.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx
from mtp_kernels.registry import Registry

from mlx_mtp_backend.api import LoadOptions, LoadProgress
from mlx_mtp_backend.cache import LayerCache


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's share of a pass: its caches (trunk's or head's) and its number of rows."""

    caches: Sequence[LayerCache]
    rows: int


@dataclass(frozen=True, slots=True)
class Hidden:
    """A pass's result, each [N, hidden size].

    Attributes:
        normed: what the output matrix reads.
        carried: what the head is fed next: the trunk's seed, or the head's own recycled hidden.
    """

    normed: mx.array
    carried: mx.array


class Model(Protocol):
    """A loaded model. Calls build graphs and wait for nothing, though a pass may begin; caches are in a transaction.

    Attributes:
        most_rows: of a decode or verify pass, beyond which a row's bits are others; None: no such limit.
        most_segment_rows: likewise of one sequence.
        kernels: names and versions of custom kernels in use, "none" for stock operations; part of the fingerprint.
        sampler: draws a token a row from `logits`, see mtp_kernels.sampler.sample; None: by stock operations.
    """

    vocab_size: int
    hidden_size: int
    has_head: bool
    most_rows: int | None
    most_segment_rows: int | None
    kernels: str
    sampler: Callable[[mx.array, mx.array], mx.array] | None

    @property
    def weight_bytes(self) -> int:
        """Bytes held by trunk and head together."""

    def alternatives(self) -> dict[str, Model]:
        """Known mistakes in wiring this head, each as a model, by name; empty without a head."""

    def trunk_caches(self) -> list[LayerCache]:
        """Empty caches for one sequence."""

    def head_caches(self) -> list[LayerCache]:
        """Likewise for the head; empty list without one."""

    def trunk(self, tokens: mx.array, segments: Sequence[Segment]) -> Hidden:
        """Run rows through the trunk. tokens: int32 [N], N the sum of the segments' rows."""

    def head(self, tokens: mx.array, carried: mx.array, segments: Sequence[Segment]) -> Hidden:
        """Run rows through the head: row p takes hidden p and the token after it. carried: [N, hidden size]."""

    def logits(self, normed: mx.array) -> mx.array:
        """[M, hidden size] to [M, vocab size], for trunk and head alike."""


class Driver(Protocol):
    """A family's module."""

    def load(self, path: Path, options: LoadOptions, dtype: mx.Dtype | None) -> Generator[LoadProgress, None, Model]:
        """Load in slices, each short enough that decoding streams hardly notice; the model is the return value.

        Args:
            dtype: keep floating weights in this type; None as stored.

        Raises:
            EngineError: WEIGHTS_MISMATCH, HEAD_MISSING, or what inspection raises.
        """

    def accelerate(self, model: Model, registry: Registry) -> Generator[LoadProgress, None, tuple[Model, str | None]]:
        """The loaded model through this device's kernels, or as it is and why.

        A slice may take seconds: kernels are compiled and checked in it.
        """


def split_rows(segments: Sequence[Segment]) -> list[slice]:
    """Where each segment's rows lie in the flat arrays."""
    slices, start = [], 0
    for segment in segments:
        slices.append(slice(start, start + segment.rows))
        start += segment.rows
    return slices
