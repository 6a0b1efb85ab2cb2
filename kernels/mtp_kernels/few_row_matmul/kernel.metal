// y[m, n] = sum_k x[m, k] * W[n, k] for at most 8 rows of x. UNPROVED: never run; the registry checks it before use.
//
// One simdgroup computes one output feature for all rows: its lanes take the weight row's 32-bit words in turn, unpack each
// once, and use it for every row. A row has its own accumulators and its own tree, so other rows do not change its bits.
// The norm's factor is applied at the end: the sum of squares is gathered in the same loop.
namespace few_row {

inline float tree(float v) {
  for (ushort d = 1; d < 32; d *= 2) v += simd_shuffle_xor(v, d);
  return v;
}

template <typename T, int BITS, int GROUP, int ROWS, bool NORM, typename Scales>
inline void multiply(const device T* x, const device T* norm_weight, const device uint* w, Scales scales, Scales biases, int K, uint lane, thread float (&sums)[ROWS], thread float (&squares)[ROWS]) {
  constexpr int kValues = 32 / BITS;
  constexpr uint kMask = (1u << BITS) - 1;
  for (int word = lane; word < K / kValues; word += 32) {
    const uint packed = w[word];
    const int k = word * kValues;
    const float scale = float(scales[k / GROUP]), bias = float(biases[k / GROUP]);
    for (int m = 0; m < ROWS; ++m) {
      float product = 0.0f, plain = 0.0f;
      for (int i = 0; i < kValues; ++i) {
        float v = float(x[m * K + k + i]);
        if (NORM) {
          squares[m] = fma(v, v, squares[m]);
          v *= float(norm_weight[k + i]);
        }
        product = fma(float((packed >> (BITS * i)) & kMask), v, product);
        plain += v;
      }
      sums[m] = fma(scale, product, fma(bias, plain, sums[m]));
    }
  }
}

template <typename T, int ROWS, bool NORM>
inline void multiply_dense(const device T* x, const device T* norm_weight, const device T* w, int K, uint lane,
                           thread float (&sums)[ROWS], thread float (&squares)[ROWS]) {
  for (int k = lane; k < K; k += 32) {
    const float weight = float(w[k]);
    for (int m = 0; m < ROWS; ++m) {
      float v = float(x[m * K + k]);
      if (NORM) {
        squares[m] = fma(v, v, squares[m]);
        v *= float(norm_weight[k]);
      }
      sums[m] = fma(weight, v, sums[m]);
    }
  }
}

inline float silu(float v) { return v / (1.0f + exp(-v)); }

}  // namespace few_row
