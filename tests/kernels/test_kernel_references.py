"""References against independent NumPy in float64, written from the definitions."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mtp_kernels import attention_inputs, few_row_attention, few_row_experts, few_row_matmul, gated_delta
from mtp_kernels.few_row_matmul import Matrix
from mtp_kernels.segments import Segments

RNG = np.random.default_rng(0)


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def close(got: mx.array, want: np.ndarray, tolerance: float = 2e-5) -> None:
    error = np.linalg.norm(wide(got) - want) / np.linalg.norm(want)
    assert error < tolerance


def unpacked(matrix: Matrix) -> np.ndarray:
    """Weights from MLX's packing: value i of a word lies at bit i * bits, q * scale + bias by group."""
    if matrix.bits == 16:
        return wide(matrix.weight)
    words = np.array(matrix.weight)
    shifts = np.arange(0, 32, matrix.bits, dtype=np.uint32)
    codes = ((words[:, :, None] >> shifts) & ((1 << matrix.bits) - 1)).reshape(words.shape[0], -1)
    scales, biases = (np.repeat(wide(a), matrix.group_size, axis=1) for a in (matrix.scales, matrix.biases))
    return codes * scales + biases


def random_matrix(features: int, inputs: int, bits: int, group: int) -> Matrix:
    weight = mx.array(RNG.normal(size=(features, inputs)).astype(np.float32) * inputs**-0.5)
    if bits == 16:
        return Matrix(weight)
    return Matrix(*mx.quantize(weight, group_size=group, bits=bits), bits, group)


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (8, 128), (16, 0)])
@pytest.mark.parametrize("fusion", ["plain", "norm", "residual", "swiglu"])
@pytest.mark.parametrize("implementation", [few_row_matmul.reference, few_row_matmul.stock])
def test_matmul(bits: int, group: int, fusion: str, implementation) -> None:
    x = RNG.normal(size=(5, 256))
    matrices = [random_matrix(n, 256, bits, group) for n in ((48, 48) if fusion == "swiglu" else (40, 24))]
    weight, added = RNG.uniform(0.5, 1.5, 256), RNG.normal(size=(5, 64))
    arguments = {
        "plain": {},
        "norm": {"norm_weight": mx.array(weight.astype(np.float32)), "eps": 1e-3},
        "residual": {"residual": mx.array(added.astype(np.float32))},
        "swiglu": {"swiglu": True},
    }[fusion]
    got = implementation(mx.array(x.astype(np.float32)), matrices, **arguments)
    rows = rms(x, weight, 1e-3) if fusion == "norm" else x
    products = [rows @ unpacked(m).T for m in matrices]
    want = silu(products[0]) * products[1] if fusion == "swiglu" else np.concatenate(products, axis=1)
    close(got, want + added if fusion == "residual" else want, 1e-4)


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32), (16, 0)])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("implementation", [few_row_experts.reference, few_row_experts.stock])
def test_experts(bits: int, group: int, normalised: bool, implementation) -> None:
    count, top, hidden, width, shared = 6, 3, 256, 128, 384
    sizes = [(count * width, hidden)] * 2 + [(count * hidden, width)] + [(shared, hidden)] * 2 + [(hidden, shared)]
    matrices = [random_matrix(n, k, bits, group) for n, k in sizes]
    x, norm, logits = RNG.normal(size=(4, hidden)) * 0.1, RNG.uniform(0.5, 1.5, hidden), RNG.normal(size=(4, count + 1))
    logits[2, :count] = 1.0  # ties go to the lowest
    as_mx = [mx.array(a.astype(np.float32)) for a in (x, logits, norm)]
    weights = few_row_experts.Experts(*matrices, count, top, normalised)
    got = implementation(*as_mx[:2], weights, as_mx[2])
    gate, up, down, *own = (unpacked(m) for m in matrices)
    want = x.copy()
    for m, h in enumerate(rms(x, norm, 1e-6)):
        shares = np.exp(logits[m, :count]) / np.exp(logits[m, :count]).sum()
        best = sorted(range(count), key=lambda e: (-shares[e], e))[:top]
        whole = sum(shares[e] for e in best) if normalised else 1.0
        for e in best:
            at, to = slice(e * width, (e + 1) * width), slice(e * hidden, (e + 1) * hidden)
            want[m] += shares[e] / whole * (down[to] @ (silu(gate[at] @ h) * (up[at] @ h)))
        want[m] += own[2] @ (silu(own[0] @ h) * (own[1] @ h)) / (1 + np.exp(-logits[m, count]))
    close(got, want, 1e-4)


def delta_weights(key_heads: int = 2, value_heads: int = 4) -> gated_delta.DeltaWeights:
    channels = (2 * key_heads + value_heads) * 128
    arrays = [RNG.normal(size=(channels, 4)) * 0.5, RNG.normal(size=value_heads), RNG.normal(size=value_heads)]
    conv, a_log, dt_bias = (mx.array(a.astype(np.float32)) for a in arrays)
    norm = mx.array(RNG.uniform(0.5, 1.5, 128).astype(np.float32))
    return gated_delta.DeltaWeights(conv, a_log, dt_bias, norm, key_heads, value_heads, 1e-6)


