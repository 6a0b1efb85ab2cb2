// One token a row: top-k, top-p and min-p, temperature, and an exponential race on counter-based noise.
//
// One block a row. Logits of 16 bits have few values, so tokens are counted by value, in integers: whatever the order of
// counting, the counts are the same. The kept set is a prefix of the order (value falling, id rising): a border value
// and how many tokens of that value are kept, by lowest id. The race runs over the kept tokens only.
namespace sampler {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 8192;  // values counted at once, from the greatest down
constexpr int kOwn = kBins / kThreads;
constexpr int kGroup = 8;  // tokens that a thread takes in turn, 16 bytes
constexpr int kAhead = 4;  // groups that it loads at once; more need more registers than a block of this size has
constexpr int kListed = 2048;  // tokens of the border's value that are ranked by comparing each with each
constexpr float kLog2e = 1.4426950408889634f;

// Rows of `parameters`, 8 words: key (2), position, temperature, top-k, top-p, min-p, purpose; fractions as float bits.
constexpr int kWords = 8;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// 16 bits that order as the values do; -0 counts as 0.
template <typename T>
__device__ __forceinline__ int key_of(T value) {
  unsigned bits = reinterpret_cast<const unsigned short&>(value);
  if (bits == 0x8000u) bits = 0;
  return bits & 0x8000u ? 0xffffu & ~bits : bits | 0x8000u;
}

template <typename T>
__device__ __forceinline__ float value_of(int key) {
  T value;
  reinterpret_cast<unsigned short&>(value) = key & 0x8000 ? key & 0x7fff : 0xffff & ~key;
  return static_cast<float>(value);
}

template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct Pair<__half> {
  using Type = __half2;
};

template <typename T>
struct alignas(16) Group {
  T v[kGroup];

  // The greatest value.
  __device__ __forceinline__ float most() const {
    using Two = typename Pair<T>::Type;
    const Two* pairs = reinterpret_cast<const Two*>(v);
    const Two two = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
    return fmaxf(static_cast<float>(two.x), static_cast<float>(two.y));
  }
};

// Calls f(group, number of the group) for this thread's share of a row: groups t, t + kThreads, ... whatever the row's
// alignment. Places behind the row's end hold -inf.
template <typename T, int V, typename F>
__device__ __forceinline__ void each_group(const T* row, F f) {
  constexpr int kGroups = (V + kGroup - 1) / kGroup;
  for (int first = threadIdx.x; first < kGroups; first += kThreads * kAhead) {
    Group<T> ahead[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int g = first + a * kThreads;
      if constexpr (V % kGroup == 0) {
        if (g < kGroups) ahead[a] = reinterpret_cast<const Group<T>*>(row)[g];
      } else {
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          ahead[a].v[i] = g * kGroup + i < V ? row[g * kGroup + i] : static_cast<T>(-infinity());
      }
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (first + a * kThreads < kGroups) f(ahead[a], first + a * kThreads);
  }
}

struct Shared {
  unsigned bins[kBins + kThreads];  // whole numbers: they may be added in any order
  float sums[kWarps];
  unsigned counts[kWarps];
  int ids[kWarps];
  int key, keep, ties;
  float mass;
};

// Where a bin lies: a thread reads kOwn bins in a row, and one more word a thread keeps them on different banks.
__device__ __forceinline__ int at(int bin) { return bin + bin / kOwn; }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
}

// exp(value - top), 0 for -inf; `top` is not below any value.
__device__ __forceinline__ float mass_of(float value, float top) {
  float mass;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(mass) : "f"((value - top) * kLog2e));
  return mass;
}

