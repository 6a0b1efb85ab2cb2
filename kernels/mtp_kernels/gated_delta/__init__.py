"""Gated DeltaNet for decode and verify: convolution, silu, q/k norm, recurrence and gated norm in one launch.

A pass never writes the state that follows its own rows: it hands those rows (the projections) on as `pending`, and the
next pass first replays as many of them as were kept. So a rejection costs nothing, how many rows were kept may be known
on the device alone, and the state is read and written once a pass.
"""

from __future__ import annotations

import mlx.core as mx

from ..launch import CUDA_TYPES, cuda_launch, platform, source_text, version_of
from . import metal
from .reference import HEAD_DIM, DeltaState, DeltaWeights, reference

__all__ = ["HEAD_DIM", "VERSION", "DeltaState", "DeltaWeights", "gated_delta", "reference", "supported"]

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


def check(fresh: mx.array, state: DeltaState, keep: mx.array, weights: DeltaWeights) -> None:
    """Raises ValueError when shapes or dtypes do not fit together."""
    if fresh.ndim != 2 or fresh.shape[1] != weights.width or fresh.shape[0] < 1:
        raise ValueError(f"fresh is {fresh.shape}, expected [M >= 1, {weights.width}]")
    if state.pending.ndim != 2 or state.pending.shape[1] != weights.width or state.pending.shape[0] < 1:
        raise ValueError(f"pending is {state.pending.shape}, expected [P >= 1, {weights.width}]")
    if state.recurrent.shape != (weights.value_heads, HEAD_DIM, HEAD_DIM) or state.recurrent.dtype != mx.float32:
        raise ValueError(f"recurrent is {state.recurrent.shape} {state.recurrent.dtype}")
    if state.window.shape != (3, weights.channels):
        raise ValueError(f"window is {state.window.shape}, expected {(3, weights.channels)}")
    if keep.size != 1 or keep.dtype != mx.int32:
        raise ValueError("keep must be one int32")


def gated_delta(
    fresh: mx.array, state: DeltaState, keep: mx.array, weights: DeltaWeights, *, settle: bool = False
) -> tuple[mx.array, mx.array, mx.array]:
    """Replays `keep` rows of the last pass, then runs this pass's rows.

    Args:
        fresh: `[M, width]` projections of this pass, columns q | k | v | z | b | a.
        state: the sequence before its pending rows.
        keep: one int32, how many of the pending rows were accepted (0..P); may still be uncomputed.
        weights: the layer's tensors; `conv`, `dt_bias` and `norm` in fresh's dtype.
        settle: return the state after all rows (prefill) instead of after the kept rows.

    Returns:
        Output rows `[M, Hv * 128]`, gated and normed, ready for the output projection; the recurrent state after the
        kept rows; the convolution window after the kept rows. Pair the last two with `fresh` for the next state.

    Raises:
        ValueError: shapes or dtypes that do not fit together or that the kernel does not have.
    """
    check(fresh, state, keep, weights)
    reason = supported(weights, fresh.dtype)
    if reason:
        raise ValueError(reason)
    if platform() == "metal":
        return metal.launch(fresh, state, keep, weights, settle)
    body = f"""
  gated_delta::run<{CUDA_TYPES[fresh.dtype]}, {str(settle).lower()}>(fresh, kept, keep, window, state,
      conv_weight, a_log, dt_bias, norm_weight, y, state_out, window_out, fresh_shape[0],
      {weights.value_heads}, {weights.key_heads}, {weights.eps!r}f);
"""
    kernel = cuda_launch(
        "gated_delta",
        __file__,
        body,
        ("fresh", "kept", "keep", "window", "state", "conv_weight", "a_log", "dt_bias", "norm_weight"),
        ("y", "state_out", "window_out"),
    )
    y, recurrent, window = kernel(
        inputs=[
            fresh,
            state.pending,
            keep,
            state.window,
            state.recurrent,
            weights.conv,
            weights.a_log,
            weights.dt_bias,
            weights.norm,
        ],
        output_shapes=[(fresh.shape[0], weights.value_heads * HEAD_DIM), state.recurrent.shape, state.window.shape],
        output_dtypes=[fresh.dtype, mx.float32, state.window.dtype],
        grid=(weights.value_heads * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
    )
    return y, recurrent, window
