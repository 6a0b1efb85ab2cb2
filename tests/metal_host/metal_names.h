// The names of the Metal standard library that the shipped kernels use, for clang on a host.
//
// Included twice. With TYPED every address space is a type of its own, and confusing two of them is an error. Without it
// address spaces vanish and lanes run on runtime.cpp. A name that is missing here fails to compile.
#undef device
#undef constant
#undef threadgroup
#undef threadgroup_variable
#undef thread
#undef double
#undef INFINITY
#undef ALWAYS

#ifdef TYPED
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define threadgroup_variable static
#else
#define device
#define constant
#define threadgroup
#define threadgroup_variable static __attribute__((section("threadgroup_memory")))
#endif
#define thread
#define double metal_has_no_double
#define INFINITY __builtin_inff()
#define ALWAYS inline __attribute__((always_inline))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef __SIZE_TYPE__ size_t;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef _Float16 half;
typedef __bf16 bfloat;
typedef half float16_t;      // as MLX's preamble names them
typedef bfloat bfloat16_t;
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float4 __attribute__((ext_vector_type(4)));
typedef half half2 __attribute__((ext_vector_type(2)));
typedef half half4 __attribute__((ext_vector_type(4)));
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));

// What a lane asks of the scheduler. Convergent: the compiler may not move a call into a branch nor make one of two.
extern "C" {
__attribute__((convergent, nomerge)) const void* mtl_exchange(const void* value, size_t bytes);
__attribute__((convergent, nomerge)) void mtl_threadgroup_barrier(int flags);
__attribute__((convergent, nomerge)) void mtl_simdgroup_barrier(int flags);
}

namespace metal {

template <typename To, typename From>
ALWAYS To as_type(From value) { return __builtin_bit_cast(To, value); }

#define UNARY(name, builtin) ALWAYS float name(float x) { return builtin(x); }
#define MATH                                          \
  UNARY(exp, __builtin_expf)                          \
  UNARY(exp2, __builtin_exp2f)                        \
  UNARY(log, __builtin_logf)                          \
  UNARY(cos, __builtin_cosf)                          \
  UNARY(sin, __builtin_sinf)                          \
  UNARY(sqrt, __builtin_sqrtf)                        \
  ALWAYS float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
namespace precise { MATH }
namespace fast { MATH }
MATH
#undef MATH
#undef UNARY

ALWAYS float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
ALWAYS float2 fma(float2 a, float2 b, float2 c) { return __builtin_elementwise_fma(a, b, c); }
ALWAYS float4 fma(float4 a, float4 b, float4 c) { return __builtin_elementwise_fma(a, b, c); }
ALWAYS float min(float a, float b) { return __builtin_fminf(a, b); }
ALWAYS float max(float a, float b) { return __builtin_fmaxf(a, b); }
ALWAYS int min(int a, int b) { return a < b ? a : b; }
ALWAYS int max(int a, int b) { return a > b ? a : b; }
ALWAYS uint min(uint a, uint b) { return a < b ? a : b; }
ALWAYS float ceil(float x) { return __builtin_ceilf(x); }
ALWAYS uint mulhi(uint a, uint b) { return uint((unsigned long)a * b >> 32); }
ALWAYS uint popcount(uint x) { return uint(__builtin_popcount(x)); }
ALWAYS uint max(uint a, uint b) { return a > b ? a : b; }

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
ALWAYS void threadgroup_barrier(mem_flags flags) { mtl_threadgroup_barrier(int(flags)); }
ALWAYS void simdgroup_barrier(mem_flags flags) { mtl_simdgroup_barrier(int(flags)); }

// Every simdgroup function is one exchange: each lane shows 16 bytes or fewer to the 31 others.
template <typename T>
struct Shown {
  T value;
  char fill[16 - sizeof(T)];
};
template <>
struct Shown<float4> {
  float4 value;
};
template <typename T>
ALWAYS const Shown<T>* exchange(T value) {
  return static_cast<const Shown<T>*>(mtl_exchange(&value, sizeof(T)));
}
extern "C" uint mtl_lane();

template <typename T>
ALWAYS T simd_shuffle(T value, ushort lane) { return exchange(value)[lane].value; }
template <typename T>
ALWAYS T simd_broadcast(T value, ushort lane) { return exchange(value)[lane].value; }
template <typename T>
ALWAYS T simd_shuffle_xor(T value, ushort mask) { return exchange(value)[mtl_lane() ^ mask].value; }
template <typename T>
ALWAYS T simd_shuffle_down(T value, ushort delta) { return exchange(value)[mtl_lane() + delta].value; }
template <typename T>
ALWAYS T simd_shuffle_up(T value, ushort delta) { return exchange(value)[mtl_lane() - delta].value; }
template <typename T>
ALWAYS T simd_sum(T value) {
  const Shown<T>* shown = exchange(value);
  T sum = shown[0].value;
  for (int lane = 1; lane < 32; ++lane) sum += shown[lane].value;
  return sum;
}
template <typename T>
ALWAYS T simd_max(T value) {
  const Shown<T>* shown = exchange(value);
  T top = shown[0].value;
  for (int lane = 1; lane < 32; ++lane) top = max(top, shown[lane].value);
  return top;
}

// An 8x8 matrix that a simdgroup holds together. Which lane holds which element is nobody's business, so it can be
// loaded, stored and multiplied and there is no thread_elements().
template <typename T, int ROWS, int COLUMNS>
class simdgroup_matrix {
  static_assert(ROWS == 8 && COLUMNS == 8, "simdgroup matrices are 8x8");
  struct Pair {
    T value[2];
  } pair = {};
  template <typename S>
  friend struct Matrices;

