"""The attention inputs on Metal; unproved, and run only after the registry's checks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from ..launch import METAL_TYPES, metal_launch, source_text
from ..segments import Segments
from .reference import HEAD_DIM, AttentionShape, one_by_one

_BODY = """
  using namespace attention_inputs;
  const uint lane = thread_index_in_simdgroup;
  const int item = int(thread_position_in_grid.x / 32);
  const int rows = projected_shape[0], per_row = HEADS + 2 * KV_HEADS;
  const int stride = (2 * HEADS + 2 * KV_HEADS) * kDim;
  const int first = position[1], used = first - position[0];
  if (item >= rows * per_row) {
    const int line = item - rows * per_row, row = line % TAIL;  // of the tail: [2, KV_HEADS, TAIL]
    if (line >= 2 * KV_HEADS * TAIL || (row >= used && row < used + rows)) return;
    for (int i = 0; i < 8; ++i)
      tail_out[size_t(line) * kDim + lane * 8 + i] = tail[size_t(line) * kDim + lane * 8 + i];
    return;
  }
  const int m = item / per_row, head = item - m * per_row;
  const bool query = head < HEADS, value = head >= HEADS + KV_HEADS;
  const device T* source = projected + size_t(m) * stride + (query ? head * 2 : HEADS + head) * kDim + lane * 8;
  device T* target = query ? queries + (size_t(m) * HEADS + head) * kDim
                           : tail_out + (size_t(head - HEADS) * TAIL + used + m) * kDim;
  float v[8];
  for (int i = 0; i < 8; ++i) v[i] = float(source[i]);
  if (!value) norm_and_rotate<T, ROTARY>(v, query ? q_weight : k_weight, lane, first + m, EPS, LOG2_THETA);
  for (int i = 0; i < 8; ++i) target[lane * 8 + i] = T(v[i]);
"""


def launch(
    projected: mx.array,
    tails: Sequence[mx.array],
    positions: Sequence[mx.array],
    segments: Segments,
    shape: AttentionShape,
) -> tuple[mx.array, list[mx.array]]:
    """One launch a sequence, as a kernel has at most 31 buffers; arguments are checked by the caller."""
    return one_by_one(_alone, projected, tails, positions, segments, shape)


def _alone(projected: mx.array, tail: mx.array, position: mx.array, shape: AttentionShape) -> tuple[mx.array, mx.array]:
    rows, tail_rows = projected.shape[0], tail.shape[2]
    constants = f"""
  using T = {METAL_TYPES[projected.dtype]};
  constexpr int HEADS = {shape.heads}, KV_HEADS = {shape.kv_heads}, ROTARY = {shape.rotary}, TAIL = {tail_rows};
  constexpr float EPS = {shape.eps!r}f, LOG2_THETA = {math.log2(shape.theta)!r}f;
"""
    kernel = metal_launch(
        "attention_inputs",
        source_text(__file__, "kernel.metal"),
        constants + _BODY,
        ("projected", "tail", "position", "q_weight", "k_weight"),
        ("queries", "tail_out"),
    )
    items = rows * (shape.heads + 2 * shape.kv_heads) + 2 * shape.kv_heads * tail_rows
    queries, new_tail = kernel(
        inputs=[projected, tail, position, shape.q_norm, shape.k_norm],
        output_shapes=[(rows, shape.heads, HEAD_DIM), tail.shape],
        output_dtypes=[projected.dtype, tail.dtype],
        grid=(items * 32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    return queries, new_tail
