"""Rounds that draw through the sampler's kernel, here its reference: the same tokens, in launches for all who may."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mtp_kernels.sampler import reference

from mlx_mtp_backend.api import GenerateParams, LoadOptions, Rule, Sampling
from mlx_mtp_backend.decode.drafters import HeadDrafter
from mlx_mtp_backend.decode.processors import processors_of
from mlx_mtp_backend.families.base import Model
from mlx_mtp_backend.load.loading import unseeded_rule
from mlx_mtp_backend.models import WiringReport
from tests.conformance import decode

PROMPTS = [tuple((41 * i + 7 * n) % 690 for i in range(n)) for n in (5, 17, 30)]
SAMPLINGS = [Sampling(0.0), Sampling(0.6, top_k=20, top_p=0.95), Sampling(1.0)]
NEW = 10


class Counted:
    """The reference as a model's sampler."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, logits: mx.array, parameters: mx.array) -> mx.array:
        self.rows.append(logits.shape[0])
        return reference(logits, parameters)


@pytest.fixture(scope="module")
def model(history: Path) -> Model:
    return decode.load(history)


def replies(model: Model, depth: int, rule: Rule = Rule.COUPLING, biased: int | None = None) -> list[list[int]]:
    """Three sequences that sample in three ways, decoded together; one may have processors."""
    running = []
    for place, (prompt, own) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
        one = decode.start(model, prompt, NEW, sampling=own, seed=place, rule=rule, depth=depth)
        if place == biased:
            params = GenerateParams("m", prompt, NEW, Sampling(own.temperature, logit_bias=((3, 1.0),)), place)
            one.processors = processors_of(params, frozenset())
        decode.prefill(model, one)
        running.append(one)
    decode.finish(model, HeadDrafter(model), running)
    return [one.tokens for one in running]


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("biased", [None, 1])
def test_the_same_tokens_in_one_launch(model, monkeypatch, depth, biased) -> None:
    want = replies(model, depth, biased=biased)
    sampler = Counted()
    monkeypatch.setattr(model, "sampler", sampler)
    assert replies(model, depth, biased=biased) == want
    unbiased = 3 if biased is None else 2
    assert sampler.rows[:unbiased] == [1] * unbiased  # first tokens
    rounds = sampler.rows[unbiased:]
    assert (rounds[:3] == [unbiased] * 3) if depth == 0 else (rounds[:3] == [unbiased, unbiased, unbiased * 3])


def test_rejection_keeps_laws_of_its_own(model, monkeypatch) -> None:
    """Its drafts and verify rows need the laws; first tokens, and rows that no draft shares, do not."""
    want = replies(model, 2, Rule.REJECTION)
    sampler = Counted()
    monkeypatch.setattr(model, "sampler", sampler)
    assert replies(model, 2, Rule.REJECTION) == want
    assert all(count == 1 for count in sampler.rows[:3])
    assert sum(sampler.rows) < 3 * NEW


def test_replay_beside_processed_neighbours(model, monkeypatch) -> None:
    monkeypatch.setattr(model, "sampler", Counted())
    assert replies(model, 2, biased=1)[0::2] == replies(model, 0)[0::2]


@pytest.mark.parametrize(
    ("rejection", "coupling", "drawn", "chosen"),
    [
        (0.54, 0.51, False, Rule.REJECTION),
        (0.54, 0.51, True, Rule.COUPLING),
        (0.51, 0.54, False, Rule.COUPLING),
        (0.9, 0.4, True, Rule.REJECTION),
    ],
)
def test_the_rule_without_a_seed_promises_more_tokens_a_second(rejection, coupling, drawn, chosen) -> None:
    report = WiringReport(99, 0.5, 0.1, {}, None, {Rule.REJECTION: rejection, Rule.COUPLING: coupling}, True)
    assert unseeded_rule(LoadOptions(), report, drawn=drawn) is chosen
    assert unseeded_rule(LoadOptions(unseeded_rule=Rule.REJECTION), report, drawn=drawn) is Rule.REJECTION
