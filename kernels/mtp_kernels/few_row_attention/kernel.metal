// Attention of few rows over a buffer and its tail; see kernel.cu. UNPROVED on a Mac: the registry checks it before use.
//
// A threadgroup takes one split of 64 positions of one KV head, a simdgroup up to 4 rows of one query head, so that keys
// and values are read once for its rows and by neighbours at the same time. A lane holds 8 dimensions. Scores of 8 positions
// and all rows are joined together, one to a lane; a row that a position comes too late for gives it the weight 0, which
// changes no bit. No threadgroup memory.
namespace few_row_attention {

constant constexpr int kDim = 256;
constant constexpr int kSplit = 64;
constant constexpr int kBlock = 8;  // positions
constant constexpr int kOwn = 8;    // dimensions

// Joins N sums over the lanes, D of them at a time to the lane's own half: lane i ends with sum i. Every sum is joined in
// the same tree, over lanes 16 apart, then 8, 4, 2 and 1, whatever N.
template <int D, int N>
struct Join {
  static float run(thread float* sums, int lane) {
    constexpr int kLeft = N > D ? D : N;
    const bool upper = lane & D;
#pragma clang loop unroll(full)
    for (int i = 0; i < kLeft; ++i) {
      const float other = i + D < N ? sums[i + D] : 0.0f;
      const float kept = N > D && upper ? other : sums[i], sent = N > D && !upper ? other : sums[i];
      sums[i] = kept + simd_shuffle_xor(sent, ushort(D));
    }
    return Join<D / 2, kLeft>::run(sums, lane);
  }
};
template <>
struct Join<0, 1> {
  static float run(thread float* sums, int) { return sums[0]; }
};

inline float block_max(float v) {
  for (ushort d = 1; d < kBlock; d *= 2) v = max(v, simd_shuffle_xor(v, d));
  return v;
}

inline float block_sum(float v) {
  for (ushort d = 1; d < kBlock; d *= 2) v += simd_shuffle_xor(v, d);
  return v;
}

template <typename T>
inline const device T* cache_row(const device T* main, const device T* tail, int base, int capacity, int tail_rows,
                                 int head, int position) {
  if (position < base) return main + (size_t(head) * capacity + position) * kDim;
  return tail + (size_t(head) * tail_rows + position - base) * kDim;
}

}  // namespace few_row_attention
