// y[m, n] = sum_k x[m, k] * W[n, k] for at most 8 rows of x, W affine-quantised (4 or 8 bits) or dense.
//
// The tensor core computes W_tile (16 output features) x tokens (8 wide): every token is its own MMA column, so a
// token's result cannot depend on how many tokens share the pass. A block owns one 16-feature tile at a time. Two warps
// feed it: the copy engine brings a tile's rows slab by slab into a ring that runs ahead across tiles, so memory stays
// busy during reductions and no other warp spends instructions on copies. Sixteen warps split a slab by units, unit u
// to warp u % 16; their partial sums meet in shared memory in a fixed order. The activations are staged once per block
// in MMA fragment order. A long K is summed in parts that depend on K alone; where the activations of the whole of it
// do not fit, a block takes a few tiles through one part after the other. Which block computes a tile does not change
// its bits, so blocks may take tiles from a counter: multiprocessors do not get equal shares of the memory's rate.
// Loops that run seldom are kept rolled: a launch begins with a cold instruction cache, and every line of it counts.
namespace few_row {

constexpr int kCopyWarps = 2;
constexpr int kAllThreads = kThreads + kCopyWarps * 32;
constexpr int kOutputs = kTileRows * kTokens;
constexpr int kPartial = kOutputs + 2;                     // floats of one warp's partial tile; + 2 spreads the banks
constexpr int kKeep = 4;                                   // tiles that go through the parts of K together

// By the copy engine: 16-byte aligned, a multiple of 16 bytes.
__device__ __forceinline__ void copy_bulk(unsigned dst, const void* src, unsigned bytes, unsigned barrier,
                                          unsigned long long policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          dst), "l"(src), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// A stage: UNITS units for each warp, 16 rows of weights, of scales and of biases. Pitches spread rows over the banks.
template <int BITS, int GROUP, int UNITS>
struct Stage {
  using L = Layout<BITS, GROUP>;
  static constexpr int kUnits = UNITS * kWarps;
  static constexpr int kSlabBytes = kUnits * L::kUnitBytes;           // of a row
  static constexpr int kPitch = kSlabBytes + L::kUnitBytes;
  static constexpr int kScaleBytes = BITS == 16 ? 0 : kUnits * L::kUnit / GROUP * 2;
  static constexpr int kScalePitch = kScaleBytes + 16;
  static constexpr int kBytes = kTileRows * (kPitch + (BITS == 16 ? 0 : 2 * kScalePitch));
};

// Stages rows of x (times the norm weight) as fragments, with their sums per fold and of squares. One item is 256
// values of one row, handled by one warp whatever the number of rows. A warp loads several items before it uses the
// first.
template <typename T, int BITS, int GROUP, bool NORM>
struct Activations {
  static constexpr int kBatch = NORM ? 5 : 8;
  const uint4 *x, *norm_weight;
  int rows, stride, start, vectors, per_row, items;
  uint4 loaded[kBatch], gains[NORM ? kBatch : 1];

  // Vectors [start, start + vectors) of 8 values of each row.
  __device__ __forceinline__ Activations(const T* x, const T* norm_weight, int rows, int K, int start, int vectors)
      : x(reinterpret_cast<const uint4*>(x) + start), norm_weight(reinterpret_cast<const uint4*>(norm_weight) + start),
        rows(rows), stride(K / 8), start(start), vectors(vectors), per_row((vectors + 31) / 32),
        items(rows * ((vectors + 31) / 32)) {}

  __device__ __forceinline__ void load(int first) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int item = first + j * kWarps, m = item / per_row, v = (item - m * per_row) * 32 + lane;
      const bool live = item < items && v < vectors;
      loaded[j] = live ? x[static_cast<size_t>(m) * stride + v] : make_uint4(0, 0, 0, 0);
      if constexpr (NORM) gains[j] = live ? norm_weight[v] : make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void store(int first, uint4* fragments, float* fold_sums, float* squares) const {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int item = first + j * kWarps, m = item / per_row, v = (item - m * per_row) * 32 + lane;
      if (item >= items) break;
      stage_vector<T, BITS, GROUP, NORM>(loaded[j], gains[NORM ? j : 0], v, vectors, m, rows, kTokens, fragments,
                                         fold_sums, [&](float square) {
                                           squares[m * ((stride + 31) / 32) + (start + v) / 32] = square;
                                         });
    }
  }
};

