"""The sampler on Metal; unproved, and run only after the registry's checks."""

from __future__ import annotations

import mlx.core as mx

from ..launch import metal_launch, source_text
from .reference import WORDS

_THREADS = 256
_BODY = """
  using namespace sampler;
  threadgroup int shared_tokens[kSimdgroups];
  threadgroup float shared_masses[kSimdgroups];
  const int thread_id = int(thread_position_in_threadgroup.x);
  const int lane = int(thread_index_in_simdgroup), simdgroup = int(simdgroup_index_in_threadgroup);
  const auto row = logits + size_t(threadgroup_position_in_grid.x) * V;
  const auto given = parameters + threadgroup_position_in_grid.x * WORDS;
  const float temperature = as_type<float>(given[3]), top_p = as_type<float>(given[5]);
  const float min_p = as_type<float>(given[6]);
  const int top_k = int(given[4]);

  float top = -INFINITY;
  for (int id = thread_id; id < V; id += kThreads) top = max(top, VALUE(row[id]));
  for (ushort d = 1; d < 32; d *= 2) top = max(top, simd_shuffle_xor(top, d));
  if (lane == 0) shared_masses[simdgroup] = top;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int s = 0; s < kSimdgroups; ++s) top = max(top, shared_masses[s]);

  // Tokens of keys above `border` are kept, and `keep` of those with this key, by lowest id.
  int border = -1, keep = 0;
  const bool limited = top_k > 0 && top_k < V;
  float total = 0.0f;
  for (int step = limited ? 0 : 1; step < 2; ++step) {
    const bool by_mass = step == 1;
    if (by_mass && !(top_p < 1.0f)) break;
    if (by_mass && !limited) {
      Sums own = {0, 0.0f};
      for (int id = thread_id; id < V; id += kThreads) own.mass += precise::exp(VALUE(row[id]) - top);
      total = all_sums(own, shared_tokens, shared_masses, lane, simdgroup).mass;
    }
    const float mass = top_p * total;
    int low = 0, high = 0x10000;  // reached at `low`, not at `high`
    Sums above = {0, 0.0f};
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      Sums own = {0, 0.0f};
      for (int id = thread_id; id < V; id += kThreads)
        if (key_of(row[id]) >= middle) {
          own.tokens += 1;
          if (by_mass || limited) own.mass += precise::exp(VALUE(row[id]) - top);
        }
      const Sums all = all_sums(own, shared_tokens, shared_masses, lane, simdgroup);
      if (by_mass ? all.mass >= mass : all.tokens >= top_k) {
        low = middle;
      } else {
        high = middle;
        above = all;
      }
    }
    Sums own = {0, 0.0f};
    for (int id = thread_id; id < V; id += kThreads) own.tokens += key_of(row[id]) == low;
    const int ties = all_sums(own, shared_tokens, shared_masses, lane, simdgroup).tokens;
    const float each = low == 0 ? 0.0f : precise::exp(VALUE(ushort(low & 0x8000 ? low & 0x7fff : 0xffff & ~low)) - top);
    int fit = top_k - above.tokens;
    if (by_mass) {
      const float wanted = ceil((mass - above.mass) / each);
      fit = wanted < float(ties) ? max(int(wanted), 1) : ties;
    }
    if (!by_mass) total = above.mass + float(fit) * each;
    if (low > border || (low == border && fit < keep)) {
      border = low;
      keep = fit;
    }
  }

  // The last kept id of the border's: the greatest id up to which no more than `keep` of them lie.
  int last = V;
  if (border >= 0) {
    int low = 0;  // the ids below `low` hold fewer than `keep`, those below `last` all that are kept
    while (last - low > 1) {
      const int middle = (low + last) / 2;
      Sums own = {0, 0.0f};
      for (int id = thread_id; id < middle; id += kThreads) own.tokens += key_of(row[id]) == border;
      if (all_sums(own, shared_tokens, shared_masses, lane, simdgroup).tokens < keep) {
        low = middle;
      } else {
        last = middle;
      }
    }
  }

  const float least = min_p > 0.0f ? top + precise::log(min_p) : -INFINITY;
  float best = INFINITY;
  int winner = V;
  for (int id = thread_id; id < V; id += kThreads) {
    const int key = key_of(row[id]);
    const float value = VALUE(row[id]);
    if (!(key > border || (key == border && id < last)) || !(value >= least)) continue;
    const float score = log_exponential(draw(id, given[2], given[7], given[0], given[1])) - (value - top) / temperature;
    if (score < best) {
      best = score;
      winner = id;
    }
  }
  for (ushort d = 1; d < 32; d *= 2) {
    const float other = simd_shuffle_xor(best, d);
    const int id = simd_shuffle_xor(winner, d);
    if (other < best || (other == best && id < winner)) {
      best = other;
      winner = id;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    shared_masses[simdgroup] = best;
    shared_tokens[simdgroup] = winner;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int s = 0; s < kSimdgroups; ++s)
    if (shared_masses[s] < best || (shared_masses[s] == best && shared_tokens[s] < winner)) {
      best = shared_masses[s];
      winner = shared_tokens[s];
    }
  if (thread_id == 0) tokens[threadgroup_position_in_grid.x] = min(winner, V - 1);
"""


def launch(logits: mx.array, parameters: mx.array) -> mx.array:
    """One launch; arguments are checked by the caller."""
    rows, vocab_size = logits.shape
    value = "bfloat16_of" if logits.dtype == mx.bfloat16 else "half_of"
    constants = f"""
  constexpr int V = {vocab_size}, WORDS = {WORDS};
#define VALUE {value}
"""
    kernel = metal_launch(
        "sampler",
        source_text(__file__, "kernel.metal"),
        constants + _BODY + "#undef VALUE\n",
        ("logits", "parameters"),
        ("tokens",),
    )
    (tokens,) = kernel(
        inputs=[logits.view(mx.uint16), parameters],
        output_shapes=[(rows,)],
        output_dtypes=[mx.int32],
        grid=(rows * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
    )
    return tokens
