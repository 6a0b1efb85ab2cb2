// Attention of few rows of several sequences, each over its KV cache in two parts: a long buffer below position[0], a
// short tail from there on.
//
// The context is split at fixed positions, each split reduced alone and the splits then joined in order, so a row's result
// depends on its own sequence and position only. On the tensor cores keys, and then dimensions of values, are the side of
// 16; the query heads of a KV head times the rows are the side of 8, where every column is computed apart from the others.
namespace few_row_attention {

constexpr int kDim = 256;
constexpr int kTile = 64;      // positions that are loaded and reduced together
constexpr int kThreads = 128;  // a warp takes 16 positions of the scores, then 64 dimensions of the weighted sums
constexpr int kWarps = kThreads / 32;
// Tiles in shared memory, the one in use and those on their way: as many as let two blocks share a multiprocessor.
constexpr int kRingFew = 3, kRingMany = 2;
constexpr int kFewTiles = 3;
// Splits are short where a short context needs many of them, and long where a long one would join too many.
constexpr int kNear = 1024, kFar = 4096;
constexpr int kShort = 64, kMiddle = 128;
constexpr int kLong = 256;
constexpr int kNearSplits = kNear / kShort, kFarSplits = kNearSplits + (kFar - kNear) / kMiddle;
constexpr int kJoinWays = 16;  // splits joined side by side
constexpr int kJoinDim = 128;  // dimensions that a block joins
constexpr int kJoinThreads = kJoinWays * kJoinDim / 4;
#define kNone __int_as_float(0xff800000)  // minus infinity: no position seen

__device__ __forceinline__ int split_of(int position) {
  return position < kNear  ? position / kShort
         : position < kFar ? kNearSplits + (position - kNear) / kMiddle
                           : kFarSplits + (position - kFar) / kLong;
}

__device__ __forceinline__ int split_start(int split) {
  return split < kNearSplits  ? split * kShort
         : split < kFarSplits ? kNear + (split - kNearSplits) * kMiddle
                              : kFar + (split - kFarSplits) * kLong;
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes, or zeros where nothing is present.
__device__ __forceinline__ void copy_async(void* target, const void* source, bool present) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(target)), "l"(source),
               "r"(present ? 16 : 0));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::); }

// Until at most the newest NEWEST groups of copies are on their way.
template <int NEWEST>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(NEWEST) : "memory");
}

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_transposed(unsigned (&r)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                         const __nv_bfloat16*) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                         const __half*) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// One sequence: its cache of one KV head, and where its rows are.
template <typename T>
struct Sequence {
  const T *keys, *values, *key_tail, *value_tail;
  int base, first, rows;
};

// Rows of shared memory hold 8 values to a chunk; row r keeps chunk c at c ^ (r % 8), so that 8 rows' chunks of one
// number lie in different banks.
template <typename T>
__device__ __forceinline__ void copy_tile(T* target, const T* main, const T* tail, int base, int at, int length) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < kTile / kWarps; ++i) {
    const int row = i * kWarps + warp, position = at + row;
    const bool present = position < length;
    const T* source = position < base ? main + static_cast<size_t>(position) * kDim
                                      : tail + (present ? position - base : 0) * kDim;
    copy_async(target + row * kDim + (lane ^ (row & 7)) * 8, source + lane * 8, present);
  }
}

