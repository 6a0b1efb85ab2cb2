// y[m, n] = sum_k x[m, k] * W[n, k] for at most 8 rows of x, W affine-quantised (4 or 8 bits) or dense.
//
// The tensor core computes W_tile (16 output features) x tokens (8 wide): every token is its own MMA column, so a
// token's result cannot depend on how many tokens share the pass. A block of 16 warps owns one 16-feature tile at a time
// and splits K by 64-byte chunks, chunk c to warp c % 16; partial sums meet in shared memory in a fixed order. The
// activations are staged once per block in MMA fragment order. Each warp streams its weights through a private ring of
// asynchronous copies that runs ahead across tiles, so memory stays busy during reductions.
namespace few_row {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kTileRows = 16;
constexpr int kRowBytes = 64;                              // bytes of one weight row in one chunk
constexpr int kWeightBytes = kTileRows * kRowBytes;        // 1,024
constexpr int kTokens = 8;
constexpr int kPartial = kTileRows * kTokens + 2;          // floats of one warp's partial tile; + 2 spreads the banks

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void copy16(unsigned dst, const void* src) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(dst), "l"(src));
}

template <int BYTES>
__device__ __forceinline__ void copy_small(unsigned dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(dst), "l"(src), "n"(BYTES));
}

template <typename T>
struct Scalar;

template <>
struct Scalar<__nv_bfloat16> {
  static constexpr unsigned kMagic = 0x43004300u;  // 128 + q is exact in bfloat16 for q < 16
  static constexpr float kOffset = 128.0f;
  static __device__ __forceinline__ float lo(unsigned v) { return __uint_as_float(v << 16); }
  static __device__ __forceinline__ float hi(unsigned v) { return __uint_as_float(v & 0xffff0000u); }
  static __device__ __forceinline__ unsigned pack(float a, float b) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b));
    return r;
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  // Bytes 2p and 2p+1 of w as a pair of exact values q (no offset left in them).
  static __device__ __forceinline__ unsigned bytes(unsigned w, int p) {
    const float a = __uint_as_float(__byte_perm(w, 0x4b000000u, p ? 0x7542 : 0x7540)) - 8388608.0f;
    const float b = __uint_as_float(__byte_perm(w, 0x4b000000u, p ? 0x7543 : 0x7541)) - 8388608.0f;
    return pack(a, b);
  }
  static __device__ __forceinline__ unsigned nibbles(unsigned w) {
    unsigned r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(w), "r"(0x000f000fu), "r"(kMagic));
    return r;
  }
};

template <>
struct Scalar<__half> {
  static constexpr float kOffset = 0.0f;
  static __device__ __forceinline__ float lo(unsigned v) { return __half2float(__ushort_as_half(v & 0xffffu)); }
  static __device__ __forceinline__ float hi(unsigned v) { return __half2float(__ushort_as_half(v >> 16)); }
  static __device__ __forceinline__ unsigned pack(float a, float b) {
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b));
    return r;
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ unsigned minus_1024(unsigned v) {
    unsigned r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(0x64006400u));  // exact: 1024 + q, q < 1024
    return r;
  }
  static __device__ __forceinline__ unsigned bytes(unsigned w, int p) {
    return minus_1024(__byte_perm(w, 0x64646464u, p ? 0x4342 : 0x4140));
  }
  static __device__ __forceinline__ unsigned nibbles(unsigned w) {
    return minus_1024((w & 0x000f000fu) | 0x64006400u);
  }
};

// One weight matrix of a launch that may carry several: rows [0, n) of it are features [first, first + n) of y.
struct Matrix {
  const unsigned char* w;
  const unsigned char* s;
  const unsigned char* b;
  int n;
};

template <typename T, int BITS, int GROUP>
struct Layout {
  static constexpr int kChunk = kRowBytes * 8 / BITS;                          // K covered by one chunk
  static constexpr int kGroups = BITS == 16 ? 0 : (kChunk >= GROUP ? kChunk / GROUP : 1);  // groups in one chunk
  static constexpr int kScaleBytes = kGroups < 2 ? 4 : kGroups * 2;            // of one row; a lone scale brings its pair
  static constexpr int kStageBytes = kWeightBytes + (BITS == 16 ? 0 : kTileRows * kScaleBytes * 2);
  static constexpr int kVectors = kChunk / 8;                                  // 16-byte activation vectors per chunk
  static constexpr int kFold = BITS == 4 && GROUP > 32 ? 64 : 32;              // K between two uses of scale and bias
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

// Stages rows of x (times the norm weight) as fragments, with their sums per fold and of squares. One item is 256
// values of one row, handled by one warp whatever the number of rows. A warp loads several items before it uses the
// first, and these loads go out before those of weights, behind which they would wait.
template <typename T, int BITS, int GROUP, bool NORM>
struct Activations {
  using S = Scalar<T>;
  static constexpr int kBatch = NORM ? 5 : 8;
  const uint4 *x, *norm_weight;
  int rows, vectors, per_row, items;
  uint4 loaded[kBatch], gains[NORM ? kBatch : 1];

