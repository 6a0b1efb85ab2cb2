// Gated DeltaNet over few rows of several sequences: replay of the kept rows of the last pass, then this pass's rows, in
// one launch.
//
// One block per value head and sequence; four lanes own one value row of the state, 32 key columns each, in registers. Rows come in
// chunks: convolution and norms of a chunk side by side, then the recurrence row by row. Kept and new rows go through
// the same code, so a state reached by replay has the bits of one reached row by row.
namespace gated_delta {

constexpr int kThreads = 512;
constexpr int kDim = 128;      // key and value head width
constexpr int kTaps = 4;       // convolution taps
constexpr int kChunk = 16;     // rows
constexpr int kTape = 8;       // rows of a sequence that a pass may leave to the next one

__device__ __forceinline__ float sigmoid(float v) { return 1.0f / (1.0f + __expf(-v)); }

// Four lanes' partial sums in one fixed order.
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

template <typename T>
struct Rows {
  const T* window;   // [kTaps - 1, channels], the projections before `kept`
  const T* kept;     // [kept rows, stride], the last pass's projections: the tape
  const T* fresh;    // [rows, stride]
  int channels, stride, kept_rows;

  // Convolution input s: the window, then kept rows, then new rows.
  __device__ __forceinline__ const T* at(int s) const {
    if (s < kTaps - 1) return window + static_cast<size_t>(s) * channels;
    return row(s - (kTaps - 1));
  }
  __device__ __forceinline__ const T* row(int t) const {
    return t < kept_rows ? kept + static_cast<size_t>(t) * stride : fresh + static_cast<size_t>(t - kept_rows) * stride;
  }
};

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

// Convolution and silu of four neighbouring channels at row t.
template <typename T>
__device__ __forceinline__ void convolve(const Rows<T>& rows, const T* weight, int t, int channel, float (&out)[4]) {
  Four<T> taps[4], inputs[kTaps];  // taps[channel].v[tap], inputs[tap].v[channel]
#pragma unroll
  for (int i = 0; i < 4; ++i) taps[i] = reinterpret_cast<const Four<T>*>(weight)[channel + i];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) inputs[tap] = *reinterpret_cast<const Four<T>*>(rows.at(t + tap) + channel);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = 0.0f;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
      out[i] = __fmaf_rn(static_cast<float>(inputs[tap].v[i]), static_cast<float>(taps[i].v[tap]), out[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = out[i] * sigmoid(out[i]);
}

// Rows [start, start + count) of one head: q, k (unit length, q scaled), v, decay and beta into shared memory.
template <typename T>
__device__ __forceinline__ void prepare(const Rows<T>& rows, const T* conv_weight, const int (&channel_of)[3],
                                        const float* a_log, const T* dt_bias, int head, int a_at, int b_at, int start,
                                        int count, float (*qkv)[3][kDim], float* decay, float* beta) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int item = warp; item < count * 3; item += kThreads / 32) {
    const int t = item / 3, part = item - 3 * t;
    float v[4];
    convolve(rows, conv_weight, start + t, channel_of[part] + lane * 4, v);
    if (part < 2) {
      float square = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) square = __fmaf_rn(v[i], v[i], square);
      float scale = rsqrtf(warp_sum(square) + 1e-6f);
      if (part == 0) scale *= 0.08838834764831845f;  // 128 ** -0.5
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] *= scale;
    }
    *reinterpret_cast<float4*>(&qkv[t][part][lane * 4]) = make_float4(v[0], v[1], v[2], v[3]);
  }
  if (threadIdx.x < count) {
    const T* row = rows.row(start + threadIdx.x);
    const float pre = static_cast<float>(row[a_at + head]) + static_cast<float>(dt_bias[head]);
    const float softplus = pre > 20.0f ? pre : log1pf(expf(pre));
    decay[threadIdx.x] = expf(-expf(a_log[head]) * softplus);
    beta[threadIdx.x] = sigmoid(static_cast<float>(row[b_at + head]));
  }
}