// Folds a unit's products into the lane's outputs with the scales of its two rows, which lie at `scales`.
template <typename T, int BITS, int PITCH>
__device__ __forceinline__ void fold_rows(const unsigned char* scales, const float (&acc)[4], float2 sum,
                                          float (&out)[4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const unsigned char* at = scales + 8 * r * PITCH;
    fold(affine<T, BITS>(at, at + kTileRows * PITCH), r, acc, sum, out);
  }
}

// Adds one unit of a stage to the lane's outputs: rows g, g + 8 and tokens 2q, 2q + 1. `unit` counts within the slab,
// `fragments` and `fold_sums` begin at the slab.
template <typename T, int BITS, int GROUP, int UNITS>
__device__ __forceinline__ void multiply_unit(const unsigned char* stage, const uint4* fragments,
                                              const float* fold_sums, int unit, int rows, int lane, float (&out)[4]) {
  using S = Scalar<T>;
  using L = Layout<BITS, GROUP>;
  using R = Stage<BITS, GROUP, UNITS>;
  const int g = lane >> 2, q = lane & 3;
  const unsigned char* w0 = stage + g * R::kPitch + unit * L::kUnitBytes;
  const unsigned char* w1 = w0 + 8 * R::kPitch;
  const bool live = g < rows;
  const uint4 none = make_uint4(0, 0, 0, 0);
  const uint4* column = fragments + (unit * (L::kUnit / 32) * rows + g) * 4 + q;  // 4 vectors of 8 values of k a step

  if constexpr (BITS == 16) {
    const uint4 f = live ? *column : none;
    const uint4 u0 = *reinterpret_cast<const uint4*>(w0 + q * 16), u1 = *reinterpret_cast<const uint4*>(w1 + q * 16);
    const unsigned lo[4] = {u0.x, u1.x, u0.y, u1.y}, hi[4] = {u0.z, u1.z, u0.w, u1.w};
    S::mma(out, lo, f.x, f.y);
    S::mma(out, hi, f.z, f.w);
  } else {
    const float2* sums = reinterpret_cast<const float2*>(fold_sums + unit * L::kFolds * kTokens) + q;
    const unsigned char* scales =
        stage + kTileRows * R::kPitch + g * R::kScalePitch + unit * L::kUnit / GROUP * 2;
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if constexpr (BITS == 8) {
      const uint4 f = live ? *column : none;
      const uint2 u0 = *reinterpret_cast<const uint2*>(w0 + q * 8), u1 = *reinterpret_cast<const uint2*>(w1 + q * 8);
      multiply_word<T, 8>(u0.x, u1.x, f.x, f.y, 0, 0, acc);
      multiply_word<T, 8>(u0.y, u1.y, f.z, f.w, 0, 0, acc);
      fold_rows<T, 8, R::kScalePitch>(scales, acc, *sums, out);
    } else if constexpr (GROUP == 32) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 f = live ? column[i * rows * 4] : none;
        const unsigned u0 = *reinterpret_cast<const unsigned*>(w0 + i * 16 + q * 4);
        const unsigned u1 = *reinterpret_cast<const unsigned*>(w1 + i * 16 + q * 4);
        acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
        multiply_word<T, 4>(u0, u1, f.x, f.y, f.z, f.w, acc);
        fold_rows<T, 4, R::kScalePitch>(scales + 2 * i, acc, sums[i * kTokens / 2], out);
      }
    } else {
      const uint4 f0 = live ? column[0] : none, f1 = live ? column[rows * 4] : none;
      const uint2 u0 = *reinterpret_cast<const uint2*>(w0 + q * 8), u1 = *reinterpret_cast<const uint2*>(w1 + q * 8);
      multiply_word<T, 4>(u0.x, u1.x, f0.x, f0.y, f0.z, f0.w, acc);
      multiply_word<T, 4>(u0.y, u1.y, f1.x, f1.y, f1.z, f1.w, acc);
      fold_rows<T, 4, R::kScalePitch>(scales, acc, *sums, out);
    }
  }
}

