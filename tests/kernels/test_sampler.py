"""The sampler's reference against the engine's own law and race, and the face's errors."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mtp_kernels.registry import CHECK_ROWS
from mtp_kernels.sampler import reference, row_words, sample
from mtp_kernels.sampler.probe import case
from mtp_kernels.sampler.reference import philox

from mlx_mtp_backend.api import Sampling
from mlx_mtp_backend.decode import noise, sampling
from mlx_mtp_backend.decode.noise import Purpose

RNG = np.random.default_rng(0)


def words(own: Sampling, seeds: list[int], positions: list[int], purpose: int) -> mx.array:
    rows = [
        row_words(seed, position, purpose, own.temperature, own.top_k, own.top_p, own.min_p)
        for seed, position in zip(seeds, positions, strict=True)
    ]
    return mx.array(rows, mx.uint32)


def rows(kind: str, vocab_size: int, spread: float, seed: int) -> mx.array:
    values = np.random.default_rng(seed).normal(size=(3, vocab_size)) * spread
    if kind == "ties":
        values = np.round(values)
    elif kind == "equal":
        values[:] = -1.5
    elif kind == "excluded":
        values[np.random.default_rng(seed + 1).random(values.shape) < 0.6] = -np.inf
        values[:, -1] = -0.0
    return mx.array(values.astype(np.float32))


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(["random", "ties", "equal", "excluded"]),
    vocab_size=st.sampled_from([1, 2, 7, 33, 250, 1003]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    dtype=st.sampled_from([mx.bfloat16, mx.float16]),
    own=st.builds(
        Sampling,
        temperature=st.sampled_from([0.3, 0.6, 1.0, 1.7]),
        top_k=st.sampled_from([0, 1, 5, 20, 1000, 9999]),
        top_p=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
        min_p=st.sampled_from([0.0, 0.03, 0.2]),
    ),
    purpose=st.sampled_from(Purpose),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_reference_draws_what_the_engine_draws(kind, vocab_size, spread, dtype, own, purpose, seed) -> None:
    logits = rows(kind, vocab_size, spread, seed % 1000).astype(dtype)
    seeds, positions = [seed, 3, 2**63], [seed % 5000, 0, 2**31]
    law = sampling.transform(logits, own)
    want = sampling.choose(law, noise.keys(seeds), mx.array(positions), purpose)
    drawn = reference(logits, words(own, seeds, positions, purpose))
    for row, pair in enumerate(zip(drawn.tolist(), want.tolist(), strict=True)):
        # Only a nucleus may end elsewhere, and only where its border is within rounding of a token's.
        assert len(set(pair)) == 1 or any(at_the_border(logits[row], token, own) for token in pair)


def at_the_border(logits: mx.array, token: int, own: Sampling) -> bool:
    """Whether the mass before a token is within rounding of top-p: added up in float64, likeliest first."""
    values = np.array(logits.astype(mx.float32)).astype(np.float64)
    order = np.argsort(-values, kind="stable")
    mass = np.exp(values[order] - values.max())[: own.top_k or None]
    place = int(np.flatnonzero(order == token)[0])
    return own.top_p < 1 and place < mass.size and bool(abs(mass[:place].sum() / mass.sum() - own.top_p) < 1e-5)


def test_a_border_within_rounding_is_told_from_a_fault() -> None:
    """Found by chance: 1000 equal tokens, of which half are a nucleus; 500 or 501 of them, by the order of the sum."""
    own = Sampling(0.3, top_k=1000, top_p=0.5)
    equal = mx.zeros((1003,))
    assert [at_the_border(equal, token, own) for token in (499, 500, 501, 1001)] == [False, True, False, False]
    assert not at_the_border(equal, 500, Sampling(0.3, top_k=1000))


def test_the_reference_follows_the_law() -> None:
    """Draws at many positions, counted."""
    own, count = Sampling(0.7, top_k=6, top_p=0.9, min_p=0.05), 4000
    logits = mx.array(RNG.normal(size=(1, 40)) * 2).astype(mx.float16)
    drawn = reference(mx.broadcast_to(logits, (count, 40)), words(own, [9] * count, list(range(count)), 0))
    seen = np.bincount(np.array(drawn), minlength=40) / count
    law = np.exp(np.array(sampling.transform(logits, own).dense(40)))[0]
    assert np.abs(seen - law).max() < 4 * np.sqrt(0.25 / count)
    assert not seen[law == 0].any()


def test_philox_is_the_engines() -> None:
    tokens = mx.array([[0, 1, 2, 3, 4, 77, 248_319]])
    mine = philox(
        noise.keys([2**63 + 5]), mx.array([[9]], mx.uint32), mx.array([[2]], mx.uint32), tokens.astype(mx.uint32)
    )
    assert mx.array_equal(mine, noise.bits(noise.keys([2**63 + 5]), mx.array([9]), tokens, Purpose.ACCEPT))


def test_the_probe_tells_rows_apart() -> None:
    """Its draws differ between rows and draws, so that a kernel that mixes them up fails."""
    (drawn,) = case(301, mx.bfloat16).probe(reference, CHECK_ROWS)
    assert drawn.shape == (CHECK_ROWS, 4)
    assert len({tuple(row) for row in drawn.tolist()}) == CHECK_ROWS
    (single,) = case(301, mx.bfloat16).probe(reference, 1)
    assert mx.array_equal(drawn, single)


@pytest.mark.parametrize(
    ("logits", "parameters", "message"),
    [
        (mx.zeros((4,), mx.bfloat16), mx.zeros((4, 8), mx.uint32), r"expected \[R, V\]"),
        (mx.zeros((2, 0), mx.bfloat16), mx.zeros((2, 8), mx.uint32), r"expected \[R, V\]"),
        (mx.zeros((2, 5), mx.bfloat16), mx.zeros((1, 8), mx.uint32), r"expected \[R, 8\]"),
        (mx.zeros((2, 5), mx.bfloat16), mx.zeros((2, 8), mx.int32), r"expected \[R, 8\]"),
        (mx.zeros((2, 5)), mx.zeros((2, 8), mx.uint32), "neither bfloat16 nor float16"),
    ],
)
def test_the_face_refuses(logits: mx.array, parameters: mx.array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(logits, parameters)
