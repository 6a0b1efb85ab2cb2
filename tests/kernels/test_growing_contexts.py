"""Contexts of different lengths that grow, join and leave: what is compiled anew, where kernels find their rows."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mtp_kernels.few_row_attention import Context, reference
from mtp_kernels.registry import Registry
from mtp_kernels.segments import Segments

from mlx_mtp_backend.families import qwen3_5_fused_pass
from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.families.qwen3_5_fused import FusedQwen35
from mlx_mtp_backend.families.qwen3_5_fused import fused as fused_model
from mlx_mtp_backend.families.qwen3_5_fused_cache import FusedKVCache
from mlx_mtp_backend.families.qwen3_5_fused_pass import _round_bound, kv_cache
from tests.kernels.test_fused_step import build
from tests.kernels.test_fused_together import Counted, Stream, step

KV_HEADS, F16 = 2, mx.float16


def address(array: mx.array) -> int:
    """Where the array's data begin."""
    return np.asarray(memoryview(array)).ctypes.data


def whole(row: mx.array, kv_heads: int, capacity: int) -> mx.array:
    """The float16 buffer that a first row is of, read as a kernel reads it: on from its address."""
    held = (ctypes.c_uint16 * (kv_heads * capacity * 256)).from_address(address(row))
    return mx.array(np.frombuffer(held, np.float16).reshape(1, kv_heads, capacity, 256))


def attend_by_address(
    queries: mx.array, contexts: Sequence[Context], segments: Segments, projected: mx.array
) -> mx.array:
    """Stands for the kernel, over first rows."""
    found = []
    for context, rows in zip(contexts, segments.counts, strict=True):
        _, first, capacity = context.position.tolist()
        assert context.keys.shape == context.values.shape == (1, 1, 1, 256)
        assert first + rows <= context.positions
        keys, values = (whole(row, KV_HEADS, capacity) for row in (context.keys, context.values))
        found.append(replace(context, keys=keys, values=values))
    return reference(queries, found, segments, projected)


@pytest.fixture
def model() -> FusedQwen35:
    return fused_model(build(num_hidden_layers=4, full_attention_interval=2), Registry())


@pytest.fixture
def not_compiling() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def compiling() -> Iterator[None]:
    """MLX compiles, which whoever ran an engine on the CPU in this process may have ended."""
    mx.enable_compile()
    yield
    mx.disable_compile()


def kv(stream: Stream) -> FusedKVCache:
    return kv_cache(Segment(stream.trunk, 1))


def prefilled(model: FusedQwen35, number: int, length: int) -> Stream:
    one = Stream(model, number)
    one.tokens = mx.random.randint(0, 512, (1024,), key=mx.random.key(number)).astype(mx.int32)
    step(model, [one], [length], [length])
    return one