// The row's greatest value, the mass of all tokens relative to it if asked for, and this thread's own greatest value.
template <typename T, int V>
__device__ void survey(const T* row, Shared& s, bool weigh, float& top, float& total, float& own) {
  own = -infinity();
  float sum = 0.0f;
  each_group<T, V>(row, [&](const Group<T>& x, int) {
    const float most = x.most();
    if (most > own) {
      if (weigh) sum *= mass_of(own, most);
      own = most;
    }
    if (!weigh || own == -infinity()) return;
    float masses[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) masses[i] = mass_of(static_cast<float>(x.v[i]), own);
#pragma unroll
    for (int width = kGroup / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) masses[i] += masses[i + width];
    sum += masses[0];
  });
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  top = warp_max(own);
  if (lane == 0) s.sums[warp] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, s.sums[w]);
  __syncthreads();
  if (!weigh) return;
  sum = warp_sum(own == -infinity() ? 0.0f : sum * mass_of(own, top));
  if (lane == 0) s.sums[warp] = sum;
  __syncthreads();
  total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += s.sums[w];
}

__device__ __forceinline__ void clear(Shared& s) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i <= kOwn; ++i) s.bins[threadIdx.x + i * kThreads] = 0;
  if (threadIdx.x == 0) s.key = -1;
  __syncthreads();
}

// Counts tokens with keys in (first - kBins, first], but not below `floor`.
template <typename T, int V>
__device__ void count(const T* row, Shared& s, int first, int floor) {
  const int least = max(floor, first - kBins + 1);
  const float least_value = value_of<T>(least);
  clear(s);
  each_group<T, V>(row, [&](const Group<T>& x, int g) {
    if (x.most() < least_value) return;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int key = key_of(x.v[i]);
      if (key >= least && key <= first && (V % kGroup == 0 || g * kGroup + i < V)) atomicAdd(&s.bins[at(first - key)], 1u);
    }
  });
  __syncthreads();
}

// Finds in the counted window where `tokens` tokens or `mass` are reached, values falling: then s.key is the border's
// key, s.keep how many of its tokens belong, s.ties how many there are, s.mass the mass through the last that belongs.
// Else s.key is -1. `tokens` and `mass` lose what the window holds.
template <typename T>
__device__ void find(Shared& s, int first, float top, unsigned& tokens, float& mass, float& before_window) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, start = threadIdx.x * kOwn;
  unsigned own = 0;
  float own_mass = 0.0f;
  for (int i = 0; i < kOwn; ++i) {
    const unsigned n = s.bins[at(start + i)];
    own += n;
    if (n) own_mass += n * mass_of(value_of<T>(first - start - i), top);
  }
  unsigned through = own;
  float mass_through = own_mass;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const unsigned n = __shfl_up_sync(0xffffffffu, through, d);
    const float m = __shfl_up_sync(0xffffffffu, mass_through, d);
    if (lane >= d) through += n, mass_through += m;
  }
  if (lane == 31) s.counts[warp] = through, s.sums[warp] = mass_through;
  __syncthreads();
  unsigned before = 0, all = 0;
  float mass_before = before_window, mass_all = before_window;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = all, mass_before = mass_all;
    all += s.counts[w], mass_all += s.sums[w];
  }
  const unsigned lanes_before = __shfl_up_sync(0xffffffffu, through, 1);
  const float lanes_mass = __shfl_up_sync(0xffffffffu, mass_through, 1);
  if (lane > 0) before += lanes_before, mass_before += lanes_mass;
  int found = -1, keep = 0, ties = 0;
  float reached = 0.0f;
  for (int i = 0; i < kOwn && found < 0; ++i) {
    const unsigned n = s.bins[at(start + i)];
    if (n == 0) continue;
    const float each = mass_of(value_of<T>(first - start - i), top);
    if (before + n >= tokens || mass_before + n * each >= mass) {
      const float wanted = ceilf((mass - mass_before) / each);
      keep = wanted < n ? max(static_cast<int>(wanted), 1) : n;
      if (tokens < before + keep) keep = tokens - before;
      found = first - start - i, ties = n, reached = mass_before + keep * each;
    }
    before += n;
    mass_before += n * each;
  }
  if (found >= 0) atomicMax(&s.key, found);
  __syncthreads();
  if (found >= 0 && s.key == found) s.keep = keep, s.ties = ties, s.mass = reached;
  if (s.key < 0) tokens -= all;
  before_window = mass_all;
  __syncthreads();
}

struct Border {
  int key, keep, ties;  // tokens of greater keys belong, and `keep` of the `ties` tokens with this one
  float mass;
};

