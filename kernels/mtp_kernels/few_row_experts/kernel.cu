// A mixture-of-experts block for few rows x in two launches: y = x + sum of weight * expert(h) + gate * shared(h),
// h = RMSNorm(x), expert(h) = down(silu(gate h) * (up h)).
//
// A row's experts are known on the device alone. Every block of the first launch finds them again for itself, while it
// stages h in shared memory: each row's best experts, then the distinct ones with the rows of each. So an expert's
// weights are read once for all of its rows, and no launch goes by that only sorts. Tokens are the tensor core's
// columns: a row cannot see which rows share an expert with it. Weights go straight to registers, for K is short. Sums
// over K are split by K alone and joined in order; a row's experts are added up in the order of its choice.
namespace experts {

using tensor_core::multiply_word;
using tensor_core::Scalar;
using tensor_core::silu;

constexpr int kTokens = 8;          // columns
constexpr int kTeamWarps = 8;       // that share a tile of the first launch, each with its part of K
constexpr int kTeams = 4;
constexpr int kEnterThreads = kTeams * kTeamWarps * 32;
constexpr int kEnterFeatures = 8;   // of a tile: as many rows of the gate, and of the up projection
constexpr int kLeaveThreads = 512;
constexpr int kLeaveWarps = kLeaveThreads / 32;
constexpr int kLeaveFeatures = 16;
constexpr int kMostRows = 32;       // a set of rows is a word
constexpr int kPartial = 16 * kTokens + 2;  // floats of one warp's tile; + 2 spreads the banks
constexpr int kPad = 16;            // bytes between rows of h
constexpr int kGreatest = 0x7fffffff, kLeast = -kGreatest - 1;

struct Matrix {
  const unsigned char *w, *s, *b;   // of rows of all experts, one expert after the other
};

// Rows that use one expert: `count` of `pairs` from `start` on. A pair is row * TOP + place among the row's experts.
struct alignas(16) Slot {
  int expert, start, count, unused;
};

template <int BITS, int GROUP>
struct Layout {
  static constexpr int kUnit = BITS == 4 ? 64 : 32;          // values of k that four lanes take at once
  static constexpr int kUnitBytes = kUnit * BITS / 8;
  static constexpr int kLaneWords = kUnitBytes / 16;
  static constexpr int kUnits = 4;                           // of a chunk, which is loaded at once
  static constexpr int kChunk = kUnits * kUnit;
  static constexpr int kGroups = BITS == 16 ? 1 : kChunk / GROUP;
  static constexpr int kScaleWords = (kGroups + 1) / 2;
};

// Each weight is read by one lane of one block: it need not stay near the multiprocessor.
template <int WORDS>
__device__ __forceinline__ void load(const unsigned char* at, unsigned* words) {
  if constexpr (WORDS == 4)
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(at));
  else if constexpr (WORDS == 2)
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1]) : "l"(at));
  else
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(words[0]) : "l"(at));
}

template <int GROUPS>
__device__ __forceinline__ void load_scales(const unsigned char* at, unsigned* words) {
  if constexpr (GROUPS == 8) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(at));
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (GROUPS == 4) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(at));
    words[0] = v.x, words[1] = v.y;
  } else if constexpr (GROUPS == 2) {
    words[0] = __ldg(reinterpret_cast<const unsigned*>(at));
  } else {
    words[0] = __ldg(reinterpret_cast<const unsigned short*>(at));
  }
}

template <typename T>
__device__ __forceinline__ float half_of(const unsigned* words, int i) {
  return i & 1 ? Scalar<T>::hi(words[i / 2]) : Scalar<T>::lo(words[i / 2]);
}

// A lane's share of a chunk of two weight rows, those that are rows lane / 4 and lane / 4 + 8 of the MMA's tile.
template <typename T, int BITS, int GROUP>
struct Chunk {
  using S = Scalar<T>;
  using L = Layout<BITS, GROUP>;
  unsigned words[2][L::kUnits][L::kLaneWords];
  unsigned scales[2][L::kScaleWords], biases[2][L::kScaleWords];

  __device__ __forceinline__ void load_row(int which, const Matrix& matrix, size_t row, int K, int chunk) {
    const int q = threadIdx.x & 3;
    const unsigned char* at = matrix.w + row * (K / 8 * BITS) + chunk * (L::kUnits * L::kUnitBytes);
#pragma unroll
    for (int u = 0; u < L::kUnits; ++u) {
      if constexpr (BITS == 4 && GROUP == 32) {
        load<1>(at + u * L::kUnitBytes + q * 4, &words[which][u][0]);
        load<1>(at + u * L::kUnitBytes + 16 + q * 4, &words[which][u][1]);
      } else {
        load<L::kLaneWords>(at + u * L::kUnitBytes + q * L::kLaneWords * 4, words[which][u]);
      }
    }
    if constexpr (BITS != 16) {
      const size_t first = row * (K / GROUP * 2) + chunk * L::kGroups * 2;
      load_scales<L::kGroups>(matrix.s + first, scales[which]);
      load_scales<L::kGroups>(matrix.b + first, biases[which]);
    }
  }

