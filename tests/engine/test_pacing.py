"""What a pass has room for, and whom a failure concerns: one sequence, or all of its pass."""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_mtp_backend import Engine, EngineOptions, ErrorReason, Finished, GenerateParams, LoadOptions, Sampling, host
from mlx_mtp_backend.api import Rule, WiringPolicy
from mlx_mtp_backend.decode import pacing
from mlx_mtp_backend.decode.depth import DepthController
from mlx_mtp_backend.families.qwen3_5 import Qwen35
from mlx_mtp_backend.host import DeviceFailure
from mlx_mtp_backend.language.text import GrowingText
from tests.conformance import decode
from tests.engine.test_engine import tokens_of

PROMPTS = [tuple(range(n, n + 40)) for n in (1, 5, 9)]


def ask(prompt: tuple[int, ...], **changes) -> GenerateParams:
    defaults = {"max_tokens": 24, "sampling": Sampling(0.8), "seed": 5, "ignore_eos": True}
    return GenerateParams("m", prompt, **defaults | changes)


@pytest.fixture
def engine(history: Path):
    with Engine(EngineOptions(device="cpu")) as engine:
        options = LoadOptions(depth=2, wiring=WiringPolicy.OFF, prefill_chunk=16)
        engine.load("m", history, options).result(timeout=60)
        yield engine


@pytest.mark.parametrize(("streams", "deepest"), [(1, 7), (3, 7), (4, 7), (8, 3), (16, 1), (32, 0)])
def test_a_pass_keeps_within_the_rows_that_are_invariant(history, streams, deepest):
    model = decode.load(history)
    limits = SimpleNamespace(most_rows=32, most_segment_rows=8)
    running = [
        decode.start(model, [1, 2], 100, sampling=Sampling(0.0), seed=1, rule=Rule.COUPLING, depth=16)
        for _ in range(streams)
    ]
    pacing._share(limits, running)
    assert {one.round_depth for one in running} == {deepest}
    assert sum(1 + one.round_depth for one in running) <= 32


def test_a_reply_whose_text_fails_ends_alone(engine, monkeypatch):
    plain = [tokens_of(list(engine.submit(ask(prompt)))) for prompt in PROMPTS]
    add, calls = GrowingText.add, 0

    def failing(self, token):
        nonlocal calls
        calls += 1
        if calls == 20:
            raise RuntimeError("invalid prefix")
        return add(self, token)

    monkeypatch.setattr(GrowingText, "add", failing)
    replies = [list(stream) for stream in [engine.submit(ask(prompt)) for prompt in PROMPTS]]
    ends = [reply[-1] for reply in replies]
    assert all(isinstance(end, Finished) for end in ends)
    failed = [end.error is not None for end in ends]
    assert sum(failed) == 1
    for reply, whole, lost in zip(replies, plain, failed, strict=True):
        assert lost or tokens_of(reply) == whole
    assert tokens_of(list(engine.submit(ask(PROMPTS[0])))) == plain[0]


def test_a_round_that_teaches_nothing_is_delivered(engine, monkeypatch):
    """Its tokens are committed by then: the round must not be tried again."""
    plain = [tokens_of(list(engine.submit(ask(prompt)))) for prompt in PROMPTS]

    def failing(*arguments, **named):
        raise RecursionError

    monkeypatch.setattr(DepthController, "observe", failing)
    assert [tokens_of(list(engine.submit(ask(prompt)))) for prompt in PROMPTS] == plain


def test_a_device_that_fails_while_a_round_is_built_ends_its_replies(engine, monkeypatch):
    """Their caches may hold what was never computed, so nothing of them is found by the next prompt either."""
    values, armed = host._values, [False]

    def failing(array: mx.array):
        if armed[0]:
            armed[0] = False
            raise DeviceFailure("lost")
        return values(array)

    plain = tokens_of(list(engine.submit(ask(PROMPTS[0], sampling=Sampling(0.8, top_p=0.9)))))
    monkeypatch.setattr(host, "_values", failing)
    armed[0] = True
    end = list(engine.submit(ask(PROMPTS[0], sampling=Sampling(0.8, top_p=0.9))))[-1]
    assert end.error is not None
    assert end.error.reason is ErrorReason.DEVICE_FAILURE
    again = list(engine.submit(ask(PROMPTS[0], sampling=Sampling(0.8, top_p=0.9))))
    assert again[0].cached_tokens == 0
    assert tokens_of(again) == plain


def test_a_failed_pass_forgets_the_models_prefixes(engine, monkeypatch):
    """A device may report a failure one call late: the chunk before may be spoilt, too."""
    prompt = tuple(range(100, 180))
    plain = tokens_of(list(engine.submit(ask(prompt))))
    warm = list(engine.submit(ask(prompt)))
    assert warm[0].cached_tokens == 64
    trunk, armed = Qwen35.trunk, [True]

    def failing(self, tokens, segments):
        if armed[0]:
            armed[0] = False
            raise DeviceFailure("lost")
        return trunk(self, tokens, segments)

    monkeypatch.setattr(Qwen35, "trunk", failing)
    assert list(engine.submit(ask(tuple(range(300, 340)))))[-1].error.reason is ErrorReason.DEVICE_FAILURE
    again = list(engine.submit(ask(prompt)))
    assert again[0].cached_tokens == 0
    assert tokens_of(again) == plain
