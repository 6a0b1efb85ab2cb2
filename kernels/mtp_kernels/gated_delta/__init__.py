"""Gated DeltaNet for decode and verify: convolution, silu, q/k norm, recurrence and gated norm in one launch.

A pass never writes the state that follows its own rows: it hands those rows (the projections) on as a tape, and the
next pass first replays as many of them as were kept. So a rejection costs nothing, how many rows were kept may be known
on the device alone, and the state is read and written once a pass. States of sequences that decode together lie in one
array, so that a launch has the same few arguments however many there are.
"""

from __future__ import annotations

import mlx.core as mx

from ..launch import CUDA_TYPES, cuda_launch, platform, source_text, version_of
from ..segments import Segments
from . import metal
from .reference import HEAD_DIM, TAPE, DeltaState, DeltaWeights, reference

__all__ = ["HEAD_DIM", "TAPE", "VERSION", "DeltaState", "DeltaWeights", "gated_delta", "reference", "supported"]

_THREADS = 512
VERSION = version_of(*(source_text(__file__, name) for name in ("kernel.cu", "kernel.metal", "metal.py")))


def supported(weights: DeltaWeights, dtype: mx.Dtype) -> str | None:
    """None when the CUDA kernel can take this layer, else the reason why not."""
    if dtype not in (mx.bfloat16, mx.float16):
        return f"dtype {dtype} is neither bfloat16 nor float16"
    if weights.value_heads % weights.key_heads:
        return f"{weights.value_heads} value heads over {weights.key_heads} key heads"
    if weights.conv.shape != (weights.channels, 4):
        return f"convolution taps {weights.conv.shape}: only 4 taps and heads of {HEAD_DIM} are built"
    return None


def check(fresh: mx.array, state: DeltaState, keep: mx.array, weights: DeltaWeights, segments: Segments) -> None:
    """Raises ValueError when shapes or dtypes do not fit together."""
    count = len(segments.counts)
    if min(segments.counts, default=0) < 1:
        raise ValueError(f"sequences of {segments.counts} rows: each has at least one")
    if fresh.shape != (sum(segments.counts), weights.width):
        raise ValueError(f"fresh is {fresh.shape}, expected {(sum(segments.counts), weights.width)}")
    if state.tape.shape != (count, TAPE, weights.width):
        raise ValueError(f"tape is {state.tape.shape}, expected {(count, TAPE, weights.width)}")
    recurrent = (count, weights.value_heads, HEAD_DIM, HEAD_DIM)
    if state.recurrent.shape != recurrent or state.recurrent.dtype != mx.float32:
        raise ValueError(f"recurrent is {state.recurrent.shape} {state.recurrent.dtype}, expected {recurrent} float32")
    if state.window.shape != (count, 3, weights.channels):
        raise ValueError(f"window is {state.window.shape}, expected {(count, 3, weights.channels)}")
    if keep.shape != (count,) or keep.dtype != mx.int32:
        raise ValueError(f"keep is {keep.shape} {keep.dtype}, expected {(count,)} int32")


def gated_delta(
    fresh: mx.array,
    state: DeltaState,
    keep: mx.array,
    weights: DeltaWeights,
    segments: Segments,
    *,
    settle: bool = False,
) -> tuple[mx.array, DeltaState]:
    """Replays each sequence's first `keep` rows of the last pass, then runs this pass's rows.

    Args:
        fresh: `[N, width]` projections of this pass, columns q | k | v | z | b | a.
        state: of the sequences, before the rows on their tapes.
        keep: `[S]` int32, how many rows of each tape were accepted (0..8); may still be uncomputed.
        weights: the layer's tensors; `conv`, `dt_bias` and `norm` in fresh's dtype.
        segments: which rows are whose; at most 8 each unless `settle`.
        settle: return the state after all rows (prefill) instead of after the kept rows, with a tape that holds none.

    Returns:
        Output rows `[N, Hv * 128]`, gated and normed, ready for the output projection; the state after the kept rows,
        this pass's rows on its tapes. What a tape holds behind a sequence's rows is undefined.

    Raises:
        ValueError: shapes or dtypes that do not fit together or that the kernel does not have.
    """
    check(fresh, state, keep, weights, segments)
    reason = supported(weights, fresh.dtype)
    if reason:
        raise ValueError(reason)
    if not settle and max(segments.counts) > TAPE:
        raise ValueError(f"sequences of {segments.counts} rows: a tape holds {TAPE}")
    if platform() == "metal":
        return metal.launch(fresh, state, keep, weights, segments, settle)
    body = f"""
  gated_delta::run<{CUDA_TYPES[fresh.dtype]}, {str(settle).lower()}>(fresh, starts, tape, keep, window, state,
      conv_weight, a_log, dt_bias, norm_weight, y, state_out, window_out, {"nullptr" if settle else "tape_out"},
      {weights.value_heads}, {weights.key_heads}, {weights.eps!r}f);
"""
    kernel = cuda_launch(
        "gated_delta",
        __file__,
        body,
        ("fresh", "starts", "tape", "keep", "window", "state", "conv_weight", "a_log", "dt_bias", "norm_weight"),
        ("y", "state_out", "window_out", *(() if settle else ("tape_out",))),
    )
    kept = [] if settle else [state.tape]
    y, recurrent, window, *tape = kernel(
        inputs=[
            fresh,
            segments.starts,
            state.tape,
            keep,
            state.window,
            state.recurrent,
            weights.conv,
            weights.a_log,
            weights.dt_bias,
            weights.norm,
        ],
        output_shapes=[
            (fresh.shape[0], weights.value_heads * HEAD_DIM),
            *(array.shape for array in (state.recurrent, state.window, *kept)),
        ],
        output_dtypes=[fresh.dtype, mx.float32, *(array.dtype for array in (state.window, *kept))],
        grid=(weights.value_heads * _THREADS, keep.size, 1),
        threadgroup=(_THREADS, 1, 1),
    )
    return y, DeltaState(recurrent, window, tape[0] if tape else state.tape)