  // Values k .. k + 7 of the lane's column, in the order in which a packed word leaves its nibbles.
  static __device__ __forceinline__ uint4 values(const T* column, int k) {
    if (column == nullptr) return make_uint4(0, 0, 0, 0);
    const uint4 r = *reinterpret_cast<const uint4*>(column + k);
    if constexpr (BITS != 4) return r;
    return make_uint4(__byte_perm(r.x, r.z, 0x5410), __byte_perm(r.x, r.z, 0x7632), __byte_perm(r.y, r.w, 0x5410),
                      __byte_perm(r.y, r.w, 0x7632));
  }

  // out += scale * products + bias * sum of the column, the sum being a product with ones.
  __device__ __forceinline__ void fold(int group, const float (&acc)[4], const float (&sum)[4], float (&out)[4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = half_of<T>(scales[r], group);
      float bias = half_of<T>(biases[r], group);
      if constexpr (BITS == 4) bias = __fmaf_rn(-S::kOffset, scale, bias);
      out[2 * r] = __fmaf_rn(scale, acc[2 * r], __fmaf_rn(bias, sum[2 * r], out[2 * r]));
      out[2 * r + 1] = __fmaf_rn(scale, acc[2 * r + 1], __fmaf_rn(bias, sum[2 * r + 1], out[2 * r + 1]));
    }
  }

  static __device__ __forceinline__ void add_up(const uint4& f, float (&sum)[4]) {
    const unsigned ones[4] = {S::kOnes, S::kOnes, S::kOnes, S::kOnes};
    S::mma(sum, ones, f.x, f.y);
    S::mma(sum, ones, f.z, f.w);
  }

  // Adds the chunk's products with the lane's column (null for none), which begins at the chunk.
  __device__ __forceinline__ void multiply(const T* column, float (&out)[4]) const {
    const int q = threadIdx.x & 3;
#pragma unroll
    for (int u = 0; u < L::kUnits; ++u) {
      const unsigned(&w0)[L::kLaneWords] = words[0][u], (&w1)[L::kLaneWords] = words[1][u];
      float acc[4] = {}, sum[4] = {};
      if constexpr (BITS == 16) {
        const uint4 f = values(column, u * 32 + q * 8);
        const unsigned lo[4] = {w0[0], w1[0], w0[1], w1[1]}, hi[4] = {w0[2], w1[2], w0[3], w1[3]};
        S::mma(out, lo, f.x, f.y);
        S::mma(out, hi, f.z, f.w);
      } else if constexpr (BITS == 8) {
        const uint4 f = values(column, u * 32 + q * 8);
        multiply_word<T, 8>(w0[0], w1[0], f.x, f.y, 0, 0, acc);
        multiply_word<T, 8>(w0[1], w1[1], f.z, f.w, 0, 0, acc);
        add_up(f, sum);
        fold(u * 32 / GROUP, acc, sum, out);
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 f = values(column, u * 64 + (GROUP == 32 ? i * 32 + q * 8 : q * 16 + i * 8));
          multiply_word<T, 4>(w0[i], w1[i], f.x, f.y, f.z, f.w, acc);
          add_up(f, sum);
          if (GROUP > 32 && i == 0) continue;
          fold((u * 64 + i * 32) / GROUP, acc, sum, out);
          if (GROUP == 32) acc[0] = acc[1] = acc[2] = acc[3] = sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
        }
      }
    }
  }
};

// ---- which experts