// Weighted sums, highest scores and sums of weights of one split, for up to TILES * 8 columns.
template <typename T, int GROUP, int TILES, int RING>
__device__ __forceinline__ void reduce(const Sequence<T>& s, const T* queries, int query_stride, int start, int end,
                                       float* out, float2* stats, float scale, unsigned char* smem) {
  constexpr int kColumns = TILES * 8;
  T* query = reinterpret_cast<T*>(smem);    // [kColumns][kDim]
  T* ring = query + kColumns * kDim;        // [RING][kTile][kDim]: keys and values of a tile, then of the next
  T* weight = ring + RING * kTile * kDim;   // [kColumns][kTile]
  float* exchange = reinterpret_cast<float*>(weight + kColumns * kTile);  // [5][kColumns]
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, swap = lane & 7;
  const int count = s.rows * GROUP, length = s.first + s.rows;

#pragma unroll
  for (int i = 0; i < kColumns / kWarps; ++i) {
    const int n = i * kWarps + warp;
    const bool present = n < count;
    const T* source = queries + (present ? n / GROUP * query_stride + n % GROUP * kDim : 0);
    copy_async(query + n * kDim + (lane ^ (n & 7)) * 8, source + lane * 8, present);
  }
  // Tile t's keys are the ring's copy 2t, its values 2t + 1.
  auto copy = [&](int number) {
    const int at = start + number / 2 * kTile;
    T* target = ring + number % RING * kTile * kDim;
    if (at < end && number % 2 == 0) copy_tile(target, s.keys, s.key_tail, s.base, at, length);
    if (at < end && number % 2 == 1) copy_tile(target, s.values, s.value_tail, s.base, at, length);
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < RING; ++i) copy(i);

  // Addresses of a lane's matrices: chunks 8 apart are `kEight` bytes apart, those between are swapped.
  constexpr unsigned kRow = kDim * sizeof(T), kEight = 64 * sizeof(T), kChunk = 8 * sizeof(T), kWhole = kTile * kRow;
  unsigned key_at[4], query_at[2], value_at[4], weight_at[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    key_at[i] = shared_address(ring) + (warp * 16 + (lane & 15)) * kRow + ((i * 2 + (lane >> 4)) ^ swap) * kChunk;
    value_at[i] = shared_address(ring) + ((lane >> 4) * 8 + swap) * kRow + warp * kEight +
                  ((i * 2 + (lane >> 3 & 1)) ^ swap) * kChunk;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    query_at[i] = shared_address(query) + swap * kRow + ((i * 4 + (lane >> 3)) ^ swap) * kChunk;
    weight_at[i] = shared_address(weight) + swap * kEight + ((i * 4 + (lane >> 3)) ^ swap) * kChunk;
  }

  // A lane has columns tile * 8 + lane % 4 * 2 + {0, 1} throughout, of scores as of weighted sums.
  float total[4][TILES][4] = {}, top[TILES][2], sum[TILES][2] = {};
#pragma unroll
  for (int n = 0; n < TILES; ++n) top[n][0] = top[n][1] = kNone;

  for (int at = start, number = 0; at < end; at += kTile, number += 2) {
    const unsigned key_tile = number % RING * kWhole, value_tile = (number + 1) % RING * kWhole;
    wait_for_copies<RING - 1>();
    __syncthreads();
    // Scores [16 positions of this warp, columns]: even and odd steps of 16 dimensions apart, then together.
    float score[TILES][4];
    constexpr int kTogether = TILES <= 3 ? TILES : 2;
#pragma unroll
    for (int group = 0; group < TILES / kTogether; ++group) {
      float even[kTogether][4] = {}, odd[kTogether][4] = {};
#pragma unroll
      for (int pair = 0; pair < kDim / 32; ++pair) {
        unsigned a[4], b[4];
        load_matrices(a, key_tile + key_at[pair % 2 * 2] + pair / 2 * kEight);
        load_matrices(b, key_tile + key_at[pair % 2 * 2 + 1] + pair / 2 * kEight);
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
          unsigned q[4];
          load_matrices(q, query_at[pair % 2] + (group * kTogether + n) * 8 * kRow + pair / 2 * kEight);
          multiply(even[n], a, q[0], q[1], query);
          multiply(odd[n], b, q[2], q[3], query);
        }
      }
#pragma unroll
      for (int n = 0; n < kTogether; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          score[group * kTogether + n][i] = __fmul_rn(__fadd_rn(even[n][i], odd[n][i]), scale);
    }
    if (at + kTile - 1 > s.first) {
#pragma unroll
      for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int position = at + warp * 16 + (lane >> 2) + (i >> 1) * 8;
          const int column = n * 8 + (lane & 3) * 2 + (i & 1);
          if (position > s.first + column / GROUP) score[n][i] = kNone;
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float highest = fmaxf(score[n][j], score[n][j + 2]);
#pragma unroll
        for (int d = 4; d < 32; d *= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, d));
        if (lane < 4) exchange[warp * kColumns + n * 8 + lane * 2 + j] = highest;
      }
    __syncthreads();
    copy(number + RING);

#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = n * 8 + (lane & 3) * 2 + j;
        float highest = top[n][j];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, exchange[w * kColumns + column]);
        const float above = highest == kNone ? 0.0f : highest;  // no position of this row yet: all weights are 0
        const float factor = power_of_two(__fadd_rn(top[n][j], -above));
        top[n][j] = highest;
        // What is added up is what is multiplied: weights as rounded to T.
        const T low = static_cast<T>(power_of_two(__fadd_rn(score[n][j], -above)));
        const T high = static_cast<T>(power_of_two(__fadd_rn(score[n][j + 2], -above)));
        sum[n][j] = __fmaf_rn(sum[n][j], factor, __fadd_rn(static_cast<float>(low), static_cast<float>(high)));
        T* place = weight + column * kTile + (lane >> 2);
        place[((warp * 2) ^ (column & 7)) * 8] = low;
        place[((warp * 2 + 1) ^ (column & 7)) * 8] = high;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          total[m][n][j] = __fmul_rn(total[m][n][j], factor);
          total[m][n][j + 2] = __fmul_rn(total[m][n][j + 2], factor);
        }
      }
    wait_for_copies<RING - 1>();
    __syncthreads();
    // Weighted sums [64 dimensions of this warp, columns].
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned w[TILES][4];
#pragma unroll
      for (int n = 0; n < TILES; ++n) load_matrices(w[n], weight_at[half] + n * 8 * kEight);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          unsigned v[4];
          load_transposed(v, value_tile + value_at[m] + (half * 32 + step * 16) * kRow);
