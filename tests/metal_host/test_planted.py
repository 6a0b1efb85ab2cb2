"""Bugs planted in the shipped Metal texts, one at a time: the checks that the texts pass must catch each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import pytest
from mtp_kernels.few_row_matmul import few_row_matmul
from mtp_kernels.launch import metal_through
from mtp_kernels.registry import Case, check

from benchmarks.gpu_checks import attention_case, delta, experts, inputs, matrix, sampler_case
from tests.metal_host.host import Host
from tests.metal_host.test_kernels import BF16, TOLERANCE, matmul

RACE = "race|nothing has written"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def norm() -> Case:
    return matmul((40, 21), 1280, 4, 64, BF16, norm=True)


def swiglu() -> Case:
    return matmul((21, 21), 256, 4, 64, BF16, swiglu=True)


def dense() -> Case:
    return matmul((21,), 512, 16, 0, BF16)


def gated_delta() -> Case:
    return delta(4, 2, BF16)


def attention_inputs() -> Case:
    return inputs(4, 2, 64, BF16)


def attention() -> Case:
    return attention_case(6, 2, BF16)


def mixture() -> Case:
    return experts((40, 3, 256, 128, 256), BF16, (8, 64), (8, 64))


def sampler() -> Case:
    return sampler_case(301, BF16)


@dataclass(frozen=True)
class Bug:
    """One line of one text, broken.

    Attributes:
        what: kind of bug.
        case: what it must fail on.
        old: found once in the text.
        new: what replaces it.
        by: what the reason must say; empty for any.
        rows: of the passes that eight rows must be compared with to see it.
    """

    what: str
    case: Callable[[], Case]
    old: str
    new: str
    by: str = ""
    rows: tuple[int, ...] = ()


BUGS = [
    Bug("missing barrier", norm, f"[split][lane] = value;\n  {BARRIER}", "[split][lane] = value;", RACE),
    Bug("divergent barrier", norm,
        f"  {BARRIER}\n  if (split != 0) return;", f"  if (split != 0) return;\n  {BARRIER}", "reach"),
    Bug("off by one", norm, "k < K; k +=", "k <= K; k +=", "out of bounds"),
    Bug("off by one", norm, "s < SPLITS; ++s) value", "s < SPLITS - 1; ++s) value", "differs"),
    Bug("wrong lane", norm, "simd_shuffle_xor(sent, ushort(D))", "simd_shuffle_xor(sent, ushort(D ^ 1))", "differs"),
    Bug("wrong lane", swiglu, "min(lane + OUTPUTS, 31)", "min(lane + 1 + OUTPUTS, 31)", "differs"),
    Bug("wrong group scale", norm, "+ k / GROUP;", "+ (k + 32) / GROUP % (K / GROUP);", "differs"),
    Bug("wrong group scale", norm, "uint(K / GROUP) + k", "uint(K / GROUP + 1) + k"),
    Bug("last tile not clamped", norm, "min(first + s % kRows, last)", "first + s % kRows", "out of bounds"),
    Bug("last tile stored whole", norm, " || first + s > last) return;", ") return;", "race|out of bounds"),
    Bug("halves exchanged", dense, "out[0] = as_type<float>(word << 16);", "out[0] = as_type<float>(word);", ""),
    Bug("second matrix forgotten", swiglu, "s < kRows ? matrix.words : second.words", "matrix.words", "differs"),
    Bug("squares of weighted values", norm,
        "tile.squares[m] = fma(v, v,", "tile.squares[m] = fma(v, 1.1f * v,", "differs"),
    Bug("wrong address space", norm, "threadgroup float shares[", "device float shares[", "error"),
    Bug("missing barrier", gated_delta, f"[b_at + head]));\n    }}\n    {BARRIER}", "[b_at + head]));\n    }", RACE),
    Bug("missing barrier", gated_delta, f"{BARRIER}\n    const int row = start", "const int row = start", RACE),
    Bug("off by one", gated_delta, "i < (kTaps - 1) * 3 * kDim", "i <= (kTaps - 1) * 3 * kDim", "out of bounds"),
    Bug("off by one", gated_delta, "start + t + 1 == settle", "start + t == settle"),
    Bug("off by one", gated_delta, "row >= kept_rows)", "row > kept_rows)", "differs"),
    Bug("wrong lane", gated_delta, "simd_shuffle_xor(v, 2)", "simd_shuffle_xor(v, 4)", "differs"),
    Bug("wrong row's factor", gated_delta, "decay[t], beta[t]", "decay[t], beta[0]", "differs"),
    Bug("wrong head", gated_delta, "key_head = head / (HV / HK)", "key_head = head % HK", "race|differs"),
    Bug("wrong sequence", gated_delta, "own = ((size_t(sequence) * HV", "own = ((size_t(0) * HV", "race|differs"),
    Bug("wrong sequence", gated_delta, "size_t(sequence) * kTape", "size_t(0) * kTape", "race|differs"),
    Bug("wrong sequence", gated_delta, "size_t(sequence) * (kTaps - 1)", "size_t(0) * (kTaps - 1)", "race|differs"),
    Bug("wrong sequence", gated_delta, "kept_rows = keep[sequence]", "kept_rows = keep[0]", "differs"),
    Bug("rows of others", gated_delta, "y + size_t(first + row", "y + size_t(row", "race|differs"),
    Bug("tape cut short", gated_delta, "item < new_rows * 4", "item < new_rows * 3", "differs|nothing has written"),
    Bug("window written twice", gated_delta, " || head % (HV / HK) == 0", " || true", "race"),
    Bug("replay rounds once more", gated_delta, "q[2 * kDim + value_row], decay",
        "start + t < kept_rows ? float(T(q[2 * kDim + value_row])) : q[2 * kDim + value_row], decay",
        "rows of one pass", (1,)),
    Bug("unaligned", gated_delta, "reinterpret_cast<const device float4*>(state + own)",
        "reinterpret_cast<const device float4*>(state + own + 1)", "unaligned|out of bounds"),
    Bug("off by one", attention_inputs, "row < used + rows", "row <= used + rows", "differs"),
    Bug("off by one", attention_inputs, "lane < 2 * kHalfLanes", "lane <= 2 * kHalfLanes", "differs"),
    Bug("wrong lane", attention_inputs,
        "simd_shuffle_xor(v[i], kHalfLanes)", "simd_shuffle_xor(v[i], kHalfLanes / 2)", "differs"),
    Bug("wrong position", attention_inputs, "lane, first + m, EPS", "lane, first, EPS", "differs"),
    Bug("wrong norm", attention_inputs, "query ? q_weight : k_weight", "k_weight", "differs"),
    Bug("rows on one line", attention_inputs, "* TAIL + used + m) * kDim", "* TAIL + used) * kDim", "race"),
    Bug("divergent shuffle", attention_inputs, "const float other = simd_shuffle_xor(v[i], kHalfLanes);",
        "float other = 0.0f; if (first) other = simd_shuffle_xor(v[i], kHalfLanes);", "diverges"),
    Bug("wrong address space", attention_inputs,
        "const device T* weight, uint lane", "const threadgroup T* weight, uint lane", "error"),
    Bug("off by one", attention, "at < min(start + kSplit, last + 1)", "at < min(start + kSplit, last)", rows=(1,)),
    Bug("off by one", attention, "lane % kBlock > own_last", "lane % kBlock >= own_last", "differs"),
    Bug("last position not clamped", attention, "float k[kOwn];", "key += (at + p - read) * 512 * kDim; float k[kOwn];",
        "out of bounds"),
    Bug("wrong lane", attention, "simd_shuffle(weight, ushort(m * kBlock + p))",
        "simd_shuffle(weight, ushort(m * kBlock + (p ^ 1)))", "differs"),
    Bug("wrong lane", attention, "d < kBlock; d *= 2) v +=", "d < 2 * kBlock; d *= 2) v +=", "differs"),
    Bug("wrong row's factor", attention, "simd_shuffle(factor, ushort(m * kBlock))", "simd_shuffle(factor, ushort(0))",
        "differs"),
    Bug("tail read as buffer", attention, "if (position < base)", "if (position <= base)", "differs"),
    Bug("row stored past the last", attention, "if (first + m >= rows) return;", "", "race|out of bounds", (5,)),
    Bug("divergent shuffle", attention, "float score = Join<16,", "if (lane > 30) return; float score = Join<16,",
        "diverges"),
    Bug("missing barrier", mixture, f"sets[e] = set;\n  }}\n  {BARRIER}", "sets[e] = set;\n  }", RACE),
    Bug("missing barrier", mixture, f"weights + row * (TOP + 1));\n  }}\n  {BARRIER}",
        "weights + row * (TOP + 1));\n  }", RACE),
    Bug("missing barrier", mixture,
        f"slot.count, lane, made);\n  }}\n  {BARRIER}", "slot.count, lane, made);\n  }", RACE),
    Bug("off-by-one expert", mixture,
        "size_t(slot.expert) * WIDTH", "size_t((slot.expert + 1) % E) * WIDTH", "differs"),
    Bug("off-by-one expert", mixture,
        "size_t(slot.expert) * HIDDEN", "size_t((slot.expert + 1) % E) * HIDDEN", "differs"),
    Bug("off-by-one expert", mixture, "for (; before < e; ++before) {", "for (; before < e - 1; ++before) {"),
    Bug("wrong weight", mixture, "fma(weights[row * (TOP + 1) + s]", "fma(weights[row * (TOP + 1) + s / 2]", "differs"),
    Bug("wrong weight", mixture, "if (lane == s) own = mass;", "if (lane == s) own = total;", "differs"),
    Bug("wrong weight", mixture, "weights[lane] = own / total;", "weights[lane] = own;", "differs"),
    Bug("wrong row", mixture, "line[m] = pair[m] / PER;", "line[m] = pair[0] / PER;", "differs"),
    Bug("wrong row", mixture, "made[(row * TOP + s) * 4 + f]", "made[s * 4 + f]", "differs"),
    Bug("ties to the highest", mixture, "other_id < id)", "other_id > id)", "differs"),
    Bug("expert chosen twice", mixture,
        "if (i * 32 + lane == id) left[i]", "if (false) left[i]", "differs|race|written"),
    Bug("wrong lane", mixture, "min(lane + 2, 31)", "min(lane + 1, 31)", "differs"),
    Bug("second matrix forgotten", mixture,
        "(s < kRows ? matrix.words : second.words)[row", "matrix.words[row", "differs"),
    Bug("wrong group scale", mixture,
        "row * (K / GROUP) + k / GROUP", "row * (K / GROUP) + (k + 32) / GROUP % (K / GROUP)", "differs"),
    Bug("shared expert forgotten", mixture,
        "sum = fma(weights[row * (TOP + 1) + TOP]", "(void)(weights[row * (TOP + 1) + TOP]", "differs"),
    Bug("columns past the last", mixture, "if (m < columns && s < 2)", "if (s < 2)", "race|differs"),
    Bug("missing barrier", sampler, f"masses[simdgroup] = own.mass;\n  }}\n  {BARRIER}",
        "masses[simdgroup] = own.mass;\n  }", RACE),
    Bug("off by one", sampler, "int fit = top_k - above.tokens;", "int fit = top_k - above.tokens - 1;", "differs"),
    Bug("off by one", sampler, ".tokens < keep)", ".tokens <= keep)", "differs"),
    Bug("wrong lane", sampler, "simd_shuffle_xor(winner, d)", "simd_shuffle_xor(winner, ushort(d ^ 1))", "differs"),
    Bug("wrong word of the noise", sampler, "return c[token % 4];", "return c[token % 2];", "differs"),
    Bug("mass at the wrong border", sampler, "above.mass + float(fit) * each", "above.mass", "differs"),
    Bug("least share ignored", sampler, " || !(value >= least)", "", "differs"),
    Bug("temperature too early", sampler, "(value - top) / temperature", "value - top", "differs"),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.case.__name__}: {bug.what}")
def test_a_planted_bug_is_caught(bug: Bug, tally) -> None:
    mx.random.seed(7)
    case = bug.case()
    host = Host(((bug.old, bug.new),))
    with tally(case.kernel) as entry, metal_through(host):
        choice = check(case, rows=bug.rows)
    assert host.swapped[bug.old] >= 1, "the text has changed: nothing was planted"
    if choice.implementation == "metal":
        assert choice.error > TOLERANCE[case.dtype], "not caught"
        reason = "differs from its reference"
    else:
        reason = choice.reason
    assert any(part in reason for part in bug.by.split("|")), reason
    entry.bugs += 1


def test_an_order_of_sums_that_depends_on_the_rows_is_caught() -> None:
    """In float32, where no rounding to the results' type hides the last bit."""
    mx.random.seed(7)
    x, matrices = mx.random.normal((8, 1280)).astype(BF16), [matrix(40, 1280, 4, 64, BF16)]
    for planted in ((), (("[s][lane];", "[ROWS == 8 ? SPLITS - s : s][lane];"),)):
        with metal_through(Host(planted)):
            parts = [
                mx.concatenate(
                    [few_row_matmul(x[i : i + n], matrices, out_dtype=mx.float32) for i in range(0, 8, n)], axis=0
                )
                for n in (8, 3, 1)
            ]
        same = [mx.array_equal(parts[0], other).item() for other in parts[1:]]
        assert same == ([False, False] if planted else [True, True])