  __device__ __forceinline__ Activations(const T* x, const T* norm_weight, int rows, int K)
      : x(reinterpret_cast<const uint4*>(x)), norm_weight(reinterpret_cast<const uint4*>(norm_weight)), rows(rows),
        vectors(K / 8), per_row((K / 8 + 31) / 32), items(rows * ((K / 8 + 31) / 32)) {}

  __device__ __forceinline__ void load(int first) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int item = first + j * kWarps, m = item / per_row, v = (item - m * per_row) * 32 + lane;
      const bool live = item < items && v < vectors;
      loaded[j] = live ? x[static_cast<size_t>(m) * vectors + v] : make_uint4(0, 0, 0, 0);
      if constexpr (NORM) gains[j] = live ? norm_weight[v] : make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void store(int first, uint4* fragments, float* fold_sums, float* squares) const {
    constexpr int kFoldVectors = Layout<T, BITS, GROUP>::kFold / 8;
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int item = first + j * kWarps, m = item / per_row, v = (item - m * per_row) * 32 + lane;
      if (item >= items) break;
      unsigned r[4] = {loaded[j].x, loaded[j].y, loaded[j].z, loaded[j].w};
      if constexpr (NORM) {
        float square = 0.0f;
        const unsigned g[4] = {gains[j].x, gains[j].y, gains[j].z, gains[j].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float a = S::lo(r[i]), b = S::hi(r[i]);
          square = __fmaf_rn(b, b, __fmaf_rn(a, a, square));
          r[i] = S::pack(a * S::lo(g[i]), b * S::hi(g[i]));
        }
#pragma unroll
        for (int d = 1; d < 32; d *= 2) square += __shfl_xor_sync(0xffffffffu, square, d);
        if (lane == 0) squares[item] = square;
      }
      if constexpr (BITS != 16) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += S::lo(r[i]) + S::hi(r[i]);
#pragma unroll
        for (int d = 1; d < kFoldVectors; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        if (v < vectors && v % kFoldVectors == 0) fold_sums[v / kFoldVectors * kTokens + m] = sum;
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
  }
};

// Scales and biases of the lane's two rows (g and g + 8) in one chunk, as packed pairs.
template <typename T, int BITS, int GROUP>
struct Scales {
  using S = Scalar<T>;
  using L = Layout<T, BITS, GROUP>;
  static constexpr int kWords = L::kScaleBytes / 4;
  unsigned s[2][kWords], b[2][kWords];
  bool odd;

  __device__ __forceinline__ Scales(const unsigned char* stage, int chunk, int g) {
    const unsigned* words = reinterpret_cast<const unsigned*>(stage + kWeightBytes);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        s[r][w] = words[(g + 8 * r) * kWords + w];
        b[r][w] = words[(kTileRows + g + 8 * r) * kWords + w];
      }
    }
    odd = (chunk * L::kChunk / GROUP) & 1;
  }

  static __device__ __forceinline__ float half_of(unsigned word, bool high) { return high ? S::hi(word) : S::lo(word); }

  // out += scale * products + bias * sum, for fold i of the chunk.
  __device__ __forceinline__ void fold(const float (&acc)[4], float2 sum, int i, float (&out)[4]) const {
    const int local = L::kGroups == 1 ? 0 : i * L::kFold / GROUP;
    const bool high = L::kGroups == 1 ? odd : local & 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = half_of(s[r][local / 2], high);
      float bias = half_of(b[r][local / 2], high);
      if constexpr (BITS == 4) bias = __fmaf_rn(-S::kOffset, scale, bias);
      out[2 * r] = __fmaf_rn(scale, acc[2 * r], __fmaf_rn(bias, sum.x, out[2 * r]));
      out[2 * r + 1] = __fmaf_rn(scale, acc[2 * r + 1], __fmaf_rn(bias, sum.y, out[2 * r + 1]));
    }
  }
};