def numpy_delta(rows: np.ndarray, window: np.ndarray, state: np.ndarray, w: gated_delta.DeltaWeights):
    """Outputs of every row and the state after each, one row at a time."""
    conv, norm = wide(w.conv), wide(w.norm)
    keys, values = w.key_heads * 128, w.value_heads * 128
    history, outputs, states = list(window), [], []
    for row in rows:
        history.append(row[: w.channels])
        mixed = silu(sum(conv[:, tap] * history[len(history) - 4 + tap] for tap in range(4)))
        z = row[w.channels : w.channels + values].reshape(-1, 128)
        b, a = np.split(row[w.channels + values :], 2)
        out = np.zeros((w.value_heads, 128))
        for head in range(w.value_heads):
            at = head // (w.value_heads // w.key_heads) * 128
            q, k = mixed[at : at + 128], mixed[keys + at : keys + at + 128]
            q, k = (t / np.sqrt((t * t).sum() + 1e-6) for t in (q, k))
            v = mixed[2 * keys + head * 128 : 2 * keys + (head + 1) * 128]
            decay = np.exp(-np.exp(wide(w.a_log)[head]) * np.log1p(np.exp(a[head] + wide(w.dt_bias)[head])))
            s = state[head] * decay
            s = s + np.outer(v - s @ k, k) / (1 + np.exp(-b[head]))
            state = np.concatenate([state[:head], s[None], state[head + 1 :]])
            out[head] = s @ q / np.sqrt(128)
        outputs.append((rms(out, norm, w.eps) * silu(z)).reshape(-1))
        states.append(state)
    return np.array(outputs), states, np.array(history)


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("settle", [False, True])
def test_gated_delta(kept: int, settle: bool) -> None:
    w = delta_weights()
    pending, fresh = RNG.normal(size=(3, w.width)), RNG.normal(size=(2, w.width))
    window, state = RNG.normal(size=(3, w.channels)), RNG.normal(size=(4, 128, 128)) * 0.1
    as_mx = [mx.array(a.astype(np.float32)) for a in (state, window, pending, fresh)]
    recurrent, window_rows, tape = as_mx[:3]
    tape = mx.concatenate([tape, mx.full((gated_delta.TAPE - 3, w.width), mx.nan)])
    given_state = gated_delta.DeltaState(recurrent[None], window_rows[None], tape[None])
    y, after = gated_delta.reference(as_mx[3], given_state, mx.array([kept]), w, Segments.of((2,)), settle=settle)
    outputs, states, history = numpy_delta(np.concatenate([pending[:kept], fresh]), window, state, w)
    close(y, outputs[kept:])
    settled = kept + 2 if settle else kept
    close(after.recurrent[0], states[settled - 1] if settled else state)
    close(after.window[0], history[settled : settled + 3])
    if not settle:
        close(after.tape[0, :2], fresh)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_gated_delta_passes_equal_one_pass(sizes: list[int]) -> None:
    """However rows are cut into passes, outputs and state are the same bits."""
    w = delta_weights(1, 2)
    total = sum(sizes)
    rows = mx.random.normal((total, w.width), key=mx.random.key(total))
    start = gated_delta.DeltaState.empty(w, mx.float32)
    none = mx.array([0])
    want, settled = gated_delta.reference(rows, start, none, w, Segments.of((total,)), settle=True)
    state, kept, outputs, at = start, 0, [], 0
    for size in sizes:
        fresh = rows[at : at + size]
        y, state = gated_delta.reference(fresh, state, mx.array([kept]), w, Segments.of((size,)))
        outputs.append(y)
        kept, at = size, at + size
    _, last = gated_delta.reference(rows[:1], state, mx.array([kept]), w, Segments.of((1,)))
    assert mx.array_equal(mx.concatenate(outputs), want)
    assert mx.array_equal(last.recurrent, settled.recurrent)
    assert mx.array_equal(last.window, settled.window)


def test_gated_delta_of_several_sequences_is_that_of_each_alone() -> None:
    w, segments, keep = delta_weights(1, 2), Segments.of((2, 1, 8)), mx.array([0, 8, 3])
    shapes = [(3, 2, 128, 128), (3, 3, w.channels), (3, gated_delta.TAPE, w.width), (11, w.width)]
    keys = mx.random.split(mx.random.key(4), 4)
    *state, fresh = (mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True))
    y, after = gated_delta.reference(fresh, gated_delta.DeltaState(*state), keep, w, segments)
    for own, part in enumerate(segments.slices):
        one = gated_delta.DeltaState(*(array[own : own + 1] for array in state))
        rows = segments.counts[own]
        alone, left = gated_delta.reference(fresh[part], one, keep[own : own + 1], w, Segments.of((rows,)))
        assert mx.array_equal(y[part], alone)
        assert mx.array_equal(after.recurrent[own], left.recurrent[0])
        assert mx.array_equal(after.window[own], left.window[0])
        assert mx.array_equal(after.tape[own, :rows], left.tape[0, :rows])


