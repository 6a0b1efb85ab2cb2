// The product of kernel.cu for 9 to 32 rows: weights are read and unpacked once, and every row has the same bits.
//
// A row of x is again a column of the tensor core, and a unit of weights meets COLUMNS groups of 8 columns. Activations
// of so many rows do not fit into a block's shared memory, so blocks share out K: a share is one part of K and CLASSES
// neighbouring accumulators of the 16 (unit u of a part goes to accumulator u % 16), and a block has the activations of
// its share for good. A warp owns one accumulator, for 32 features; the accumulators of a share meet in shared memory in
// the order of kernel.cu's tree, of which a share is a whole branch. Branches meet in global memory: a block leaves its
// own there and counts up the tile's arrivals, and the block that comes last joins all of them in their fixed order.
// Nobody ever waits for another block. The count is known only after a trip to the second-level cache, so one warp does
// nothing else, and a tile is joined after the next has been multiplied. Copies come by other warps, too, which pass
// their registers on to those that multiply.
namespace few_row {

constexpr int kFeeders = 3;                                // warps that copy: two the weights, one their scales
constexpr int kHelpers = 4;                                // those, and the one that counts arrivals
constexpr int kPair = 2;                                   // tiles of 16 features for each fragment of activations
constexpr int kPiece = kTileRows * kTokens;                // outputs of one MMA tile

// From here on each thread of the warps that call together, four and four, has so many registers.
template <int COUNT, bool MORE>
__device__ __forceinline__ void give_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // else all keep what they have
  if constexpr (MORE) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
  else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// A fold's weights of 16 features, two fragments for every 32 values of k. The lane's bytes of row g lie at `w`, those of
// row g + 8 `pitch` on.
template <typename T, int BITS, int HALVES>
__device__ __forceinline__ void load_fragments(const unsigned char* w, int pitch, unsigned (&a)[HALVES][2][4]) {
  using tensor_core::unpack_word;
  if constexpr (BITS == 16) {
    const uint4 u0 = *reinterpret_cast<const uint4*>(w), u1 = *reinterpret_cast<const uint4*>(w + pitch);
    const unsigned lo[4] = {u0.x, u1.x, u0.y, u1.y}, hi[4] = {u0.z, u1.z, u0.w, u1.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) a[0][0][i] = lo[i], a[0][1][i] = hi[i];
  } else if constexpr (BITS == 4 && HALVES == 1) {
    unpack_word<T, 4>(*reinterpret_cast<const unsigned*>(w), *reinterpret_cast<const unsigned*>(w + pitch), a[0]);
  } else {
    const uint2 u0 = *reinterpret_cast<const uint2*>(w), u1 = *reinterpret_cast<const uint2*>(w + pitch);
    unpack_word<T, BITS>(u0.x, u1.x, a[0]);
    unpack_word<T, BITS>(u0.y, u1.y, BITS == 8 ? a[0] + 1 : a[HALVES - 1]);
  }
}

// The whole launch, its state in one place; see kernel.cu's Launch.
template <typename T, typename OutT, int BITS, int GROUP, int COUNT, int PARTS, int CLASSES, int COLUMNS, int JOINED,
          int STAGES, bool NORM, int EPILOGUE, int SCALE>
struct WideLaunch {
  using L = Layout<BITS, GROUP>;
  static constexpr int kTeams = kWarps / CLASSES;          // of warps, each with 32 features; also shares of a part
  static constexpr int kShares = PARTS * kTeams;
  static constexpr int kRows = COLUMNS * kTokens;
  static constexpr int kQuads = CLASSES / 4;
  static constexpr int kFeatures = kTeams * kPair * kTileRows;
  static constexpr int kTileOutputs = kFeatures * kRows;
  static constexpr int kTilesOf16 = EPILOGUE == kSwiGLU ? kTeams : kTeams * kPair;  // of the output, in a tile
  // A stage: one unit for each accumulator, of all features of a tile, then their scales, then their biases.
  static constexpr int kRowBytes = CLASSES * L::kUnitBytes;
  static constexpr int kScaleBytes = BITS == 16 ? 0 : CLASSES * L::kUnit / GROUP * 2;
  static constexpr int kStageBytes = kFeatures * (kRowBytes + 2 * kScaleBytes);
  static constexpr int kHead = 256;  // barriers, a label for each stage, claims, what a block knows of a tile
  // Of the 65,536 there are, once the launch has given all threads as many as 640 of them can have.
  static constexpr int kHelperRegisters = 48, kRegisters = 104;
  static_assert(STAGES <= 6, "they fit the head");
  const T *x, *norm_weight, *residual;
  const Matrix (&matrices)[COUNT];
  OutT* y;
  int rows, K;
  float eps;
  unsigned char* base;
  int row_bytes, first_unit, end_unit, rounds, tiles = 0, ldy = 0;
  int slot = 0, parity = 0;
  unsigned* work = nullptr;   // zeros: tiles claimed by each share's blocks, then arrivals at each tile
  float* branches = nullptr;  // of all shares, in global memory
  float *partials, *scale, *fold_sums, *squares;
  uint4* fragments;