// The products of one word of each of the lane's two rows: 8 values of k in 4 bits, or 4 in 8 bits.
template <typename T, int BITS>
__device__ __forceinline__ void multiply_word(unsigned w0, unsigned w1, unsigned f0, unsigned f1, unsigned f2,
                                              unsigned f3, float (&acc)[4]) {
  using S = Scalar<T>;
  if constexpr (BITS == 8) {
    const unsigned a[4] = {S::bytes(w0, 0), S::bytes(w1, 0), S::bytes(w0, 1), S::bytes(w1, 1)};
    S::mma(acc, a, f0, f1);
  } else {
    const unsigned a[4] = {S::nibbles(w0), S::nibbles(w1), S::nibbles(w0 >> 4), S::nibbles(w1 >> 4)};
    const unsigned b[4] = {S::nibbles(w0 >> 8), S::nibbles(w1 >> 8), S::nibbles(w0 >> 12), S::nibbles(w1 >> 12)};
    S::mma(acc, a, f0, f1);
    S::mma(acc, b, f2, f3);
  }
}

// Adds one chunk of TILES tiles to the lane's outputs: rows g, g + 8 and tokens 2q, 2q + 1 of each tile.
template <typename T, int BITS, int GROUP, int TILES>
__device__ __forceinline__ void multiply_chunk(const unsigned char* stage, const uint4* fragments,
                                               const float* fold_sums, int chunk, int rows, int lane,
                                               float (&out)[TILES][4]) {
  using S = Scalar<T>;
  using L = Layout<T, BITS, GROUP>;
  const int g = lane >> 2, q = lane & 3;
  const int flip = ((g >> 1) & 1) << 5;
  const unsigned char* row = stage + g * kRowBytes;
  const bool live = g < rows;
  const uint4 none = make_uint4(0, 0, 0, 0);
  const uint4* column = fragments + (chunk * (L::kVectors / 4) * rows + g) * 4 + q;

  if constexpr (BITS == 16) {
    const uint4 f = live ? *column : none;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const unsigned char* at = row + tile * L::kStageBytes + ((q * 16) ^ flip);
      const uint4 w0 = *reinterpret_cast<const uint4*>(at);
      const uint4 w1 = *reinterpret_cast<const uint4*>(at + 8 * kRowBytes);
      const unsigned lo[4] = {w0.x, w1.x, w0.y, w1.y}, hi[4] = {w0.z, w1.z, w0.w, w1.w};
      S::mma(out[tile], lo, f.x, f.y);
      S::mma(out[tile], hi, f.z, f.w);
    }
  } else {
    const float2* sums = reinterpret_cast<const float2*>(fold_sums + chunk * (L::kChunk / L::kFold) * kTokens) + q;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const Scales<T, BITS, GROUP> scales(stage + tile * L::kStageBytes, chunk, g);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        unsigned w0[2], w1[2];
        const unsigned char* at = row + tile * L::kStageBytes;
        if constexpr (BITS == 4 && GROUP == 32) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            w0[i] = *reinterpret_cast<const unsigned*>(at + ((half * 32 + i * 16 + q * 4) ^ flip));
            w1[i] = *reinterpret_cast<const unsigned*>(at + 8 * kRowBytes + ((half * 32 + i * 16 + q * 4) ^ flip));
          }
        } else {
          const uint2 u0 = *reinterpret_cast<const uint2*>(at + ((half * 32 + q * 8) ^ flip));
          const uint2 u1 = *reinterpret_cast<const uint2*>(at + 8 * kRowBytes + ((half * 32 + q * 8) ^ flip));
          w0[0] = u0.x, w0[1] = u0.y, w1[0] = u1.x, w1[1] = u1.y;
        }
        if constexpr (BITS == 8) {
          const uint4 f = live ? column[half * rows * 4] : none;
          multiply_word<T, 8>(w0[0], w1[0], f.x, f.y, 0, 0, acc);
          multiply_word<T, 8>(w0[1], w1[1], f.z, f.w, 0, 0, acc);
          scales.fold(acc, sums[half * 4], half, out[tile]);
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint4 f = live ? column[(half * 2 + i) * rows * 4] : none;
            multiply_word<T, 4>(w0[i], w1[i], f.x, f.y, f.z, f.w, acc);
            if constexpr (GROUP == 32) {
              scales.fold(acc, sums[(half * 2 + i) * 4], half * 2 + i, out[tile]);
              acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
            }
          }
          if constexpr (GROUP != 32) scales.fold(acc, sums[half * 4], half, out[tile]);
        }
      }
    }
  }
}

