// y[m, n] = sum_k x[m, k] * W[n, k] for at most 8 rows of x. UNPROVED on a Mac: the registry checks it before use.
//
// A simdgroup holds a tile of STREAMS weight rows times ROWS rows of x in registers. Its lanes take WORDS neighbouring
// 32-bit words of every weight row in turn, turn them into floats once and use them for all rows of x. SPLITS simdgroups
// share a tile: they take blocks of K in turn, and threadgroup memory joins them in order. How K is dealt out to
// simdgroups and lanes, and each sum's order, depend on neither ROWS nor STREAMS: a row's bits do not know its neighbours.
// All sums are explicit fma, so that a compiler has nothing to contract in one variant and not in another.
namespace few_row {

inline float silu(float v) { return v / (1.0f + exp(-v)); }

template <int WORDS>
struct Vector;
template <>
struct Vector<1> {
  typedef uint type;
};
template <>
struct Vector<2> {
  typedef uint2 type;
};
template <>
struct Vector<4> {
  typedef uint4 type;
};
inline uint word_of(uint v, int) { return v; }
inline uint word_of(uint2 v, int i) { return v[i]; }
inline uint word_of(uint4 v, int i) { return v[i]; }

// The values of one word: integers times scale plus bias, or two of T.
template <typename T, int BITS>
struct Unpack {
  static void run(uint word, float scale, float bias, thread float (&out)[32 / BITS]) {
    for (int i = 0; i < 32 / BITS; ++i) out[i] = fma(float((word >> (BITS * i)) & ((1u << BITS) - 1)), scale, bias);
  }
};
template <>
struct Unpack<half, 16> {
  static void run(uint word, float, float, thread float (&out)[2]) {
    const half2 both = as_type<half2>(word);
    out[0] = float(both.x);
    out[1] = float(both.y);
  }
};
template <>
struct Unpack<bfloat16_t, 16> {
  static void run(uint word, float, float, thread float (&out)[2]) {
    out[0] = as_type<float>(word << 16);
    out[1] = as_type<float>(word & 0xffff0000u);
  }
};

template <int ROWS, int STREAMS>
struct Tile {
  float sums[ROWS][STREAMS] = {};
  float squares[ROWS] = {};
};

// Weight rows of one matrix, or in its second half of another (SwiGLU's gate and up): words, scales and biases by row.
template <typename Words, typename Scales>
struct Matrix {
  Words words;
  Scales scales, biases;
};
template <typename Words, typename Scales>
inline Matrix<Words, Scales> matrix(Words words, Scales scales, Scales biases) {
  return Matrix<Words, Scales>{words, scales, biases};
}

// Adds one split's share of K to the tile of weight rows first, first + 1, ... A row past the last one repeats that.
template <typename T, int BITS, int GROUP, int K, int WORDS, int SPLITS, bool NORM, bool PAIRS, int ROWS, int STREAMS,
          typename M0, typename M1>
inline void multiply(const device T* x, const device T* norm_weight, M0 matrix, M1 second, int first, int last, int split,
                     int lane, thread Tile<ROWS, STREAMS>& tile) {
  typedef typename Vector<WORDS>::type Words;
  constexpr int kValues = 32 / BITS, kBlock = kValues * WORDS, kRows = PAIRS ? STREAMS / 2 : STREAMS;
  for (int k = (split * 32 + lane) * kBlock; k < K; k += SPLITS * 32 * kBlock) {
    Words packed[STREAMS];
    float scale[STREAMS] = {}, bias[STREAMS] = {};
#pragma clang loop unroll(full)
    for (int s = 0; s < STREAMS; ++s) {
      const uint row = uint(min(first + s % kRows, last));
      const device uint* words = s < kRows ? matrix.words : second.words;
      packed[s] = *reinterpret_cast<const device Words*>(words + row * uint(K / kValues) + k / kValues);
      if (BITS < 16) {
        const uint group = row * uint(K / GROUP) + k / GROUP;
        scale[s] = float(s < kRows ? matrix.scales[group] : second.scales[group]);
        bias[s] = float(s < kRows ? matrix.biases[group] : second.biases[group]);
      }
    }
#pragma clang loop unroll(full)
    for (int j = 0; j < WORDS; ++j) {
      float weight[STREAMS][kValues];
#pragma clang loop unroll(full)
      for (int s = 0; s < STREAMS; ++s) Unpack<T, BITS>::run(word_of(packed[s], j), scale[s], bias[s], weight[s]);
      const int at = k + j * kValues;
#pragma clang loop unroll(full)
      for (int m = 0; m < ROWS; ++m) {
#pragma clang loop unroll(full)
        for (int i = 0; i < kValues; ++i) {
          float v = float(x[m * K + at + i]);
          if (NORM) {
            tile.squares[m] = fma(v, v, tile.squares[m]);
            v *= float(norm_weight[at + i]);
          }
#pragma clang loop unroll(full)
          for (int s = 0; s < STREAMS; ++s) tile.sums[m][s] = fma(weight[s][i], v, tile.sums[m][s]);
        }
      }
    }
  }
}

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

// Lane m * STREAMS + s gets the tile's sum (m, s), lane ROWS * STREAMS + m the squares of row m.
template <bool NORM, int ROWS, int STREAMS>
inline float joined(thread Tile<ROWS, STREAMS>& tile, int lane) {
  constexpr int kSums = ROWS * (STREAMS + (NORM ? 1 : 0));
  static_assert(kSums <= 32, "a sum a lane");
  float sums[kSums];
#pragma clang loop unroll(full)
  for (int m = 0; m < ROWS; ++m) {
#pragma clang loop unroll(full)
    for (int s = 0; s < STREAMS; ++s) sums[m * STREAMS + s] = tile.sums[m][s];
    if (NORM) sums[ROWS * STREAMS + m] = tile.squares[m];
  }
  return Join<16, kSums>::run(sums, lane);
}

}  // namespace few_row
