// Attention of few rows over a KV cache in two parts: a long buffer below position[0], a short tail from there on.
//
// Grouped queries share one read of the keys and values. The context is split at fixed multiples of 64 positions, each
// split reduced alone and the splits then joined in order, so a row's result depends on its own position only.
namespace few_row_attention {

constexpr int kDim = 256;
constexpr int kSplit = 64;      // positions of one block
constexpr int kThreads = 256;
constexpr int kNode = 16, kNodes = 4;  // splits that are joined first, and how many such nodes at once
constexpr int kJoinThreads = kNodes * kDim;
#define kNone __int_as_float(0xff800000)  // minus infinity: no position seen

template <typename T>
__device__ __forceinline__ const T* cache_row(const T* main, const T* tail, int base, int capacity, int tail_rows,
                                              int head, int position) {
  if (position < base) return main + (static_cast<size_t>(head) * capacity + position) * kDim;
  return tail + (static_cast<size_t>(head) * tail_rows + position - base) * kDim;
}

template <typename T>
struct alignas(16) Eight {
  T v[8];
};

template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T v[2];
};

template <typename T, int GROUP, int TAIL>
__device__ __forceinline__ void partial(const T* queries, const T* keys, const T* values, const T* tail,
                                        const int* position, float* out, float2* stats, int rows, int kv_heads,
                                        int capacity, float scale, float* smem) {
  const int split = blockIdx.x, head = blockIdx.y;
  const int base = position[0], first = position[1];
  const int start = split * kSplit, length = first + rows;
  if (start >= length) return;
  const int count = rows * GROUP;
  float* query = smem;                      // [count][2][32][4]: low and high half of each vector of 8
  float* weight = smem + count * kDim;      // [count][kSplit]
  const int t = threadIdx.x, warp = t >> 5, lane = t & 31;

  // All loads start before anything waits. Scores: eight lanes share a key and every thread has two keys; values: a
  // thread has two dimensions of half of the keys.
  const int part = t & 7, half = t >> 7, pair = t & 127;
  Eight<T> key[2][4];
  Two<T> value[kSplit / 2];
  const T* value_tail = tail + static_cast<size_t>(kv_heads) * TAIL * kDim;
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
    const int at = min(start + pass * 32 + (t >> 3), length - 1);
    const T* row = cache_row(keys, tail, base, capacity, TAIL, head, at);
#pragma unroll
    for (int j = 0; j < 4; ++j) key[pass][j] = *reinterpret_cast<const Eight<T>*>(row + (j * 8 + part) * 8);
  }
#pragma unroll
  for (int i = 0; i < kSplit / 2; ++i) {
    const int at = min(start + half * (kSplit / 2) + i, length - 1);
    value[i] = reinterpret_cast<const Two<T>*>(cache_row(values, value_tail, base, capacity, TAIL, head, at))[pair];
  }
  for (int i = t; i < count * 32; i += kThreads) {
    const int n = i >> 5, unit = i & 31, m = n / GROUP;
    const Eight<T> raw = *reinterpret_cast<const Eight<T>*>(
        queries + (static_cast<size_t>(m) * kv_heads * GROUP + head * GROUP + n % GROUP) * kDim + unit * 8);
#pragma unroll
    for (int j = 0; j < 8; ++j) query[n * kDim + ((j >> 2) * 32 + unit) * 4 + (j & 3)] = static_cast<float>(raw.v[j]);
  }
  __syncthreads();