// Floats as integers of the same order.
__device__ __forceinline__ int ordered(float v) {
  const int bits = __float_as_int(v + 0.0f);  // -0 becomes 0
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

// One warp, one row: its TOP best experts, the lowest of equals first, and what each and the shared one weigh.
template <int E, int TOP, bool NORMALISED>
__device__ __forceinline__ void choose(const float* logits, int* chosen, float* weights) {
  constexpr int kOwn = (E + 31) / 32;
  const int lane = threadIdx.x & 31;
  float v[kOwn], own = 0.0f;
  int key[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const bool there = i * 32 + lane < E;
    v[i] = there ? logits[i * 32 + lane] : __int_as_float(0xff800000);
    key[i] = there ? ordered(v[i]) : kLeast;
  }
  float top = 0.0f, mass = 0.0f, total = 0.0f;
#pragma unroll 1
  for (int s = 0; s < TOP; ++s) {
    int best = key[0], id = lane;
#pragma unroll
    for (int i = 1; i < kOwn; ++i)
      if (key[i] > best) best = key[i], id = i * 32 + lane;
    const int greatest = __reduce_max_sync(0xffffffffu, best);
    const int expert = min(__reduce_min_sync(0xffffffffu, best == greatest ? id : kGreatest), E - 1);
    float mine = 0.0f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (i * 32 + lane == expert) mine = v[i], key[i] = kLeast;
    const float value = __shfl_sync(0xffffffffu, mine, expert & 31);
    if (s == 0) top = value;
    mass = expf(value - top);
    total += mass;
    if (lane == s) own = mass;
    if (lane == 0) chosen[s] = expert;
  }
  if constexpr (!NORMALISED) {
    total = 0.0f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) total += expf(v[i] - top);
    total = warp_sum(total);
  }
  if (lane < TOP) weights[lane] = own / total;
  if (lane == TOP) weights[lane] = 1.0f / (1.0f + expf(-logits[E]));
}

// One warp, all rows: the distinct experts in rising order, from the sets of rows that chose each; how many they are.
template <int E>
__device__ __forceinline__ int list_experts(const unsigned* sets, int* first, Slot* slots, int size) {
  constexpr int kOwn = (E + 31) / 32;
  const int lane = threadIdx.x & 31;
  int experts = 0, rows = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const unsigned set = lane * kOwn + i < E ? sets[lane * kOwn + i] : 0;
    experts += set != 0, rows += __popc(set);
  }
  int slot = experts, start = rows;  // sums over the lanes up to this one
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int a = __shfl_up_sync(0xffffffffu, slot, d), b = __shfl_up_sync(0xffffffffu, start, d);
    if (lane >= d) slot += a, start += b;
  }
  const int distinct = __shfl_sync(0xffffffffu, slot, 31);
  slot -= experts, start -= rows;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int expert = lane * kOwn + i;
    if (expert >= E) break;
    const int count = __popc(sets[expert]);
    first[expert] = start;
    if (count) slots[slot++] = {expert, start, count, 0};
    start += count;
  }
  for (int s = distinct + lane; s < size; s += 32) slots[s] = {0, 0, 0, 0};
  return distinct;
}

// ---- the first launch: experts' gate and up projections, SwiGLU

// `activated` [rows * TOP, WIDTH] by pair and `shared` [rows, SHARED] are the results, and what the second launch must
// know: `slots` [min(rows * TOP, E)], of which those without rows come last, `pairs` [rows * TOP], `weights`
// [rows, TOP + 1].
template <typename T, int BITS, int GROUP, int SHARED_BITS, int SHARED_GROUP, int E, int TOP, bool NORMALISED,
          int HIDDEN, int WIDTH, int SHARED, int ROWS>
struct Enter {
  using S = Scalar<T>;
  static constexpr int kPitch = HIDDEN * 2 + kPad;
  static constexpr int kMostSlots = ROWS * TOP < E ? ROWS * TOP : E;
  static_assert(ROWS <= kMostRows && TOP < 32, "a word of rows, a lane an expert");

  struct Shared {
    alignas(16) unsigned char h[ROWS * kPitch];
    float partials[kTeams][2][kTeamWarps * kPartial];
    Slot slots[kMostSlots];
    unsigned sets[E];
    int first[E], chosen[ROWS * TOP], pairs[ROWS * TOP], distinct;
    float weights[ROWS * (TOP + 1)];
  };

  Shared& s;
  int rows;

  // One warp: h of one row.
  __device__ __forceinline__ void stage(const T* x, const T* norm_weight, float eps, int row) {
    const int lane = threadIdx.x & 31;
    const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<size_t>(row) * HIDDEN);
    float square = 0.0f;
#pragma unroll 4
    for (int v = lane; v < HIDDEN / 8; v += 32) {
      const uint4 r = from[v];
      const unsigned words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = S::lo(words[i]), b = S::hi(words[i]);
        square = __fmaf_rn(b, b, __fmaf_rn(a, a, square));
      }
    }
    const float scale = rsqrtf(warp_sum(square) / HIDDEN + eps);
    uint4* to = reinterpret_cast<uint4*>(s.h + row * kPitch);
