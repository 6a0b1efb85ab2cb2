"""Gated DeltaNet on Metal; unproved, and run only after the registry's checks."""

from __future__ import annotations

import mlx.core as mx

from ..launch import METAL_TYPES, metal_launch, source_text
from ..segments import Segments
from .reference import HEAD_DIM, DeltaState, DeltaWeights

_BODY = """
  using namespace gated_delta;
  threadgroup float4 qkv4[kChunk * 3 * kDim / 4];
  threadgroup float outputs[kChunk * kDim], decay[kChunk], beta[kChunk];
  threadgroup float* qkv = reinterpret_cast<threadgroup float*>(qkv4);
  const int head = threadgroup_position_in_grid.x, sequence = threadgroup_position_in_grid.y;
  const int thread_id = thread_position_in_threadgroup.x;
  const int lane = thread_index_in_simdgroup, warp = simdgroup_index_in_threadgroup;
  const int value_row = thread_id >> 2, quarter = thread_id & 3;
  const int key_head = head / (HV / HK), key_width = HK * kDim, value_width = HV * kDim;
  const int channels = 2 * key_width + value_width, z_at = channels;
  const int b_at = z_at + value_width, a_at = b_at + HV, stride = a_at + HV;
  const int first = starts[sequence], new_rows = starts[sequence + 1] - first;
  const int kept_rows = keep[sequence], total = kept_rows + new_rows, settle = SETTLE ? total : kept_rows;
  const size_t own_tape = size_t(sequence) * kTape * stride;
  const size_t own_window = size_t(sequence) * (kTaps - 1) * channels;
  const Rows<T> rows{window + own_window, tape + own_tape, fresh + size_t(first) * stride, channels, stride, kept_rows};
  const int channel_of[3] = {key_head * kDim, key_width + key_head * kDim, 2 * key_width + head * kDim};
  const size_t own = ((size_t(sequence) * HV + head) * kDim + value_row) * kDim;
  const device float4* source = reinterpret_cast<const device float4*>(state + own);
  device float4* target = reinterpret_cast<device float4*>(state_out + own);
  float4 s[8];
  for (int j = 0; j < 8; ++j) s[j] = source[j * 4 + quarter];

  for (int i = thread_id; i < (kTaps - 1) * 3 * kDim; i += kThreads) {
    const int tap = i / (3 * kDim), part = (i / kDim) % 3, channel = channel_of[part] + i % kDim;
    if (part == 2 || head % (HV / HK) == 0)
      window_out[own_window + tap * channels + channel] = rows.at(settle + tap)[channel];
  }
  TAPE_OUT
  if (settle == 0)
    for (int j = 0; j < 8; ++j) target[j * 4 + quarter] = s[j];
  for (int start = 0; start < total; start += kChunk) {
    const int count = min(kChunk, total - start);
    for (int item = warp; item < count * 3; item += kThreads / 32) {
      const int t = item / 3, part = item - 3 * t;
      float v[4], square = 0.0f;
      for (int i = 0; i < 4; ++i) {
        v[i] = convolve(rows, conv_weight, start + t, channel_of[part] + lane * 4 + i);
        square = fma(v[i], v[i], square);
      }
      float scale = 1.0f;
      if (part < 2) scale = rsqrt(warp_sum(square) + 1e-6f) * (part == 0 ? 0.08838834764831845f : 1.0f);
      for (int i = 0; i < 4; ++i) qkv[item * kDim + lane * 4 + i] = v[i] * scale;
    }
    if (thread_id < count) {
      const device T* row = rows.row(start + thread_id);
      const float pre = float(row[a_at + head]) + float(dt_bias[head]);
      const float softplus = pre > 20.0f ? pre : precise::log(1.0f + precise::exp(pre));
      decay[thread_id] = precise::exp(-precise::exp(a_log[head]) * softplus);
      beta[thread_id] = sigmoid(float(row[b_at + head]));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int t = 0; t < count; ++t) {
      const threadgroup float* q = qkv + t * 3 * kDim;
      const float read = advance(s, q, q + kDim, q[2 * kDim + value_row], decay[t], beta[t], quarter);
      if (quarter == 0) outputs[t * kDim + value_row] = read;
      if (start + t + 1 == settle)
        for (int j = 0; j < 8; ++j) target[j * 4 + quarter] = s[j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int row = start + warp;  // one simdgroup gates one row of the chunk
    if (warp < count && row >= kept_rows) {
      float v[4], square = 0.0f;
      for (int i = 0; i < 4; ++i) {
        v[i] = outputs[warp * kDim + lane * 4 + i];
        square = fma(v[i], v[i], square);
      }
      const float scale = rsqrt(warp_sum(square) * (1.0f / kDim) + EPS);
      const device T* gate = rows.row(row) + z_at + head * kDim + lane * 4;
      device T* out = y + size_t(first + row - kept_rows) * value_width + head * kDim + lane * 4;
      for (int i = 0; i < 4; ++i) {
        const float z = float(gate[i]);
        out[i] = T(v[i] * scale * float(norm_weight[lane * 4 + i]) * z * sigmoid(z));
      }
    }
  }
"""


