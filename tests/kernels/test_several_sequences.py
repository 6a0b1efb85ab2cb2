"""How passes of several sequences become launches on CUDA; nothing is compiled here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mtp_kernels import attention_inputs, few_row_attention
from mtp_kernels.few_row_attention import Context
from mtp_kernels.launch import SHARED_MEMORY_BYTES, cuda_launch
from mtp_kernels.segments import LAUNCH_SIZES, Segments, of_sequence

HEADS, KV_HEADS, BF16 = 4, 2, mx.bfloat16


@dataclass(frozen=True)
class Launched:
    """One launch: its parameters and arrays by name, and its grid in threads."""

    kernel: str
    inputs: dict[str, mx.array]
    outputs: tuple[str, ...]
    source: str
    grid: tuple[int, int, int]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launched]]:
    """Launches, which give zeros, in the order that they were asked for."""
    made: list[Launched] = []

    def compiler(name: str, input_names: list[str], output_names: list[str], source: str, **_: object) -> Any:
        def launch(inputs, output_shapes, output_dtypes, grid, threadgroup) -> list[mx.array]:
            arrays = dict(zip(input_names, inputs, strict=True))
            kernel = name.removeprefix("mtp_").rsplit("_", 1)[0]
            made.append(Launched(kernel, arrays, tuple(output_names), source, grid))
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    monkeypatch.setattr(mx.fast, "cuda_kernel", compiler)
    for module in (attention_inputs, few_row_attention):
        monkeypatch.setattr(module, "platform", lambda: "cuda")
    cuda_launch.cache_clear()
    yield made
    cuda_launch.cache_clear()


def run(counts: tuple[int, ...]) -> tuple[mx.array, list[mx.array], list[Context]]:
    """Both kernels over sequences of distinct arrays: result, tails, contexts as they were."""
    norm, position = mx.ones((256,), BF16), mx.array([0, 5, 64], dtype=mx.int32)
    shape = attention_inputs.AttentionShape(HEADS, KV_HEADS, norm, norm, 1e-6, 64, 1e7)
    segments = Segments.of(counts)
    rows = mx.broadcast_to(mx.arange(sum(counts))[:, None], (sum(counts), shape.width)).astype(BF16)
    contexts = [
        Context(
            *(mx.zeros((1, KV_HEADS, 64 + 256 * i, 256), BF16) for _ in range(2)),
            mx.zeros((2, KV_HEADS, 64, 256), BF16),
            position + mx.array([0, i, 256 * i]),
        )
        for i in range(len(counts))
    ]
    positions = [context.position for context in contexts]
    queries, tails = attention_inputs.attention_inputs(
        rows, [context.tail for context in contexts], positions, segments, shape
    )
    return few_row_attention.few_row_attention(queries, contexts, segments, rows), tails, contexts


def test_one_launch_of_each_kernel_for_a_few_sequences(launched: list[Launched]) -> None:
    result, tails, contexts = run((2, 1, 4))
    assert result.shape == (7, HEADS * 256)
    assert [tail.shape for tail in tails] == [(2, KV_HEADS, 64, 256)] * 3
    assert [one.kernel for one in launched] == ["attention_inputs", "few_row_attention", "few_row_attention_join"]
    inputs, partial, join = launched
    assert [one.grid[1] for one in (inputs, partial)] == [3, 3]  # none for the fourth that it is compiled for
    assert inputs.outputs == ("queries", "tail_out0", "tail_out1", "tail_out2", "tail_out3")
    for one in launched:
        assert one.inputs["starts"].tolist() == [0, 2, 3, 7]
        assert [one.inputs[f"position{i}"].tolist()[1] for i in range(4)] == [5, 6, 7, 5]
    for i, own in enumerate((0, 1, 2, 0)):
        assert partial.inputs[f"keys{i}"] is contexts[own].keys
        assert partial.inputs[f"values{i}"] is contexts[own].values
        assert partial.inputs[f"tail{i}"] is contexts[own].tail
    # Splits for the longest context: 576 + 64 positions are 10 of 64.
    assert partial.grid[0] == 10 * KV_HEADS * few_row_attention._THREADS
    assert join.grid[0] == 7 * HEADS * 2 * few_row_attention._JOIN_THREADS


def test_a_launch_over_first_rows_is_sized_by_the_bound(launched: list[Launched]) -> None:
    tail, segments = mx.zeros((2, KV_HEADS, 64, 256), BF16), Segments.of((1, 1))
    shapes = set()
    for capacity in (256, 4096):
        row = few_row_attention.first_row(mx.zeros((1, KV_HEADS, capacity, 256), BF16))
        position = mx.array([0, 5, capacity], dtype=mx.int32)
        context = Context(row, row, tail, position, bound=2048)
        queries, projected = mx.zeros((2, HEADS, 256), BF16), mx.zeros((2, 12 * 256), BF16)
        few_row_attention.few_row_attention(queries, [context] * 2, segments, projected)
        partial = next(one for one in reversed(launched) if one.kernel == "few_row_attention")
        shapes.add((partial.grid, *(array.shape for array in partial.inputs.values())))
        assert "_shape[2]" not in partial.source  # the distance between heads is no first row's
    assert len(shapes) == 1
    assert partial.grid[0] == (few_row_attention._split_of(2047) + 1) * KV_HEADS * few_row_attention._THREADS


def test_more_sequences_than_a_launch_takes_are_several_launches(launched: list[Launched]) -> None:
    counts = (1, 2) * 5
    result, tails, contexts = run(counts)
    assert result.shape[0] == 15
    assert len(tails) == 10
    first, second = (one for one in launched if one.kernel == "attention_inputs")
    assert first.inputs["starts"].tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 12]
    assert second.inputs["starts"].tolist() == [0, 1, 3]
    assert first.inputs["projected"][:, 0].tolist() == list(range(12))
    assert second.inputs["projected"][:, 0].tolist() == [12, 13, 14]
    partials = [one for one in launched if one.kernel == "few_row_attention"]
    assert [one.inputs["keys1"] is contexts[own].keys for one, own in zip(partials, (1, 9), strict=True)] == [True] * 2
    joins = [one.inputs["projected"][:, 0].tolist() for one in launched if one.kernel == "few_row_attention_join"]
    assert joins == [list(range(12)), [12, 13, 14]]


@pytest.mark.parametrize("tiles", few_row_attention._TILES)
def test_two_blocks_of_attention_fit_into_a_multiprocessor(tiles: int) -> None:
    assert 2 * (few_row_attention._shared_bytes(tiles) + 1024) <= SHARED_MEMORY_BYTES + 1024


@given(st.integers(0, 300_000))
def test_positions_lie_in_the_splits_that_start_before_them(position: int) -> None:
    near, far = few_row_attention._NEAR, few_row_attention._FAR
    lengths = (few_row_attention._SHORT, few_row_attention._MIDDLE, few_row_attention._LONG)
    borders = ((0, near), (near, far), (far, max(far, position + 1)))
    starts = [at for border, length in zip(borders, lengths, strict=True) for at in range(*border, length)]
    assert few_row_attention._split_of(position) == sum(start <= position for start in starts) - 1


@pytest.mark.parametrize("size", LAUNCH_SIZES)
def test_a_sequence_picks_its_own_parameter(size: int) -> None:
    text = of_sequence("keys{}_shape[2]", size)
    terms = text.replace("sequence == ", "").split(" : ")
    picks = dict(term.split(" ? ") for term in terms[:-1]) | {"0": terms[-1]}
    assert picks == {str(i): f"keys{i}_shape[2]" for i in range(size)}