#pragma unroll 2
    for (int v = lane; v < HIDDEN / 8; v += 32) {
      const uint4 r = from[v], n = reinterpret_cast<const uint4*>(norm_weight)[v];
      const unsigned words[4] = {r.x, r.y, r.z, r.w}, gains[4] = {n.x, n.y, n.z, n.w};
      unsigned out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        out[i] = S::pack(S::lo(words[i]) * scale * S::lo(gains[i]), S::hi(words[i]) * scale * S::hi(gains[i]));
      to[v] = make_uint4(out[0], out[1], out[2], out[3]);
    }
  }

  __device__ __forceinline__ void route(const T* x, const T* norm_weight, const float* logits, float eps) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int e = threadIdx.x; e < E; e += kEnterThreads) s.sets[e] = 0;
    __syncthreads();
#pragma unroll 1
    for (int task = warp; task < 2 * rows; task += kEnterThreads / 32) {
      const int row = task < rows ? task : task - rows;
      if (task < rows) {
        stage(x, norm_weight, eps, row);
      } else {
        choose<E, TOP, NORMALISED>(logits + row * (E + 1), s.chosen + row * TOP, s.weights + row * (TOP + 1));
        __syncwarp();
        if (lane < TOP) atomicOr(&s.sets[s.chosen[row * TOP + lane]], 1u << row);
      }
    }
    __syncthreads();
    if (warp == 0) {
      const int distinct = list_experts<E>(s.sets, s.first, s.slots, min(rows * TOP, E));
      if (lane == 0) s.distinct = distinct;
    }
    __syncthreads();
    for (int pair = threadIdx.x; pair < rows * TOP; pair += kEnterThreads) {
      const int expert = s.chosen[pair], row = pair / TOP;
      s.pairs[s.first[expert] + __popc(s.sets[expert] & ((1u << row) - 1))] = pair;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void publish(Slot* slots, int* pairs, float* weights) const {
    for (int i = threadIdx.x; i < min(rows * TOP, E); i += kEnterThreads) slots[i] = s.slots[i];
    for (int i = threadIdx.x; i < rows * TOP; i += kEnterThreads) pairs[i] = s.pairs[i];
    for (int i = threadIdx.x; i < rows * (TOP + 1); i += kEnterThreads) weights[i] = s.weights[i];
  }

  // One team: 8 features of up to 8 rows. `row` is that of the lane's column, or less than 0; the result of column c
  // goes to line(c) of `to`, where that is not less than 0.
  template <int B, int G, typename Line>
  __device__ __forceinline__ void tile(const Matrix& gate, const Matrix& up, size_t feature, int row, int& buffer,
                                       Line line, T* to, int width, int first) {
    using C = Chunk<T, B, G>;
    const int team = threadIdx.x / (kTeamWarps * 32), t = threadIdx.x % (kTeamWarps * 32), warp = t >> 5;
    const int lane = t & 31, g = lane >> 2, q = lane & 3;
    const T* column = row < 0 ? nullptr : reinterpret_cast<const T*>(s.h + row * kPitch);
    float out[4] = {};
    for (int chunk = warp; chunk < HIDDEN / C::L::kChunk; chunk += kTeamWarps) {
      C c;
      c.load_row(0, gate, feature + g, HIDDEN, chunk);
      c.load_row(1, up, feature + g, HIDDEN, chunk);
      c.multiply(column == nullptr ? nullptr : column + chunk * C::L::kChunk, out);
    }
    float* partials = s.partials[team][buffer];
    buffer ^= 1;
    float* mine = partials + warp * kPartial;
    *reinterpret_cast<float2*>(mine + g * 8 + 2 * q) = make_float2(out[0], out[1]);
    *reinterpret_cast<float2*>(mine + (g + 8) * 8 + 2 * q) = make_float2(out[2], out[3]);
    // One barrier a tile: the other buffer is free once every warp has come past this one.
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTeamWarps * 32) : "memory");
    // Of the four threads of a result two have the gate and two the up projection, each pair half of the warps.
    const int result = t >> 2, part = t & 3;
    const float* from = partials + (part & 1) * (kTeamWarps / 2) * kPartial + (part >> 1) * 64 + result;
    float sum = __fadd_rn(__fadd_rn(from[0], from[kPartial]), __fadd_rn(from[2 * kPartial], from[3 * kPartial]));
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    const float other = __shfl_xor_sync(0xffffffffu, sum, 2);
    const int at = line(result & 7);
    if (part == 0 && at >= 0) to[static_cast<size_t>(at) * width + first + (result >> 3)] = static_cast<T>(silu(sum) * other);
  }

  __device__ __forceinline__ void run(const Matrix& gate, const Matrix& up, const Matrix& shared_gate,
                                      const Matrix& shared_up, T* activated, T* shared) {
    constexpr int kSharedTiles = SHARED / kEnterFeatures, kTiles = WIDTH / kEnterFeatures;
    const int total = kSharedTiles + s.distinct * kTiles, g = (threadIdx.x & 31) >> 2;
    int buffer = 0;
    for (int t = threadIdx.x / (kTeamWarps * 32) * gridDim.x + blockIdx.x; t < total; t += kTeams * gridDim.x) {
      if (t < kSharedTiles) {
        for (int row = 0; row < rows; row += kTokens) {
          const auto line = [&](int column) { return row + column < rows ? row + column : -1; };
          tile<SHARED_BITS, SHARED_GROUP>(shared_gate, shared_up, t * kEnterFeatures, line(g), buffer, line, shared,
                                          SHARED, t * kEnterFeatures);
        }
      } else {
        const Slot slot = s.slots[(t - kSharedTiles) / kTiles];
        const int first = (t - kSharedTiles) % kTiles * kEnterFeatures;
        for (int row = 0; row < slot.count; row += kTokens) {
          const auto line = [&](int column) {
            return row + column < slot.count ? s.pairs[slot.start + row + column] : -1;
          };
          const int pair = line(g);
          tile<BITS, GROUP>(gate, up, static_cast<size_t>(slot.expert) * WIDTH + first, pair < 0 ? -1 : pair / TOP,
                            buffer, line, activated, WIDTH, first);
        }
      }
    }
  }
};

