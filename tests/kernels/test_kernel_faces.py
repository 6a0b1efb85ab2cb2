"""Shape and dtype errors, shared-memory arithmetic, and what can be read off the sources."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mtp_kernels
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mtp_kernels import attention_inputs, few_row_attention, few_row_experts, few_row_matmul, gated_delta, sampler
from mtp_kernels.few_row_matmul import Matrix
from mtp_kernels.few_row_matmul.plan import (
    THREADS,
    TILE_FEATURES,
    TILE_ROWS,
    WARPS,
    WidePlan,
    launches,
    plan,
    wide_plan,
)
from mtp_kernels.launch import SHARED_MEMORY_BYTES, version_of
from mtp_kernels.segments import Segments

FOLDER = Path(mtp_kernels.__file__).parent
KERNELS = ["few_row_matmul", "gated_delta", "attention_inputs", "few_row_attention", "few_row_experts", "sampler"]
BF16 = mx.bfloat16


def matrix(features: int = 32, inputs: int = 256, bits: int = 4, group: int = 64, dtype: mx.Dtype = BF16) -> Matrix:
    if bits == 16:
        return Matrix(mx.zeros((features, inputs), dtype))
    scales = mx.zeros((features, inputs // group), dtype)
    return Matrix(mx.zeros((features, inputs * bits // 32), mx.uint32), scales, scales, bits, group)


def rows(count: int = 2, inputs: int = 256, dtype: mx.Dtype = BF16) -> mx.array:
    return mx.zeros((count, inputs), dtype)


@pytest.mark.parametrize(
    ("x", "matrices", "arguments", "message"),
    [
        (rows(), [], {}, "no matrix"),
        (rows(33), [matrix()], {}, r"expected \[1..32, K\]"),
        (rows(0), [matrix()], {}, r"expected \[1..32, K\]"),
        (mx.zeros((2, 2, 256), BF16), [matrix()], {}, r"expected \[1..32, K\]"),
        (rows(inputs=128), [matrix()], {}, "128 columns"),
        (rows(dtype=mx.float32), [matrix()], {}, "neither bfloat16 nor float16"),
        (rows(), [matrix(dtype=mx.float16)], {}, "like x"),
        (rows(), [matrix(), matrix(bits=8)], {}, "differ in bits"),
        (rows(inputs=192), [matrix(inputs=192)], {}, "no multiple of 128"),
        (rows(inputs=384), [matrix(inputs=384, group=128)], {}, "no multiple of 256"),
        (rows(), [replace(matrix(), bits=6)], {}, "."),
        (rows(), [matrix(), matrix(features=16)], {"swiglu": True}, "one shape"),
        (rows(), [matrix(), matrix()], {"swiglu": True, "residual": rows(2, 32)}, "not built"),
        (rows(), [matrix()], {"residual": rows(2, 31)}, "residual is"),
        (rows(), [matrix()], {"norm_weight": mx.zeros((255,), BF16)}, "norm_weight is"),
        (rows(), [matrix()], {"norm_weight": mx.zeros((256,))}, "like x"),
    ],
)
def test_matmul_refuses(x: mx.array, matrices: list[Matrix], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        few_row_matmul.few_row_matmul(x, matrices, **arguments)


@given(
    st.integers(1, 8),
    st.integers(1, 136).map(lambda n: n * 256),
    st.sampled_from([(4, 64), (4, 32), (4, 128), (8, 64), (8, 32), (8, 128), (16, 0)]),
    st.booleans(),
    st.booleans(),
)
def test_every_launch_fits_into_shared_memory(
    count: int, inputs: int, form: tuple[int, int], swiglu: bool, norm: bool
) -> None:
    bits, group = form
    made = plan(count, inputs, bits, group, swiglu=swiglu, norm=norm)
    assert made.shared_bytes <= SHARED_MEMORY_BYTES
    assert 2 <= made.stages <= 8
    assert made.parts == plan(1, inputs, bits, group, swiglu=swiglu, norm=norm).parts  # else rows would sum otherwise
    if bits != 16:
        assert (inputs // group * 2) % made.scale_bytes == 0  # every row of scales starts where such a copy may


FORMS = st.sampled_from([(4, 64), (4, 32), (4, 128), (8, 64), (8, 32), (8, 128), (16, 0)])


@given(st.integers(1, 32), st.integers(1, 136).map(lambda n: n * 256), FORMS, st.booleans(), st.booleans())
def test_launches_take_all_rows_in_order_and_fit(
    count: int, inputs: int, form: tuple[int, int], swiglu: bool, norm: bool
) -> None:
    sizes = launches(count, inputs, *form, swiglu=swiglu, norm=norm)
    assert sum(sizes) == count
    assert all(size > 0 for size in sizes)
    for size in sizes[:-1]:
        assert size % TILE_ROWS == 0
    for size in sizes:
        if size > TILE_ROWS:
            made = wide_plan(size, inputs, *form, swiglu=swiglu, norm=norm)
            assert made is not None
            check_wide(made, size, inputs, form)


def check_wide(made: WidePlan, rows: int, inputs: int, form: tuple[int, int]) -> None:
    """What the CUDA text takes for granted of its template arguments, and that K has the parts of narrow launches."""
    bits, group = form
    assert made.shared_bytes <= SHARED_MEMORY_BYTES
    assert rows <= made.columns * TILE_ROWS
    assert made.columns % 2 == 0
    assert 2 <= made.stages <= 6
    assert made.parts == plan(1, inputs, bits, group, swiglu=made.swiglu, norm=False).parts
    assert WARPS % made.classes == 0
    assert made.classes % 4 == 0  # a quad of accumulators is the smallest branch of the tree
    values = made.classes * (64 if bits == 4 else 32)
    assert values % 256 == 0
    if bits != 16:
        line = values // group * 2
        assert line % made.scale_bytes == (inputs // group * 2) % made.scale_bytes == 0
        assert made.scale_bytes in (4, 8, 16)


@pytest.mark.parametrize(
    ("rows", "sizes"), [(9, (9,)), (16, (16,)), (17, (16, 1)), (24, (16, 8)), (25, (16, 9)), (32, (16, 16))]
)
def test_rows_that_do_not_fit_are_cut_up(rows: int, sizes: tuple[int, ...]) -> None:
    assert launches(rows, 6144, 8, 64, swiglu=False, norm=False) == sizes


@pytest.mark.parametrize("inputs", [2048, 2560, 4096, 5120, 6144, 9216, 10_240, 17_408])
def test_four_bits_take_32_rows_in_one_launch(inputs: int) -> None:
    for rows in (9, 16, 17, 32):
        assert launches(rows, inputs, 4, 64, swiglu=False, norm=True) == (rows,)


def test_tiles_and_branches_of_wide_launches() -> None:
    made = wide_plan(32, 5120, 4, 64, swiglu=False, norm=True)
    paired = wide_plan(32, 5120, 4, 64, swiglu=True, norm=True)
    assert made is not None
    assert paired is not None
    assert (made.classes, made.shares) == (paired.classes, paired.shares) == (4, 4)
    # A tile is 8 pieces of 16 features; with SwiGLU half of them are the gate's, whose pieces alone are counted.
    assert (made.tiles(320), made.tiles(321), paired.tiles(1088)) == (40, 41, 272)
    # 128 features of 32 rows from four shares, and 20 sums of squares a row.
    assert made.branches(40, 5120) == 40 * 4 * 128 * 32 + 32 * 20
    small = wide_plan(16, 2048, 4, 64, swiglu=False, norm=True)
    assert small is not None
    assert (small.shares, small.branches(40, 2048)) == (1, 0)


def test_counters_are_apart_even_where_compiled() -> None:
    """MLX would take two arrays of zeros of one size for one, which both launches would then count up."""

    def counts(x: mx.array) -> list[mx.array]:
        return [x + work.sum() for work in (*few_row_matmul.counters(1), *few_row_matmul.counters(2))]

    made = few_row_matmul.counters(3)
    assert [work.shape for work in made] == [(few_row_matmul.COUNTERS,)] * 3
    assert not mx.any(mx.concatenate(made)).item()
    first, second = few_row_matmul._zeros(8), few_row_matmul._zeros(8)
    assert first.shape != second.shape
    assert mx.array_equal(mx.concatenate(mx.compile(counts)(mx.ones((1,)))), mx.ones((3,))).item()


def mixture(
    count: int = 4, top: int = 2, hidden: int = 256, width: int = 256, **formats: int
) -> few_row_experts.Experts:
    sizes = [(count * width, hidden)] * 2 + [(count * hidden, width)] + [(256, hidden)] * 2 + [(hidden, 256)]
    return few_row_experts.Experts(*(matrix(n, k, **formats) for n, k in sizes), count, top)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": rows(33)}, r"expected \[1..32, 256\]"),
        ({"x": rows(0)}, r"expected \[1..32, 256\]"),
        ({"x": rows(inputs=128)}, r"expected \[1..32, 256\]"),
        ({"x": rows(dtype=mx.float32)}, "neither bfloat16 nor float16"),
        ({"x": rows(dtype=mx.float16)}, "like x"),
        ({"logits": mx.zeros((2, 4))}, "logits are"),
        ({"logits": mx.zeros((2, 5), BF16)}, "logits are"),
        ({"norm_weight": mx.zeros((255,), BF16)}, "norm_weight is"),
        ({"experts": replace(mixture(), top=5)}, "5 of 4 experts"),
        ({"experts": mixture(count=513)}, "of 513 experts"),
        ({"experts": mixture(width=128)}, "128 inputs in 4 bits are no multiple of 256"),
        ({"experts": replace(mixture(), up=matrix(512))}, "one shape"),
        ({"experts": replace(mixture(), down=matrix(512))}, "down is"),
        ({"experts": replace(mixture(), shared_down=matrix(128))}, "shared_down is"),
        ({"experts": replace(mixture(), gate=matrix(1024, bits=8), up=matrix(1024))}, "differ in bits"),
        ({"experts": mixture(hidden=13_312)}, "do not fit into shared memory"),
    ],
)
def test_experts_refuse(arguments: dict[str, object], message: str) -> None:
    given = {"x": rows(), "logits": mx.zeros((2, 5)), "experts": mixture(), "norm_weight": mx.zeros((256,), BF16)}
    with pytest.raises(ValueError, match=message):
        few_row_experts.few_row_experts(**given | arguments)


def test_rows_of_experts_are_those_that_fit() -> None:
    assert few_row_experts.most_rows(mixture(256, 8, 2048, 512)) == 32
    most = few_row_experts.most_rows(mixture(512, 10, 4096, 1024))
    assert 8 <= most < 32
    assert few_row_experts._enter_bytes(most, mixture(512, 10, 4096, 1024)) <= SHARED_MEMORY_BYTES


def delta_weights() -> gated_delta.DeltaWeights:
    return gated_delta.DeltaWeights(
        mx.zeros((512, 4), BF16), mx.zeros((2,)), mx.zeros((2,), BF16), mx.zeros((128,), BF16), 1, 2, 1e-6
    )


def delta_call(counts: tuple[int, ...] = (1, 2), *, settle: bool = False, **changed: mx.array) -> object:
    """Two sequences, or what is changed of them, through the face."""
    arrays = {
        "fresh": mx.zeros((3, 772), BF16),
        "recurrent": mx.zeros((2, 2, 128, 128)),
        "window": mx.zeros((2, 3, 512), BF16),
        "tape": mx.zeros((2, 8, 772), BF16),
        "keep": mx.array([0, 1], dtype=mx.int32),
    } | changed
    state = gated_delta.DeltaState(arrays["recurrent"], arrays["window"], arrays["tape"])
    segments = Segments.of(counts)
    return gated_delta.gated_delta(arrays["fresh"], state, arrays["keep"], delta_weights(), segments, settle=settle)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("fresh", mx.zeros((3, 771), BF16), "fresh is"),
        ("fresh", mx.zeros((2, 772), BF16), "fresh is"),
        ("tape", mx.zeros((2, 7, 772), BF16), "tape is"),
        ("tape", mx.zeros((1, 8, 772), BF16), "tape is"),
        ("recurrent", mx.zeros((2, 1, 128, 128)), "recurrent is"),
        ("recurrent", mx.zeros((2, 2, 128, 128), BF16), "recurrent is"),
        ("window", mx.zeros((2, 4, 512), BF16), "window is"),
        ("keep", mx.array([0, 1], dtype=mx.float32), "keep is"),
        ("keep", mx.array([0], dtype=mx.int32), "keep is"),
    ],
)
def test_gated_delta_refuses_shapes(part: str, value: mx.array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_call(**{part: value})


def test_gated_delta_refuses_rows_that_no_tape_holds() -> None:
    fresh = mx.zeros((10, 772), BF16)
    with pytest.raises(ValueError, match="a tape holds 8"):
        delta_call((1, 9), fresh=fresh)
    with pytest.raises(ValueError, match="at least one"):
        delta_call((0, 10), fresh=fresh)


def attention_shape(rotary: int = 64) -> attention_inputs.AttentionShape:
    return attention_inputs.AttentionShape(4, 2, mx.zeros((256,), BF16), mx.zeros((256,), BF16), 1e-6, rotary, 1e7)


def test_attention_inputs_refuse() -> None:
    positions, tails = [mx.array([0, 0, 64], dtype=mx.int32)] * 2, [mx.zeros((2, 2, 64, 256), BF16)] * 2
    projected, segments = mx.zeros((3, 12 * 256), BF16), Segments.of((1, 2))
    run, shape = attention_inputs.attention_inputs, attention_shape()
    with pytest.raises(ValueError, match="projected is"):
        run(projected[:, :-1], tails, positions, segments, shape)
    with pytest.raises(ValueError, match="projected is"):
        run(projected[:2], tails, positions, segments, shape)
    with pytest.raises(ValueError, match="1 tails and 2 positions for 2 sequences"):
        run(projected, tails[:1], positions, segments, shape)
    with pytest.raises(ValueError, match="each has 1 to 64"):
        run(projected, tails, positions, Segments.of((0, 3)), shape)
    with pytest.raises(ValueError, match="tail is"):
        run(projected, [tails[0], tails[1][:, :, :-1]], positions, segments, shape)
    with pytest.raises(ValueError, match="position"):
        run(projected, tails, [positions[0], positions[1][:1]], segments, shape)
    with pytest.raises(ValueError, match="48 rotary"):
        run(projected, tails, positions, segments, attention_shape(rotary=48))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("queries", (1, 4, 128), "queries are"),
        ("keys", (2, 2, 64, 256), "keys are"),
        ("keys", (1, 1, 64, 256), "keys are"),
        ("values", (1, 2, 32, 256), "values"),
        ("tail", (2, 2, 32, 256), "tail is"),
        ("position", (2,), "position"),
        ("projected", (3, 256), "projected is"),
        ("queries", (2, 4, 256), "queries are"),
    ],
)
def test_attention_refuses(part: str, value: tuple[int, ...], message: str) -> None:
    """The second of two sequences is at fault where it can be."""
    shapes = {
        "queries": (3, 4, 256),
        "keys": (1, 2, 64, 256),
        "values": (1, 2, 64, 256),
        "tail": (2, 2, 64, 256),
        "position": (3,),
        "projected": (3, 12 * 256),
    }

    def arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, mx.array]:
        return {n: mx.zeros(s, mx.int32 if n == "position" else BF16) for n, s in shapes.items()}

    good, bad = arrays(shapes), arrays(shapes | {part: value})
    contexts = [few_row_attention.Context(*(a[n] for n in list(shapes)[1:5])) for a in (good, bad)]
    with pytest.raises(ValueError, match=message):
        few_row_attention.few_row_attention(bad["queries"], contexts, Segments.of((1, 2)), bad["projected"])


def test_attention_refuses_more_rows_or_other_sequences() -> None:
    keys, tail = mx.zeros((1, 2, 64, 256), BF16), mx.zeros((2, 2, 64, 256), BF16)
    context = few_row_attention.Context(keys, keys, tail, mx.array([0, 0, 64], dtype=mx.int32))
    queries, projected = mx.zeros((34, 4, 256), BF16), mx.zeros((34, 12 * 256), BF16)
    with pytest.raises(ValueError, match="exceed 64"):
        few_row_attention.few_row_attention(queries, [context] * 2, Segments.of((1, 33)), projected)
    with pytest.raises(ValueError, match="1 contexts for 2 sequences"):
        few_row_attention.few_row_attention(queries, [context], Segments.of((17, 17)), projected)


def test_attention_refuses_first_rows_without_a_bound() -> None:
    keys, tail = mx.zeros((1, 2, 64, 256), BF16), mx.zeros((2, 2, 64, 256), BF16)
    row = few_row_attention.first_row(keys)
    context = few_row_attention.Context(row, row, tail, mx.array([0, 0, 64], dtype=mx.int32))
    queries, projected, segments = mx.zeros((1, 4, 256), BF16), mx.zeros((1, 12 * 256), BF16), Segments.of((1,))
    with pytest.raises(ValueError, match="a bound"):
        few_row_attention.check(queries, [context], segments, projected)
    few_row_attention.check(queries, [replace(context, bound=128)], segments, projected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sources_reduce_in_a_fixed_order(kernel: str) -> None:
    text = (FOLDER / kernel / "kernel.cu").read_text()
    text = re.sub(r"atomicAdd\(&s\.bins|atomic(Max|Add)\(&s\.key", "", text)  # whole numbers, which no order changes
    text = text.replace("atomicAdd(work, 1u)", "")  # counts tiles, which does not sum anything
    text = text.replace("atomicOr(&s.sets", "")  # sets of rows
    assert not re.search(r"\batomic|\bred\.", text)


def test_wide_launches_count_and_sum_nothing_by_atomics() -> None:
    text = "".join((FOLDER / "few_row_matmul" / name).read_text() for name in ("shared.cuh", "wide.cu"))
    assert text.count("atomicAdd(work + ") == 2  # tiles claimed and branches that arrived
    assert not re.search(r"\batomic|\bred\.", text.replace("atomicAdd(work + ", ""))


def constant(kernel: str, name: str, file: str = "kernel.cu") -> int:
    match = re.search(rf"constexpr int (?:\w+ = \d+, )?{name} = (\d+)", (FOLDER / kernel / file).read_text())
    assert match, f"{kernel} has no {name}"
    return int(match[1])


def test_python_and_cuda_agree_on_constants() -> None:
    assert constant("few_row_matmul", "kWarps", "shared.cuh") == WARPS
    assert (WARPS + constant("few_row_matmul", "kCopyWarps")) * 32 == THREADS
    assert constant("few_row_matmul", "kTokens", "shared.cuh") == TILE_ROWS
    assert constant("few_row_matmul", "kTileRows", "shared.cuh") == TILE_FEATURES
    assert (WARPS + constant("few_row_matmul", "kHelpers", "wide.cu")) * 32 == WidePlan.threads
    assert constant("gated_delta", "kThreads") == gated_delta._THREADS
    assert constant("gated_delta", "kDim") == gated_delta.HEAD_DIM
    assert constant("gated_delta", "kTape") == gated_delta.TAPE
    assert constant("attention_inputs", "kThreads") == attention_inputs._WARPS * 32
    for own in ("NEAR", "FAR", "SHORT", "MIDDLE", "LONG", "TILE", "RING_FEW", "RING_MANY", "FEW_TILES", "THREADS"):
        name = "k" + own.title().replace("_", "")
        assert constant("few_row_attention", name) == getattr(few_row_attention, f"_{own}"), name
    assert constant("sampler", "kThreads") == sampler._THREADS
    assert constant("sampler", "kWords") == sampler.WORDS
    assert constant("few_row_attention", "kJoinDim") == few_row_attention._JOIN_DIM
    threads = constant("few_row_attention", "kJoinWays") * few_row_attention._JOIN_DIM // 4
    assert threads == few_row_attention._JOIN_THREADS
    assert constant("few_row_experts", "kTeamWarps") == few_row_experts._TEAM_WARPS
    assert constant("few_row_experts", "kTeams") == few_row_experts._TEAMS
    assert constant("few_row_experts", "kEnterFeatures") == few_row_experts._ENTER_FEATURES
    assert constant("few_row_experts", "kLeaveFeatures") == few_row_experts._LEAVE_FEATURES
    assert constant("few_row_experts", "kLeaveThreads") == few_row_experts._LEAVE_THREADS
    assert constant("few_row_experts", "kMostRows") == few_row_experts.MAX_ROWS
    assert few_row_attention.HEAD_DIM == constant("few_row_attention", "kDim") == attention_inputs.HEAD_DIM


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_version_follows_its_sources(kernel: str) -> None:
    names = ["kernel.cu", "kernel.metal", "metal.py"]
    if kernel == "few_row_matmul":
        names = ["../tensor_core.cuh", "shared.cuh", "kernel.cu", "wide.cu", "plan.py", "kernel.metal", "metal.py"]
    if kernel == "few_row_experts":
        names = ["../tensor_core.cuh", "../few_row_matmul/kernel.metal", *names]
    texts = [(FOLDER / kernel / name).read_text() for name in names]
    assert version_of(*texts) == getattr(mtp_kernels, kernel).VERSION
    for changed in range(len(names)):
        assert version_of(*(text + " " * (i == changed) for i, text in enumerate(texts))) != version_of(*texts)


@pytest.mark.parametrize("kernel", KERNELS)
def test_metal_says_that_it_is_unproved(kernel: str) -> None:
    assert "UNPROVED" in (FOLDER / kernel / "kernel.metal").read_text()
