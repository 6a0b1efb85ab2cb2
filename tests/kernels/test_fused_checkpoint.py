"""A quantised checkpoint of experts from disk to replies through the kernels, here on their references."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mtp_kernels.choice import Choice
from mtp_kernels.registry import Case, Registry, Run, Selection

from mlx_mtp_backend.api import LoadOptions, Sampling
from mlx_mtp_backend.decode.drafters import HeadDrafter
from mlx_mtp_backend.families import qwen3_5_fused, qwen3_5_load
from mlx_mtp_backend.families.qwen3_5_fused import FusedQwen35
from mlx_mtp_backend.families.qwen3_5_fused_mlp import FusedExperts
from mlx_mtp_backend.synthetic import Recipe, write
from tests.conformance import decode
from tests.support.conversion import convert


class References(Selection):
    """As if every kernel had passed its checks, with its definition in its place."""

    def resolve(self, case: Case) -> Run:
        self._choices.append(Choice(case.kernel, case.version, case.shape, "cuda", "", 0.0, True))
        return case.reference

    def optional(self, case: Case) -> Run | None:
        return None


@pytest.fixture
def uncompiled():
    """References read positions back to the host."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("uncompiled")
def test_a_checkpoint_of_experts_gets_the_kernels_and_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(layers=2, hidden=256, width=768, head_dim=256, linear_dim=128, experts=8)
    path = convert(write(tmp_path / "original", recipe), tmp_path / "quantised", group_size=64)
    monkeypatch.setattr(qwen3_5_fused, "platform", lambda: "cuda")
    monkeypatch.setattr(qwen3_5_fused, "Selection", References)
    monkeypatch.setattr(qwen3_5_fused, "stands_in", lambda: True)  # references take whole buffers
    stock = decode.result(qwen3_5_load.load(path, LoadOptions(), mx.bfloat16))
    model, stock_because = decode.result(qwen3_5_load.accelerate(stock, Registry()))
    assert stock_because is None
    assert isinstance(model, FusedQwen35)
    assert "few_row_experts:" in model.kernels
    assert all(isinstance(layer.mlp, FusedExperts) for layer in model.layers)
    prompts, drafter = [(5, 9, 2, 6, 5, 3), (11, 4)], HeadDrafter(model)
    told = [
        decode.generate(model, prompts, 8, drafter, sampling=Sampling(0.8, top_p=0.95), depth=depth) for depth in (0, 3)
    ]
    assert [one.tokens for one in told[1]] == [one.tokens for one in told[0]]
    assert sum(sum(one.drafted) for one in told[1]) > 0