  __device__ __forceinline__ WideLaunch(const T* x, const T* norm_weight, const T* residual,
                                        const Matrix (&matrices)[COUNT], OutT* y, int rows, int K, float eps,
                                        unsigned char* smem)
      : x(x), norm_weight(norm_weight), residual(residual), matrices(matrices), y(y), rows(rows), K(K), eps(eps),
        base(smem), row_bytes(K * BITS / 8) {
    const int units = row_bytes / L::kUnitBytes;
    const int part_units = (units + PARTS * kWarps - 1) / (PARTS * kWarps) * kWarps;
    const int part = share() / kTeams, begin = part * part_units;
    end_unit = min(begin + part_units, units);
    rounds = (end_unit - begin + kWarps - 1) / kWarps;
    first_unit = begin + share() % kTeams * CLASSES;
#pragma unroll
    for (int i = 0; i < (EPILOGUE == kSwiGLU ? 1 : COUNT); ++i) {
      tiles += (matrices[i].n + kTileRows - 1) / kTileRows;
      ldy += matrices[i].n;
    }
    tiles = (tiles + kTilesOf16 - 1) / kTilesOf16;
    partials = reinterpret_cast<float*>(smem + kHead + STAGES * kStageBytes);  // two buffers
    scale = partials + 2 * kWarps * JOINED * kPiece;
    fold_sums = scale + kRows;
    fragments = reinterpret_cast<uint4*>(fold_sums + (BITS == 16 ? 0 : part_units / kTeams * L::kFolds * kRows));
    squares = reinterpret_cast<float*>(fragments + part_units / kTeams * (L::kUnit / 8) * kRows);
  }

  __device__ __forceinline__ int share() const { return blockIdx.x % kShares; }
  __device__ __forceinline__ int blocks() const { return gridDim.x / kShares; }  // that have this share
  __device__ __forceinline__ int square_count() const { return (K / 8 + 31) / 32; }

  // ---- the ring and the block's notes

  __device__ __forceinline__ unsigned full() const { return shared_address(base) + slot * 16; }
  __device__ __forceinline__ unsigned empty() const { return full() + 8; }
  __device__ __forceinline__ unsigned decided() const { return shared_address(base) + 160; }
  __device__ __forceinline__ unsigned char* stage() const { return base + kHead + slot * kStageBytes; }
  __device__ __forceinline__ int& label() const { return reinterpret_cast<int*>(base + 128)[slot]; }
  __device__ __forceinline__ int& claim(int which) const { return reinterpret_cast<int*>(base + 168)[which]; }
  __device__ __forceinline__ int& left() const { return *reinterpret_cast<int*>(base + 176); }  // a tile, or -1
  __device__ __forceinline__ int& last() const { return *reinterpret_cast<int*>(base + 180); }  // to arrive at it
  __device__ __forceinline__ void advance() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }

