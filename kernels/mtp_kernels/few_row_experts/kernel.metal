// A mixture-of-experts block for few rows in three launches. UNPROVED on a Mac: the registry checks it before use.
//
// The first, of one threadgroup, norms the rows, chooses each row's experts and lists the distinct ones with the rows of
// each. The second and third go through that list; simdgroups without an entry leave at once. A simdgroup takes 4 weight
// rows, unpacks each once for up to 8 columns, which are the rows that share the expert, and joins its 32 sums in one tree
// that is the same for every sum: a row cannot see its neighbours. A row's experts are added up in the order of its
// choice. Sums are explicit fma, so that a compiler has nothing to contract in one place and not in another.
namespace experts {

constexpr constant int kColumns = 8;
constexpr constant int kStreams = 4;  // weight rows of a simdgroup

// Rows that use one expert: `count` of `pairs` from `start` on. A pair is row * TOP + place among the row's experts.
struct Slot {
  int expert, start, count;
};
template <typename Slots>
inline Slot slot_of(Slots slots, int i) {
  return Slot{slots[4 * i], slots[4 * i + 1], slots[4 * i + 2]};
}

inline float all_lanes(float v) {
  for (ushort d = 1; d < 32; d *= 2) v += simd_shuffle_xor(v, d);
  return v;
}

// One simdgroup: h = RMSNorm(x) of one row.
template <typename T, int HIDDEN>
inline void normed(const device T* x, const device T* norm_weight, float eps, int lane, device T* h) {
  float square = 0.0f;
  for (int i = lane; i < HIDDEN; i += 32) square = fma(float(x[i]), float(x[i]), square);
  const float scale = rsqrt(all_lanes(square) * (1.0f / HIDDEN) + eps);
  for (int i = lane; i < HIDDEN; i += 32) h[i] = T(float(x[i]) * scale * float(norm_weight[i]));
}

// One simdgroup, one row: its TOP best experts, the lowest of equals first, and what each and the shared one weigh.
template <int E, int TOP, bool NORMALISED, typename Logits>
inline void choose(Logits logits, int lane, threadgroup int* chosen, device float* weights) {
  constexpr int kOwn = (E + 31) / 32;
  float left[kOwn], top = 0.0f, total = 0.0f, own = 0.0f;
  for (int i = 0; i < kOwn; ++i) left[i] = i * 32 + lane < E ? logits[i * 32 + lane] : -INFINITY;
  for (int s = 0; s < TOP; ++s) {
    float best = left[0];
    int id = lane;
    for (int i = 1; i < kOwn; ++i)
      if (left[i] > best) {
        best = left[i];
        id = i * 32 + lane;
      }
    for (ushort d = 1; d < 32; d *= 2) {
      const float other = simd_shuffle_xor(best, d);
      const int other_id = simd_shuffle_xor(id, d);
      if (other > best || (other == best && other_id < id)) {
        best = other;
        id = other_id;
      }
    }
    if (s == 0) top = best;
    const float mass = precise::exp(best - top);
    total += mass;
    if (lane == s) own = mass;
    if (lane == 0) chosen[s] = id;
    for (int i = 0; i < kOwn; ++i)
      if (i * 32 + lane == id) left[i] = -INFINITY;
  }
  if (!NORMALISED) {
    total = 0.0f;
    for (int e = lane; e < E; e += 32) total += precise::exp(logits[e] - top);
    total = all_lanes(total);
  }
  if (lane < TOP) weights[lane] = own / total;
  if (lane == TOP) weights[lane] = 1.0f / (1.0f + precise::exp(-logits[E]));
}

// The threadgroup: experts in rising order with the rows of each, from the rows' choices; slots left over have no rows.
template <int E, int TOP, int ROWS, int SLOTS, int THREADS>
inline void list_experts(const threadgroup int* chosen, threadgroup uint* sets, int thread_id, device int* slots,
                         device int* pairs) {
  for (int e = thread_id; e < E; e += THREADS) {
    uint set = 0;
    for (int pair = 0; pair < ROWS * TOP; ++pair)
      if (chosen[pair] == e) set |= 1u << (pair / TOP);
    sets[e] = set;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int distinct = 0, before = 0, start = 0;  // experts of those below `before`, and their rows
  for (int e = thread_id; e < E; e += THREADS) {
    for (; before < e; ++before) {
      distinct += sets[before] != 0;
      start += int(popcount(sets[before]));
    }
    if (sets[e] == 0) continue;
    slots[4 * distinct] = e;
    slots[4 * distinct + 1] = start;
    slots[4 * distinct + 2] = int(popcount(sets[e]));
    slots[4 * distinct + 3] = 0;
    int at = start;
    for (int pair = 0; pair < ROWS * TOP; ++pair)
      if (chosen[pair] == e) pairs[at++] = pair;
  }
  for (; before < E; ++before) distinct += sets[before] != 0;
  for (int i = 4 * distinct + thread_id; i < 4 * SLOTS; i += THREADS) slots[i] = 0;
}

// Sums of 4 weight rows with up to 8 rows of x: lane 4 * m + s gets that of row line[m] of x and weight row s. With
// PAIRS the weight rows are two of the one matrix and two of the other.
template <typename T, int BITS, int GROUP, int K, bool PAIRS, typename M0, typename M1>
inline float products(const device T* x, M0 matrix, M1 second, size_t first, thread const int (&line)[kColumns],
                      int count, int lane) {
  constexpr int kValues = 32 / BITS, kRows = PAIRS ? kStreams / 2 : kStreams;
  float sums[kColumns * kStreams] = {};
  for (int k = lane * kValues; k < K; k += 32 * kValues) {
    float weight[kStreams][kValues];
#pragma clang loop unroll(full)
    for (int s = 0; s < kStreams; ++s) {
      const size_t row = first + s % kRows;
      const size_t group = row * (K / GROUP) + k / GROUP;
      const uint word = (s < kRows ? matrix.words : second.words)[row * (K / kValues) + k / kValues];
      const float scale = BITS < 16 ? float((s < kRows ? matrix.scales : second.scales)[BITS < 16 ? group : 0]) : 0.0f;
      const float bias = BITS < 16 ? float((s < kRows ? matrix.biases : second.biases)[BITS < 16 ? group : 0]) : 0.0f;
      few_row::Unpack<T, BITS>::run(word, scale, bias, weight[s]);
    }
#pragma clang loop unroll(full)
    for (int m = 0; m < kColumns; ++m) {
      if (m >= count) break;
#pragma clang loop unroll(full)
      for (int i = 0; i < kValues; ++i) {
        const float v = float(x[size_t(line[m]) * K + k + i]);
#pragma clang loop unroll(full)
        for (int s = 0; s < kStreams; ++s) sums[m * kStreams + s] = fma(weight[s][i], v, sums[m * kStreams + s]);
      }
    }
  }
  return few_row::Join<16, kColumns * kStreams>::run(sums, lane);
}

// One simdgroup: features first and first + 1 of silu(gate x) * (up x) for `count` rows: those of x that pair / PER names,
// stored at line `pair`; pairs are `pairs` from `start` on, or without a list 0, 1, ...
template <typename T, int BITS, int GROUP, int K, int PER, bool LISTED, typename M0, typename M1, typename Pairs>
inline void enter(const device T* h, M0 gate, M1 up, size_t row, Pairs pairs, int start, int count, int width, int first,
                  int lane, device T* to) {
  for (int base = 0; base < count; base += kColumns) {
    const int columns = min(count - base, kColumns);
    int pair[kColumns], line[kColumns];
    for (int m = 0; m < kColumns; ++m) {
      pair[m] = m < columns ? (LISTED ? pairs[start + base + m] : base + m) : 0;
      line[m] = pair[m] / PER;
    }
    const float value = products<T, BITS, GROUP, K, true>(h, gate, up, row, line, columns, lane);
    const float other = simd_shuffle(value, ushort(min(lane + 2, 31)));
    const int m = lane / kStreams, s = lane % kStreams;
    int at = 0;
    for (int i = 0; i < kColumns; ++i)
      if (i == m) at = pair[i];
    if (m < columns && s < 2) to[size_t(at) * width + first + s] = T(few_row::silu(value) * other);
  }
}

// One simdgroup: 4 features of an expert's down projection for `count` rows, left at the pair's place in `made`.
template <typename T, int BITS, int GROUP, int K, bool LISTED, typename M, typename Pairs>
inline void leave(const device T* from, M down, size_t row, Pairs pairs, int start, int count, int lane,
                  threadgroup float* made) {
  for (int base = 0; base < count; base += kColumns) {
    const int columns = min(count - base, kColumns);
    int pair[kColumns];
    for (int m = 0; m < kColumns; ++m) pair[m] = m < columns ? (LISTED ? pairs[start + base + m] : base + m) : 0;
    const float value = products<T, BITS, GROUP, K, false>(from, down, down, row, pair, columns, lane);
    const int m = lane / kStreams;
    int at = 0;
    for (int i = 0; i < kColumns; ++i)
      if (i == m) at = pair[i];
    if (m < columns) made[at * kStreams + lane % kStreams] = value;
  }
}

}  // namespace experts
