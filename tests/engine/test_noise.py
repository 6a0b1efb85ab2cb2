"""Noise: the published generator, the same integers however they are asked for, fine enough at the winning end."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp_backend.decode import noise
from mlx_mtp_backend.decode.noise import Purpose

# Known answers published with Random123 for philox4x32 at ten rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = tuple(mx.array(word, mx.uint32) for word in counter)
    assert tuple(noise.philox4x32(words, mx.array(key, mx.uint32)).tolist()) == answer


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31 - 1),
    tokens=st.lists(st.integers(0, 300), min_size=1, max_size=20),
    purpose=st.sampled_from(Purpose),
)
def test_a_draw_depends_on_its_own_key_only(seed, position, tokens, purpose):
    alone = noise.bits(noise.keys([seed]), mx.array([position]), mx.array([tokens]), purpose)
    row = noise.row_bits(noise.keys([seed]), mx.array([position]), 301, purpose)
    beside = noise.row_bits(noise.keys([1, seed, 2]), mx.array([position + 1, position, 3]), 301, purpose)
    assert alone[0].tolist() == [row[0, token].item() for token in tokens]
    assert mx.array_equal(row[0], beside[1])


def test_keys_give_unrelated_draws():
    """Correlation of the uniforms of any two keys stays within five standard errors."""
    keys = [(s, p, purpose) for s in (1, 2, 1 << 32, 1 << 63) for p in (0, 1, 2) for purpose in Purpose]
    draws = [noise.row_bits(noise.keys([s]), mx.array([p]), 4096, purpose) for s, p, purpose in keys]
    rows = np.array([np.array(noise.uniform(row))[0] for row in draws])
    correlation = np.corrcoef(rows) - np.eye(len(keys))
    assert np.abs(correlation).max() < 5 / math.sqrt(4096)
    assert np.abs(rows.mean(axis=1) - 0.5).max() < 5 * math.sqrt(1 / 12 / 4096)


def test_the_exponential_is_fine_at_the_end_that_wins_and_finite_at_the_other():
    small = np.exp(np.array(noise.log_exponential(mx.arange(6).astype(mx.uint32)), dtype=np.float64))
    assert np.allclose(small, (np.arange(6) + 0.5) * 2.0**-32, rtol=1e-5)
    assert math.isfinite(noise.log_exponential(mx.array([0xFFFFFFFF], mx.uint32)).item())


def test_the_exponential_has_its_law():
    """Kolmogorov-Smirnov distance of 40,000 draws from Exp(1), at a level of about 1e-6."""
    bits = noise.row_bits(noise.keys([9]), mx.array([0]), 40_000, Purpose.TARGET)
    draws = np.sort(np.exp(np.array(noise.log_exponential(bits))[0]))
    law = 1 - np.exp(-draws)
    steps = np.arange(1, draws.size + 1) / draws.size
    assert np.abs(law - steps).max() < 2.7 / math.sqrt(draws.size)