def attention_shape(heads: int = 4, kv_heads: int = 2, rotary: int = 64) -> attention_inputs.AttentionShape:
    norms = (mx.array(RNG.uniform(0.5, 1.5, 256).astype(np.float32)) for _ in range(2))
    return attention_inputs.AttentionShape(heads, kv_heads, *norms, eps=1e-6, rotary=rotary, theta=1e4)


def numpy_rotate(x: np.ndarray, position: int, rotary: int, theta: float) -> np.ndarray:
    """Each pair (i, i + rotary / 2) as a complex number, turned."""
    half = rotary // 2
    turned = x.copy()
    angle = position * theta ** (-np.arange(half) / half)
    pair = (x[..., :half] + 1j * x[..., half:rotary]) * np.exp(1j * angle)
    turned[..., :half], turned[..., half:rotary] = pair.real, pair.imag
    return turned


@pytest.mark.parametrize("rotary", [64, 256])
def test_attention_inputs(rotary: int) -> None:
    shape = attention_shape(rotary=rotary)
    rows, base, first = RNG.normal(size=(3, shape.width)), 100, 107
    tail = RNG.normal(size=(2, 2, attention_inputs.TAIL, 256))
    as_mx = [mx.array(a.astype(np.float32)) for a in (rows, tail)]
    position = mx.array([base, first, 96], dtype=mx.int32)
    q, (new_tail,) = attention_inputs.reference(as_mx[0], [as_mx[1]], [position], Segments.of((3,)), shape)
    want_q, want_tail = np.zeros((3, 4, 256)), tail.copy()
    for m, row in enumerate(rows):
        for head in range(4):
            query = rms(row[head * 512 : head * 512 + 256], wide(shape.q_norm), 1e-6)
            want_q[m, head] = numpy_rotate(query, first + m, rotary, 1e4)
        for head in range(2):
            key = rms(row[2048 + head * 256 : 2304 + head * 256], wide(shape.k_norm), 1e-6)
            want_tail[0, head, 7 + m] = numpy_rotate(key, first + m, rotary, 1e4)
            want_tail[1, head, 7 + m] = row[2560 + head * 256 : 2816 + head * 256]
    close(q, want_q)
    close(new_tail, want_tail)


@pytest.mark.parametrize("base", [0, 70])
def test_attention(base: int) -> None:
    rows, first = 3, base + 5
    shapes = [(rows, 4, 256), (1, 2, 96, 256), (1, 2, 96, 256), (2, 2, attention_inputs.TAIL, 256), (rows, 12 * 256)]
    q, k, v, tail, projected = (RNG.normal(size=s) for s in shapes)
    as_mx = [mx.array(a.astype(np.float32)) for a in (q, k, v, tail)]
    position = mx.array([base, first, 96], dtype=mx.int32)
    context = few_row_attention.Context(*as_mx[1:], position)
    got = few_row_attention.reference(as_mx[0], [context], Segments.of((rows,)), mx.array(projected.astype(np.float32)))
    want = np.zeros((rows, 4, 256))
    for m in range(rows):
        for head in range(4):
            length = first + m + 1
            keys = np.concatenate([k[0, head // 2, :base], tail[0, head // 2]])[:length]
            values = np.concatenate([v[0, head // 2, :base], tail[1, head // 2]])[:length]
            weights = np.exp(keys @ q[m, head] / 16)
            gate = projected[m, head * 512 + 256 : head * 512 + 512]
            want[m, head] = weights @ values / weights.sum() / (1 + np.exp(-gate))
    close(got, want.reshape(rows, -1))


def test_attention_of_several_sequences_is_that_of_each_alone() -> None:
    """References of both kernels, at lengths that differ."""
    shape, segments = attention_shape(), Segments.of((2, 1, 3))
    where = [(0, 0), (70, 71), (30, 60)]
    projected = mx.random.normal((6, shape.width), key=mx.random.key(1))
    tails = list(mx.random.normal((3, 2, 2, attention_inputs.TAIL, 256), key=mx.random.key(2)))
    keys, values = mx.random.normal((2, 3, 1, 2, 96, 256), key=mx.random.key(3))
    positions = [mx.array([*pair, 96], dtype=mx.int32) for pair in where]

    def run(chosen: list[int], rows: mx.array, segments: Segments) -> list[mx.array]:
        own_tails, own_positions = [tails[i] for i in chosen], [positions[i] for i in chosen]
        q, after = attention_inputs.reference(rows, own_tails, own_positions, segments, shape)
        contexts = [
            few_row_attention.Context(keys[i], values[i], tail, positions[i])
            for i, tail in zip(chosen, after, strict=True)
        ]
        return [few_row_attention.reference(q, contexts, segments, rows), *after]

    together, *tails_together = run([0, 1, 2], projected, segments)
    for own, part in enumerate(segments.slices):
        alone, tail = run([own], projected[part], Segments.of((segments.counts[own],)))
        assert mx.array_equal(together[part], alone)
        assert mx.array_equal(tails_together[own], tail)
