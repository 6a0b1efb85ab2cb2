// Gated DeltaNet over few rows; see kernel.cu, whose order of operations this follows. UNPROVED on a Mac:
// the registry checks it before use.
//
// One threadgroup of 512 threads per value head and sequence; four lanes own one value row of the state, 32 key columns each.
namespace gated_delta {

constant constexpr int kThreads = 512;
constant constexpr int kDim = 128;
constant constexpr int kTaps = 4;
constant constexpr int kChunk = 8;  // rows; 16 KiB of threadgroup memory
constant constexpr int kTape = 8;   // rows of a sequence that a pass may leave to the next one

inline float sigmoid(float v) { return 1.0f / (1.0f + exp(-v)); }

inline float quad_sum(float v) {
  v += simd_shuffle_xor(v, 1);
  return v + simd_shuffle_xor(v, 2);
}

inline float warp_sum(float v) {
  for (ushort d = 1; d < 32; d *= 2) v += simd_shuffle_xor(v, d);
  return v;
}

template <typename T>
struct Rows {
  const device T* window;
  const device T* kept;
  const device T* fresh;
  int channels, stride, kept_rows;

  const device T* row(int t) const {
    return t < kept_rows ? kept + size_t(t) * stride : fresh + size_t(t - kept_rows) * stride;
  }
  const device T* at(int s) const { return s < kTaps - 1 ? window + size_t(s) * channels : row(s - (kTaps - 1)); }
};

template <typename T>
inline float convolve(Rows<T> rows, const device T* weight, int t, int channel) {
  float out = 0.0f;
  for (int tap = 0; tap < kTaps; ++tap)
    out = fma(float(rows.at(t + tap)[channel]), float(weight[channel * kTaps + tap]), out);
  return out * sigmoid(out);
}

// One row of the recurrence for a lane's 32 state values.
inline float advance(thread float4 (&s)[8], const threadgroup float* q, const threadgroup float* k, float v, float g,
                     float beta, uint quarter) {
  const threadgroup float4* k4 = reinterpret_cast<const threadgroup float4*>(k);
  const threadgroup float4* q4 = reinterpret_cast<const threadgroup float4*>(q);
  float4 part = float4(0.0f), out = float4(0.0f);
  for (int j = 0; j < 8; ++j) {
    s[j] = s[j] * g;
    part = fma(s[j], k4[j * 4 + quarter], part);
  }
  const float delta = (v - quad_sum((part.x + part.y) + (part.z + part.w))) * beta;
  for (int j = 0; j < 8; ++j) {
    s[j] = fma(k4[j * 4 + quarter], float4(delta), s[j]);
    out = fma(s[j], q4[j * 4 + quarter], out);
  }
  return quad_sum((out.x + out.y) + (out.z + out.w));
}

}  // namespace gated_delta