// The ring: `full` and `empty` barriers of each stage, then the stages.
template <int BITS, int GROUP, int UNITS, int STAGES>
struct Ring {
  using R = Stage<BITS, GROUP, UNITS>;
  static constexpr int kHead = 256;  // barriers, a label for each stage, tiles that go together, the next tile
  static constexpr int kBytes = kHead + STAGES * R::kBytes;
  static_assert(STAGES <= 8 && kKeep <= 8, "they fit the head");
  unsigned char* base;
  int slot = 0, parity = 0;

  __device__ __forceinline__ explicit Ring(unsigned char* base) : base(base) {}
  __device__ __forceinline__ unsigned full() const { return shared_address(base) + slot * 16; }
  __device__ __forceinline__ unsigned empty() const { return full() + 8; }
  __device__ __forceinline__ unsigned char* stage() const { return base + kHead + slot * R::kBytes; }
  __device__ __forceinline__ void wait_full() const { barrier_wait(full(), parity); }
  __device__ __forceinline__ void wait_empty() const { barrier_wait(empty(), parity ^ 1); }
  __device__ __forceinline__ int& label() const { return reinterpret_cast<int*>(base + 128)[slot]; }
  __device__ __forceinline__ int& kept(int n) const { return reinterpret_cast<int*>(base + 160)[n]; }
  __device__ __forceinline__ int& claim(int which) const { return reinterpret_cast<int*>(base + 192)[which]; }
  __device__ __forceinline__ void advance() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  // Each copying warp arrives at `full` once for the copy engine's bytes and with every lane for its small copies.
  __device__ __forceinline__ void init() {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared_address(base) + i * 16, kCopyWarps * (BITS == 16 ? 1 : 33));
      barrier_init(shared_address(base) + i * 16 + 8, kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // A copying warp's share of a slab: `bytes` from `at` on of the 16 rows from `row` on. SCALE is the widest copy that
  // the alignment of rows of scales allows.
  template <int SCALE>
  __device__ __forceinline__ void fetch(const Matrix& matrix, int label, int row, int at, int bytes, int row_bytes,
                                        unsigned long long policy) {
    constexpr int kRows = kTileRows / kCopyWarps;
    const int lane = threadIdx.x & 31, t = threadIdx.x - kThreads;
    const int last = matrix.n - 1;  // rows past the end repeat the last, and are dropped
    const unsigned dst = shared_address(stage()), barrier = full();
    wait_empty();
    if (t == 0) this->label() = label;
    if (lane == 0) barrier_expect(barrier, kRows * bytes);
    __syncwarp();
    if (lane < kRows) {
      const int r = t / 32 * kRows + lane;
      const unsigned char* source = matrix.w + static_cast<size_t>(min(row + r, last)) * row_bytes + at;
      copy_bulk(dst + r * R::kPitch, source, bytes, barrier, policy);
    }
    if constexpr (BITS != 16) {
      constexpr int kParts = R::kScaleBytes / SCALE, kRatio = BITS * GROUP / 16;  // weight bytes to a byte of scales
      const int stride = row_bytes / kRatio, start = at / kRatio, end = bytes / kRatio;
#pragma unroll 1
      for (int i = t; i < 2 * kTileRows * kParts; i += kCopyWarps * 32) {
        const int line = i / kParts, part = i % kParts * SCALE;
        const unsigned char* source = (line < kTileRows ? matrix.s : matrix.b) + start + part;
        if (part < end)
          copy_small<SCALE>(dst + kTileRows * R::kPitch + line * R::kScalePitch + part,
                            source + static_cast<size_t>(min(row + line % kTileRows, last)) * stride, policy);
      }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
    }
    advance();
  }

  // A stage without bytes that says that there are no more tiles.
  __device__ __forceinline__ void finish(int label) {
    wait_empty();
    if (threadIdx.x == kThreads) this->label() = label;
    if constexpr (BITS != 16) barrier_arrive(full());
    if ((threadIdx.x & 31) == 0) barrier_arrive(full());
  }
};

// The whole launch, its state in one place. `matrices` is filled by the caller; for kSwiGLU it holds the gate and the
// up projection. K is summed in PARTS; RESIDENT when all of its activations are staged at once.
template <typename T, typename OutT, int BITS, int GROUP, int COUNT, int PARTS, bool RESIDENT, int UNITS,
          int STAGES, bool NORM, int EPILOGUE, int SCALE>
struct Launch {
  using L = Layout<BITS, GROUP>;
  using R = Stage<BITS, GROUP, UNITS>;
  static constexpr int kPerTile = EPILOGUE == kSwiGLU ? 2 : 1;
  static constexpr int kStagings = RESIDENT ? 1 : PARTS, kTogether = PARTS / kStagings;  // parts staged at once
  const T *x, *norm_weight, *residual;
  const Matrix (&matrices)[COUNT];
  OutT* y;
  int rows, K;
  float eps;
  int row_bytes, part_units, total = 0, ldy = 0;
  Ring<BITS, GROUP, UNITS, STAGES> ring;
  float *reduce, *kept, *squares, *scale, *fold_sums;
  uint4* fragments;

