"""The experts over a prompt's many rows, here on the CPU, against mlx-lm's block and the few-row definition."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import mlx.core as mx
import pytest
from mlx.nn.layers.quantized import quantize
from mlx_lm.models.qwen3_5 import TextModelArgs
from mlx_lm.models.qwen3_next import Qwen3NextSparseMoeBlock
from mtp_kernels import few_row_experts
from mtp_kernels.few_row_experts import Experts, many_row_experts, router_logits
from mtp_kernels.few_row_matmul import Matrix
from mtp_kernels.registry import Registry

from mlx_mtp_backend.cache import begin
from mlx_mtp_backend.families import qwen3_5_fused, qwen3_5_fused_mlp
from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.families.qwen3_5_fused import fused as fused_model
from mlx_mtp_backend.families.qwen3_5_fused_mlp import stacked_matrix
from mlx_mtp_backend.families.qwen3_5_fused_products import matrix_of
from tests.kernels.test_fused_step import MIXTURE, TOKENS, build, error, sharpened

FORMATS = [(4, 64), (8, 32), (16, 0)]
HIDDEN, WIDTH, SHARED, COUNT, TOP = 128, 64, 192, 12, 3


def block(bits: int, group: int, *, normalised: bool = True) -> Qwen3NextSparseMoeBlock:
    """mlx-lm's, in float32, which is all that a CPU multiplies sorted rows in."""
    mx.random.seed(bits + group)
    args = TextModelArgs(
        hidden_size=HIDDEN,
        num_experts=COUNT,
        num_experts_per_tok=TOP,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=SHARED,
    )
    args.norm_topk_prob = normalised
    made = Qwen3NextSparseMoeBlock(args)
    if bits < 16:
        quantize(made, group, bits)
    mx.eval(made.parameters())
    return made


def taken(made: Qwen3NextSparseMoeBlock) -> tuple[Experts, list[Matrix]]:
    routed, shared = made.switch_mlp, made.shared_expert
    experts = Experts(
        *(stacked_matrix(routed[f"{name}_proj"]) for name in ("gate", "up", "down")),
        *(matrix_of(shared[f"{name}_proj"]) for name in ("gate", "up", "down")),
        made.num_experts,
        made.top_k,
        made.norm_topk_prob,
    )
    return experts, [matrix_of(made.gate), matrix_of(made.shared_expert_gate)]


@pytest.mark.parametrize("rows", [1, 33, 300])
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_many_rows_are_those_of_mlx_lm(bits: int, group: int, rows: int) -> None:
    made = block(bits, group, normalised=rows != 33)
    experts, gates = taken(made)
    h = mx.random.normal((rows, HIDDEN))
    got = many_row_experts(h, router_logits(h, gates), experts)
    assert error(got, made(h[None])[0]) < 1e-5


def test_many_rows_are_those_of_few() -> None:
    """One definition, also where all experts score alike and the lowest are to be taken."""
    experts, _ = taken(block(4, 64))
    x, norm = mx.random.normal((40, HIDDEN)), mx.random.uniform(0.5, 1.5, (HIDDEN,))
    logits = mx.round(mx.random.normal((40, COUNT + 1)) * 2)
    want = few_row_experts.reference(x, logits, experts, norm)
    got = x + many_row_experts(mx.fast.rms_norm(x, norm, 1e-6), logits, experts)
    assert error(got - x, want - x) < 1e-5


def test_no_more_than_two_projections_are_whole_at_once() -> None:
    """The device is waited for before it is given the third."""
    experts, _ = taken(block(4, 64))
    h, logits = mx.random.normal((40, HIDDEN)), mx.random.normal((40, COUNT + 1))
    events: list[str] = []
    whole = mx.dequantize

    def dequantize(*arrays: mx.array, **settings: int) -> mx.array:
        events.append("whole")
        return whole(*arrays, **settings)

    def wait(array: mx.array) -> None:
        mx.eval(array)
        events.append("wait")

    with mock.patch.object(mx, "dequantize", dequantize):
        mx.eval(many_row_experts(h, logits, experts, wait))
    assert events[:5] == ["whole", "whole", "wait", "whole", "wait"]


def wide(product: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """gather_mm in float32, which is all that a CPU has."""

    def run(a: mx.array, b: mx.array, **settings: object) -> mx.array:
        return product(a.astype(mx.float32), b.astype(mx.float32), **settings).astype(a.dtype)

    return run


@pytest.mark.parametrize("sliced", [0, 64])
def test_a_prompt_on_cuda_is_the_stock_prompt(monkeypatch: pytest.MonkeyPatch, sliced: int) -> None:
    """Trunk and head, unpacked or in passes of few rows; by each sequence's own rows where several are in a pass."""
    monkeypatch.setattr(qwen3_5_fused, "platform", lambda: "cuda")
    monkeypatch.setattr(qwen3_5_fused_mlp, "_SLICED_ROWS", sliced)
    monkeypatch.setattr(mx, "gather_mm", wide(mx.gather_mm))
    stock = sharpened(build(bits=4, num_hidden_layers=2, full_attention_interval=2, **MIXTURE))
    model = fused_model(stock, Registry())
    sorted_rows: list[int] = []
    sort = few_row_experts.many_row_experts

    def counted(h: mx.array, *rest: object) -> mx.array:
        sorted_rows.append(h.shape[0])
        return sort(h, *rest)

    monkeypatch.setattr(few_row_experts, "many_row_experts", counted)

    def run(which: object, rows: list[int]) -> list[mx.array]:
        trunk = [which.trunk_caches() for _ in rows]
        head = [which.head_caches() for _ in rows]
        for caches in (*trunk, *head):
            begin(caches)
        tokens = mx.concatenate([TOKENS[:count] for count in rows])
        hidden = which.trunk(tokens, [Segment(c, n) for c, n in zip(trunk, rows, strict=True)])
        drafted = which.head(tokens, hidden.carried, [Segment(c, n) for c, n in zip(head, rows, strict=True)])
        return [hidden.normed, drafted.normed]

    for got, want in zip(run(model, [12]), run(stock, [12]), strict=True):
        assert error(got, want) < 3e-2
    assert sorted_rows == ([] if sliced else [12] * 3)
    sorted_rows.clear()
    run(model, [11, 10])
    assert sorted_rows == ([] if sliced else [11, 10] * 3)
