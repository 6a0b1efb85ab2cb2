"""Several sequences in a pass of the fused step, here on its fallbacks: what each gets, what is launched for all."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import pytest
from mtp_kernels.few_row_attention import Context
from mtp_kernels.gated_delta import DeltaState
from mtp_kernels.registry import Registry

from mlx_mtp_backend.cache import abort, begin, commit
from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.families.qwen3_5_fused import FusedQwen35
from mlx_mtp_backend.families.qwen3_5_fused import fused as fused_model
from mlx_mtp_backend.families.qwen3_5_fused_layers import FusedDelta
from mlx_mtp_backend.families.qwen3_5_fused_pass import Layout
from tests.kernels.test_fused_step import build

PROMPTS = (3, 20, 70, 130)


@pytest.fixture(scope="module")
def fused() -> FusedQwen35:
    return fused_model(build(num_hidden_layers=4, full_attention_interval=2), Registry())


class Stream:
    """A sequence of its own tokens."""

    def __init__(self, model: FusedQwen35, number: int) -> None:
        self.trunk, self.head = model.trunk_caches(), model.head_caches()
        self.tokens = mx.random.randint(0, 512, (256,), key=mx.random.key(number)).astype(mx.int32)
        self.at = 0


def step(model: FusedQwen35, streams: Sequence[Stream], rows: Sequence[int], keep: Sequence[int]) -> list[mx.array]:
    """One pass of trunk and head, some rows of which are kept: each stream's logits of both."""
    for one in streams:
        begin([*one.trunk, *one.head])
    tokens = mx.concatenate([one.tokens[one.at : one.at + count] for one, count in zip(streams, rows, strict=True)])
    hidden = model.trunk(tokens, [Segment(one.trunk, count) for one, count in zip(streams, rows, strict=True)])
    after = [Segment(one.head, count) for one, count in zip(streams, rows, strict=True)]
    drafted = model.head(tokens, hidden.carried, after)
    told, first = [], 0
    for one, count, kept in zip(streams, rows, keep, strict=True):
        commit([*one.trunk, *one.head], kept)
        one.at += kept
        told.append(mx.concatenate([hidden.normed[first : first + count], drafted.normed[first : first + count]]))
        first += count
    return told


def prefilled(model: FusedQwen35) -> list[Stream]:
    streams = [Stream(model, number) for number in range(len(PROMPTS))]
    for one, length in zip(streams, PROMPTS, strict=True):
        step(model, [one], [length], [length])
    return streams


# Mixtures that fit when all get the rows of the longest, and one that does not.
ROUNDS = [(1, 1, 1, 1), (4, 4, 4, 4), (1, 4, 2, 3), (8, 1, 1, 5), (8, 8, 8, 8)]


@pytest.mark.parametrize("seed", range(3))
def test_whoever_shares_a_pass_changes_no_bit(fused: FusedQwen35, seed: int) -> None:
    """Streams join, leave, trade places and lose drafts; each has what it has alone."""
    mixed = random.Random(seed)
    together, alone = prefilled(fused), prefilled(fused)
    for number in range(8):
        chosen = mixed.sample(range(4), mixed.randint(1, 4)) if number else list(range(4))
        rows = [mixed.choice(ROUNDS)[place] for place in chosen]
        keep = [mixed.randint(1, count) for count in rows]
        got = step(fused, [together[place] for place in chosen], rows, keep)
        for place, own, count, kept in zip(chosen, got, rows, keep, strict=True):
            (want,) = step(fused, [alone[place]], [count], [kept])
            assert mx.array_equal(own, want)


def test_an_aborted_pass_of_several_never_was(fused: FusedQwen35) -> None:
    together, alone = prefilled(fused)[:3], prefilled(fused)[:3]
    rows = [2, 1, 3]
    step(fused, together, rows, rows)
    for one in together:
        begin(one.trunk)
    mx.eval(
        fused.trunk(
            mx.arange(4).astype(mx.int32), [Segment(together[2].trunk, 1), Segment(together[0].trunk, 3)]
        ).normed
    )
    for one in together:
        abort(one.trunk)
    got = step(fused, together, rows, rows)
    for one, own, count in zip(alone, got, rows, strict=True):
        step(fused, [one], [count], [count])
        assert mx.array_equal(own, step(fused, [one], [count], [count])[0])