  __device__ __forceinline__ Launch(const T* x, const T* norm_weight, const T* residual,
                                    const Matrix (&matrices)[COUNT], OutT* y, int rows, int K, float eps,
                                    unsigned char* smem)
      : x(x), norm_weight(norm_weight), residual(residual), matrices(matrices), y(y), rows(rows), K(K), eps(eps),
        row_bytes(K * BITS / 8), ring(smem) {
    const int units = row_bytes / L::kUnitBytes;
    part_units = (units + PARTS * kWarps - 1) / (PARTS * kWarps) * kWarps;
    reduce = reinterpret_cast<float*>(smem + ring.kBytes);  // two buffers
    kept = reduce + 2 * kWarps * kPerTile * kPartial;
    squares = kept + (kStagings > 1 ? kKeep * kPerTile * kOutputs : 0);
    scale = squares + (NORM ? kTokens * square_count() : 0);
    fold_sums = scale + kTokens;
    fragments = reinterpret_cast<uint4*>(fold_sums + (BITS == 16 ? 0 : kTogether * part_units * L::kFolds * kTokens));
#pragma unroll
    for (int i = 0; i < (EPILOGUE == kSwiGLU ? 1 : COUNT); ++i) {
      total += (matrices[i].n + kTileRows - 1) / kTileRows;
      ldy += matrices[i].n;
    }
  }

  __device__ __forceinline__ int square_count() const { return (K / 8 + 31) / 32; }
  __device__ __forceinline__ int part_start(int part) const { return part * part_units * L::kUnitBytes; }
  __device__ __forceinline__ int part_bytes(int part) const {
    return min(part_units * L::kUnitBytes, row_bytes - part_start(part));
  }

  // ---- the copying warps; a stage's label is 4 * tile + flags

  static constexpr int kLater = 2, kLast = 1;  // for the second staging or a later one; no tile follows those before

  __device__ __forceinline__ void copy_tile(int tile, int part, bool last, unsigned long long policy) {
    Matrix matrix;
    int row, first;
    locate<EPILOGUE>(matrices, tile, matrix, row, first);
    const int end = part_start(part) + part_bytes(part);
    const int label = tile * 4 + (part >= kTogether ? kLater : 0) + (last ? kLast : 0);
    for (int at = part_start(part); at < end; at += R::kSlabBytes) {
      ring.template fetch<SCALE>(matrix, label, row, at, min(R::kSlabBytes, end - at), row_bytes, policy);
      if constexpr (EPILOGUE == kSwiGLU)
        ring.template fetch<SCALE>(matrices[1], label, row, at, min(R::kSlabBytes, end - at), row_bytes, policy);
    }
  }

