"""A mixture-of-experts block for the few rows of a decode or verify pass, with its RMSNorm and residual.

The rows of a pass share experts: each distinct expert's weights are read once. Row-invariant: a row of the result has
the same bits whatever rows share the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..few_row_matmul import Matrix
from ..few_row_matmul import supported as matrices_supported
from ..launch import CUDA_TYPES, SHARED_MEMORY_BYTES, cuda_launch, multiprocessors, platform, source_text, version_of
from . import metal
from .many_rows import many_row_experts, router_logits
from .reference import Experts, choose, reference, stock

__all__ = [
    "MAX_ROWS",
    "VERSION",
    "Experts",
    "choose",
    "few_row_experts",
    "many_row_experts",
    "most_rows",
    "reference",
    "router_logits",
    "stock",
    "supported",
]

MAX_ROWS = 32
MAX_EXPERTS, MAX_TOP = 512, 16
COMMON = ("tensor_core.cuh",)
_SOURCES = ("../tensor_core.cuh", "../few_row_matmul/kernel.metal", "kernel.cu", "kernel.metal", "metal.py")
VERSION = version_of(*(source_text(__file__, name) for name in _SOURCES))
_TEAMS, _TEAM_WARPS, _ENTER_FEATURES = 4, 8, 8
_ENTER_THREADS = _TEAMS * _TEAM_WARPS * 32
_LEAVE_THREADS, _LEAVE_FEATURES = 512, 16


def supported(experts: Experts, dtype: mx.Dtype) -> str | None:
    """None when the CUDA kernel can take these experts, else the reason why not."""
    for pair in ((experts.gate, experts.up), (experts.shared_gate, experts.shared_up)):
        if reason := matrices_supported(pair, dtype, swiglu=True):
            return reason
    for matrix in (experts.down, experts.shared_down):
        if reason := matrices_supported([matrix], dtype):
            return reason
    if not 1 <= experts.count <= MAX_EXPERTS or not 1 <= experts.top <= min(MAX_TOP, experts.count):
        return f"{experts.top} of {experts.count} experts: at most {MAX_TOP} of {MAX_EXPERTS} are built"
    for matrix in (*experts.routed, *experts.shared):
        chunk = 256 if matrix.bits == 4 else 128
        if matrix.inputs % chunk:
            return f"{matrix.inputs} inputs in {matrix.bits} bits are no multiple of {chunk}"
    if most_rows(experts) < 8:
        return f"eight rows of {experts.hidden} do not fit into shared memory"
    return None


def most_rows(experts: Experts) -> int:
    """Rows that one call takes."""
    return max((n for n in range(1, MAX_ROWS + 1) if _enter_bytes(n, experts) <= SHARED_MEMORY_BYTES), default=0)


def few_row_experts(
    x: mx.array, logits: mx.array, experts: Experts, norm_weight: mx.array, eps: float = 1e-6
) -> mx.array:
    """x plus the experts' weighted answers to the normed x, in two launches.

    Args:
        x: `[M, hidden]` bfloat16 or float16, 1 <= M <= `most_rows`.
        logits: `[M, E + 1]` float32: of each expert, and of the shared one's gate.
        experts: the weights.
        norm_weight: `[hidden]`; x is RMS-normalised with it (arXiv 1910.07467) before any expert sees it.
        eps: added to the mean square.

    Returns:
        `[M, hidden]`: x + sum over the row's best experts e of weight_e * mlp_e(h) + sigmoid(gate) * shared(h), an mlp
        being down(silu(gate h) * up h) (arXiv 2002.05202), the weights a softmax in float32 (arXiv 2401.04088).

    Raises:
        ValueError: a shape, dtype or combination that the kernel does not have.
    """
    _check(x, logits, experts, norm_weight)
    if platform() == "metal":
        return metal.launch(x, logits, experts, norm_weight, eps)
    return leave(x, experts, *enter(x, logits, experts, norm_weight, eps))


def _check(x: mx.array, logits: mx.array, experts: Experts, norm_weight: mx.array) -> None:
    if reason := supported(experts, x.dtype):
        raise ValueError(reason)
    most = most_rows(experts)
    if x.ndim != 2 or not 1 <= x.shape[0] <= most or x.shape[1] != experts.hidden:
        raise ValueError(f"x is {x.shape}, expected [1..{most}, {experts.hidden}]")
    if logits.shape != (x.shape[0], experts.count + 1) or logits.dtype != mx.float32:
        raise ValueError(
            f"logits are {logits.shape} {logits.dtype}, expected {(x.shape[0], experts.count + 1)} float32"
        )
    if norm_weight.shape != (experts.hidden,):
        raise ValueError(f"norm_weight is {norm_weight.shape}, expected {(experts.hidden,)}")
    sizes = {
        "gate": (experts.gate, experts.count * experts.width, experts.hidden),
        "down": (experts.down, experts.count * experts.hidden, experts.width),
        "shared_gate": (experts.shared_gate, experts.shared_width, experts.hidden),
        "shared_down": (experts.shared_down, experts.hidden, experts.shared_width),
    }
    for name, (matrix, features, inputs) in sizes.items():
        if (matrix.features, matrix.inputs) != (features, inputs):
            raise ValueError(f"{name} is {(matrix.features, matrix.inputs)}, expected {(features, inputs)}")
    given = [a for m in (*experts.routed, *experts.shared) for a in m.arrays() if a.dtype != mx.uint32]
    if any(a.dtype != x.dtype for a in [*given, norm_weight]):
        raise ValueError(f"scales, biases, dense weights and norm must be {x.dtype} like x")


def _enter_bytes(rows: int, experts: Experts) -> int:
    """Shared memory of the first launch, in the order of kernel.cu."""
    pairs = rows * experts.top
    staged = rows * (experts.hidden * 2 + 16)
    partials = _TEAMS * 2 * _TEAM_WARPS * (16 * 8 + 2) * 4
    lists = min(pairs, experts.count) * 16 + experts.count * 8 + pairs * 8 + 4 + (pairs + rows) * 4
    return -(-(staged + partials + lists) // 16) * 16


def _format(*matrices: Matrix) -> str:
    """Template arguments: bits and group of routed and shared weights."""
    return ", ".join(f"{m.bits}, {m.group_size or 64}" for m in matrices)


def _named(matrices: Sequence[tuple[str, Matrix]]) -> tuple[list[str], list[mx.array], str]:
    """Inputs for matrices, and statements that gather each matrix's pointers under its name."""
    names: list[str] = []
    arrays: list[mx.array] = []
    text = "  using Bytes = const unsigned char*;\n"
    for name, m in matrices:
        own = [f"{name}_{part}" for part in ("w", "s", "b")][: len(m.arrays())]
        pointers = ", ".join(f"(Bytes){n}" for n in own) + (", nullptr, nullptr" if m.scales is None else "")
        names, arrays = names + own, arrays + m.arrays()
        text += f"  const experts::Matrix {name}{{{pointers}}};\n"
    return names, arrays, text


