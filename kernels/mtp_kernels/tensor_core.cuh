// What kernels on the tensor core share: 16-bit types, packed weights as exact values of them, and one MMA,
// m16n8k16: 16 rows of weights times 8 tokens, each token a column of its own.
namespace tensor_core {

template <typename T>
struct Scalar;

template <>
struct Scalar<__nv_bfloat16> {
  static constexpr unsigned kMagic = 0x43004300u;  // 128 + q is exact in bfloat16 for q < 16
  static constexpr float kOffset = 128.0f;
  static constexpr unsigned kOnes = 0x3f803f80u;
  static __device__ __forceinline__ float lo(unsigned v) { return __uint_as_float(v << 16); }
  static __device__ __forceinline__ float hi(unsigned v) { return __uint_as_float(v & 0xffff0000u); }
  static __device__ __forceinline__ unsigned pack(float a, float b) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b));
    return r;
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  // Bytes 2p and 2p+1 of w as a pair of exact values q (no offset left in them).
  static __device__ __forceinline__ unsigned bytes(unsigned w, int p) {
    const float a = __uint_as_float(__byte_perm(w, 0x4b000000u, p ? 0x7542 : 0x7540)) - 8388608.0f;
    const float b = __uint_as_float(__byte_perm(w, 0x4b000000u, p ? 0x7543 : 0x7541)) - 8388608.0f;
    return pack(a, b);
  }
  static __device__ __forceinline__ unsigned nibbles(unsigned w) {
    unsigned r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(w), "r"(0x000f000fu), "r"(kMagic));
    return r;
  }
};

template <>
struct Scalar<__half> {
  static constexpr float kOffset = 0.0f;
  static constexpr unsigned kOnes = 0x3c003c00u;
  static __device__ __forceinline__ float lo(unsigned v) { return __half2float(__ushort_as_half(v & 0xffffu)); }
  static __device__ __forceinline__ float hi(unsigned v) { return __half2float(__ushort_as_half(v >> 16)); }
  static __device__ __forceinline__ unsigned pack(float a, float b) {
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b));
    return r;
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ unsigned minus_1024(unsigned v) {
    unsigned r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(0x64006400u));  // exact: 1024 + q, q < 1024
    return r;
  }
  static __device__ __forceinline__ unsigned bytes(unsigned w, int p) {
    return minus_1024(__byte_perm(w, 0x64646464u, p ? 0x4342 : 0x4140));
  }
  static __device__ __forceinline__ unsigned nibbles(unsigned w) {
    return minus_1024((w & 0x000f000fu) | 0x64006400u);
  }
};

// One word of each of the lane's two rows as fragments: 8 values of k in 4 bits, or 4 in 8 bits.
template <typename T, int BITS>
__device__ __forceinline__ void unpack_word(unsigned w0, unsigned w1, unsigned (*fragments)[4]) {
  using S = Scalar<T>;
  if constexpr (BITS == 8) {
    const unsigned a[4] = {S::bytes(w0, 0), S::bytes(w1, 0), S::bytes(w0, 1), S::bytes(w1, 1)};
#pragma unroll
    for (int i = 0; i < 4; ++i) fragments[0][i] = a[i];
  } else {
    const unsigned a[4] = {S::nibbles(w0), S::nibbles(w1), S::nibbles(w0 >> 4), S::nibbles(w1 >> 4)};
    const unsigned b[4] = {S::nibbles(w0 >> 8), S::nibbles(w1 >> 8), S::nibbles(w0 >> 12), S::nibbles(w1 >> 12)};
#pragma unroll
    for (int i = 0; i < 4; ++i) fragments[0][i] = a[i], fragments[1][i] = b[i];
  }
}

// The products of such words with activations.
template <typename T, int BITS>
__device__ __forceinline__ void multiply_word(unsigned w0, unsigned w1, unsigned f0, unsigned f1, unsigned f2,
                                              unsigned f3, float (&acc)[4]) {
  unsigned fragments[BITS == 8 ? 1 : 2][4];
  unpack_word<T, BITS>(w0, w1, fragments);
  Scalar<T>::mma(acc, fragments[0], f0, f1);
  if constexpr (BITS == 4) Scalar<T>::mma(acc, fragments[1], f2, f3);
}

__device__ __forceinline__ float silu(float v) { return v / (1.0f + __expf(-v)); }

}  // namespace tensor_core
