// Attention of few rows over a buffer and its tail; see kernel.cu. UNPROVED: never run; the registry checks it before use.
//
// One simdgroup takes one query of one split of 64 positions; a lane holds 8 dimensions. No threadgroup memory.
namespace few_row_attention {

constant constexpr int kDim = 256;
constant constexpr int kSplit = 64;

inline float warp_sum(float v) {
  for (ushort d = 1; d < 32; d *= 2) v += simd_shuffle_xor(v, d);
  return v;
}

template <typename T>
inline const device T* cache_row(const device T* main, const device T* tail, int base, int capacity, int tail_rows,
                                 int head, int position) {
  if (position < base) return main + (size_t(head) * capacity + position) * kDim;
  return tail + (size_t(head) * tail_rows + position - base) * kDim;
}

}  // namespace few_row_attention
