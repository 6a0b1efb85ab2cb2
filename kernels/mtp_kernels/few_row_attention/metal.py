"""Few-row attention on Metal; unproved, and run only after the registry's checks."""

from __future__ import annotations

import mlx.core as mx

from ..launch import METAL_TYPES, metal_launch, source_text
from .reference import HEAD_DIM

_PARTIAL = """
  using namespace few_row_attention;
  const int lane = thread_index_in_simdgroup, item = int(thread_position_in_grid.x / 32);
  const int rows = queries_shape[0], split = item / (rows * HEADS), query = item % (rows * HEADS);
  const int m = query / HEADS, head = query % HEADS / GROUP;
  const int base = position[0], last = position[1] + m, start = split * kSplit;
  if (start > last) return;
  const device T* value_tail = tail + size_t(HEADS / GROUP) * TAIL * kDim;
  float q[8], out[8] = {}, top = -INFINITY, sum = 0.0f;
  for (int i = 0; i < 8; ++i) q[i] = float(queries[size_t(query) * kDim + lane * 8 + i]) * SCALE;
  for (int at = start; at < min(start + kSplit, last + 1); ++at) {
    const device T* key = cache_row(keys, tail, base, keys_shape[2], TAIL, head, at) + lane * 8;
    float score = 0.0f;
    for (int i = 0; i < 8; ++i) score = fma(q[i], float(key[i]), score);
    score = warp_sum(score);
    const float higher = max(top, score), factor = exp(top - higher), weight = exp(score - higher);
    const device T* value = cache_row(values, value_tail, base, keys_shape[2], TAIL, head, at) + lane * 8;
    for (int i = 0; i < 8; ++i) out[i] = fma(weight, float(value[i]), out[i] * factor);
    sum = fma(sum, factor, weight);
    top = higher;
  }
  for (int i = 0; i < 8; ++i) parts[size_t(item) * kDim + lane * 8 + i] = out[i];
  if (lane == 0) {
    stats[item * 2] = top;
    stats[item * 2 + 1] = sum;
  }
"""
_JOIN = """
  const int lane = thread_index_in_simdgroup, query = int(thread_position_in_grid.x / 32);
  const int rows = projected_shape[0], m = query / HEADS, head = query % HEADS;
  const int splits = (position[1] + m) / 64 + 1;
  float top = -INFINITY, sum = 0.0f, out[8] = {};
  for (int s = 0; s < splits; ++s) top = max(top, stats[(s * rows * HEADS + query) * 2]);
  for (int s = 0; s < splits; ++s) {
    const int item = s * rows * HEADS + query;
    const float factor = exp(stats[item * 2] - top);
    sum = fma(factor, stats[item * 2 + 1], sum);
    for (int i = 0; i < 8; ++i) out[i] = fma(factor, parts[size_t(item) * 256 + lane * 8 + i], out[i]);
  }
  const int stride = 2 * (HEADS + HEADS / GROUP) * 256;
  for (int i = 0; i < 8; ++i) {
    const float gate = float(projected[size_t(m) * stride + (2 * head + 1) * 256 + lane * 8 + i]);
    y[size_t(query) * 256 + lane * 8 + i] = T(out[i] / sum / (1.0f + exp(-gate)));
  }
"""


def launch(
    queries: mx.array, keys: mx.array, values: mx.array, tail: mx.array, position: mx.array, projected: mx.array
) -> mx.array:
    """Two launches; arguments are checked by the caller."""
    rows, heads, _ = queries.shape
    tail_rows = tail.shape[2]
    splits = (keys.shape[2] + tail_rows - 1) // 64 + 1
    constants = f"""
  using T = {METAL_TYPES[queries.dtype]};
  constexpr int HEADS = {heads}, GROUP = {heads // keys.shape[1]}, TAIL = {tail_rows};
  constexpr float SCALE = {HEAD_DIM**-0.5!r}f;
"""
    header = source_text(__file__, "kernel.metal")
    read = ("queries", "keys", "values", "tail", "position")
    partial = metal_launch("few_row_attention", header, constants + _PARTIAL, read, ("parts", "stats"))
    parts, stats = partial(
        inputs=[queries, keys, values, tail, position],
        output_shapes=[(splits, rows * heads, HEAD_DIM), (splits, rows * heads, 2)],
        output_dtypes=[mx.float32, mx.float32],
        grid=(splits * rows * heads * 32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    joined = ("parts", "stats", "projected", "position")
    join = metal_launch("few_row_attention_join", header, constants + _JOIN, joined, ("y",))
    (y,) = join(
        inputs=[parts, stats, projected, position],
        output_shapes=[(rows, heads * HEAD_DIM)],
        output_dtypes=[queries.dtype],
        grid=(rows * heads * 32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    return y
