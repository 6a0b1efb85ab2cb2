// Queries, keys and values of few rows: per-head RMSNorm and rotary embedding, and the tail of the KV cache with the
// new keys and values in it.
//
// One warp handles one head of one row (or copies one row of the old tail); a lane holds 8 neighbouring dimensions.
namespace attention_inputs {

constexpr int kDim = 256;
constexpr int kThreads = 256;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

template <typename T>
struct alignas(16) Eight {
  T v[8];
};

// RMSNorm over the head, then rotation of pairs (i, i + ROTARY / 2) by position * theta ** (-2i / ROTARY).
template <typename T, int ROTARY>
__device__ __forceinline__ void norm_and_rotate(float (&v)[8], const T* weight, int lane, int position, float eps,
                                                float log2_theta) {
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) square = __fmaf_rn(v[i], v[i], square);
  const float scale = rsqrtf(warp_sum(square) * (1.0f / kDim) + eps);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = v[i] * scale * static_cast<float>(weight[lane * 8 + i]);
  // Lane p computes the angle of pair p (and p + 32, ...) once; elements then fetch their pair's.
  constexpr int kPairs = ROTARY / 2, kHalfLanes = ROTARY / 16;
  float sine[(kPairs + 31) / 32], cosine[(kPairs + 31) / 32];
#pragma unroll
  for (int r = 0; r < (kPairs + 31) / 32; ++r)
    sincosf(position * exp2f(-2.0f * (lane + 32 * r) / ROTARY * log2_theta), &sine[r], &cosine[r]);
  const bool first = lane < kHalfLanes;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float other = __shfl_xor_sync(0xffffffffu, v[i], kHalfLanes);
    const int pair = (lane % kHalfLanes) * 8 + i;
    float c = 0.0f, d = 0.0f;
#pragma unroll
    for (int r = 0; r < (kPairs + 31) / 32; ++r) {
      const float cr = __shfl_sync(0xffffffffu, cosine[r], pair & 31), dr = __shfl_sync(0xffffffffu, sine[r], pair & 31);
      if (pair / 32 == r) c = cr, d = dr;
    }
    if (lane < 2 * kHalfLanes) v[i] = first ? v[i] * c - other * d : v[i] * c + other * d;
  }
}

// One sequence, of which `row` is the first row. position[0]: first position that the tail holds; position[1]: position of
// the first new row.
template <typename T, int ROTARY, int TAIL>
__device__ __forceinline__ void run(const T* projected, const T* tail, const int* position, const T* q_weight,
                                    const T* k_weight, T* queries, T* tail_out, int row, int rows, int heads,
                                    int kv_heads, float eps, float log2_theta) {
  const int lane = threadIdx.x & 31;
  const int item = blockIdx.x * (kThreads / 32) + (threadIdx.x >> 5);
  const int per_row = heads + 2 * kv_heads;
  const int stride = (2 * heads + 2 * kv_heads) * kDim;
  const int used = position[1] - position[0];
  if (item >= rows * per_row) {
    const int line = item - rows * per_row;  // of the tail: [2, kv_heads, TAIL]
    const int place = line % TAIL;
    if (line >= 2 * kv_heads * TAIL || (place >= used && place < used + rows)) return;
    reinterpret_cast<uint4*>(tail_out)[static_cast<size_t>(line) * 32 + lane] =
        reinterpret_cast<const uint4*>(tail)[static_cast<size_t>(line) * 32 + lane];
    return;
  }
  const int m = item / per_row, head = item - m * per_row;
  const T* from = projected + static_cast<size_t>(row + m) * stride;
  const bool query = head < heads, value = head >= heads + kv_heads;
  const T* source = query ? from + head * 2 * kDim : from + (2 * heads + (head - heads)) * kDim;
  Eight<T> raw = *reinterpret_cast<const Eight<T>*>(source + lane * 8);
  T* target = query ? queries + (static_cast<size_t>(row + m) * heads + head) * kDim
                    : tail_out + (static_cast<size_t>(head - heads) * TAIL + used + m) * kDim;
  if (!value) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = static_cast<float>(raw.v[i]);
    norm_and_rotate<T, ROTARY>(v, query ? q_weight : k_weight, lane, position[1] + m, eps, log2_theta);
#pragma unroll
    for (int i = 0; i < 8; ++i) raw.v[i] = static_cast<T>(v[i]);
  }
  *reinterpret_cast<Eight<T>*>(target + lane * 8) = raw;
}

}  // namespace attention_inputs