// The border where `tokens` or `mass` are reached; key -1 where they are not.
template <typename T, int V>
__device__ Border border(const T* row, Shared& s, int greatest, int floor, float top, unsigned tokens, float mass,
                         int& counted) {
  float before = 0.0f;
  for (int first = greatest; first >= floor; first -= kBins) {
    if (counted != first) {
      count<T, V>(row, s, first, floor);
    } else {
      __syncthreads();
      if (threadIdx.x == 0) s.key = -1;
      __syncthreads();
    }
    counted = first;
    find<T>(s, first, top, tokens, mass, before);
    if (s.key >= 0) return {s.key, s.keep, s.ties, s.mass};
  }
  return {-1, 0, 0, 0.0f};
}

// The id of the `keep`-th token with this key, ids rising.
template <typename T, int V>
__device__ int last_tie(const T* row, Shared& s, int key, int keep) {
  constexpr int kSegment = (V + kWarps - 1) / kWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int start = warp * kSegment, end = min(start + kSegment, V);
  int own = 0;
  for (int id = start + lane; id < end; id += 32) own += key_of(row[id]) == key;
  own = __reduce_add_sync(0xffffffffu, own);
  __syncthreads();
  if (lane == 0) s.ids[warp] = own;
  __syncthreads();
  int before = 0;
  for (int w = 0; w < warp; ++w) before += s.ids[w];
  __syncthreads();
  if (before < keep && keep <= before + own) {
    for (int base = start; base < end; base += 32) {
      const int id = base + lane;
      const unsigned here = __ballot_sync(0xffffffffu, id < end && key_of(row[id]) == key);
      if (before + __popc(here) >= keep) {
        if (lane == 0) s.ids[0] = base + __fns(here, 0, keep - before);
        break;
      }
      before += __popc(here);
    }
  }
  __syncthreads();
  return s.ids[0];
}