def test_draft_steps_after_an_uneven_catch_up(fused: FusedQwen35) -> None:
    """Rows that a pass adds to make sequences alike leave no gap before the head's next rows."""
    together, alone = prefilled(fused)[:2], prefilled(fused)[:2]
    counts, hidden = (1, 5), mx.random.normal((8, 256), key=mx.random.key(9)).astype(mx.float16)

    def drafts(streams: Sequence[Stream], counts: Sequence[int], rows: slice, last: slice) -> mx.array:
        for one in streams:
            begin(one.head)
        segments = [Segment(one.head, count) for one, count in zip(streams, counts, strict=True)]
        fused.head(mx.arange(8)[rows], hidden[rows], segments)
        drafted = fused.head(mx.arange(8)[last], hidden[last], [Segment(one.head, 1) for one in streams]).normed
        for one, count in zip(streams, counts, strict=True):
            commit(one.head, count)
        return drafted

    for _ in range(2):
        got = drafts(together, counts, slice(0, 6), slice(6, 8))
        assert mx.array_equal(got[:1], drafts(alone[:1], counts[:1], slice(0, 1), slice(6, 7)))
        assert mx.array_equal(got[1:], drafts(alone[1:], counts[1:], slice(1, 6), slice(7, 8)))


def test_an_abort_forgets_a_tail_behind_what_is_kept(fused: FusedQwen35) -> None:
    """Many rows, then few: the tail begins behind rows that are taken back."""
    disturbed, plain = prefilled(fused)[0], prefilled(fused)[0]
    begin(disturbed.head)
    for rows in (12, 2):
        fused.head(mx.arange(rows), mx.ones((rows, 256), mx.float16), [Segment(disturbed.head, rows)])
    abort(disturbed.head)
    for _ in range(2):
        (got,), (want,) = (step(fused, [one], [2], [1]) for one in (disturbed, plain))
        assert mx.array_equal(got, want)


def test_rows_are_made_alike_where_they_fit() -> None:
    def layout(*rows: int) -> Layout:
        return Layout.of([Segment((), count) for count in rows])

    assert layout(3).launched == (3,)
    assert layout(1, 4, 2).launched == (4, 4, 4)
    assert layout(1, 4, 2).alike
    assert layout(8, 8, 8, 8).launched == (8, 8, 8, 8)
    assert layout(8, 1, 1, 1, 1).launched == (8, 1, 1, 1, 1)
    assert not layout(8, 1, 1, 1, 1).alike
    rows = mx.arange(7)
    spread = layout(1, 4, 2).spread(rows)
    assert spread.tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 6, 6]
    assert mx.array_equal(layout(1, 4, 2).gathered(spread), rows)


class Counted:
    """Stands for a kernel in every layer, and counts how often one is built into a graph."""

    def __init__(self, model: FusedQwen35, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, int] = {}
        # As no reference reads a position back to the host, passes can be compiled.
        monkeypatch.setattr(model, "_compilable", True)
        for layer in [*model.layers, *model._head_layers]:
            stubs: dict[str, Callable[..., object]] = {"prepare": self.prepare, "attend": self.attend}
            for name, stub in ({"run": self.run} if isinstance(layer, FusedDelta) else stubs).items():
                monkeypatch.setattr(layer, name, stub)

    def count(self, kind: str) -> None:
        self.calls[kind] = self.calls.get(kind, 0) + 1

    def run(self, fresh, state: DeltaState, keep, weights, segments, settle: bool = False):
        self.count("settled" if settle else "recurrence")
        return fresh[:, : weights.value_heads * 128], state

    def prepare(self, projected, tails, positions, segments, shape):
        self.count("inputs")
        return projected[:, : shape.heads * 256].reshape(-1, shape.heads, 256), list(tails)

    def attend(self, queries, contexts: Sequence[Context], segments, projected):
        self.count("attention")
        return queries.reshape(queries.shape[0], -1)


def test_a_pass_of_several_sequences_launches_each_kernel_once_a_layer(
    fused: FusedQwen35, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(fused, monkeypatch)
    streams = prefilled(fused)
    for size in (1, 2, 4):
        counted.calls.clear()
        step(fused, streams[:size], [2] * size, [1] * size)
        assert counted.calls == {"recurrence": 2, "inputs": 3, "attention": 3}


@pytest.fixture
def compiling() -> Iterator[None]:
    """MLX compiles, which whoever ran an engine on the CPU in this process may have ended."""
    mx.enable_compile()
    yield
    mx.disable_compile()


@pytest.mark.usefixtures("compiling")
def test_mixtures_of_rows_share_what_is_compiled(fused: FusedQwen35, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(fused, monkeypatch)
    streams = prefilled(fused)[:3]
    step(fused, streams, [1, 4, 2], [1, 1, 1])
    counted.calls.clear()
    for rows in ([4, 4, 4], [4, 1, 1], [1, 2, 4]):
        step(fused, streams, rows, rows)
    assert counted.calls == {}
    step(fused, streams, [1, 1, 1], [1, 1, 1])
    assert counted.calls["recurrence"] == 2
