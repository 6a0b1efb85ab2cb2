"""The Qwen3.5 step through the kernels' faces, here on their fallbacks, against the stock model."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.nn.layers.quantized import QuantizedLinear, quantize
from mlx_lm.models.qwen3_5 import TextModel, TextModelArgs
from mtp_kernels.registry import Registry

from mlx_mtp_backend.cache import LayerCache, abort, begin, commit
from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.families.qwen3_5 import MTPHead, Qwen35
from mlx_mtp_backend.families.qwen3_5_fused import FusedQwen35, fused_or_stock
from mlx_mtp_backend.families.qwen3_5_fused import fused as fused_model
from mlx_mtp_backend.families.qwen3_5_fused_products import Unsupported

TOKENS = mx.random.randint(0, 512, (96,), key=mx.random.key(3)).astype(mx.int32)
# (rows of a pass, rows kept); the first is a prefill of which some rows are taken back.
PASSES = [(20, 17), (4, 2), (4, 4), (1, 1), (4, 1), (3, 2)]


def build(bits: int = 0, **changes: object) -> Qwen35:
    """A history-dependent model with a head, in float16; dense unless bits are given."""
    mx.random.seed(0)
    settings = {
        "model_type": "qwen3_5",
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "vocab_size": 512,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    } | changes
    args = TextModelArgs(**settings)
    text, head = TextModel(args), MTPHead(args)
    for module in (text, head):
        module.set_dtype(mx.float16)
        if bits:
            quantize(module, 64, bits)
        mx.eval(module.parameters())
    return Qwen35(text, head)


@pytest.fixture(scope="module")
def stock() -> Qwen35:
    return build()


@pytest.fixture(scope="module")
def fused(stock: Qwen35) -> FusedQwen35:
    return fused_model(stock, Registry())


class Driven:
    """One sequence's passes through trunk and head, each rolled back to what it keeps."""

    def __init__(self, model: Qwen35, *, lazy: bool = False) -> None:
        self.model, self.lazy = model, lazy
        self.trunk, self.head = model.trunk_caches(), model.head_caches()
        self.at = 0

    def run(self, rows: int, keep: int) -> tuple[mx.array, mx.array]:
        tokens = TOKENS[self.at : self.at + rows]
        begin(self.trunk)
        begin(self.head)
        hidden = self.model.trunk(tokens, [Segment(self.trunk, rows)])
        drafted = self.model.head(tokens, hidden.carried, [Segment(self.head, rows)])
        self.end(self.trunk, rows, keep)
        self.end(self.head, rows, keep)
        self.at += keep
        return self.model.logits(hidden.normed[-8:]), self.model.logits(drafted.normed[-8:])

    def end(self, caches: list[LayerCache], rows: int, keep: int) -> None:
        on_device = self.lazy and rows <= 8
        commit(caches, mx.array([keep], dtype=mx.int32) if on_device else keep)  # type: ignore[arg-type]


def error(got: mx.array, want: mx.array) -> float:
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    return float((mx.linalg.norm(got - want) / mx.linalg.norm(want)).item())


def test_the_step_is_the_stock_step(stock: Qwen35, fused: FusedQwen35) -> None:
    one, other = Driven(stock), Driven(fused)
    for rows, keep in PASSES:
        for want, got in zip(one.run(rows, keep), other.run(rows, keep), strict=True):
            assert error(got, want) < 3e-2


def test_a_quantised_step_is_the_stock_step() -> None:
    stock = build(bits=4, num_hidden_layers=2, full_attention_interval=2)
    one, other = Driven(stock), Driven(fused_model(stock, Registry()))
    for want, got in zip(one.run(3, 3), other.run(3, 3), strict=True):
        assert error(got, want) < 3e-2


MIXTURE = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}


def sharpened(model: Qwen35) -> Qwen35:
    """With routers so decided that no rounding changes a row's experts."""
    for layer in [*model.text.model.layers, *model.mtp.layers]:
        layer.mlp.gate.scales, layer.mlp.gate.biases = layer.mlp.gate.scales * 30, layer.mlp.gate.biases * 30
    return model