#pragma unroll
          for (int n = 0; n < TILES; ++n) multiply(total[m][n], v, w[n][step * 2], w[n][step * 2 + 1], query);
        }
      }
    }
    __syncthreads();
    copy(number + 1 + RING);
  }

#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = n * 8 + (lane & 3) * 2 + j;
      float whole = sum[n][j];
#pragma unroll
      for (int d = 4; d < 32; d *= 2) whole = __fadd_rn(whole, __shfl_xor_sync(0xffffffffu, whole, d));
      if (lane < 4) exchange[warp * kColumns + column] = whole;
      if (warp == 0 && lane < 4) exchange[kWarps * kColumns + column] = top[n][j];
      if (column < count) {
        float* place = out + static_cast<size_t>(column) * kDim + warp * 64 + (lane >> 2);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          place[m * 16] = total[m][n][j];
          place[m * 16 + 8] = total[m][n][j + 2];
        }
      }
    }
  __syncthreads();
  for (int n = threadIdx.x; n < count; n += kThreads) {
    float whole = exchange[n];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) whole = __fadd_rn(whole, exchange[w * kColumns + n]);
    stats[n] = make_float2(exchange[kWarps * kColumns + n], whole);
  }
}

// A block reduces one split of one KV head of one sequence, the last splits first: those are long. `all_rows` are those
// of all sequences, `row` the first of this one.
template <typename T, int GROUP, int TAIL, int MOST>
__device__ __forceinline__ void partial(const T* queries, const T* keys, const T* values, const T* tail,
                                        const int* position, float* out, float2* stats, int row, int rows, int all_rows,
                                        int kv_heads, int capacity, float scale, unsigned char* smem) {
  const int block = gridDim.x - 1 - blockIdx.x, split = block / kv_heads, head = block - split * kv_heads;
  Sequence<T> s;
  s.base = position[0], s.first = position[1], s.rows = rows;
  const int start = split_start(split), end = min(split_start(split + 1), s.first + rows);
  if (start >= end) return;
  s.keys = keys + static_cast<size_t>(head) * capacity * kDim;
  s.values = values + static_cast<size_t>(head) * capacity * kDim;
  s.key_tail = tail + static_cast<size_t>(head) * TAIL * kDim;
  s.value_tail = tail + static_cast<size_t>(kv_heads + head) * TAIL * kDim;
  const int stride = kv_heads * GROUP * kDim;
  const T* own = queries + static_cast<size_t>(row) * stride + head * GROUP * kDim;
  const size_t place = (static_cast<size_t>(split) * kv_heads + head) * all_rows * GROUP + row * GROUP;
  out += place * kDim, stats += place;
  constexpr int kRing = MOST <= kFewTiles ? kRingFew : kRingMany;
  const int tiles = (rows * GROUP + 7) / 8;
  if (tiles <= 1) {
    reduce<T, GROUP, 1, kRing>(s, own, stride, start, end, out, stats, scale, smem);
  } else if (MOST <= 3 || tiles <= 3) {
    if constexpr (MOST >= 3) reduce<T, GROUP, 3, kRing>(s, own, stride, start, end, out, stats, scale, smem);
  } else if (MOST <= 6 || tiles <= 6) {
    if constexpr (MOST >= 6) reduce<T, GROUP, 6, kRing>(s, own, stride, start, end, out, stats, scale, smem);
  } else {
    if constexpr (MOST >= 8) reduce<T, GROUP, 8, kRing>(s, own, stride, start, end, out, stats, scale, smem);
  }
}

