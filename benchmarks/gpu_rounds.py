"""Greedy MTP rounds with imposed acceptance, accepted on the device.

The drafter runs the real head, then replaces its tokens: by the plain continuation, known from an earlier plain run, or
by a wrong token where the imposed law says so. So the head's cost is real, as many rounds keep a draft as the law says,
and the tokens must equal the plain run's exactly. Round n + 1 is built before the host has read how many rows round n
kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import mlx.core as mx
from mtp_kernels.launch import host_ints

from benchmarks.imposed import kept_drafts
from mlx_mtp_backend.cache import LayerCache, begin, commit
from mlx_mtp_backend.families import qwen3_5_fused_cache
from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.families.qwen3_5_fused import FusedQwen35
from mlx_mtp_backend.families.qwen3_5_fused_cache import FusedKVCache

_AT_ONCE = 20e-6  # seconds within which a read of a value that the device has long computed returns


@dataclass
class Prefilled:
    """A prefilled sequence.

    Attributes:
        trunk, head: its caches.
        carried: [R, hidden] rows of the newest trunk pass.
        following: [R] int32, the token after each of those rows.
        kept: how many of those rows count.
    """

    trunk: list[LayerCache]
    head: list[LayerCache]
    carried: mx.array
    following: mx.array
    kept: int | mx.array


@dataclass(frozen=True)
class Rounds:
    """What a run of rounds gave.

    Attributes:
        seconds: wall time.
        waited: seconds of it in which the host had nothing to do but wait for the device.
        tokens: emitted.
        rounds: run.
        syncs: reads of device values for which the host had to wait, the caches' own included.
        equal_plain: whether tokens equalled the plain run's.
    """

    seconds: float
    waited: float
    tokens: int
    rounds: int
    syncs: int
    equal_plain: bool

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def prefill(model: FusedQwen35, tokens: mx.array, chunk: int = 256) -> Prefilled:
    """Runs a prompt through trunk and head, in the engine's chunks."""
    trunk, head, carried = model.trunk_caches(), model.head_caches(), []
    for part in _chunks(tokens, chunk):
        begin(trunk)
        hidden = model.trunk(part, [Segment(trunk, part.shape[0])])
        commit(trunk, part.shape[0])
        carried.append(hidden.carried)
    newest = mx.argmax(model.logits(hidden.normed[-1:]), axis=-1).astype(mx.int32)
    rows = mx.concatenate(carried)
    slots = zip(_chunks(tokens[1:], chunk), _chunks(rows[:-1], chunk), strict=True)
    for following, before in slots if head else ():
        begin(head)
        model.head(following, before, [Segment(head, before.shape[0])])
        commit(head, before.shape[0])
    mx.eval([a for cache in [*trunk, *head] for a in cache.arrays])
    return Prefilled(trunk, head, rows[-1:], newest, 1)


def copied(model: FusedQwen35, sequence: Prefilled) -> Prefilled:
    """A sequence of its own from here on, as the engine makes one from a kept prefix."""
    trunk, head = model.trunk_caches(), model.head_caches()
    for new, old in zip([*trunk, *head], [*sequence.trunk, *sequence.head], strict=True):
        rows = old.rows(0, old.offset) if isinstance(old, FusedKVCache) else ()
        new.restore([rows] if rows else [], old.snapshot())
    mx.eval([a for cache in [*trunk, *head] for a in cache.arrays])
    return replace(sequence, trunk=trunk, head=head)


def _chunks(rows: mx.array, size: int) -> list[mx.array]:
    return [rows[start : start + size] for start in range(0, rows.shape[0], size)]


def plain(model: FusedQwen35, sequence: Prefilled, steps: int) -> tuple[float, list[int]]:
    """Greedy steps, each built while the one before runs: seconds, and the tokens from the newest one on."""
    token, tokens = sequence.following, [sequence.following]
    mx.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        begin(sequence.trunk)
        hidden = model.trunk(token, [Segment(sequence.trunk, 1)])
        commit(sequence.trunk, 1)
        token = mx.argmax(model.logits(hidden.normed), axis=-1).astype(mx.int32)
        mx.async_eval(token)
        mx.eval(tokens[-1])  # one step ahead, as a server would be
        tokens.append(token)
    mx.eval(token)
    return time.perf_counter() - started, [int(t.item()) for t in tokens]


