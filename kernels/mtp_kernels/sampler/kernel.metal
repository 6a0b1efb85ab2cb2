// One token a row; see kernel.cu. UNPROVED: never run on a Mac; the registry checks it before use.
//
// One threadgroup a row. The border is found by bisection over the 16 bits of a value's key: each step sums over all
// tokens of keys from the middle up, in an order that the row alone fixes, so that a sum never falls as the middle does.
namespace sampler {

constant constexpr int kSimdgroups = 8;
constant constexpr int kThreads = kSimdgroups * 32;

// 16 bits that order as the values do; -0 counts as 0.
inline int key_of(ushort bits) {
  if (bits == 0x8000) bits = 0;
  return bits & 0x8000 ? 0xffff & ~int(bits) : int(bits) | 0x8000;
}

inline float bfloat16_of(ushort bits) { return as_type<float>(uint(bits) << 16); }
inline float half_of(ushort bits) { return float(as_type<half>(bits)); }

struct Sums {
  int tokens;
  float mass;
};

// Sums over the threadgroup, simdgroups in order.
inline Sums all_sums(Sums own, threadgroup int* tokens, threadgroup float* masses, int lane, int simdgroup) {
  for (ushort d = 1; d < 32; d *= 2) {
    own.tokens += simd_shuffle_xor(own.tokens, d);
    own.mass += simd_shuffle_xor(own.mass, d);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    tokens[simdgroup] = own.tokens;
    masses[simdgroup] = own.mass;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Sums all = {0, 0.0f};
  for (int s = 0; s < kSimdgroups; ++s) {
    all.tokens += tokens[s];
    all.mass += masses[s];
  }
  return all;
}

// Philox4x32-10 (Salmon et al. 2011): the word of one token.
inline uint draw(uint token, uint position, uint purpose, uint k0, uint k1) {
  uint c[4] = {token / 4, position, purpose, 0};
  for (int round = 0; round < 10; ++round) {
    const uint a = c[0], b = c[2];
    c[0] = mulhi(b, 0xCD9E8D57u) ^ c[1] ^ k0;
    c[2] = mulhi(a, 0xD2511F53u) ^ c[3] ^ k1;
    c[1] = b * 0xCD9E8D57u;
    c[3] = a * 0xD2511F53u;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c[token % 4];
}

// log of an Exp(1) draw, -log1p(-u). Below 1/16 a series, as 1 - u would drop most of u.
inline float log_exponential(uint bits) {
  const float u = min((float(bits) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
  if (u >= 0.0625f) return precise::log(-precise::log(1.0f - u));
  float sum = 0.0f;
  for (int n = 8; n > 0; --n) sum = fma(sum, u, 1.0f / float(n));
  return precise::log(sum * u);
}

}  // namespace sampler
