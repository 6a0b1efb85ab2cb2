"""The sampler's transforms against a plain full sort, and the parameters' limits."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_mtp_backend.api import Sampling
from mlx_mtp_backend.decode import noise
from mlx_mtp_backend.decode import sampling as module
from mlx_mtp_backend.decode.noise import Purpose
from mlx_mtp_backend.decode.sampling import Law, candidates, choose, transform
from mlx_mtp_backend.errors import EngineError, ErrorReason


def by_full_sort(logits: np.ndarray, sampling: Sampling) -> np.ndarray | None:
    """The law by its definition, in float64; None where a border is too close to call."""
    order = sorted(range(logits.size), key=lambda token: (-logits[token], token))
    if sampling.greedy:
        return np.eye(logits.size)[order[0]]
    if sampling.top_k:
        order = order[: sampling.top_k]
    p = np.exp(logits[order].astype(np.float64) - logits.max())
    p /= p.sum()
    before = np.cumsum(p) - p
    close = np.abs(before - sampling.top_p) < 1e-5
    if sampling.min_p:
        close |= np.abs(p / p[0] - sampling.min_p) < 1e-5
    if sampling.top_p < 1 and close.any():
        return None
    keep = (
        (before < sampling.top_p) & (p >= sampling.min_p * p[0]) if sampling.top_p < 1 else p >= sampling.min_p * p[0]
    )
    law = np.zeros(logits.size)
    kept = np.array(order)[keep]
    tempered = np.exp((logits[kept].astype(np.float64) - logits.max()) / sampling.temperature)
    law[kept] = tempered / tempered.sum()
    return law


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.6, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, 20, 1000]),
    top_p=st.sampled_from([0.05, 0.31, 0.5, 0.87, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.21]),
)


@settings(max_examples=150, deadline=None)
@given(
    # A coarse grid makes ties common.
    logits=st.lists(st.integers(-6, 6).map(lambda i: i / 2), min_size=1, max_size=40),
    sampling=SAMPLINGS,
    width=st.sampled_from([3, 1024]),
)
def test_the_law_is_that_of_a_full_sort(logits, sampling, width):
    values = np.array(logits, dtype=np.float32)
    expected = by_full_sort(values, sampling)
    assume(expected is not None)
    kept_width, module.NUCLEUS_WIDTH = module.NUCLEUS_WIDTH, width
    try:
        law = transform(mx.array(values)[None], sampling)
    finally:
        module.NUCLEUS_WIDTH = kept_width
    assert np.allclose(np.exp(np.array(law.dense(values.size)))[0], expected, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(logits=st.lists(st.integers(-3, 3), min_size=1, max_size=50), data=st.data())
def test_candidates_are_ordered_with_ties_by_lowest_id(logits, data):
    width = data.draw(st.integers(1, len(logits)))
    expected = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:width]
    assert candidates(mx.array(logits, mx.float32)[None], width)[0].tolist() == expected


def test_minus_zero_ties_with_zero():
    assert candidates(mx.array([[-0.0, 0.0, -0.0]]), 2)[0].tolist() == [0, 1]


@pytest.mark.parametrize("sampling", [Sampling(0.7, top_p=0.99), Sampling(0.7, top_k=40), Sampling(1.0, min_p=0.1)])
def test_a_row_does_not_depend_on_its_neighbours(sampling):
    """Flat rows need the wide path and peaked rows do not; mixing them must change no bit."""
    flat = mx.random.normal((2, 5000), key=mx.random.key(1)) * 0.1
    peaked = mx.random.normal((2, 5000), key=mx.random.key(2)) * 8
    together = transform(mx.concatenate([flat, peaked]), sampling).dense(5000)
    apart = mx.concatenate([transform(row[None], sampling).dense(5000) for row in (*flat, *peaked)])
    assert mx.array_equal(together, apart)


def test_a_wide_nucleus_is_exact_for_the_target_and_cut_for_a_draft():
    flat = mx.zeros((1, 5000))
    exact = transform(flat, Sampling(1.0, top_p=0.9))
    cut = transform(flat, Sampling(1.0, top_p=0.9), exact=False)
    assert int(mx.sum(mx.isfinite(exact.logp)).item()) == pytest.approx(4500, abs=2)
    assert int(mx.sum(mx.isfinite(cut.logp)).item()) == module.NUCLEUS_WIDTH


def test_greedy_takes_the_lowest_of_equal_logits():
    law = transform(mx.array([[0.0, 2.0, 2.0]]), Sampling(0.0))
    assert choose(law, noise.keys([5]), mx.array([3]), Purpose.TARGET).tolist() == [1]


def test_an_excluded_token_is_never_drawn():
    law = Law(mx.array([[-math.inf, 0.0, -math.inf, -math.inf]] * 5000))
    assert set(choose(law, noise.keys([5] * 5000), mx.arange(5000), Purpose.TARGET).tolist()) == {1}


def test_a_draw_is_the_same_from_the_dense_and_the_truncated_form():
    logits = mx.random.normal((64, 500), key=mx.random.key(3)) * 4
    law = transform(logits, Sampling(0.8, top_k=30, top_p=0.9))
    keys, positions = noise.keys([11] * 64), mx.arange(64) + 7
    dense = choose(Law(law.dense(500)), keys, positions, Purpose.TARGET)
    assert mx.array_equal(choose(law, keys, positions, Purpose.TARGET), dense)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", 1.0),
        ("min_p", -0.2),
    ],
)
def test_bad_parameters_are_named(field, value):
    with pytest.raises(EngineError) as caught:
        Sampling(**{field: value})
    assert caught.value.reason is ErrorReason.INVALID_PARAMS
    assert caught.value.field == field