#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
    const int local = pass * 32 + (t >> 3), at = start + local;
    for (int n = 0; n < count; ++n) {
      const float4* q = reinterpret_cast<const float4*>(query + n * kDim);
      float a = 0.0f, b = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 lo = q[j * 8 + part], hi = q[32 + j * 8 + part];
        const T* k = key[pass][j].v;
        a = __fmaf_rn(lo.x, static_cast<float>(k[0]), a), b = __fmaf_rn(hi.x, static_cast<float>(k[4]), b);
        a = __fmaf_rn(lo.y, static_cast<float>(k[1]), a), b = __fmaf_rn(hi.y, static_cast<float>(k[5]), b);
        a = __fmaf_rn(lo.z, static_cast<float>(k[2]), a), b = __fmaf_rn(hi.z, static_cast<float>(k[6]), b);
        a = __fmaf_rn(lo.w, static_cast<float>(k[3]), a), b = __fmaf_rn(hi.w, static_cast<float>(k[7]), b);
      }
      float score = __fadd_rn(a, b);
      score += __shfl_xor_sync(0xffffffffu, score, 1);
      score += __shfl_xor_sync(0xffffffffu, score, 2);
      score += __shfl_xor_sync(0xffffffffu, score, 4);
      if (part == 0) weight[n * kSplit + local] = at <= first + n / GROUP ? score * scale : kNone;
    }
  }
  __syncthreads();

  for (int n = warp; n < count; n += kThreads / 32) {
    float* w = weight + n * kSplit;
    const float a = w[lane], b = w[lane + 32];
    float top = fmaxf(a, b);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
    const float pa = top == kNone ? 0.0f : __expf(a - top), pb = top == kNone ? 0.0f : __expf(b - top);
    float sum = pa + pb;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    w[lane] = pa, w[lane + 32] = pb;
    if (lane == 0) stats[(static_cast<size_t>(split) * kv_heads + head) * count + n] = make_float2(top, sum);
  }
  __syncthreads();

  // Weighted sums of the values: each half of the keys alone, then together through the space of the queries.
  float* target = out + (static_cast<size_t>(split) * kv_heads + head) * count * kDim;
  for (int n = 0; n < count; ++n) {
    const float4* w = reinterpret_cast<const float4*>(weight + n * kSplit + half * (kSplit / 2));
    float a = 0.0f, b = 0.0f;
#pragma unroll
    for (int j = 0; j < kSplit / 8; ++j) {
      const float4 u = w[j];
      const float p[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a = __fmaf_rn(p[i], static_cast<float>(value[4 * j + i].v[0]), a);
        b = __fmaf_rn(p[i], static_cast<float>(value[4 * j + i].v[1]), b);
      }
    }
    float2* place = reinterpret_cast<float2*>(half ? query + n * kDim : target + n * kDim) + pair;
    *place = make_float2(a, b);
  }
  __syncthreads();
  if (half == 0) {
    for (int n = 0; n < count; ++n) {
      float2* place = reinterpret_cast<float2*>(target + n * kDim) + pair;
      const float2 one = *place, other = reinterpret_cast<const float2*>(query + n * kDim)[pair];
      *place = make_float2(__fadd_rn(one.x, other.x), __fadd_rn(one.y, other.y));
    }
  }
}

// Joins the splits of one head of one row and applies the sigmoid gate. Splits are added up in order within nodes of
// kNode, and nodes in order. A quarter of the block takes a node, a thread one dimension of it.
template <typename T, int GROUP>
__device__ __forceinline__ void join(const float* parts, const float2* stats, const T* projected, const int* position,
                                     T* y, int rows, int kv_heads) {
  __shared__ float node_total[kNodes][kDim], node_sum[kNodes], tops[kJoinThreads / 32];
  const int heads = kv_heads * GROUP;
  const int m = blockIdx.x / heads, h = blockIdx.x - m * heads, head = h / GROUP;
  const int n = m * GROUP + h % GROUP, count = rows * GROUP;
  const int splits = (position[1] + m) / kSplit + 1;
  const int node = threadIdx.x / kDim, dim = threadIdx.x % kDim, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  auto place = [&](int split) { return (static_cast<size_t>(split) * kv_heads + head) * count + n; };

  float top = kNone;
  for (int s = threadIdx.x; s < splits; s += kJoinThreads) top = fmaxf(top, stats[place(s)].x);
#pragma unroll
  for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
  if (lane == 0) tops[warp] = top;
  __syncthreads();
  top = tops[lane];
#pragma unroll
  for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));

  float sum = 0.0f, total = 0.0f;
  for (int first = 0; first < splits; first += kNodes * kNode) {
    const int start = first + node * kNode;
    float own_sum = 0.0f, own_total = 0.0f;
    if (start < splits) {
      float value[kNode];
      float2 stat[kNode];
#pragma unroll
      for (int i = 0; i < kNode; ++i) {
        const size_t at = place(min(start + i, splits - 1));
        stat[i] = stats[at], value[i] = parts[at * kDim + dim];
      }
#pragma unroll
      for (int i = 0; i < kNode; ++i) {
        const float factor = start + i < splits ? __expf(stat[i].x - top) : 0.0f;
        own_sum = __fmaf_rn(factor, stat[i].y, own_sum);
        own_total = __fmaf_rn(factor, value[i], own_total);
      }
    }
    node_total[node][dim] = own_total;
    if (dim == 0) node_sum[node] = own_sum;
    __syncthreads();
    if (node == 0) {
#pragma unroll
      for (int i = 0; i < kNodes; ++i) {
        sum = __fadd_rn(sum, node_sum[i]);
        total = __fadd_rn(total, node_total[i][dim]);
      }
    }
    __syncthreads();
  }
  if (node > 0) return;
  const size_t stride = static_cast<size_t>(2 * heads + 2 * kv_heads) * kDim;
  const float gate = static_cast<float>(projected[m * stride + (2 * h + 1) * kDim + dim]);
  y[(static_cast<size_t>(m) * heads + h) * kDim + dim] =
      static_cast<T>(__fdiv_rn(total, sum) / (1.0f + __expf(-gate)));
}

}  // namespace few_row_attention