 public:
  simdgroup_matrix() = default;
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <typename D>
struct Matrices {
  template <typename P>
  static ALWAYS void load(thread simdgroup_matrix<D, 8, 8>& m, P from, size_t stride) {
    for (uint i = 0; i < 2; ++i) {
      const uint at = 2 * mtl_lane() + i;
      m.pair.value[i] = from[at / 8 * stride + at % 8];
    }
    exchange(0);  // no lane may be missing
  }
  template <typename P>
  static ALWAYS void store(thread const simdgroup_matrix<D, 8, 8>& m, P to, size_t stride) {
    for (uint i = 0; i < 2; ++i) {
      const uint at = 2 * mtl_lane() + i;
      to[at / 8 * stride + at % 8] = m.pair.value[i];
    }
    exchange(0);
  }
  template <typename A, typename B>
  static ALWAYS void multiply(thread simdgroup_matrix<D, 8, 8>& d, thread const simdgroup_matrix<A, 8, 8>& a,
                              thread const simdgroup_matrix<B, 8, 8>& b, thread const simdgroup_matrix<D, 8, 8>& c) {
    const auto* left = exchange(a.pair);
    float row[8];
    for (uint k = 0; k < 8; ++k) row[k] = float(left[mtl_lane() / 4 * 4 + k / 2].value.value[k % 2]);
    const auto* right = exchange(b.pair);
    for (uint i = 0; i < 2; ++i) {
      float sum = float(c.pair.value[i]);
      for (uint k = 0; k < 8; ++k)
        sum = fma(row[k], float(right[k * 4 + mtl_lane() % 4].value.value[i]), sum);
      d.pair.value[i] = D(sum);
    }
  }
};

template <typename T>
ALWAYS void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const device T* from, size_t stride = 8) {
  Matrices<T>::load(m, from, stride);
}
template <typename T>
ALWAYS void simdgroup_store(thread const simdgroup_matrix<T, 8, 8>& m, device T* to, size_t stride = 8) {
  Matrices<T>::store(m, to, stride);
}
#ifdef TYPED
template <typename T>
ALWAYS void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const threadgroup T* from, size_t stride = 8) {
  Matrices<T>::load(m, from, stride);
}
template <typename T>
ALWAYS void simdgroup_store(thread const simdgroup_matrix<T, 8, 8>& m, threadgroup T* to, size_t stride = 8) {
  Matrices<T>::store(m, to, stride);
}
#endif
template <typename D, typename A, typename B>
ALWAYS void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, thread const simdgroup_matrix<A, 8, 8>& a,
                               thread const simdgroup_matrix<B, 8, 8>& b) {
  Matrices<D>::multiply(d, a, b, simdgroup_matrix<D, 8, 8>());
}
template <typename D, typename A, typename B>
ALWAYS void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
                                          thread const simdgroup_matrix<A, 8, 8>& a,
                                          thread const simdgroup_matrix<B, 8, 8>& b,
                                          thread const simdgroup_matrix<D, 8, 8>& c) {
  Matrices<D>::multiply(d, a, b, c);
}

}  // namespace metal

using namespace metal;
