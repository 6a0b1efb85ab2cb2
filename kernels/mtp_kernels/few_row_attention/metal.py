"""Few-row attention on Metal; unproved, and run only after the registry's checks."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..launch import METAL_TYPES, metal_launch, source_text
from ..segments import Segments
from .reference import HEAD_DIM, Context

_ROWS = 4
"""Most rows of a query head that a simdgroup takes."""
_PARTIAL = """
  using namespace few_row_attention;
  const int lane = thread_index_in_simdgroup, number = simdgroup_index_in_threadgroup;
  const int split = threadgroup_position_in_grid.x, kv_head = threadgroup_position_in_grid.y;
  const int rows = queries_shape[0], first = number / GROUP * ROWS, head = kv_head * GROUP + number % GROUP;
  const int base = position[0], start = split * kSplit;
  const int last = position[1] + min(first + ROWS, rows) - 1;  // position of the last of its rows
  const int own_last = position[1] + first + lane / kBlock;  // and of the row whose score this lane gets
  if (start > last) return;
  const device T* value_tail = tail + size_t(HEADS / GROUP) * TAIL * kDim;
  float q[ROWS][kOwn], out[ROWS][kOwn] = {}, top = -INFINITY, sum = 0.0f;
#pragma clang loop unroll(full)
  for (int m = 0; m < ROWS; ++m) {
    const device T* query = queries + (size_t(min(first + m, rows - 1)) * HEADS + head) * kDim + lane * kOwn;
#pragma clang loop unroll(full)
    for (int i = 0; i < kOwn; ++i) q[m][i] = float(query[i]) * SCALE;
  }
  for (int at = start; at < min(start + kSplit, last + 1); at += kBlock) {
    float scores[ROWS * kBlock];
#pragma clang loop unroll(full)
    for (int p = 0; p < kBlock; ++p) {
      const int read = min(at + p, last);
      const device T* key = cache_row(keys, tail, base, position[2], TAIL, kv_head, read) + lane * kOwn;
      float k[kOwn];
#pragma clang loop unroll(full)
      for (int i = 0; i < kOwn; ++i) k[i] = float(key[i]);
#pragma clang loop unroll(full)
      for (int m = 0; m < ROWS; ++m) {
        float score = 0.0f;
#pragma clang loop unroll(full)
        for (int i = 0; i < kOwn; ++i) score = fma(q[m][i], k[i], score);
        scores[m * kBlock + p] = score;
      }
    }
    float score = Join<16, ROWS * kBlock>::run(scores, lane);
    if (at + lane % kBlock > own_last) score = -INFINITY;
    // A split where a row has no position leaves NaN; its row never reads it.
    const float higher = max(top, block_max(score)), factor = exp(top - higher), weight = exp(score - higher);
    sum = fma(sum, factor, block_sum(weight));
    top = higher;
#pragma clang loop unroll(full)
    for (int m = 0; m < ROWS; ++m) {
      const float shrink = simd_shuffle(factor, ushort(m * kBlock));
#pragma clang loop unroll(full)
      for (int i = 0; i < kOwn; ++i) out[m][i] *= shrink;
    }
#pragma clang loop unroll(full)
    for (int p = 0; p < kBlock; ++p) {
      const int read = min(at + p, last);
      const device T* value = cache_row(values, value_tail, base, position[2], TAIL, kv_head, read) + lane * kOwn;
      float v[kOwn];
#pragma clang loop unroll(full)
      for (int i = 0; i < kOwn; ++i) v[i] = float(value[i]);
#pragma clang loop unroll(full)
      for (int m = 0; m < ROWS; ++m) {
        const float share = simd_shuffle(weight, ushort(m * kBlock + p));
#pragma clang loop unroll(full)
        for (int i = 0; i < kOwn; ++i) out[m][i] = fma(share, v[i], out[m][i]);
      }
    }
  }
#pragma clang loop unroll(full)
  for (int m = 0; m < ROWS; ++m) {
    if (first + m >= rows) return;
    const int item = (split * rows + first + m) * HEADS + head;
    for (int i = 0; i < kOwn; ++i) parts[size_t(item) * kDim + lane * kOwn + i] = out[m][i];
    if (lane == m * kBlock) {
      stats[item * 2] = top;
      stats[item * 2 + 1] = sum;
    }
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


def launch(queries: mx.array, contexts: Sequence[Context], segments: Segments, projected: mx.array) -> mx.array:
    """Two launches a sequence, as a kernel has at most 31 buffers; arguments are checked by the caller."""
    own = zip(segments.slices, contexts, strict=True)
    return mx.concatenate([_alone(queries[part], context, projected[part]) for part, context in own])


def _alone(queries: mx.array, context: Context, projected: mx.array) -> mx.array:
    keys, values, tail, position = context.keys, context.values, context.tail, context.position
    rows, heads, _ = queries.shape
    tail_rows = tail.shape[2]
    splits = (context.positions - 1) // 64 + 1
    kv_heads, group = tail.shape[1], heads // tail.shape[1]
    together = min(rows, _ROWS)
    simdgroups = group * -(-rows // together)
    constants = f"""
  using T = {METAL_TYPES[queries.dtype]};
  constexpr int HEADS = {heads}, GROUP = {group}, TAIL = {tail_rows};
  constexpr float SCALE = {HEAD_DIM**-0.5!r}f;
"""
    header = source_text(__file__, "kernel.metal")
    read = ("queries", "keys", "values", "tail", "position")
    body = f"  constexpr int ROWS = {together};\n" + _PARTIAL
    partial = metal_launch("few_row_attention", header, constants + body, read, ("parts", "stats"))
    parts, stats = partial(
        inputs=[queries, keys, values, tail, position],
        output_shapes=[(splits, rows * heads, HEAD_DIM), (splits, rows * heads, 2)],
        output_dtypes=[mx.float32, mx.float32],
        grid=(splits * simdgroups * 32, kv_heads, 1),
        threadgroup=(simdgroups * 32, 1, 1),
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