  __device__ __forceinline__ void init() {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared_address(base) + i * 16, kFeeders * 33);  // every lane's copies, and the label
      barrier_init(shared_address(base) + i * 16 + 8, kWarps);
    }
    barrier_init(decided(), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // ---- the copying warps

  static constexpr int kRatio = BITS == 16 ? 1 : BITS * GROUP / 16;  // weight bytes to a byte of scales

  // Where 16 rows of a stage begin, in the weights or in scales and biases; each of the first lanes has one.
  struct Rows {
    const unsigned char *first, *second;
    int count;  // those of them that there are; the others' products are dropped
  };

  template <bool SCALES>
  __device__ __forceinline__ Rows rows_of(int tile, int piece) const {
    Matrix matrix;
    int row, first;
    locate<EPILOGUE>(matrices, tile * kTilesOf16 + (EPILOGUE == kSwiGLU ? piece / kPair : piece), matrix, row, first);
    if (EPILOGUE == kSwiGLU && piece % kPair) matrix = matrices[COUNT - 1];
    const size_t at = static_cast<size_t>(row) * (SCALES ? row_bytes / kRatio : row_bytes);
    if constexpr (SCALES) return {matrix.s + at, matrix.b + at, matrix.n - row};
    else return {matrix.w + at, nullptr, matrix.n - row};
  }

  static __device__ __forceinline__ const unsigned char* from_lane(const unsigned char* p, int lane) {
    return reinterpret_cast<const unsigned char*>(
        __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(p), lane));
  }

  // Every other 16 rows' weights of a round.
  __device__ __forceinline__ void copy_weights(const Rows& mine, int feeder, int unit, unsigned long long policy) {
    constexpr int kPieces = kRowBytes / 16, kSteps = kTileRows * kPieces / 32, kAcross = kPieces > 32 ? 32 : kPieces;
    const int lane = threadIdx.x & 31, at = lane % kAcross * 16, row = lane / kAcross;
    const int units = end_unit - unit;
#pragma unroll 1
    for (int piece = feeder; piece < kTeams * kPair; piece += 2) {
      const int count = __shfl_sync(0xffffffffu, mine.count, piece) - row;
      const unsigned char* from = from_lane(mine.first, piece) + row * row_bytes + unit * L::kUnitBytes + at;
      const unsigned dst = shared_address(stage()) + (piece * kTileRows + row) * kRowBytes;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        // A row of more than 512 bytes takes two steps.
        const int r = step * 32 / kPieces, across = kPieces > 32 ? step % 2 * 512 : 0;
        const int turned = (at + across) ^ (BITS == 16 ? ((row + r) & 1) * 64 : ((row + r) & 3) * 32);
        if (r < count && (at + across) / L::kUnitBytes < units)  // rows lie turned, so that they use all banks
          copy_small<16>(dst + r * kRowBytes + turned, from + across, policy);
        if (kPieces <= 32 || step % 2) from += row_bytes * (32 / kAcross);
      }
    }
  }

  // All scales and biases of a round.
  __device__ __forceinline__ void copy_scales(const Rows& mine, int unit) {
    constexpr int kPieces = kScaleBytes / SCALE;
    const int lane = threadIdx.x & 31, stride = row_bytes / kRatio;
    const int start = unit * L::kUnitBytes / kRatio, end = end_unit * L::kUnitBytes / kRatio;
#pragma unroll 1
    for (int piece = 0; piece < kTeams * kPair; ++piece) {
      const int count = __shfl_sync(0xffffffffu, mine.count, piece);
      const unsigned char *s = from_lane(mine.first, piece), *b = from_lane(mine.second, piece);
      const unsigned dst = shared_address(stage()) + kFeatures * kRowBytes + piece * kTileRows * kScaleBytes;
#pragma unroll
      for (int i = lane; i < 2 * kTileRows * kPieces; i += 32) {
        const int line = i / kPieces, r = line % kTileRows, at = i % kPieces * SCALE;
        if (r < count && start + at < end)
          copy_shared<SCALE>(dst + (line / kTileRows * kFeatures + r) * kScaleBytes + at,
                             (line < kTileRows ? s : b) + r * stride + start + at);
      }
    }
  }

  // A block's first tile is its number among those of its share; later ones are claimed, or come by stride where there
  // is one share and nothing to count with. A claim is made before the copies of the tile that comes before.
  template <bool SCALES>
  __device__ __forceinline__ void copy_all() {
    const bool first_thread = !SCALES && threadIdx.x == kThreads;
    const int lane = threadIdx.x & 31, feeder = (threadIdx.x - kThreads) / 32;
    const unsigned long long policy = passing_through();
    int tile = blockIdx.x / kShares;
    for (int claims = 0; tile < tiles; claims ^= 1) {
      int next = tile + blocks();
      if (work != nullptr && first_thread) next = blocks() + atomicAdd(work + share(), 1u);
      const Rows mine = rows_of<SCALES>(tile, lane);
#pragma unroll 1
      for (int round = 0; round < rounds; ++round) {
        barrier_wait(empty(), parity ^ 1);
        if (lane == 0) {
          label() = tile;
          barrier_arrive(full());
        }
        if constexpr (!SCALES) copy_weights(mine, feeder, first_unit + round * kWarps, policy);
        else if constexpr (BITS != 16) copy_scales(mine, first_unit + round * kWarps);
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full()) : "memory");
        advance();
      }
      if (work != nullptr) {
        if (first_thread) claim(claims) = next;
        asm volatile("bar.sync 3, %0;" ::"n"(kFeeders * 32) : "memory");
        next = claim(claims);
      }
      tile = next;
    }
    barrier_wait(empty(), parity ^ 1);
    if (lane == 0) {
      label() = tiles;
      barrier_arrive(full());
    }
    barrier_arrive(full());
  }

  // ---- the counting warp

  static __device__ __forceinline__ void leave() {
    asm volatile("bar.arrive 1, %0;" ::"n"(kThreads + 32) : "memory");
  }

  // For each tile that the block leaves its branch of: whether all others have left theirs.
  __device__ __forceinline__ void count_arrivals() {
    for (;;) {
      asm volatile("bar.sync 1, %0;" ::"n"(kThreads + 32) : "memory");
      const int tile = left();
      if (tile < 0) return;
      if (threadIdx.x % 32 == 0) {
        __threadfence();
        last() = atomicAdd(work + kShares + tile, 1u) == kShares - 1;
        if (last()) __threadfence();
        barrier_arrive(decided());
      }
      __syncwarp();
    }
  }

  // ---- the multiplying warps

  static __device__ __forceinline__ void meet() { asm volatile("bar.sync 2, %0;" ::"n"(kThreads) : "memory"); }

  __device__ __forceinline__ void stage_activations() {
    constexpr int kBatch = NORM ? 4 : 8;
    constexpr int kItems = CLASSES * L::kUnit / 256;  // of 256 values, in a round of a row
    const int lane = threadIdx.x & 31, per_row = rounds * kItems, items = kRows * per_row;
    const int end = end_unit * L::kUnit / 8;
    const uint4* vectors = reinterpret_cast<const uint4*>(x);
    for (int begin = threadIdx.x >> 5; begin < items; begin += kBatch * kWarps) {
      uint4 loaded[kBatch], gains[NORM ? kBatch : 1];
      auto place = [&](int j, int& m, int& item) {
        m = (begin + j * kWarps) / per_row, item = begin + j * kWarps - m * per_row;
        return (first_unit + item / kItems * kWarps) * (L::kUnit / 8) + item % kItems * 32;  // its first vector
      };
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        int m, item;
        const int v = place(j, m, item) + lane;
        const bool live = m < rows && v < end;
        loaded[j] = live ? vectors[static_cast<size_t>(m) * (K / 8) + v] : make_uint4(0, 0, 0, 0);
        if constexpr (NORM) gains[j] = live ? reinterpret_cast<const uint4*>(norm_weight)[v] : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        int m, item;
        const int v = place(j, m, item);
        if (begin + j * kWarps >= items) break;
        stage_vector<T, BITS, GROUP, NORM>(loaded[j], gains[NORM ? j : 0], item * 32 + lane, per_row * 32, m, kRows,
                                           kRows, fragments, fold_sums, [&](float square) {
                                             if (m < rows && v < end) squares[m * square_count() + v / 32] = square;
                                           });
      }
    }
    meet();
    if (NORM && kShares == 1) scale_rows();
  }

  __device__ __forceinline__ void scale_rows() {
    if (threadIdx.x < rows)
      scale[threadIdx.x] = norm_scale(squares + threadIdx.x * square_count(), square_count(), K, eps);
    meet();
  }

  // Adds a round's unit of the warp's accumulator to the lane's outputs: rows g, g + 8 and tokens 2q, 2q + 1. The unit's
  // weights lie at `w`, its scales at `scale_at`, its activations and their sums at `column` and `sums`. Two groups
  // of columns at a time, so that four chains of MMAs run side by side.
  static __device__ __forceinline__ void multiply_unit(const unsigned char* w, const unsigned char* scale_at,
                                                       const uint4* column, const float* sums,
                                                       float (&out)[COLUMNS][kPair][4]) {
    constexpr int kHalves = BITS == 16 ? 1 : L::kFold / 32;
#pragma unroll
    for (int part = 0; part < L::kFolds; ++part) {
      unsigned a[kPair][kHalves][2][4];
#pragma unroll
      for (int p = 0; p < kPair; ++p)
        load_fragments<T, BITS>(w + p * kTileRows * kRowBytes + part * 16, 8 * kRowBytes, a[p]);
#pragma unroll
      for (int first = 0; first < COLUMNS; first += 2) {
        float acc[2][kPair][4] = {};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const uint4 f = column[((part * kHalves + half) * kRows + (first + c) * kTokens) * 4];
#pragma unroll
            for (int p = 0; p < kPair; ++p)
              Scalar<T>::mma(BITS == 16 ? out[first + c][p] : acc[c][p], a[p][half][0], f.x, f.y);
#pragma unroll
            for (int p = 0; p < kPair; ++p)
              Scalar<T>::mma(BITS == 16 ? out[first + c][p] : acc[c][p], a[p][half][1], f.z, f.w);
          }
        }
        if constexpr (BITS != 16) {
#pragma unroll
          for (int i = 0; i < 2 * kPair; ++i) {
            const unsigned char* at = scale_at + i * kTokens * kScaleBytes + part * 2;
            const float2 scale_bias = affine<T, BITS>(at, at + kFeatures * kScaleBytes);
#pragma unroll
            for (int c = 0; c < 2; ++c)
              fold(scale_bias, i % 2, acc[c][i / 2],
                   *reinterpret_cast<const float2*>(sums + part * kRows + (first + c) * kTokens), out[first + c][i / 2]);
          }
        }
      }
    }
  }

  // Where output (token, feature) of a piece lies, xor-ed within 32 floats so that neither side meets bank conflicts.
  static __device__ __forceinline__ int turn(int token_pair, int quad) {
    const int by_quad = kQuads == 1 ? 0 : kQuads == 2 ? quad * 16 : (quad & 1) * 16 ^ (quad >> 1) * 8;
    return (token_pair >> 1) * 16 ^ (token_pair & 1) * 8 ^ by_quad;
  }

  // Joins the accumulators of a column group's outputs; threads with a quad of 0 have output `o` of both pieces. JOINED
  // pieces go at a time, through two buffers in turn: one is free once every warp is past the other's barrier.
  __device__ __forceinline__ void join_accumulators(const float (&out)[COLUMNS][kPair][4], int c, int o, int quad,
                                                    int team, int accumulator, float (&sum)[kPair]) const {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int first = 0; first < kPair; first += JOINED) {
      const int turn_of = (c * kPair + first) / JOINED & 1;
      float* buffer = partials + (turn_of * kWarps + team * CLASSES) * JOINED * kPiece;
      float* mine = buffer + accumulator * JOINED * kPiece + 32 * q;
      const int turned = turn(q, accumulator / 4);
#pragma unroll
      for (int p = 0; p < JOINED; ++p) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mine[p * kPiece + ((16 * (i & 1) + 8 * (i >> 1) + g) ^ turned)] = out[c][first + p][i];
      }
      asm volatile("bar.sync %0, %1;" ::"r"(4 + team), "n"(CLASSES * 32) : "memory");
      const float* from = buffer + quad * 4 * JOINED * kPiece + (o & ~31) + ((o & 31) ^ turn(o >> 5, quad));
