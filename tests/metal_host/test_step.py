"""A whole model's step through the Metal texts, and tuning, on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from mtp_kernels.few_row_matmul import variants
from mtp_kernels.few_row_matmul.variants import Variant
from mtp_kernels.launch import metal_through
from mtp_kernels.registry import TUNING_FILE, Registry

from mlx_mtp_backend.api import LoadOptions
from mlx_mtp_backend.cache import begin, commit
from mlx_mtp_backend.families import qwen3_5_load
from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.families.qwen3_5 import Qwen35
from mlx_mtp_backend.families.qwen3_5_fused import FusedQwen35, fused, fused_or_stock
from mlx_mtp_backend.load import tuning
from mlx_mtp_backend.synthetic import Recipe, write
from tests.conformance import decode
from tests.kernels.test_fused_step import sharpened
from tests.metal_host.host import Host
from tests.support.conversion import convert

TOKENS = mx.arange(40).astype(mx.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of each kind and a head, in shapes that the kernels take."""
    recipe = Recipe(layers=2, hidden=128, width=128, head_dim=256, linear_dim=128)
    return write(tmp_path_factory.mktemp("checkpoint"), recipe)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with experts, quantised: a CPU multiplies by no others in half floats."""
    recipe = Recipe(layers=2, hidden=128, width=384, head_dim=256, linear_dim=128, experts=8)
    folder = tmp_path_factory.mktemp("mixture")
    return convert(write(folder / "original", recipe), folder / "quantised", bits=8, group_size=64)


@pytest.fixture
def host() -> Iterator[Host]:
    """Kernels on the host, and no graphs compiled: a launch there needs its arrays' values."""
    mx.disable_compile()
    made = Host()
    with metal_through(made):
        yield made
    mx.enable_compile()
    variants.use({})


def decoded(model: Qwen35, passes: list[tuple[int, int]]) -> mx.array:
    """Logits of each pass's newest rows, of which some are kept, then of what the head makes of them."""
    trunk, head, at, out = model.trunk_caches(), model.head_caches(), 0, []
    for rows, keep in passes:
        tokens = TOKENS[at : at + rows]
        for caches in (trunk, head):
            begin(caches)
        hidden = model.trunk(tokens, [Segment(trunk, rows)])
        drafted = model.head(tokens, hidden.carried, [Segment(head, rows)])
        for caches in (trunk, head):
            commit(caches, keep)
        at += keep
        out += [model.logits(hidden.normed[:keep][-8:]), model.logits(drafted.normed[:keep][-8:])]
    return mx.concatenate([rows.astype(mx.float32) for rows in out])


STEP = {"few_row_matmul", "gated_delta", "attention_inputs", "few_row_attention"}


def test_a_step_is_the_stock_step_and_replays_bit_for_bit(checkpoint: Path, host: Host) -> None:
    stepped(tuning.load(checkpoint), host, STEP)


def test_a_step_with_experts_is_the_stock_step_and_replays_bit_for_bit(mixture: Path, host: Host) -> None:
    # In bfloat16 the stock router's rounding alone moves experts' weights by more than what is allowed below.
    stock = decode.result(qwen3_5_load.load(mixture, LoadOptions(), mx.float16))
    stepped(sharpened(stock), host, STEP | {"experts_route", "experts_enter", "experts_leave"})


def stepped(stock: Qwen35, host: Host, kernels: set[str]) -> None:
    model = fused(stock, Registry())
    assert not model.falls_back
    got, want = (decoded(m, [(10, 10), (4, 2)]) for m in (model, stock))
    assert mx.linalg.norm(got - want) / mx.linalg.norm(want) < 3e-2
    assert set(host.launched) >= kernels
    # The rows that were kept, one at a time.
    alone = decoded(model, [(10, 10), (1, 1), (1, 1)])
    assert mx.array_equal(alone[mx.array([16, 18, 17, 19])], got[16:])


def test_tuning_saves_what_wins_and_the_engine_then_uses_it(
    checkpoint: Path, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks, better = tmp_path / "kernel-checks.json", Variant(4, 24, 2, 2, 1)

    def accelerated() -> tuple[Qwen35, str | None]:
        steps = fused_or_stock(tuning.load(checkpoint), Registry(checks))
        while True:
            try:
                next(steps)
            except StopIteration as done:
                return done.value

    # Measured as it is: on this host no Metal text beats stock operations.
    monkeypatch.setattr(tuning, "ROWS", (1,))
    monkeypatch.setattr(tuning, "CHUNK", 9)
    monkeypatch.setattr(tuning, "REPEATS", 1)
    monkeypatch.setattr(tuning, "CONTEXT", 12)
    tuned = tuning.tune(checkpoint, checks, candidates=())
    assert set(tuned.stock) == set(tuned.best.seconds) == {1, 9}
    assert min(*tuned.stock.values(), *tuned.best.seconds.values()) > 0
    assert not tuned.saved
    assert not (tmp_path / TUNING_FILE).exists()
    model, reason = accelerated()
    assert type(model) is Qwen35
    assert "mtp-router tune" in reason

    def clock(model: Qwen35, steps: Sequence[int]) -> dict[int, float]:
        """Stock 1 s; the kernels 0.9 s, less for each product cut up the better way."""
        count = sum(v == better for v in variants._tuned.values())
        return dict.fromkeys(steps, 0.9 - 0.05 * count if isinstance(model, FusedQwen35) else 1.0)

    tuned = tuning.tune(checkpoint, checks, candidates=(better,), measure=clock)
    assert tuned.saved
    assert tuned.best.variants == dict.fromkeys(tuned.products, better)
    variants.use({})
    model, reason = accelerated()
    assert (type(model), reason) == (FusedQwen35, None)
    assert variants._tuned == tuned.best.variants
    assert f"-{better}" in model.kernels