class Reads:
    """Counts the reads of device values that took so long that the host must have waited."""

    def __init__(self) -> None:
        self.waited, self.seconds = 0, 0.0

    def ints(self, array: mx.array) -> list[int]:
        """The integers of a one-dimensional array."""
        started = time.perf_counter()
        values = host_ints(array)
        took = time.perf_counter() - started
        self.waited += took > _AT_ONCE
        self.seconds += took
        return values


@contextmanager
def _counted() -> Iterator[Reads]:
    """Reads through it, and those that the caches do meanwhile, are counted."""
    reads = Reads()
    with patch.object(qwen3_5_fused_cache, "host_ints", reads.ints):
        yield reads


def _draft(model: FusedQwen35, sequence: Prefilled, depth: int) -> list[mx.array]:
    """The head's own tokens, [1] each: committed slots with true hiddens first, then one step a draft."""
    rows = sequence.following.shape[0]
    begin(sequence.head)
    hidden = model.head(sequence.following, sequence.carried, [Segment(sequence.head, rows)])
    commit(sequence.head, sequence.kept)
    normed, carried = (_row(r, sequence.kept - 1) for r in (hidden.normed, hidden.carried))
    drafts = [mx.argmax(model.logits(normed), axis=-1).astype(mx.int32)]
    begin(sequence.head)
    for _ in range(depth - 1):
        hidden = model.head(drafts[-1], carried, [Segment(sequence.head, 1)])
        carried = hidden.carried
        drafts.append(mx.argmax(model.logits(hidden.normed), axis=-1).astype(mx.int32))
    commit(sequence.head, 0)
    return drafts


def run(
    model: FusedQwen35, sequence: Prefilled, continuation: Sequence[int], acceptance: Sequence[float], rounds: int
) -> Rounds:
    """Rounds at depth len(acceptance).

    Args:
        continuation: the plain run's tokens, from the sequence's newest token on; enough for all rounds.
        acceptance: share of the rounds in which draft i and all before it are kept.
    """
    depth = len(acceptance)
    known = mx.array(list(continuation), dtype=mx.int32)
    right = [mx.arange(depth) < kept for kept in kept_drafts(acceptance, rounds)]
    steps = mx.arange(1, depth + 1)
    newest, cursor = sequence.following, mx.array([0])
    mx.eval(known, right, steps, newest, cursor)
    outputs: list[tuple[mx.array, mx.array]] = []
    counts: list[int] = []
    mx.synchronize()
    started = time.perf_counter()
    with _counted() as reads:
        for number in range(rounds):
            own = mx.concatenate(_draft(model, sequence, depth))
            true = known[cursor + steps]
            drafts = mx.where(right[number], true, (true + 1) % model.vocab_size) + own * 0
            begin(sequence.trunk)
            hidden = model.trunk(mx.concatenate([newest, drafts]), [Segment(sequence.trunk, depth + 1)])
            following = mx.argmax(model.logits(hidden.normed), axis=-1).astype(mx.int32)
            wrong = mx.where(drafts == following[:-1], depth, mx.arange(depth))
            kept = mx.min(wrong, keepdims=True).astype(mx.int32) + 1
            commit(sequence.trunk, kept)
            sequence.carried, sequence.following, sequence.kept = hidden.carried, following, kept
            newest, cursor = _row(following[:, None], kept - 1)[0], cursor + kept
            mx.async_eval(newest, cursor, kept)
            if outputs:  # the only wait: for a round whose successor is already queued
                counts += reads.ints(outputs[-1][1])
            outputs.append((following, kept))
        counts += reads.ints(outputs[-1][1])
    seconds = time.perf_counter() - started
    emitted = [t for (tokens, _), count in zip(outputs, counts, strict=True) for t in tokens.tolist()[:count]]
    return Rounds(
        seconds, reads.seconds, len(emitted), rounds, reads.waited, emitted == list(continuation[1 : len(emitted) + 1])
    )


def _row(rows: mx.array, index: int | mx.array) -> mx.array:
    """rows[index] as [1, width] for an index on the device; a masked sum, which unlike a gather compiles nothing."""
    picked = mx.arange(rows.shape[0])[:, None] == index
    return mx.sum(mx.where(picked, rows, mx.zeros_like(rows)), axis=0, keepdims=True)