# A head's columns of the new rows, for the next pass.
_TAPE_OUT = """for (int item = warp; item < new_rows * 4; item += kThreads / 32) {
    const int t = item / 4, part = item % 4;
    if (part < 2 && head % (HV / HK) != 0) continue;
    const size_t at = size_t(t) * stride + (part < 3 ? channel_of[part] : z_at + head * kDim) + lane * 4;
    for (int i = 0; i < 4; ++i) tape_out[own_tape + at + i] = rows.fresh[at + i];
  }
  if (thread_id < new_rows) {
    const size_t at = size_t(thread_id) * stride + head;
    tape_out[own_tape + at + b_at] = rows.fresh[at + b_at];
    tape_out[own_tape + at + a_at] = rows.fresh[at + a_at];
  }"""


def launch(
    fresh: mx.array, state: DeltaState, keep: mx.array, weights: DeltaWeights, segments: Segments, settle: bool
) -> tuple[mx.array, DeltaState]:
    """One launch; arguments are checked by the caller."""
    # MLX puts arrays of fewer than 8 elements into another address space, which makes it another text.
    constants = f"""  // constant: {segments.starts.size < 8}, {keep.size < 8}
  using T = {METAL_TYPES[fresh.dtype]};
  constexpr int HV = {weights.value_heads}, HK = {weights.key_heads};
  constexpr bool SETTLE = {str(settle).lower()};
  constexpr float EPS = {weights.eps!r}f;
"""
    kernel = metal_launch(
        "gated_delta",
        source_text(__file__, "kernel.metal"),
        constants + _BODY.replace("TAPE_OUT", "" if settle else _TAPE_OUT),
        ("fresh", "starts", "tape", "keep", "window", "state", "conv_weight", "a_log", "dt_bias", "norm_weight"),
        ("y", "state_out", "window_out", *(() if settle else ("tape_out",))),
    )
    small = [weights.conv, weights.a_log, weights.dt_bias, weights.norm]
    kept = [] if settle else [state.tape]
    y, recurrent, window, *tape = kernel(
        inputs=[fresh, segments.starts, state.tape, keep, state.window, state.recurrent, *small],
        output_shapes=[
            (fresh.shape[0], weights.value_heads * HEAD_DIM),
            *(array.shape for array in (state.recurrent, state.window, *kept)),
        ],
        output_dtypes=[fresh.dtype, mx.float32, *(array.dtype for array in (state.window, *kept))],
        grid=(weights.value_heads * 512, keep.size, 1),
        threadgroup=(512, 1, 1),
    )
    return y, DeltaState(recurrent, window, tape[0] if tape else state.tape)