// One lane's share of the copies of a 16-row tile: two 16-byte units of weights and one row's scales or biases.
template <typename T, int BITS, int GROUP>
struct Source {
  using L = Layout<T, BITS, GROUP>;
  const unsigned char *w, *s;
  unsigned second;  // from the first unit's row to the row 8 below, or to itself at the matrix's end

  __device__ __forceinline__ void aim(const Matrix& matrix, int row, int chunk, int K, int lane) {
    const size_t stride = static_cast<size_t>(K) * BITS / 8;
    const int last = matrix.n - 1;  // rows past the end repeat it, and their results are dropped
    const int first = min(row + (lane >> 2), last);
    w = matrix.w + first * stride + chunk * kRowBytes + (lane & 3) * 16;
    second = static_cast<unsigned>((min(row + 8 + (lane >> 2), last) - first) * stride);
    if constexpr (BITS != 16) {
      const size_t group = static_cast<size_t>(min(row + (lane >> 1), last)) * (K / GROUP) + chunk * L::kChunk / GROUP;
      s = ((lane & 1) ? matrix.b : matrix.s) + (L::kGroups == 1 ? group / 2 * 4 : group * 2);
    }
  }

  __device__ __forceinline__ void fetch(unsigned stage, int lane) {
    const unsigned dst = stage + (lane >> 2) * kRowBytes + (((lane & 3) * 16) ^ (((lane >> 3) & 1) << 5));
    copy16(dst, w);
    copy16(dst + 8 * kRowBytes, w + second);
    w += kWarps * kRowBytes;
    if constexpr (BITS != 16) {
      copy_small<L::kScaleBytes>(stage + kWeightBytes + ((lane & 1) * kTileRows + (lane >> 1)) * L::kScaleBytes, s);
      s += kWarps * L::kChunk / GROUP * 2;
    }
  }
};

enum Epilogue { kPlain = 0, kResidual = 1, kSwiGLU = 2 };

__device__ __forceinline__ float silu(float v) { return v / (1.0f + __expf(-v)); }