#pragma unroll
      for (int p = first; p < first + JOINED; ++p, from += kPiece) {
        sum[p] = __fadd_rn(__fadd_rn(from[0], from[JOINED * kPiece]),
                           __fadd_rn(from[2 * JOINED * kPiece], from[3 * JOINED * kPiece]));
#pragma unroll
        for (int d = 1; d < kQuads; d *= 2) sum[p] = __fadd_rn(sum[p], __shfl_xor_sync(0xffffffffu, sum[p], d));
      }
    }
  }

  // Output `o` of a column group, of both pieces of a team's features.
  __device__ __forceinline__ void write(int tile, int team, int c, int o, float (&sum)[kPair]) const {
    const int token = c * kTokens + o / kTileRows, feature = o % kTileRows;
    if (token >= rows) return;
    if constexpr (NORM) {
#pragma unroll
      for (int p = 0; p < kPair; ++p) sum[p] = __fmul_rn(sum[p], scale[token]);
    }
    constexpr int kOutputs = EPILOGUE == kSwiGLU ? 1 : kPair;
#pragma unroll
    for (int p = 0; p < kOutputs; ++p) {
      Matrix matrix;
      int row, first;
      locate<EPILOGUE>(matrices, tile * kTilesOf16 + team * kOutputs + p, matrix, row, first);
      if (row + feature < matrix.n)
        write_output<EPILOGUE>(y, residual, static_cast<size_t>(token) * ldy + first + row + feature, sum[p],
                               sum[kPair - 1]);
    }
  }

  // Branches lie by tile, share, column group, piece, team and output.
  __device__ __forceinline__ size_t branch(int tile, int of, int c, int p, int team) const {
    return (static_cast<size_t>(tile) * kShares + of) * kTileOutputs + ((c * kPair + p) * kTeams + team) * kPiece;
  }

  // The parts of K in order, each from its shares' branches, of 4 neighbouring features at a time.
  __device__ __forceinline__ void join_shares(int tile) const {
    for (int i = threadIdx.x; i < COLUMNS * kTeams * kPiece / 4; i += kThreads) {
      const int c = i / (kTeams * kPiece / 4), team = i / (kPiece / 4) % kTeams, o = i % (kPiece / 4) * 4;
      float total[4][kPair];
#pragma unroll 1
      for (int part = 0; part < PARTS; ++part) {
#pragma unroll
        for (int p = 0; p < kPair; ++p) {
          float4 v[kTeams];
#pragma unroll
          for (int split = 0; split < kTeams; ++split)
            v[split] = __ldcg(
                reinterpret_cast<const float4*>(branches + branch(tile, part * kTeams + split, c, p, team) + o));
#pragma unroll
          for (int d = 1; d < kTeams; d *= 2) {
#pragma unroll
            for (int split = 0; split < kTeams; split += 2 * d)
              v[split] = make_float4(__fadd_rn(v[split].x, v[split + d].x), __fadd_rn(v[split].y, v[split + d].y),
                                     __fadd_rn(v[split].z, v[split + d].z), __fadd_rn(v[split].w, v[split + d].w));
          }
          const float got[4] = {v[0].x, v[0].y, v[0].z, v[0].w};
#pragma unroll
          for (int j = 0; j < 4; ++j) total[j][p] = part == 0 ? got[j] : __fadd_rn(total[j][p], got[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) write(tile, team, c, o + j, total[j]);
    }
  }

  // One tile's sums over the block's share of K, written where they are complete, else left for the last to join.
  __device__ __forceinline__ void multiply_tile(int tile) {
    const int warp = threadIdx.x >> 5, team = warp / CLASSES, accumulator = warp % CLASSES;
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, line = team * kPair * kTileRows + g;
    const int turned = BITS == 16 ? (g & 1) * 64 : (g & 3) * 32;
    const int w = line * kRowBytes + ((accumulator * L::kUnitBytes) ^ turned) +
                  q * (BITS == 16 ? 16 : L::kFolds == 2 ? 4 : 8);
    const int scale_at =
        kFeatures * kRowBytes + line * kScaleBytes + accumulator * L::kUnit / (BITS == 16 ? 1 : GROUP) * 2;
    // Kept in a register: a value from a shuffle cannot be computed anew in every round.
    const unsigned offsets = __shfl_sync(0xffffffffu, static_cast<unsigned>(scale_at) << 16 | w, lane);
    const uint4* column = fragments + (accumulator * (L::kUnit / 32) * kRows + g) * 4 + q;
    const float* sums = fold_sums + accumulator * L::kFolds * kRows + 2 * q;
    const bool whole = first_unit + (rounds - 1) * kWarps + accumulator < end_unit;  // the last round has this unit
    float out[COLUMNS][kPair][4] = {};
#pragma unroll 1
    for (int left = rounds; left > 0; --left) {
      barrier_wait(full(), parity);
      if (left > 1 || whole) multiply_unit(stage() + (offsets & 0xffff), stage() + (offsets >> 16), column, sums, out);
      __syncwarp();
      if (lane == 0) barrier_arrive(empty());
      advance();
      column += CLASSES * (L::kUnit / 32) * kRows * 4, sums += CLASSES * L::kFolds * kRows;
    }
    const int thread = threadIdx.x % (CLASSES * 32), quad = thread % kQuads, o = thread / kQuads;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      float sum[kPair];
      join_accumulators(out, c, o, quad, team, accumulator, sum);
      if (quad == 0) {
        if constexpr (kShares == 1) {
          write(tile, team, c, o, sum);
        } else {
#pragma unroll
          for (int p = 0; p < kPair; ++p) __stcg(branches + branch(tile, share(), c, p, team) + o, sum[p]);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_all() {
    stage_activations();
    bool scaled = false;
    for (int before = -1, turn = 0;;) {
      barrier_wait(full(), parity);
      const int tile = label();
      const bool more = tile < tiles;
      if (more) multiply_tile(tile);
      if (kShares > 1 && before >= 0) {
        barrier_wait(decided(), turn), turn ^= 1;
        if (last()) {
          if (NORM && !scaled) scale_rows(), scaled = true;
          join_shares(before);
        }
      }
      if (kShares > 1) {
        if (threadIdx.x == 0) left() = more ? tile : -1;
        leave();
        before = tile;
      }
      if (!more) return;
    }
  }

  __device__ __forceinline__ void run(unsigned* counters, float* left = nullptr) {
    work = counters, branches = left;
    if (kShares > 1) squares = branches + static_cast<size_t>(tiles) * kShares * kTileOutputs;
    if (threadIdx.x == 0) init();
    __syncthreads();
    const int helper = static_cast<int>(threadIdx.x) - kThreads;
    if (helper < 0) {
      give_registers<kRegisters, true>();
      multiply_all();
    } else {
      give_registers<kHelperRegisters, false>();
      if (helper < (kFeeders - 1) * 32) copy_all<false>();
      else if (helper < kFeeders * 32) copy_all<true>();
      else if (kShares > 1) count_arrivals();
    }
  }
};

}  // namespace few_row