@pytest.mark.parametrize("same_format", [True, False])
def test_a_step_with_experts_is_the_stock_step(same_format: bool) -> None:
    """The trunk's and the head's layers, the router's two matrices in one format or each in its own."""
    stock = sharpened(build(bits=4, num_hidden_layers=2, full_attention_interval=2, **MIXTURE))
    if not same_format:
        for layer in [*stock.text.model.layers, *stock.mtp.layers]:
            layer.mlp.shared_expert_gate = QuantizedLinear(256, 1, bias=False, group_size=64, bits=8)
            layer.mlp.shared_expert_gate.set_dtype(mx.float16)
    one, other = Driven(stock), Driven(fused_model(stock, Registry()))
    for rows, keep in PASSES:
        for want, got in zip(one.run(rows, keep), other.run(rows, keep), strict=True):
            assert error(got, want) < 3e-2


def test_rejected_rows_leave_no_trace(fused: FusedQwen35) -> None:
    """What a run of rejections ends in has the bits of the same tokens run without any."""
    rolled, straight = Driven(fused), Driven(fused)
    straight.run(17, 17)
    rolled.run(17, 17)
    for rows, keep in [(4, 2), (6, 1), (8, 3), (3, 1)]:
        rolled.run(rows, keep)
    for _ in range(7):
        straight.run(1, 1)
    assert rolled.at == straight.at
    for got, want in zip(rolled.run(1, 1), straight.run(1, 1), strict=True):
        assert mx.array_equal(got, want)


def test_a_count_on_the_device_is_a_count_on_the_host(fused: FusedQwen35) -> None:
    """Enough passes for the tails to move several times."""
    host, device = Driven(fused), Driven(fused, lazy=True)
    host.run(20, 20)
    device.run(20, 20)
    for rows, keep in [(4, 2), (4, 4), (1, 1), (8, 1), (3, 2)] * 5:
        for got, want in zip(device.run(rows, keep), host.run(rows, keep), strict=True):
            assert mx.array_equal(got, want)


def test_an_aborted_pass_never_was(fused: FusedQwen35) -> None:
    plain, disturbed = Driven(fused), Driven(fused)
    for driven in (plain, disturbed):
        driven.run(20, 20)
        driven.run(2, 2)
    for rows in (3, 12):
        begin(disturbed.trunk)
        mx.eval(fused.trunk(TOKENS[:rows], [Segment(disturbed.trunk, rows)]).normed)
        abort(disturbed.trunk)
    assert mx.array_equal(disturbed.run(2, 2)[0], plain.run(2, 2)[0])


def test_neighbours_change_nothing(fused: FusedQwen35) -> None:
    alone, first, second = (fused.trunk_caches() for _ in range(3))
    for caches in (alone, first, second):
        begin(caches)
    want = fused.trunk(TOKENS[:3], [Segment(alone, 3)]).normed
    both = fused.trunk(TOKENS[:5], [Segment(first, 3), Segment(second, 2)]).normed
    assert mx.array_equal(both[:3], want)


def test_a_tail_that_cannot_move_is_refused(fused: FusedQwen35) -> None:
    caches = fused.head_caches()
    begin(caches)
    hidden = mx.zeros((8, 256), mx.float16)
    with pytest.raises(RuntimeError, match="after its first pass"):
        for _ in range(9):
            fused.head(TOKENS[:8], hidden, [Segment(caches, 8)])


@pytest.mark.parametrize(("first", "second"), [(2, 2), (2, 12), (12, 2), (12, 12)])
def test_a_second_pass_in_one_transaction_is_refused(fused: FusedQwen35, first: int, second: int) -> None:
    """Its rows alone would be counted by `commit`."""
    caches = fused.trunk_caches()
    begin(caches)
    fused.trunk(TOKENS[:first], [Segment(caches, first)])
    with pytest.raises(RuntimeError, match="second pass"):
        fused.trunk(TOKENS[:second], [Segment(caches, second)])


def test_without_a_gpu_the_stock_model_stays(stock: Qwen35) -> None:
    with pytest.raises(StopIteration) as end:
        next(fused_or_stock(stock, Registry()))
    model, reason = end.value.value
    assert model is stock
    assert reason == "no GPU: the step through the kernels is for CUDA and Metal"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"head_dim": 128}, "heads of 128"), ({"linear_key_head_dim": 64, "linear_value_head_dim": 64}, "heads of 64")],
)
def test_unsupported_shapes_are_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        fused_model(build(**changes), Registry())