// Philox4x32-10 (Salmon et al. 2011).
__device__ __forceinline__ uint4 philox(unsigned c0, unsigned c1, unsigned c2, unsigned k0, unsigned k1) {
  unsigned c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned low = c0 * 0xD2511F53u, low_high = __umulhi(c0, 0xD2511F53u);
    const unsigned high = c2 * 0xCD9E8D57u, high_high = __umulhi(c2, 0xCD9E8D57u);
    c0 = high_high ^ c1 ^ k0;
    c2 = low_high ^ c3 ^ k1;
    c1 = high;
    c3 = low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// log of an Exp(1) draw, -log1p(-(bits + 0.5) / 2^32).
__device__ __forceinline__ float log_exponential(unsigned bits) {
  const float uniform = fminf((static_cast<float>(bits) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
  return logf(-log1pf(-uniform));
}

// What this thread's tokens came to: the least score and whose it is.
struct Best {
  float score;
  int id;
};

__device__ __forceinline__ void enter(Best& best, unsigned bits, float value, int id, float top, float temperature) {
  const float score = log_exponential(bits) - (value - top) / temperature;
  if (score < best.score || (score == best.score && id < best.id)) best = {score, id};
}

// The kept token of the least log E - value / temperature, the lowest id of equals. Kept are values not below `least`
// that belong by the border, or all where its key is -1.
template <typename T, int V>
__device__ int race(const T* row, Shared& s, const unsigned* parameters, float top, float least, Border border) {
  const unsigned k0 = parameters[0], k1 = parameters[1], position = parameters[2], purpose = parameters[7];
  const float temperature = __uint_as_float(parameters[3]);
  const float border_value = border.key < 0 ? -infinity() : value_of<T>(border.key);
  const bool cut = border.key >= 0 && border.keep < border.ties, listed = cut && border.ties <= kListed;
  const int last = cut && !listed ? last_tie<T, V>(row, s, border.key, border.keep) : V;
  __syncthreads();
  if (threadIdx.x == 0) s.key = 0;  // tokens in the list, which lies where the counts lay
  __syncthreads();
  Best best = {infinity(), V};
  each_group<T, V>(row, [&](const Group<T>& x, int g) {
    if (x.most() < border_value) return;
#pragma unroll
    for (int half = 0; half < kGroup; half += 4) {
      bool kept[4], any = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int own = key_of(x.v[half + i]), id = g * kGroup + half + i;
        kept[i] = (own > border.key || (own == border.key && id <= last)) && static_cast<float>(x.v[half + i]) >= least &&
                  (V % kGroup == 0 || id < V);
        if (listed && kept[i] && own == border.key) {
          s.bins[atomicAdd(&s.key, 1)] = id;
          kept[i] = false;
        }
        any |= kept[i];
      }
      if (!any) continue;
      const uint4 block = philox(g * (kGroup / 4) + half / 4, position, purpose, k0, k1);
      const unsigned draws[4] = {block.x, block.y, block.z, block.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (kept[i]) enter(best, draws[i], static_cast<float>(x.v[half + i]), g * kGroup + half + i, top, temperature);
    }
  });
  __syncthreads();
  const int count = s.key;
  for (int t = threadIdx.x; t < count; t += kThreads) {
    const unsigned id = s.bins[t];
    int rank = 0;
    for (int other = 0; other < count; ++other) rank += s.bins[other] < id;
    if (rank >= border.keep) continue;
    const uint4 block = philox(id / 4, position, purpose, k0, k1);
    const unsigned bits = id % 4 < 2 ? (id % 2 ? block.y : block.x) : (id % 2 ? block.w : block.z);
    enter(best, bits, border_value, id, top, temperature);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float score = __shfl_xor_sync(0xffffffffu, best.score, d);
    const int id = __shfl_xor_sync(0xffffffffu, best.id, d);
    if (score < best.score || (score == best.score && id < best.id)) best = {score, id};
  }
  if (lane == 0) s.sums[warp] = best.score, s.ids[warp] = best.id;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
    if (s.sums[w] < best.score || (s.sums[w] == best.score && s.ids[w] < best.id)) best = {s.sums[w], s.ids[w]};
  return min(best.id, V - 1);  // a row without a finite value has no winner
}

template <typename T, int V>
__device__ void run(const T* logits, const unsigned* parameters, int* tokens) {
  __shared__ Shared s;
  const T* row = logits + static_cast<size_t>(blockIdx.x) * V;
  parameters += blockIdx.x * kWords;
  const unsigned top_k = parameters[4];
  const float top_p = __uint_as_float(parameters[5]), min_p = __uint_as_float(parameters[6]);
  float top, total = 0.0f, own;
  survey<T, V>(row, s, top_p < 1.0f && (top_k == 0 || top_k >= V), top, total, own);
  const int greatest = key_of(static_cast<T>(top));
  int counted = -1, floor = 0;
  Border limit = {-1, 0, 0, total};
  if (top_k > 0 && top_k < V) {
    if (top_k <= kThreads) {
      // So many threads have a token at least this great, so no smaller one can be among the first.
      clear(s);
      const int bin = greatest - key_of(static_cast<T>(own));
      if (bin < kBins) atomicAdd(&s.bins[at(bin)], 1u);
      __syncthreads();
      unsigned tokens_wanted = top_k;
      float no_mass = infinity(), before = 0.0f;
      find<T>(s, greatest, top, tokens_wanted, no_mass, before);
      if (s.key >= 0) floor = s.key;
    }
    limit = border<T, V>(row, s, greatest, floor, top, top_k, infinity(), counted);
  } else if (top_p < 1.0f) {
    // What lies below has less than 1 - top_p of the mass, by a factor of e, even if it were all tokens.
    const float least = top - logf(V / ((1.0f - top_p) * total)) - 1.0f;
    if (least > -1e4f) floor = max(key_of(static_cast<T>(least)) - 1, 0);
  }
  if (top_p < 1.0f) {
    const Border nucleus = border<T, V>(row, s, greatest, floor, top, V, top_p * limit.mass, counted);
    if (nucleus.key > limit.key || (nucleus.key == limit.key && nucleus.keep < limit.keep)) limit = nucleus;
  }
  const float least = min_p > 0.0f ? top + logf(min_p) : -infinity();
  const int token = race<T, V>(row, s, parameters, top, least, limit);
  if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}

}  // namespace sampler