// One row of the recurrence for a lane's 32 state values; returns the row's output, alike in the four lanes of a quad.
__device__ __forceinline__ float advance(float4 (&s)[8], const float (*qkv)[kDim], float g, float beta, int value_row,
                                         int quarter) {
  const float4* k4 = reinterpret_cast<const float4*>(qkv[1]);
  const float4* q4 = reinterpret_cast<const float4*>(qkv[0]);
  float4 key[8];
  float4 part = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    key[j] = k4[j * 4 + quarter];
    s[j] = make_float4(__fmul_rn(s[j].x, g), __fmul_rn(s[j].y, g), __fmul_rn(s[j].z, g), __fmul_rn(s[j].w, g));
    part.x = __fmaf_rn(s[j].x, key[j].x, part.x);
    part.y = __fmaf_rn(s[j].y, key[j].y, part.y);
    part.z = __fmaf_rn(s[j].z, key[j].z, part.z);
    part.w = __fmaf_rn(s[j].w, key[j].w, part.w);
  }
  const float recalled = quad_sum(__fadd_rn(__fadd_rn(part.x, part.y), __fadd_rn(part.z, part.w)));
  const float delta = __fmul_rn(__fsub_rn(qkv[2][value_row], recalled), beta);
  float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float4 query = q4[j * 4 + quarter];
    s[j].x = __fmaf_rn(key[j].x, delta, s[j].x);
    s[j].y = __fmaf_rn(key[j].y, delta, s[j].y);
    s[j].z = __fmaf_rn(key[j].z, delta, s[j].z);
    s[j].w = __fmaf_rn(key[j].w, delta, s[j].w);
    out.x = __fmaf_rn(s[j].x, query.x, out.x);
    out.y = __fmaf_rn(s[j].y, query.y, out.y);
    out.z = __fmaf_rn(s[j].z, query.z, out.z);
    out.w = __fmaf_rn(s[j].w, query.w, out.w);
  }
  return quad_sum(__fadd_rn(__fadd_rn(out.x, out.y), __fadd_rn(out.z, out.w)));
}

// RMSNorm of one head's output row times silu of its gate, by one warp.
template <typename T>
__device__ __forceinline__ void gate_row(const float* output, Four<T> gate, Four<T> norm, float eps, T* target) {
  const int lane = threadIdx.x & 31;
  float v[4], square = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = output[lane * 4 + i];
    square = __fmaf_rn(v[i], v[i], square);
  }
  const float scale = rsqrtf(warp_sum(square) * (1.0f / kDim) + eps);
  Four<T> row;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float z = static_cast<float>(gate.v[i]);
    row.v[i] = static_cast<T>(v[i] * scale * static_cast<float>(norm.v[i]) * z * sigmoid(z));
  }
  *reinterpret_cast<Four<T>*>(target + lane * 4) = row;
}

// A head's columns of the new rows, for the next pass.
template <typename T>
__device__ __forceinline__ void write_tape(const Rows<T>& rows, const int (&channel_of)[3], int head, bool leads,
                                           int z_at, int b_at, int a_at, int new_rows, T* tape) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int item = warp; item < new_rows * 4; item += kThreads / 32) {
    const int t = item >> 2, part = item & 3;
    if (part < 2 && !leads) continue;
    const size_t at = static_cast<size_t>(t) * rows.stride + (part < 3 ? channel_of[part] : z_at + head * kDim) + lane * 4;
    *reinterpret_cast<Four<T>*>(tape + at) = *reinterpret_cast<const Four<T>*>(rows.fresh + at);
  }
  if (threadIdx.x < new_rows) {
    const size_t at = static_cast<size_t>(threadIdx.x) * rows.stride + head;
    tape[at + b_at] = rows.fresh[at + b_at];
    tape[at + a_at] = rows.fresh[at + a_at];
  }
}