// Joins the splits of some dimensions of one head of one row, and applies the sigmoid gate. Every kJoinWays-th split is
// added up in order, then those sums in order. A thread has 4 dimensions of one of the sums.
template <typename T, int GROUP>
__device__ __forceinline__ void join(const float* parts, const float2* stats, const T* projected, T* y, int position,
                                     int rows, int kv_heads) {
  __shared__ __align__(16) float way_total[kJoinWays][kJoinDim];
  __shared__ float way_sum[kJoinWays];
  constexpr int kAtOnce = 6;
  const int heads = kv_heads * GROUP, block = blockIdx.x / (kDim / kJoinDim);
  const int m = block / heads, h = block - m * heads, dims = blockIdx.x % (kDim / kJoinDim) * kJoinDim;
  const int way = threadIdx.x / (kJoinDim / 4), quad = threadIdx.x % (kJoinDim / 4), lane = threadIdx.x & 31;
  const int splits = split_of(position) + 1;
  const size_t place = static_cast<size_t>(h / GROUP) * rows * GROUP + m * GROUP + h % GROUP;
  const size_t stride = static_cast<size_t>(kv_heads) * rows * GROUP;
  const float4* from = reinterpret_cast<const float4*>(parts + place * kDim + dims) + quad;
  stats += place;

  float4 value[kAtOnce], total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float2 stat[kAtOnce];
  auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int s = first + i * kJoinWays;
      if (s < splits) stat[i] = stats[s * stride], value[i] = from[s * stride * (kDim / 4)];
    }
  };
  load(way);  // on its way while the highest score is found
  const size_t width = static_cast<size_t>(2 * heads + 2 * kv_heads) * kDim;
  const int dim = dims + threadIdx.x % kJoinDim;
  const T gate_of = projected[m * width + (2 * h + 1) * kDim + dim];
  float top = kNone, sum = 0.0f;
  for (int s = lane; s < splits; s += 32) top = fmaxf(top, stats[s * stride].x);
#pragma unroll
  for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
  for (int first = way; first < splits; first += kAtOnce * kJoinWays) {
    if (first != way) load(first);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kJoinWays >= splits) break;
      const float factor = power_of_two(__fadd_rn(stat[i].x, -top));
      sum = __fmaf_rn(factor, stat[i].y, sum);
      total.x = __fmaf_rn(factor, value[i].x, total.x), total.y = __fmaf_rn(factor, value[i].y, total.y);
      total.z = __fmaf_rn(factor, value[i].z, total.z), total.w = __fmaf_rn(factor, value[i].w, total.w);
    }
  }
  reinterpret_cast<float4*>(way_total[way])[quad] = total;
  if (quad == 0) way_sum[way] = sum;
  __syncthreads();
  if (threadIdx.x >= kJoinDim) return;
  float whole = way_total[0][threadIdx.x], weight = way_sum[0];
#pragma unroll
  for (int i = 1; i < kJoinWays; ++i) {
    whole = __fadd_rn(whole, way_total[i][threadIdx.x]);
    weight = __fadd_rn(weight, way_sum[i]);
  }
  const float gate = static_cast<float>(gate_of);
  y[(static_cast<size_t>(m) * heads + h) * kDim + dim] =
      static_cast<T>(__fdiv_rn(whole, weight) / (1.0f + __expf(-gate)));
}

}  // namespace few_row_attention