// The whole launch. `matrices` is filled by the caller; for kSwiGLU it holds the gate and the up projection.
template <typename T, typename OutT, int BITS, int GROUP, int COUNT, int STAGES, bool NORM, int EPILOGUE>
__device__ __forceinline__ void run(const T* x, const T* norm_weight, const T* residual, const Matrix (&matrices)[COUNT],
                                    OutT* y, int rows, int K, float eps, unsigned char* smem) {
  using L = Layout<T, BITS, GROUP>;
  constexpr int kPerTile = EPILOGUE == kSwiGLU ? 2 : 1;
  const int chunks = K / L::kChunk;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;

  unsigned char* ring = smem + warp * (STAGES * kPerTile * L::kStageBytes);
  float* reduce = reinterpret_cast<float*>(smem + kWarps * STAGES * kPerTile * L::kStageBytes);  // two buffers
  float* squares = reduce + 2 * kWarps * kPerTile * kPartial;
  const int per_row = NORM ? (K / 8 + 31) / 32 : 0;
  float* scale = squares + kTokens * per_row;
  float* fold_sums = scale + kTokens;
  uint4* fragments = reinterpret_cast<uint4*>(fold_sums + (BITS == 16 ? 0 : K / L::kFold * kTokens));

  int total = 0, ldy = 0;
#pragma unroll
  for (int i = 0; i < (EPILOGUE == kSwiGLU ? 1 : COUNT); ++i) {
    total += (matrices[i].n + kTileRows - 1) / kTileRows;
    ldy += matrices[i].n;
  }
  auto locate = [&](int tile, Matrix& matrix, int& row, int& first) {
    matrix = matrices[0], row = tile * kTileRows, first = 0;
    if constexpr (EPILOGUE != kSwiGLU) {
#pragma unroll
      for (int i = 1; i < COUNT; ++i) {
        const int padded = (matrix.n + kTileRows - 1) / kTileRows * kTileRows;
        if (row >= padded) row -= padded, first += matrix.n, matrix = matrices[i];
        else break;
      }
    }
  };

  int next_tile = blockIdx.x, next_chunk = warp;
  Source<T, BITS, GROUP> source[kPerTile];
  auto aim = [&]() {
    Matrix matrix;
    int row, first;
    locate(next_tile, matrix, row, first);
    source[0].aim(matrix, row, next_chunk, K, lane);
    if constexpr (EPILOGUE == kSwiGLU) source[1].aim(matrices[1], row, next_chunk, K, lane);
  };
  if (next_chunk >= chunks) next_tile = total;
  if (next_tile < total) aim();
  auto fetch = [&](int slot) {
    if (next_tile < total) {
      const unsigned stage = shared_address(ring + slot * kPerTile * L::kStageBytes);
#pragma unroll
      for (int i = 0; i < kPerTile; ++i) source[i].fetch(stage + i * L::kStageBytes, lane);
      next_chunk += kWarps;
      if (next_chunk >= chunks) {
        next_tile += gridDim.x, next_chunk = warp;
        if (next_tile < total) aim();
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  Activations<T, BITS, GROUP, NORM> activations(x, norm_weight, rows, K);
  int filled = 0;
  for (int first = warp; first < activations.items || filled < STAGES - 1; first += activations.kBatch * kWarps) {
    activations.load(first);
    const int goal = first + activations.kBatch * kWarps < activations.items ? min(filled + 2, STAGES - 1) : STAGES - 1;
    while (filled < goal) fetch(filled++);
    activations.store(first, fragments, fold_sums, squares);
  }
  __syncthreads();
  if constexpr (NORM) {
    if (threadIdx.x < rows) {
      float total_square = 0.0f;
      for (int i = 0; i < per_row; ++i) total_square += squares[threadIdx.x * per_row + i];
      scale[threadIdx.x] = rsqrtf(total_square / K + eps);
    }
    __syncthreads();
  }

  int slot = 0, buffer = 0;
  for (int tile = blockIdx.x; tile < total; tile += gridDim.x, buffer ^= 1) {
    float out[kPerTile][4] = {};
    for (int chunk = warp; chunk < chunks; chunk += kWarps) {
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
      __syncwarp();
      const unsigned char* stage = ring + slot * kPerTile * L::kStageBytes;
      fetch(slot == 0 ? STAGES - 1 : slot - 1);  // the stage that the whole warp left before the barrier above
      multiply_chunk<T, BITS, GROUP, kPerTile>(stage, fragments, fold_sums, chunk, rows, lane, out);
      slot = slot == STAGES - 1 ? 0 : slot + 1;
    }
    float* partials = reduce + buffer * (kWarps * kPerTile * kPartial);
    const int g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int i = 0; i < kPerTile; ++i) {
      float* mine = partials + (i * kWarps + warp) * kPartial;
      *reinterpret_cast<float2*>(mine + g * 8 + 2 * q) = make_float2(out[i][0], out[i][1]);
      *reinterpret_cast<float2*>(mine + (g + 8) * 8 + 2 * q) = make_float2(out[i][2], out[i][3]);
    }
    __syncthreads();  // one barrier a tile: the other buffer is free once every warp has come past this one
    // Four neighbouring threads share an output, each with four warps' partial sums.
    const int output = threadIdx.x >> 2, token = output & 7, feature = output >> 3;
    float sum[kPerTile];
#pragma unroll
    for (int i = 0; i < kPerTile; ++i) {
      const float* part = partials + (i * kWarps + (threadIdx.x & 3) * 4) * kPartial + output;
      sum[i] = __fadd_rn(__fadd_rn(part[0], part[kPartial]), __fadd_rn(part[2 * kPartial], part[3 * kPartial]));
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
      if constexpr (NORM) sum[i] *= scale[token];
    }
    Matrix matrix;
    int row, first;
    locate(tile, matrix, row, first);
    if ((threadIdx.x & 3) == 0 && token < rows && row + feature < matrix.n) {
      const size_t at = static_cast<size_t>(token) * ldy + first + row + feature;
      float value = sum[0];
      if constexpr (EPILOGUE == kSwiGLU) value = silu(sum[0]) * sum[1];
      if constexpr (EPILOGUE == kResidual) value += static_cast<float>(residual[at]);
      y[at] = static_cast<OutT>(value);
    }
  }
}

}  // namespace few_row