  // The first tile is the block's number; later ones come from `work`, a counter that starts at zero, or by stride. A
  // claim is made before the copies of the tile that comes before, behind which its latency hides.
  __device__ __forceinline__ void copy_all(unsigned* work) {
    const bool first_thread = threadIdx.x == kThreads;
    const unsigned long long policy = passing_through();
    int tile = blockIdx.x, count = 0;
    for (int claims = 0; tile < total; claims ^= 1) {
      int next = tile + gridDim.x;
      if (work != nullptr && first_thread) next = gridDim.x + atomicAdd(work, 1u);
#pragma unroll 1
      for (int part = 0; part < kTogether; ++part) copy_tile(tile, part, false, policy);
      if (kStagings > 1 && first_thread) ring.kept(count) = tile;
      if (work != nullptr && first_thread) ring.claim(claims) = next;
      if (work != nullptr || kStagings > 1) asm volatile("bar.sync 3, %0;" ::"n"(kCopyWarps * 32) : "memory");
      tile = work != nullptr ? ring.claim(claims) : next;
      if (kStagings > 1 && (++count == kKeep || tile >= total)) {
        for (int part = 1; part < PARTS; ++part) {
#pragma unroll 1
          for (int i = 0; i < count; ++i) copy_tile(ring.kept(i), part, tile >= total, policy);
        }
        count = 0;
      }
    }
    ring.finish(total * 4);
  }

  // ---- the multiplying warps

  static __device__ __forceinline__ void meet() { asm volatile("bar.sync 2, %0;" ::"n"(kThreads) : "memory"); }

  __device__ __forceinline__ void stage(int part) {
    constexpr int kVectorBytes = BITS;  // of a row of weights: what 8 activations meet
    if constexpr (kStagings > 1) meet();  // the part before may still be read
    const int bytes = RESIDENT ? row_bytes : part_bytes(part);
    Activations<T, BITS, GROUP, NORM> activations(x, norm_weight, rows, K, part_start(part) / kVectorBytes,
                                                  bytes / kVectorBytes);
    for (int first = threadIdx.x >> 5; first < activations.items; first += activations.kBatch * kWarps) {
      activations.load(first);
      activations.store(first, fragments, fold_sums, squares);
    }
    meet();
    if (NORM && part == kStagings - 1) {
      if (threadIdx.x < rows)
        scale[threadIdx.x] = norm_scale(squares + threadIdx.x * square_count(), square_count(), K, eps);
      meet();
    }
  }

  // One part of one tile: `sum` of output threadIdx.x / 4, alike in four neighbouring threads.
  __device__ __forceinline__ void multiply_tile(int part, int buffer, float (&sum)[kPerTile]) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float out[kPerTile][4] = {};
    int done = RESIDENT ? part * part_units : 0;
    for (int left = part_bytes(part) / L::kUnitBytes; left > 0; left -= R::kUnits, done += R::kUnits) {
      const uint4* slab_fragments = fragments + static_cast<size_t>(done) * (L::kUnit / 8) * rows;
      const float* slab_sums = fold_sums + done * L::kFolds * kTokens;
#pragma unroll
      for (int i = 0; i < kPerTile; ++i) {
        auto multiply = [&](int unit) {
          multiply_unit<T, BITS, GROUP, UNITS>(ring.stage(), slab_fragments, slab_sums, unit, rows, lane, out[i]);
        };
        ring.wait_full();
        if (left >= R::kUnits) {
#pragma unroll
          for (int step = 0; step < UNITS; ++step) multiply(step * kWarps + warp);
        } else {
#pragma unroll 1
          for (int unit = warp; unit < left; unit += kWarps) multiply(unit);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(ring.empty());
        ring.advance();
      }
    }
    float* partials = reduce + buffer * (kWarps * kPerTile * kPartial);
    const int g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int i = 0; i < kPerTile; ++i) {
      float* mine = partials + (i * kWarps + warp) * kPartial;
      *reinterpret_cast<float2*>(mine + g * 8 + 2 * q) = make_float2(out[i][0], out[i][1]);
      *reinterpret_cast<float2*>(mine + (g + 8) * 8 + 2 * q) = make_float2(out[i][2], out[i][3]);
    }
    meet();  // one barrier a tile: the other buffer is free once every warp has come past this one
#pragma unroll
    for (int i = 0; i < kPerTile; ++i) {  // each of the four threads has four warps' partial sums
      const float* part_sum = partials + (i * kWarps + (threadIdx.x & 3) * 4) * kPartial + (threadIdx.x >> 2);
      sum[i] = __fadd_rn(__fadd_rn(part_sum[0], part_sum[kPartial]),
                         __fadd_rn(part_sum[2 * kPartial], part_sum[3 * kPartial]));
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
    }
  }