@pytest.mark.usefixtures("not_compiling")
def test_first_rows_lead_to_whole_buffers(model: FusedQwen35, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of several lengths grow and trade places; each has what it has alone, of buffers given whole."""
    lengths = (20, 250, 400)
    plain = [prefilled(model, number, length) for number, length in enumerate(lengths)]
    wanted: list[list[mx.array]] = [[] for _ in plain]
    for _ in range(16):
        for one, own in zip(plain, wanted, strict=True):
            own += step(model, [one], [8], [7])
    monkeypatch.setattr(model, "_compilable", True)
    for layer in [*model._attentions, *model._head_layers]:
        monkeypatch.setattr(layer, "attend", attend_by_address)
    together = [prefilled(model, number, length) for number, length in enumerate(lengths)]
    done = [0] * len(lengths)
    while min(done) < 16:
        chosen = [place for place in (2, 0, 1) if done[place] < 16 and (sum(done) + place) % 4]
        got = step(model, [together[place] for place in chosen], [8] * len(chosen), [7] * len(chosen))
        for place, own in zip(chosen, got, strict=True):
            assert mx.array_equal(own, wanted[place][done[place]])
            done[place] += 1


@pytest.mark.usefixtures("compiling")
def test_joining_leaving_and_growing_trace_nothing_anew(model: FusedQwen35, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(model, monkeypatch)
    streams = [prefilled(model, number, length) for number, length in enumerate((10, 200, 500))]
    for size in (1, 2, 3):
        for rows in (1, 8):
            step(model, streams[:size], [rows] * size, [rows] * size)
    counted.calls.clear()
    capacities = set()
    for number in range(48):
        size, rows = number % 3 + 1, (8, 8, 8, 1)[number % 4]
        step(model, streams[:size], [rows] * size, [rows] * size)
        capacities |= {tuple(kv(one).long[0].capacity for one in streams[:size])}
        if number % 8 == 7:
            streams = [prefilled(model, number, 40 * number % 700 + 9), *streams[:2]]
        streams = streams[1:] + streams[:1]
    assert len(capacities) > 8
    assert set(counted.calls) <= {"settled"}


@pytest.mark.usefixtures("compiling")
def test_a_context_past_the_bound_traces_each_function_once(
    model: FusedQwen35, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(model, monkeypatch)
    one = prefilled(model, 0, 20)
    monkeypatch.setattr(qwen3_5_fused_pass, "_LEAST_BOUND", 32)
    traced = []
    for _ in range(9):
        counted.calls.clear()
        step(model, [one], [8], [8])
        traced.append(counted.calls.get("attention", 0))
    assert traced == [3, 3, 0, 0, 0, 3, 0, 0, 0]  # up to 28 rows, 36, 68


def test_bounds_are_few_and_at_most_double() -> None:
    assert [_round_bound(n) for n in (1, 2048, 2049, 4096, 262_144)] == [2048, 2048, 4096, 4096, 262_144]


def driven(cache: FusedKVCache, rows: int, *, on_device: bool) -> list[mx.array]:
    """A transaction of one pass: first rows of keys and values as a pass was given them."""
    cache.begin()
    given = cache.give(rows, whole=False)
    keys, values, tail = given.layers[0]
    mx.eval(keys, values, given.position)
    cache.take([tail + 1] * len(given.layers), rows)
    mx.eval(cache.arrays)
    cache.commit(mx.array([rows], dtype=mx.int32) if on_device else rows)  # type: ignore[arg-type]
    return [keys, values]


@pytest.mark.parametrize("on_device", [False, True])
def test_tails_move_into_a_buffer_that_stays_where_it_is(on_device: bool) -> None:
    """A first row is the buffer's own; it is gone when the buffer is written, which else would be copied."""
    cache = FusedKVCache(2, KV_HEADS, F16)
    moved, places = 0, set()
    for _ in range(24):  # 192 of 255 rows
        base = cache._base
        rows = driven(cache, 8, on_device=on_device)
        moved += cache._base != base or (cache._start is not None and cache._start.tolist()[0] != base)
        assert [address(row) for row in rows] == [address(array) for array in cache.long[0].arrays]
        assert all(memoryview(array).c_contiguous for array in [*rows, *cache.long[0].arrays])
        places.add(tuple(address(array) for long in cache.long for array in long.arrays))
        del rows
    assert moved >= 3
    cache.settle()  # as before stock attention, which may be evaluated before the next few rows
    mx.eval(cache.arrays)
    places.add(tuple(address(array) for long in cache.long for array in long.arrays))
    assert len(places) == 1


def test_a_buffer_that_grew_is_read_where_it_is_then() -> None:
    cache, capacities = FusedKVCache(1, KV_HEADS, F16), set()
    for _ in range(60):
        rows = driven(cache, 8, on_device=False)
        assert [address(row) for row in rows] == [address(array) for array in cache.long[0].arrays]
        assert cache.give(1, whole=False).position.tolist()[2] == cache.long[0].capacity
        capacities.add(cache.long[0].capacity)
    assert capacities == {256, 512}


def test_rows_that_would_fill_a_buffer_do_not_take_its_place() -> None:
    """Stock attention's rows lie in an order of their own, in which no kernel reads a buffer."""
    cache = FusedKVCache(1, KV_HEADS, F16)
    cache.begin()
    cache.give(1, whole=False)
    cache.abort()
    cache.settle()
    rows = mx.random.normal((1, 256, KV_HEADS, 256)).astype(F16).transpose(0, 2, 1, 3)
    cache.long[0].append(rows, rows)
    cache.run_many(256)
    keys, _, _ = cache.give(1, whole=False).layers[0]
    mx.eval(keys, cache.arrays)
    capacity = cache.long[0].capacity
    assert mx.array_equal(whole(keys, KV_HEADS, capacity)[:, :, :256], rows)


def test_layers_that_grew_unevenly_are_made_alike() -> None:
    """A prefill that failed half way leaves some layers' buffers larger."""
    cache = FusedKVCache(2, KV_HEADS, F16)
    rows = mx.ones((1, KV_HEADS, 300, 256), F16)
    cache.long[0].append(rows, rows)
    cache.begin()
    given = cache.give(1, whole=False)
    assert [long.capacity for long in cache.long] == [given.position.tolist()[2]] * 2