def enter(
    x: mx.array, logits: mx.array, experts: Experts, norm_weight: mx.array, eps: float
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    """Products of SwiGLU by pair and of the shared expert; the experts' slots, their pairs and the weights."""
    rows, pairs = x.shape[0], x.shape[0] * experts.top
    matrices = [("gate", experts.gate), ("up", experts.up)]
    matrices += [("shared_gate", experts.shared_gate), ("shared_up", experts.shared_up)]
    names, arrays, text = _named(matrices)
    most = most_rows(experts)
    body = f"""{text}
  using Kernel = experts::Enter<{CUDA_TYPES[x.dtype]}, {_format(experts.gate, experts.shared_gate)}, {experts.count},
                                {experts.top}, {str(experts.normalised).lower()}, {experts.hidden}, {experts.width},
                                {experts.shared_width}, {most}>;
  extern __shared__ __align__(128) unsigned char smem[];
  static_assert(sizeof(Kernel::Shared) == {_enter_bytes(most, experts)}, "as asked for");
  Kernel kernel{{*reinterpret_cast<Kernel::Shared*>(smem), x_shape[0]}};
  kernel.route(x, norm_weight, logits, {eps!r}f);
  if (blockIdx.x == 0) kernel.publish(reinterpret_cast<experts::Slot*>(slots), pairs, weights);
  kernel.run(gate, up, shared_gate, shared_up, activated, shared);
"""
    kernel = cuda_launch(
        "experts_enter",
        __file__,
        body,
        ("x", "logits", "norm_weight", *names),
        ("activated", "shared", "slots", "pairs", "weights"),
        _enter_bytes(most, experts),
        _ENTER_THREADS,
        COMMON,
    )
    slots = min(pairs, experts.count)
    tiles = (experts.shared_width + slots * experts.width) // _ENTER_FEATURES
    outputs = kernel(
        inputs=[x, logits, norm_weight, *arrays],
        output_shapes=[
            (pairs, experts.width),
            (rows, experts.shared_width),
            (slots, 4),
            (pairs,),
            (rows, experts.top + 1),
        ],
        output_dtypes=[x.dtype, x.dtype, mx.int32, mx.int32, mx.float32],
        grid=(min(multiprocessors(), -(-tiles // _TEAMS)) * _ENTER_THREADS, 1, 1),
        threadgroup=(_ENTER_THREADS, 1, 1),
    )
    activated, shared, slots_made, pairs_made, weights = outputs
    return activated, shared, slots_made, pairs_made, weights


def leave(
    x: mx.array,
    experts: Experts,
    activated: mx.array,
    shared: mx.array,
    slots: mx.array,
    pairs: mx.array,
    weights: mx.array,
) -> mx.array:
    names, arrays, text = _named([("down", experts.down), ("shared_down", experts.shared_down)])
    most = most_rows(experts)
    body = f"""{text}
  using Kernel = experts::Leave<{CUDA_TYPES[x.dtype]}, {_format(experts.down, experts.shared_down)}, {experts.count},
                                {experts.top}, {experts.hidden}, {experts.width}, {experts.shared_width}, {most}>;
  __shared__ Kernel::Shared shared_memory;
  Kernel kernel{{shared_memory, x_shape[0]}};
  kernel.run(x, activated, shared, reinterpret_cast<const experts::Slot*>(slots), pairs, weights, down, shared_down, y);
"""
    kernel = cuda_launch(
        "experts_leave",
        __file__,
        body,
        ("x", "activated", "shared", "slots", "pairs", "weights", *names),
        ("y",),
        0,
        _LEAVE_THREADS,
        COMMON,
    )
    (y,) = kernel(
        inputs=[x, activated, shared, slots, pairs, weights, *arrays],
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        grid=(experts.hidden // _LEAVE_FEATURES * _LEAVE_THREADS, 1, 1),
        threadgroup=(_LEAVE_THREADS, 1, 1),
    )
    return y
