"""The harness itself: what it must catch, and that its lanes compute as Metal's do."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_host.host import Host, MetalFault, MetalSyntaxError

LANE = "const uint lane = thread_index_in_simdgroup, me = thread_position_in_threadgroup.x;"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
EMPTY_BARRIER = "threadgroup_barrier(mem_flags::mem_none);"
SHARED = "threadgroup float s[64]; s[me] = x[me]; "


def launch(
    source: str, x: mx.array, threads: int = 64, size: int = 64, dtype: mx.Dtype = mx.float32, header: str = ""
) -> mx.array:
    kernel = Host()(name="probe", input_names=["x"], output_names=["y"], source=LANE + source, header=header)
    (y,) = kernel(
        inputs=[x],
        output_shapes=[(size,)],
        output_dtypes=[dtype],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
    )
    return y


NUMBERS = mx.arange(64).astype(mx.float32)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"{SHARED}{BARRIER} y[me] = s[63 - me];", None),
        (f"{SHARED}y[me] = s[me ^ 1];", "race: threads|nothing has written"),
        (f"threadgroup float s[64]; s[me] = 0; {BARRIER} y[me] = s[63]; if (me == 63) s[63] = 1;", "others read"),
        (f"threadgroup float s[64]; s[me / 2] = x[me]; {BARRIER} y[me] = s[me / 2];", "race: threads 0 and 1"),
        (f"{SHARED}{EMPTY_BARRIER} y[me] = s[me ^ 1];", "race"),
        # A simdgroup's own barrier orders its lanes, and no others.
        (f"{SHARED}{SIMD_BARRIER} y[me] = s[me ^ 1];", None),
        (f"{SHARED}{SIMD_BARRIER} y[me] = s[me ^ 32];", "race|nothing has written"),
        (f"threadgroup float s[64]; if (me) s[me] = x[me]; {BARRIER} y[me] = s[me];", "nothing has written"),
        (f"threadgroup float s[64]; s[me + 1] = x[me]; {BARRIER} y[me] = s[me];", "array index out of bounds"),
        (f"if (lane < 16) {BARRIER} y[me] = x[me];", "simdgroup 0 diverges"),
        (f"if (me >= 32) return; {BARRIER} y[me] = x[me];", "never reach"),
        (f"if (me < 32) {BARRIER} else {EMPTY_BARRIER} y[me] = x[me];", "different threadgroup"),
        ("if (lane == 5) return; y[me] = simd_sum(x[me]);", "simdgroup 0 diverges"),
        ("float v = x[me]; if (lane & 1) v = simd_shuffle_xor(v, 1); y[me] = v;", "simdgroup 0 diverges"),
        ("y[me] = simd_shuffle_down(x[me], 1);", "lane that does not exist"),
        ("y[me] = x[me + 1];", "reads byte 256 of x, out of bounds"),
        ("y[me] = x[int(me) - 1];", "reads byte -4 of x, out of bounds"),
        ("y[me + 1] = x[me];", "writes byte 256 of y, out of bounds"),
        ("y[me / 2] = x[me];", "race: writes byte 0 of y, which thread 0"),
        ("y[me] = y[me] + x[me];", "reads byte 0 of y, which nothing has written"),
        ("const device float4* v = reinterpret_cast<const device float4*>(x + 1); y[me] = v[0].x;", "unaligned"),
        ("y[me] = float(1u << (me + 1));", "a shift by more"),
        ("int top = 2147483647; y[me] = float(top + int(me));", "signed overflow"),
        ("float v[4] = {}; for (uint i = 0; i <= me; ++i) v[i] = x[i]; y[me] = v[0];", "array index out of bounds"),
        (f"threadgroup float s[9000]; s[me] = x[me]; {BARRIER} y[me] = s[63 - me];", "36000 bytes of threadgroup"),
    ],
)  # fmt: skip
def test_faults(source: str, message: str | None) -> None:
    if message is None:
        assert launch(source, NUMBERS).shape == (64,)
        return
    with pytest.raises(MetalFault, match=message):
        launch(source, NUMBERS)


TAKES_DEVICE = "inline float first(const device float* p) { return p[0]; }"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("y[me] = first(x);", None),
        ("threadgroup float s[4]; s[me % 4] = 0; y[me] = first(s);", "no matching function"),
        ("float own = x[me]; y[me] = first(&own);", "no matching function"),
        ("threadgroup float s[4]; device float* p = reinterpret_cast<device float*>(s); y[me] = p[0];", "not allowed"),
        ("x[me] = 0; y[me] = 0;", "const"),
        ("y[me] = x[me] * 0.1 + y[me];", "double"),
        ("y[me] = erf(x[me]);", "undeclared"),
        ("if constexpr (true) y[me] = x[me];", "C\\+\\+17"),
        ("simdgroup_float8x8 m; y[me] = m.thread_elements()[0];", "thread_elements"),
    ],
)
def test_syntax(source: str, message: str | None) -> None:
    if message is None:
        assert launch(source, NUMBERS, header=TAKES_DEVICE).shape == (64,)
        return
    with pytest.raises(MetalSyntaxError, match=message):
        launch(source, NUMBERS, header=TAKES_DEVICE)


def test_an_array_of_fewer_than_eight_values_is_constant() -> None:
    with pytest.raises(MetalSyntaxError, match="no matching function"):
        launch("y[me] = first(x);", mx.zeros((7,)), header=TAKES_DEVICE)


def test_shape_strides_and_scalars_are_passed() -> None:
    source = "y[me] = me == 0 ? x_shape[0] : me == 1 ? x_shape[1] : me == 2 ? float(x_strides[0]) : float(x_ndim);"
    assert launch(source, mx.zeros((3, 5)), 4, 4).tolist() == [3, 5, 5, 2]
    assert launch("y[me] = x + 1;", mx.array(2.0), 2, 2).tolist() == [3, 3]


def test_lanes_exchange() -> None:
    x = np.arange(64, dtype=np.float32) ** 2
    lanes = np.arange(64)
    for source, want in [
        ("simd_sum(x[me])", np.repeat(x.reshape(2, 32).sum(1), 32)),
        ("simd_max(x[me])", np.repeat(x.reshape(2, 32).max(1), 32)),
        ("simd_shuffle_xor(x[me], 5)", x[lanes ^ 5]),
        ("simd_shuffle(x[me], 31 - lane)", x[lanes // 32 * 32 + 31 - lanes % 32]),
        ("simd_broadcast(x[me], 3)", x[lanes // 32 * 32 + 3]),
    ]:
        np.testing.assert_array_equal(np.array(launch(f"y[me] = {source};", mx.array(x))), want)


def test_simdgroup_matrices_multiply() -> None:
    a, b = (np.random.default_rng(i).integers(-4, 5, (8, 8)) for i in (0, 1))
    source = """
      threadgroup float copy[64];
      simdgroup_float8x8 a, b, c;
      simdgroup_load(a, x);
      simdgroup_load(b, x + 64);
      simdgroup_multiply(c, a, b);
      simdgroup_multiply_accumulate(c, a, b, c);
      simdgroup_store(c, copy);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      simdgroup_load(c, copy);
      simdgroup_store(c, y);"""
    got = launch(source, mx.array(np.concatenate([a, b]).astype(np.float32)), threads=32)
    np.testing.assert_array_equal(np.array(got).reshape(8, 8), 2 * a @ b)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_conversions_round_as_mlx_does(dtype: mx.Dtype) -> None:
    """Every value there is, the midpoints between them, and the floats next to those."""
    kind = "half" if dtype == mx.float16 else "bfloat"
    every = mx.arange(65536).astype(mx.uint16).view(dtype)
    wide = np.array(launch("y[thread_position_in_grid.x] = float(x[thread_position_in_grid.x]);", every, 1024, 65536))
    np.testing.assert_array_equal(wide[:1024], np.array(every.astype(mx.float32))[:1024])
    values = np.array(every.astype(mx.float32))
    values = np.sort(values[np.isfinite(values)])
    middles = values[:-1] / 2 + values[1:] / 2
    near = np.concatenate([np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)])
    x = np.concatenate([values, middles, near, [np.inf, -np.inf, 3e38, -3e38]]).astype(np.float32)
    source = f"for (uint i = me; i < {len(x)}; i += 64) y[i] = {kind}(x[i]);"
    got, want = launch(source, mx.array(x), size=len(x), dtype=dtype), mx.array(x).astype(dtype)
    assert mx.array_equal(got.view(mx.uint16), want.view(mx.uint16))
