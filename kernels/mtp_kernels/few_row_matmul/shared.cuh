// What the launches of few and of many columns share: barriers, small copies, the layout of activations as fragments,
// and every sum whose order is a row's bits.
namespace few_row {

constexpr int kWarps = 16;                                 // that multiply
constexpr int kThreads = kWarps * 32;
constexpr int kTileRows = 16;
constexpr int kTokens = 8;

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// A stage's barriers: `full` completes when its copies have landed, `empty` when every warp has read it.
__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(unsigned barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned barrier, int parity) {
  asm volatile(
      "{\n .reg .pred done;\nagain_%=:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra again_%=;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// Weights pass through the second-level cache once: they leave first, and code, activations and states stay.
__device__ __forceinline__ unsigned long long passing_through() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

template <int BYTES>
__device__ __forceinline__ void copy_small(unsigned dst, const void* src, unsigned long long policy) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "l"(policy)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %3, %2;" ::"r"(dst), "l"(src), "l"(policy),
                 "n"(BYTES) : "memory");
}

// The same for what other blocks read as well.
template <int BYTES>
__device__ __forceinline__ void copy_shared(unsigned dst, const void* src) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(dst), "l"(src), "n"(BYTES) : "memory");
}

using tensor_core::multiply_word;
using tensor_core::Scalar;
using tensor_core::silu;

// One weight matrix of a launch that may carry several: rows [0, n) of it are features [first, first + n) of y.
struct Matrix {
  const unsigned char* w;
  const unsigned char* s;
  const unsigned char* b;
  int n;
};

enum Epilogue { kPlain = 0, kResidual = 1, kSwiGLU = 2 };

// The matrix of a tile of 16 features, its first row there, and the output feature of that matrix's first row.
template <int EPILOGUE, int COUNT>
__device__ __forceinline__ void locate(const Matrix (&matrices)[COUNT], int tile, Matrix& matrix, int& row,
                                       int& first) {
  matrix = matrices[0], row = tile * kTileRows, first = 0;
  if constexpr (EPILOGUE != kSwiGLU) {
#pragma unroll
    for (int i = 1; i < COUNT; ++i) {
      const int padded = (matrix.n + kTileRows - 1) / kTileRows * kTileRows;
      if (row >= padded) row -= padded, first += matrix.n, matrix = matrices[i];
      else break;
    }
  }
}

// y[at] from a product, of gate and up where there are two, and what is added to it.
template <int EPILOGUE, typename T, typename OutT>
__device__ __forceinline__ void write_output(OutT* y, const T* residual, size_t at, float value, float up) {
  if constexpr (EPILOGUE == kSwiGLU) value = silu(value) * up;
  if constexpr (EPILOGUE == kResidual) value += static_cast<float>(residual[at]);
  y[at] = static_cast<OutT>(value);
}

template <int BITS, int GROUP>
struct Layout {
  static constexpr int kUnitBytes = BITS == 16 ? 64 : 32;             // of a row, for one warp
  static constexpr int kUnit = kUnitBytes * 8 / BITS;                 // values of k in a unit
  static constexpr int kFold = BITS == 4 && GROUP > 32 ? 64 : 32;     // k between two uses of scale and bias
  static constexpr int kFolds = kUnit / kFold;
};

// Where the 8 activations x[m, 8v .. 8v+7] live: in the order in which lanes meet the weights of the same k.
template <int BITS, int GROUP>
__device__ __forceinline__ int fragment_slot(int v, int m, int rows) {
  if constexpr (BITS == 4) {
    const int r = v & 15;
    const int word = GROUP == 32 ? (r >> 2) : ((r >> 3) * 2 + (r & 1));
    const int quad = GROUP == 32 ? (r & 3) : ((r >> 1) & 3);
    return (((v >> 4) * 4 + word) * rows + m) * 4 + quad;
  } else {
    return ((v >> 2) * rows + m) * 4 + (v & 3);
  }
}

// Puts the 8 activations `loaded` (times `gain`) where the tensor core meets them, with their sum per fold and, from
// the first lane, the sum of squares of the warp's 256 values. Lanes have neighbouring vectors v of row m.
template <typename T, int BITS, int GROUP, bool NORM, typename Keep>
__device__ __forceinline__ void stage_vector(uint4 loaded, uint4 gain, int v, int vectors, int m, int rows,
                                             int sum_pitch, uint4* fragments, float* fold_sums, Keep keep_square) {
  using S = Scalar<T>;
  constexpr int kFoldVectors = Layout<BITS, GROUP>::kFold / 8;
  unsigned r[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
  if constexpr (NORM) {
    float square = 0.0f;
    const unsigned g[4] = {gain.x, gain.y, gain.z, gain.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float a = S::lo(r[i]), b = S::hi(r[i]);
      square = __fmaf_rn(b, b, __fmaf_rn(a, a, square));
      r[i] = S::pack(a * S::lo(g[i]), b * S::hi(g[i]));
    }
#pragma unroll
    for (int d = 1; d < 32; d *= 2) square += __shfl_xor_sync(0xffffffffu, square, d);
    if ((threadIdx.x & 31) == 0) keep_square(square);
  }
  if constexpr (BITS != 16) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += S::lo(r[i]) + S::hi(r[i]);
#pragma unroll
    for (int d = 1; d < kFoldVectors; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (v < vectors && v % kFoldVectors == 0) fold_sums[v / kFoldVectors * sum_pitch + m] = sum;
  }
  if (v < vectors) {
    uint4 f = make_uint4(r[0], r[1], r[2], r[3]);
    if constexpr (BITS == 4) {  // nibbles i and i + 4 of a word leave it as one pair
      f = make_uint4(__byte_perm(r[0], r[2], 0x5410), __byte_perm(r[0], r[2], 0x7632),
                     __byte_perm(r[1], r[3], 0x5410), __byte_perm(r[1], r[3], 0x7632));
    }
    fragments[fragment_slot<BITS, GROUP>(v, m, rows)] = f;
  }
}

// RMSNorm's factor of a row from its sums of squares.
__device__ __forceinline__ float norm_scale(const float* squares, int count, int K, float eps) {
  float total = 0.0f;
  for (int i = 0; i < count; ++i) total += squares[i];
  return rsqrtf(total / K + eps);
}

// Scale and bias of one of a lane's rows; the bias takes back the offset that unpacked values carry.
template <typename T, int BITS>
__device__ __forceinline__ float2 affine(const unsigned char* scale_at, const unsigned char* bias_at) {
  const float scale = static_cast<float>(*reinterpret_cast<const T*>(scale_at));
  float bias = static_cast<float>(*reinterpret_cast<const T*>(bias_at));
  if constexpr (BITS == 4) bias = __fmaf_rn(-Scalar<T>::kOffset, scale, bias);
  return make_float2(scale, bias);
}

// out += scale * products + bias * sum for row r (0: g, 1: g + 8) of the lane's two and its two tokens.
__device__ __forceinline__ void fold(float2 scale_bias, int r, const float (&acc)[4], float2 sum, float (&out)[4]) {
  out[2 * r] = __fmaf_rn(scale_bias.x, acc[2 * r], __fmaf_rn(scale_bias.y, sum.x, out[2 * r]));
  out[2 * r + 1] = __fmaf_rn(scale_bias.x, acc[2 * r + 1], __fmaf_rn(scale_bias.y, sum.y, out[2 * r + 1]));
}

}  // namespace few_row