// The whole launch, one sequence to a blockIdx.y. State and window are written after the kept rows, or with SETTLE after
// all rows; without it the new rows go to the tape that the next pass replays.
template <typename T, bool SETTLE>
__device__ __forceinline__ void run(const T* fresh, const int* starts, const T* tape, const int* keep, const T* window,
                                    const float* state, const T* conv_weight, const float* a_log, const T* dt_bias,
                                    const T* norm_weight, T* y, float* state_out, T* window_out, T* tape_out,
                                    int value_heads, int key_heads, float eps) {
  __shared__ __align__(16) float qkv[kChunk][3][kDim];
  __shared__ float decay[kChunk], beta[kChunk];
  __shared__ __align__(16) float outputs[kChunk][kDim];
  const int head = blockIdx.x, sequence = blockIdx.y, per_key = value_heads / key_heads, key_head = head / per_key;
  const int key_width = key_heads * kDim, value_width = value_heads * kDim;
  const int channels = 2 * key_width + value_width;
  const int z_at = channels, b_at = z_at + value_width, a_at = b_at + value_heads, stride = a_at + value_heads;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int value_row = threadIdx.x >> 2, quarter = threadIdx.x & 3;
  const size_t own_tape = static_cast<size_t>(sequence) * kTape * stride;
  const size_t own_window = static_cast<size_t>(sequence) * (kTaps - 1) * channels;

  float4 s[8];
  const size_t own = ((static_cast<size_t>(sequence) * value_heads + head) * kDim + value_row) * kDim;
#pragma unroll
  for (int j = 0; j < 8; ++j) s[j] = reinterpret_cast<const float4*>(state + own)[j * 4 + quarter];
  const Four<T> norm = *reinterpret_cast<const Four<T>*>(norm_weight + lane * 4);
  const int first = starts[sequence], new_rows = starts[sequence + 1] - first;
  const int kept_rows = keep[sequence], total = kept_rows + new_rows, settle = SETTLE ? total : kept_rows;
  const Rows<T> rows{window + own_window, tape + own_tape, fresh + static_cast<size_t>(first) * stride,
                     channels, stride, kept_rows};
  const int channel_of[3] = {key_head * kDim, key_width + key_head * kDim, 2 * key_width + head * kDim};
  const bool leads = head % per_key == 0;  // key channels are shared by `per_key` heads, the first of which writes them
  auto write_state = [&]() {
#pragma unroll
    for (int j = 0; j < 8; ++j) reinterpret_cast<float4*>(state_out + own)[j * 4 + quarter] = s[j];
  };

  for (int i = threadIdx.x; i < (kTaps - 1) * 3 * kDim; i += kThreads) {
    const int tap = i / (3 * kDim), part = (i / kDim) % 3, channel = channel_of[part] + i % kDim;
    if (part == 2 || leads)
      window_out[own_window + static_cast<size_t>(tap) * channels + channel] = rows.at(settle + tap)[channel];
  }
  if (!SETTLE) write_tape(rows, channel_of, head, leads, z_at, b_at, a_at, new_rows, tape_out + own_tape);
  if (settle == 0) write_state();
  for (int start = 0; start < total; start += kChunk) {
    const int count = min(kChunk, total - start), row = start + warp;  // one warp gates one row of the chunk
    const bool gated = warp < count && row >= kept_rows;
    Four<T> gate;
    if (gated) gate = *reinterpret_cast<const Four<T>*>(rows.row(row) + z_at + head * kDim + lane * 4);
    prepare(rows, conv_weight, channel_of, a_log, dt_bias, head, a_at, b_at, start, count, qkv, decay, beta);
    __syncthreads();
    for (int t = 0; t < count; ++t) {
      const float read = advance(s, qkv[t], decay[t], beta[t], value_row, quarter);
      if (quarter == 0) outputs[t][value_row] = read;
      if (start + t + 1 == settle) write_state();
    }
    __syncthreads();
    if (gated)
      gate_row(outputs[warp], gate, norm, eps,
               y + static_cast<size_t>(first + row - kept_rows) * value_width + head * kDim);
  }
}

}  // namespace gated_delta