  __device__ __forceinline__ void write(int tile, float (&sum)[kPerTile]) {
    const int output = threadIdx.x >> 2, token = output & 7, feature = output >> 3;
    Matrix matrix;
    int row, first;
    locate<EPILOGUE>(matrices, tile, matrix, row, first);
    if ((threadIdx.x & 3) != 0 || token >= rows || row + feature >= matrix.n) return;
    if constexpr (NORM) {
#pragma unroll
      for (int i = 0; i < kPerTile; ++i) sum[i] = __fmul_rn(sum[i], scale[token]);
    }
    const size_t at = static_cast<size_t>(token) * ldy + first + row + feature;
    write_output<EPILOGUE>(y, residual, at, sum[0], sum[kPerTile - 1]);
  }

  // A tile's sum over the parts that came before, by the threads that write it.
  __device__ __forceinline__ void add_kept(int n, float (&sum)[kPerTile], bool first) {
    if ((threadIdx.x & 3) != 0) return;
#pragma unroll
    for (int i = 0; i < kPerTile; ++i) {
      float& before = kept[(n * kPerTile + i) * kOutputs + (threadIdx.x >> 2)];
      if (!first) sum[i] = __fadd_rn(before, sum[i]);
      before = sum[i];
    }
  }

  __device__ __forceinline__ void multiply_all() {
    bool more = true;
    int buffer = 0, count = kKeep;  // tiles that go through the parts together
    for (int part = 0; more; part = part + 1 == kStagings ? 0 : part + 1) {
      stage(part);
      if (part == 0) count = kKeep;
      for (int n = 0; kStagings == 1 || n < count; ++n) {
        ring.wait_full();
        const int label = ring.label();
        if (part == 0) {
          more = label / 4 < total;
          if (!more || (label & kLater)) {
            count = n;
            break;
          }
        }
        float sum[kPerTile];
        multiply_tile(part, buffer, sum), buffer ^= 1;
#pragma unroll
        for (int second = 1; second < kTogether; ++second) {
          float next[kPerTile];
          multiply_tile(second, buffer, next), buffer ^= 1;
#pragma unroll
          for (int i = 0; i < kPerTile; ++i) sum[i] = __fadd_rn(sum[i], next[i]);
        }
        if constexpr (kStagings > 1) {
          add_kept(n, sum, part == 0);
          if (part < kStagings - 1) continue;
          more = !(label & kLast);
        }
        write(label / 4, sum);
      }
    }
  }

  __device__ __forceinline__ void run(unsigned* work) {
    if (threadIdx.x == kThreads) ring.init();
    if (threadIdx.x >= kThreads) {
      asm volatile("bar.sync 3, %0;" ::"n"(kCopyWarps * 32) : "memory");
      asm volatile("bar.arrive 1, %0;" ::"n"(kAllThreads) : "memory");
      copy_all(work);
    } else {
      asm volatile("bar.sync 1, %0;" ::"n"(kAllThreads) : "memory");
      multiply_all();
    }
  }
};

}  // namespace few_row
