"""Property tests of every kernel on this GPU, CUDA or Metal: `python benchmarks/gpu_checks.py`; exits 1 on a failure.

Fresh random inputs, a few hundred output features that fill no last tile, several matrices in a launch. Each case is
compared with its reference, and rows in passes of 1, 3 and 5 with rows in a pass of 8, bit for bit; rows of the matmul
in passes of 11 and 27, too, and with those in passes of 16 and 32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import mlx.core as mx  # noqa: E402
from mtp_kernels.attention_inputs import AttentionShape  # noqa: E402
from mtp_kernels.attention_inputs.probe import case as inputs_case  # noqa: E402
from mtp_kernels.few_row_attention.probe import case as attention_case  # noqa: E402
from mtp_kernels.few_row_experts import Experts  # noqa: E402
from mtp_kernels.few_row_experts.probe import case as experts_case  # noqa: E402
from mtp_kernels.few_row_matmul import Matrix  # noqa: E402
from mtp_kernels.few_row_matmul.probe import case as matmul_case  # noqa: E402
from mtp_kernels.gated_delta import DeltaWeights  # noqa: E402
from mtp_kernels.gated_delta.probe import case as delta_case  # noqa: E402
from mtp_kernels.launch import platform  # noqa: E402
from mtp_kernels.registry import Case, check  # noqa: E402
from mtp_kernels.sampler.probe import case as sampler_case  # noqa: E402

FORMATS = [(4, 64), (4, 32), (4, 128), (8, 64), (8, 32), (8, 128), (16, 0)]


def matrix(features: int, inputs: int, bits: int, group: int, dtype: mx.Dtype) -> Matrix:
    """Random weights of standard deviation inputs ** -0.5."""
    weight = mx.random.normal((features, inputs), scale=inputs**-0.5).astype(dtype)
    if bits == 16:
        return Matrix(weight)
    return Matrix(*mx.quantize(weight, group_size=group, bits=bits), bits, group)


def delta(value_heads: int, key_heads: int, dtype: mx.Dtype) -> Case:
    """A Gated DeltaNet layer of random small tensors."""
    channels = (2 * key_heads + value_heads) * 128
    weights = DeltaWeights(
        conv=mx.random.normal((channels, 4), scale=0.5).astype(dtype),
        a_log=mx.random.normal((value_heads,)),
        dt_bias=mx.random.normal((value_heads,)).astype(dtype),
        norm=mx.random.uniform(0.5, 1.5, (128,)).astype(dtype),
        key_heads=key_heads,
        value_heads=value_heads,
        eps=1e-6,
    )
    return delta_case(weights, dtype)


def inputs(heads: int, kv_heads: int, rotary: int, dtype: mx.Dtype) -> Case:
    """An attention layer of random norms."""
    norms = (mx.random.uniform(0.5, 1.5, (256,)).astype(dtype) for _ in range(2))
    return inputs_case(AttentionShape(heads, kv_heads, *norms, eps=1e-6, rotary=rotary, theta=1e7), dtype)


def experts(
    sizes: tuple[int, int, int, int, int],
    dtype: mx.Dtype,
    routed: tuple[int, int] = (4, 64),
    shared: tuple[int, int] = (4, 64),
    *,
    normalised: bool = True,
) -> Case:
    """Experts of random weights: (how many, of them a row's, hidden, width, shared width), bits and groups."""
    count, top, hidden, width, shared_width = sizes
    made = [matrix(count * n, k, *routed, dtype) for n, k in ((width, hidden), (width, hidden), (hidden, width))]
    own = [(shared_width, hidden), (shared_width, hidden), (hidden, shared_width)]
    made += [matrix(n, k, *shared, dtype) for n, k in own]
    return experts_case(Experts(*made, count, top, normalised), dtype)


def cases() -> list[Callable[[], Case]]:
    """Built one at a time, so that the first results show early."""
    made: list[Callable[[], Case]] = []
    for dtype in (mx.bfloat16, mx.float16):
        made.append(lambda d=dtype: delta(8, 4, d))
        made.append(lambda d=dtype: inputs(24, 4, 64, d))
        made.append(lambda d=dtype: attention_case(24, 4, d))
        made += [lambda d=dtype, v=vocab_size: sampler_case(v, d) for vocab_size in (248_320, 50_257, 1003, 5)]
        made.append(lambda d=dtype: attention_case(24, 4, d, base=9_000))
        # K in two parts: eight rows stage one after the other, fewer both at once.
        made.append(lambda d=dtype: matmul_case([matrix(520, 17_408, 4, 64, d)], d, residual=True))
        # Shares of K leave sums, and sums of squares, for each other; the last unit of K is no share's last.
        made.append(lambda d=dtype: matmul_case([matrix(n, 5248, 4, 64, d) for n in (520, 40)], d, norm=True))
        made.append(lambda d=dtype: matmul_case([matrix(520, 5120, 8, 64, d)], d, norm=True))
    for dtype in (mx.bfloat16, mx.float16):
        for bits, group in FORMATS:

            def normed(b: int = bits, g: int = group, d: mx.Dtype = dtype) -> Case:
                return matmul_case([matrix(n, 1280, b, g, d) for n in (520, 40)], d, norm=True)

            made.append(normed)
        # The first has the sizes of 35B-A3B's experts, a row of the fourth takes all, as many as are built; the last
        # has more of them than lanes, and a share left over.
        made.append(lambda d=dtype: experts((64, 8, 2048, 512, 512), d))
        made.append(lambda d=dtype: experts((24, 3, 512, 256, 512), d, (4, 32), (8, 64)))
        made.append(lambda d=dtype: experts((24, 3, 512, 256, 256), d, (4, 128), (16, 0)))
        made.append(lambda d=dtype: experts((16, 16, 256, 128, 256), d, (8, 32), (8, 128)))
        made.append(lambda d=dtype: experts((70, 5, 256, 384, 128), d, (16, 0), (16, 0), normalised=False))
    for bits, group in ((4, 64), (8, 64)):
        for shape in ("swiglu", "residual"):

            def fused(b: int = bits, g: int = group, s: str = shape) -> Case:
                pair = [matrix(520, 2560, b, g, mx.bfloat16) for _ in range(2 if s == "swiglu" else 1)]
                return matmul_case(pair, mx.bfloat16, **{s: True})

            made.append(fused)
    return made


def main() -> None:
    if platform() == "cpu":
        sys.exit("benchmarks/gpu_checks.py needs a GPU that MLX runs on")
    mx.random.seed(int.from_bytes(b"mtp"))
    failed = 0
    for make in cases():
        case = make()
        choice = check(case, rows=(1, 3, 5, 11, 27) if case.kernel == "few_row_matmul" else (1, 3, 5))
        good = choice.implementation == platform()
        failed += not good
        dtype = str(case.dtype).removeprefix("mlx.core.")
        error = "-" if choice.error is None else f"{choice.error:.1e}"
        print(
            f"{'ok  ' if good else 'FAIL'} {case.kernel:18} {dtype:9} {case.shape:42} {error} {choice.reason}",
            flush=True,
        )
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