// ---- the second launch: experts' down projections, their weighted sum, the shared expert and the residual

template <typename T, int BITS, int GROUP, int SHARED_BITS, int SHARED_GROUP, int E, int TOP, int HIDDEN, int WIDTH,
          int SHARED, int ROWS>
struct Leave {
  // Each pair's and then each row's own 16 features: what its expert, and the shared one, made of it.
  struct Shared {
    float made[ROWS * (TOP + 1)][kLeaveFeatures];
  };

  Shared& s;
  int rows;

  // One warp: 16 features of up to 8 columns; `line` is where the lane's column comes from and goes to, or less than 0.
  template <int B, int G>
  __device__ __forceinline__ void tile(const Matrix& down, size_t feature, int line, const T* from, int width,
                                       int first) {
    using C = Chunk<T, B, G>;
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, chunks = width / C::L::kChunk;
    const T* column = line < 0 ? nullptr : from + static_cast<size_t>(line) * width;
    float out[4] = {};
#pragma unroll 2
    for (int chunk = 0; chunk < chunks; ++chunk) {
      C c;
      c.load_row(0, down, feature + g, width, chunk);
      c.load_row(1, down, feature + g + 8, width, chunk);
      c.multiply(column == nullptr ? nullptr : column + chunk * C::L::kChunk, out);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int to = __shfl_sync(0xffffffffu, line, (2 * q + i) * 4);
      if (to >= 0) s.made[first + to][g] = out[i], s.made[first + to][g + 8] = out[2 + i];
    }
  }

  __device__ __forceinline__ void run(const T* x, const T* activated, const T* shared, const Slot* slots,
                                      const int* pairs, const float* weights, const Matrix& down,
                                      const Matrix& shared_down, T* y) {
    const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, feature = blockIdx.x * kLeaveFeatures;
    const int size = min(rows * TOP, E);
    for (int task = warp; task <= size; task += kLeaveWarps) {
      if (task == 0) {
        for (int row = 0; row < rows; row += kTokens)
          tile<SHARED_BITS, SHARED_GROUP>(shared_down, feature, row + g < rows ? row + g : -1, shared, SHARED,
                                          rows * TOP);
      } else {
        const Slot slot = slots[task - 1];
        if (slot.count == 0) break;
        for (int row = 0; row < slot.count; row += kTokens)
          tile<BITS, GROUP>(down, static_cast<size_t>(slot.expert) * HIDDEN + feature,
                            row + g < slot.count ? pairs[slot.start + row + g] : -1, activated, WIDTH, 0);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * kLeaveFeatures; i += kLeaveThreads) {
      const int row = i / kLeaveFeatures, f = i % kLeaveFeatures;
      const size_t at = static_cast<size_t>(row) * HIDDEN + feature + f;
      float sum = 0.0f;
#pragma unroll
      for (int slot = 0; slot < TOP; ++slot)
        sum = __fmaf_rn(weights[row * (TOP + 1) + slot], s.made[row * TOP + slot][f], sum);
      sum = __fmaf_rn(weights[row * (TOP + 1) + TOP], s.made[rows * TOP + row][f], sum);
      y[at] = static_cast<T>(static_cast<float>(x[at]) + sum);
    }
  }
};

}  // namespace experts
