"""Every shipped Metal text against its reference, and eight rows in one pass against fewer, bit for bit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mtp_kernels import few_row_experts, few_row_matmul
from mtp_kernels.few_row_attention import Context, few_row_attention, reference
from mtp_kernels.few_row_matmul import variants
from mtp_kernels.few_row_matmul.variants import CANDIDATES, Variant
from mtp_kernels.launch import metal_through
from mtp_kernels.registry import Case, check, relative_error
from mtp_kernels.segments import Segments

from benchmarks.gpu_checks import attention_case, delta, experts, inputs, matmul_case, matrix, sampler_case
from tests.metal_host.host import Host

BF16, F16 = mx.bfloat16, mx.float16
TOLERANCE = {BF16: 2e-4, F16: 1e-4}  # a few results in a thousand may round to the neighbouring value


def matmul(features: tuple[int, ...], inputs: int, bits: int, group: int, dtype: mx.Dtype, **fusion: bool) -> Case:
    return matmul_case([matrix(n, inputs, bits, group, dtype) for n in features], dtype, **fusion)


CASES = {
    "matmul-norm-two": (lambda: matmul((40, 21), 1280, 4, 64, BF16, norm=True), (1, 3, 5)),
    "matmul-swiglu": (lambda: matmul((37, 37), 256, 4, 64, BF16, swiglu=True, norm=True), (1,)),
    "matmul-swiglu-8": (lambda: matmul((13, 13), 256, 8, 64, F16, swiglu=True), (1,)),
    "matmul-residual": (lambda: matmul((50,), 640, 4, 64, BF16, residual=True), (1, 4)),
    "matmul-one-feature": (lambda: matmul((1,), 256, 4, 64, F16), (1,)),
    "matmul-four": (lambda: matmul((24, 16, 3, 3), 256, 4, 64, BF16, norm=True), (1,)),
    "delta": (lambda: delta(4, 2, BF16), (1, 3, 5)),
    "delta-half": (lambda: delta(2, 2, F16), (1,)),
    "inputs": (lambda: inputs(6, 2, 64, BF16), (1, 3, 5)),
    "inputs-all-rotate": (lambda: inputs(4, 1, 256, F16), (1,)),
    "attention": (lambda: attention_case(6, 2, BF16), (1, 3, 5)),
    "attention-half": (lambda: attention_case(8, 1, F16), (1,)),
    "experts": (lambda: experts((40, 3, 256, 256, 512), BF16), (1, 3)),
    "experts-half-two-formats": (lambda: experts((5, 2, 256, 128, 256), F16, (8, 32), (16, 0), normalised=False), (1,)),
    "experts-dense": (lambda: experts((6, 6, 256, 128, 256), BF16, (16, 0), (4, 32)), (1,)),
    "sampler": (lambda: sampler_case(301, BF16), (1, 3)),
    "sampler-half-few-tokens": (lambda: sampler_case(5, F16), (1,)),
}
for _bits, _group, _dtype in [
    *((4, 32, F16), (4, 64, BF16), (4, 64, F16), (4, 128, BF16)),
    *((8, 32, BF16), (8, 64, BF16), (8, 64, F16), (8, 128, F16), (16, 0, BF16), (16, 0, F16)),
]:
    CASES[f"matmul-{_bits}b-g{_group}-{'bf16' if _dtype == BF16 else 'half'}"] = (
        lambda b=_bits, g=_group, d=_dtype: matmul((19,), 512, b, g, d),
        (1,),
    )


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_equals_its_reference_whatever_shares_the_pass(name: str, tally) -> None:
    make, rows = CASES[name]
    mx.random.seed(7)
    case, host = make(), Host()
    with tally(case.kernel) as entry, metal_through(host):
        choice = check(case, rows=rows)
    assert choice.implementation == "metal", choice.reason
    assert choice.rows_equal
    assert choice.error <= TOLERANCE[case.dtype]
    assert host.launched
    entry.cases += 1
    entry.worst = max(entry.worst, choice.error)


# Each way to deal K out, and for one of them each size of a tile.
DEALT = {(v.words, v.splits): v for v in (*CANDIDATES, Variant(4, 24, 4, 2, 1))}
TRIED = {variants.start("", 1), variants.start("", variants.WIDE), *DEALT.values()}
TRIED |= {v for v in CANDIDATES if (v.words, v.splits) == (1, 2)}


@pytest.mark.parametrize("bits", [4, 16])
def test_what_tuning_may_choose(bits: int, tally, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right in float32, where no rounding hides a row's last bit, and alike where K is dealt out alike."""
    mx.random.seed(7)
    matrices = [matrix(21, 640, bits, 64 if bits < 16 else 0, BF16)]
    x, norm = mx.random.normal((8, 640)).astype(BF16), mx.random.uniform(0.5, 1.5, (640,)).astype(BF16)
    dealt: dict[tuple[int, int], mx.array] = {}
    fused = {"norm_weight": norm, "out_dtype": mx.float32}
    want = few_row_matmul.reference(x, matrices, **fused)
    for variant in TRIED if bits == 4 else [v for v in DEALT.values() if v.splits == 2]:
        monkeypatch.setattr(variants, "_tuned", {variants.form(matrices, norm=True): variant})
        with tally("few_row_matmul") as entry, metal_through(Host()):
            assert matmul_case(matrices, BF16, norm=True).version.endswith(f"-{variant}")
            got = few_row_matmul.few_row_matmul(x, matrices, **fused)
            alone = [few_row_matmul.few_row_matmul(x[i : i + 1], matrices, **fused) for i in range(8)]
        entry.cases += 1
        error = relative_error(got, want)
        entry.worst = max(entry.worst, error)
        assert error < 1e-6, variant
        assert mx.array_equal(mx.concatenate(alone), got), variant
        assert mx.array_equal(dealt.setdefault((variant.words, variant.splits), got), got), variant


