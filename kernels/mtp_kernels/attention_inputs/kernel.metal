// Queries, keys and values of few rows; see kernel.cu. UNPROVED on a Mac: the registry checks it before use.
//
// One simdgroup handles one head of one row; a lane holds 8 neighbouring dimensions.
namespace attention_inputs {

constant constexpr int kDim = 256;

inline float warp_sum(float v) {
  for (ushort d = 1; d < 32; d *= 2) v += simd_shuffle_xor(v, d);
  return v;
}

template <typename T, int ROTARY>
inline void norm_and_rotate(thread float (&v)[8], const device T* weight, uint lane, int position, float eps,
                            float log2_theta) {
  float square = 0.0f;
  for (int i = 0; i < 8; ++i) square = fma(v[i], v[i], square);
  const float scale = rsqrt(warp_sum(square) * (1.0f / kDim) + eps);
  for (int i = 0; i < 8; ++i) v[i] = v[i] * scale * float(weight[lane * 8 + i]);
  constexpr ushort kHalfLanes = ROTARY / 16;
  const bool first = lane < kHalfLanes;
  for (int i = 0; i < 8; ++i) {
    const float other = simd_shuffle_xor(v[i], kHalfLanes);
    const int pair = int(lane % kHalfLanes) * 8 + i;
    const float angle = position * precise::exp2(-2.0f * pair / ROTARY * log2_theta);
    const float c = precise::cos(angle), s = precise::sin(angle);
    if (lane < 2 * kHalfLanes) v[i] = first ? v[i] * c - other * s : v[i] * c + other * s;
  }
}

}  // namespace attention_inputs
