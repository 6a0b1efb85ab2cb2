"""What the Gated DeltaNet kernel computes, in plain MLX operations (arXiv 2412.06464, as Qwen3.5 wires it)."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..launch import host_ints
from ..segments import Segments


@dataclass(frozen=True)
class DeltaWeights:
    """One layer's small tensors.

    Attributes:
        conv: `[C, 4]` depthwise taps, oldest first; C = 2 * Hk * 128 + Hv * 128, channels ordered q, k, v.
        a_log: `[Hv]` float32.
        dt_bias: `[Hv]`.
        norm: `[128]` weight of the gated RMSNorm.
        key_heads: Hk.
        value_heads: Hv, a multiple of Hk.
        eps: of the gated RMSNorm.
    """

    conv: mx.array
    a_log: mx.array
    dt_bias: mx.array
    norm: mx.array
    key_heads: int
    value_heads: int
    eps: float

    @property
    def channels(self) -> int:
        """C, the width of the convolution."""
        return (2 * self.key_heads + self.value_heads) * HEAD_DIM

    @property
    def width(self) -> int:
        """Columns of a projection row: C, then the gate z `[Hv * 128]`, b `[Hv]` and a `[Hv]`."""
        return self.channels + self.value_heads * (HEAD_DIM + 2)


@dataclass(frozen=True)
class DeltaState:
    """The states of some sequences before the rows on their tapes, of which an unknown prefix will be kept.

    Attributes:
        recurrent: `[S, Hv, 128 (value), 128 (key)]` float32.
        window: `[S, 3, C]`, the convolution inputs before the tape.
        tape: `[S, 8, width]`, the projection rows of the last pass, and behind them anything.
    """

    recurrent: mx.array
    window: mx.array
    tape: mx.array

    @classmethod
    def empty(cls, weights: DeltaWeights, dtype: mx.Dtype) -> DeltaState:
        """One sequence that nothing was run for."""
        recurrent = mx.zeros((1, weights.value_heads, HEAD_DIM, HEAD_DIM), mx.float32)
        window, tape = mx.zeros((1, 3, weights.channels), dtype), mx.zeros((1, TAPE, weights.width), dtype)
        return cls(recurrent, window, tape)


HEAD_DIM = 128
TAPE = 8
"""Most rows of a sequence that a pass leaves to the next one."""


def reference(
    fresh: mx.array,
    state: DeltaState,
    keep: mx.array,
    weights: DeltaWeights,
    segments: Segments,
    *,
    settle: bool = False,
) -> tuple[mx.array, DeltaState]:
    """The definition of right for `gated_delta`; reads `keep` back to the host."""
    outputs, recurrents, windows, tapes = [], [], [], []
    for place, (kept, part) in enumerate(zip(host_ints(keep), segments.slices, strict=True)):
        own, tape = fresh[part], state.tape[place]
        y, recurrent, window = _alone(own, state.recurrent[place], state.window[place], tape[:kept], weights, settle)
        outputs.append(y)
        recurrents.append(recurrent)
        windows.append(window)
        tapes.append(tape if settle else mx.concatenate([own.astype(tape.dtype), tape[own.shape[0] :]]))
    return mx.concatenate(outputs), DeltaState(mx.stack(recurrents), mx.stack(windows), mx.stack(tapes))


def _alone(
    fresh: mx.array, recurrent: mx.array, window: mx.array, tape: mx.array, weights: DeltaWeights, settle: bool
) -> tuple[mx.array, mx.array, mx.array]:
    """One sequence, all rows of whose tape were kept: output rows, recurrent state, window."""
    kept = tape.shape[0]
    rows = mx.concatenate([tape.astype(fresh.dtype), fresh], axis=0).astype(mx.float32)
    inputs = mx.concatenate([window.astype(mx.float32), rows[:, : weights.channels]], axis=0)
    total = rows.shape[0]
    settle_at = total if settle else kept
    conv = weights.conv.astype(mx.float32)
    mixed = mx.zeros((total, weights.channels))
    for tap in range(4):
        mixed = mixed + inputs[tap : tap + total] * conv[:, tap]
    mixed = mixed * mx.sigmoid(mixed)
    keys = weights.key_heads * HEAD_DIM
    q = _unit(mixed[:, :keys].reshape(total, weights.key_heads, HEAD_DIM)) * HEAD_DIM**-0.5
    k = _unit(mixed[:, keys : 2 * keys].reshape(total, weights.key_heads, HEAD_DIM))
    v = mixed[:, 2 * keys :].reshape(total, weights.value_heads, HEAD_DIM)
    repeat = weights.value_heads // weights.key_heads
    q, k = mx.repeat(q, repeat, axis=1), mx.repeat(k, repeat, axis=1)
    z_end = weights.channels + weights.value_heads * HEAD_DIM
    beta = mx.sigmoid(rows[:, z_end : z_end + weights.value_heads])
    pre = rows[:, z_end + weights.value_heads :] + weights.dt_bias.astype(mx.float32)
    decay = mx.exp(-mx.exp(weights.a_log.astype(mx.float32)) * mx.logaddexp(pre, mx.zeros_like(pre)))

    settled, outputs = recurrent, []
    for t in range(total):
        recurrent = recurrent * decay[t][:, None, None]
        recalled = (recurrent * k[t][:, None, :]).sum(axis=-1)
        delta = (v[t] - recalled) * beta[t][:, None]
        recurrent = recurrent + k[t][:, None, :] * delta[:, :, None]
        if t + 1 == settle_at:
            settled = recurrent
        if t >= kept:
            outputs.append((recurrent * q[t][:, None, :]).sum(axis=-1))
    out = mx.fast.rms_norm(mx.stack(outputs), weights.norm.astype(mx.float32), weights.eps)
    z = rows[kept:, weights.channels : z_end].reshape(out.shape)
    out = (out * z * mx.sigmoid(z)).reshape(fresh.shape[0], -1)
    return out.astype(fresh.dtype), settled, inputs[settle_at : settle_at + 3].astype(window.dtype)


def _unit(x: mx.array) -> mx.array:
    """x scaled to unit length over its last axis, with the 1e-6 that Qwen3.5 adds to the squared length."""
    return x * mx.rsqrt(mx.sum(x * x, axis=-1, keepdims=True) + 1e-6)