def test_variants_that_no_kernel_has() -> None:
    for numbers in [(4, 33, 1, 1, 1), (4, 23, 1, 1, 1), (4, 24, 3, 1, 1), (4, 24, 1, 4, 8), (0, 24, 1, 1, 1)]:
        with pytest.raises(ValueError, match="no such variant"):
            Variant(*numbers)


def test_starting_values_follow_the_gpu_and_the_matrix() -> None:
    m1, m4 = (variants.start(name, 4096) for name in ("applegpu_g13s", "applegpu_g16p"))
    assert (m1.accumulators, m4.accumulators) == (24, 32)
    assert variants.start("applegpu_g13s", 151_936).splits == 1 < m1.splits
    sizes = [m1.outputs(rows, norm=norm, swiglu=False) for norm in (False, True) for rows in (1, 4, 6, 8)]
    assert sizes == [4, 4, 4, 3, 4, 4, 3, 2]
    assert [m1.outputs(rows, norm=True, swiglu=True) for rows in (1, 4, 6, 8)] == [2, 2, 1, 1]


def test_attention_rows_that_cross_into_the_next_split(tally) -> None:
    """Rows at positions 60 to 66: some reach the second split of 64, some do not."""
    mx.random.seed(7)
    shapes = [(7, 4, 256), (1, 2, 96, 256), (1, 2, 96, 256), (2, 2, 64, 256), (7, 12 * 256)]
    q, k, v, tail, projected = (mx.random.normal(shape).astype(F16) for shape in shapes)

    def run(implementation, rows: int) -> mx.array:
        return mx.concatenate(
            [
                implementation(
                    q[i : i + rows],
                    [Context(k, v, tail, mx.array([40, 60 + i, 96], dtype=mx.int32))],
                    Segments.of((min(rows, 7 - i),)),
                    projected[i : i + rows],
                )
                for i in range(0, 7, rows)
            ]
        )

    with tally("few_row_attention") as entry, metal_through(Host()):
        got, others = run(few_row_attention, 7), [run(few_row_attention, rows) for rows in (1, 3)]
        entry.cases += 1
    assert relative_error(got, run(reference, 7)) <= TOLERANCE[F16]
    assert all(mx.array_equal(got, other) for other in others)


def test_more_rows_of_an_expert_than_columns(tally) -> None:
    """Eleven rows, of which ten choose the same experts."""
    mx.random.seed(7)
    case = experts((12, 3, 256, 128, 256), BF16, (8, 64), (8, 64))
    taken: list[few_row_experts.Experts] = []
    case.probe(lambda x, logits, weights, norm: taken.append(weights) or x, 8)
    x, norm = mx.random.normal((11, 256)).astype(BF16) * 0.02, mx.random.uniform(0.5, 1.5, (256,)).astype(BF16)
    logits = mx.random.normal((11, 13))
    logits[:10] = logits[:1] + 0.01 * logits[:10]

    def run(rows: int) -> mx.array:
        parts = [slice(i, i + rows) for i in range(0, 11, rows)]
        return mx.concatenate([few_row_experts.few_row_experts(x[p], logits[p], taken[0], norm) for p in parts])

    with tally(case.kernel) as entry, metal_through(Host()):
        got, alone = run(11), run(1)
        entry.cases += 1
    assert mx.array_equal(got, alone)
    error = relative_error(got, few_row_experts.reference(x, logits, taken[0], norm))
    assert error < 1e-3  # a value that one launch leaves for the next may round to the neighbouring one


CONTRACTING = ("-ffp-contract=fast", "-mfma")
CPU = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPU.exists() or "fma" not in CPU.read_text().split(), reason="this processor has no fused fma")
@pytest.mark.parametrize("name", ["matmul-norm-two", "matmul-swiglu", "delta", "attention", "experts"])
def test_rows_keep_their_bits_where_a_compiler_contracts(name: str, tally) -> None:
    """Apple's compiler may turn products and sums into fma as it likes; other rows must not change what it likes."""
    make, rows = CASES[name]
    mx.random.seed(7)
    with tally(make().kernel) as entry, metal_through(Host(flags=CONTRACTING)):
        choice = check(make(), rows=rows)
    assert choice.rows_equal, choice.reason
    entry.cases += 1
