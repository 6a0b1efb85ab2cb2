// Runs a kernel's lanes and watches every access to memory that they make.
//
// A lane is a fiber. It runs until it meets the others at a simdgroup function or a barrier, or ends; lanes that should
// meet there and do not are an error. The kernel is compiled with the calls of clang's thread sanitizer before each load
// and store, and with the checks of its undefined-behaviour sanitizer; the functions below are what those calls reach.
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace {

constexpr int kSimd = 32, kMaxLanes = 1024, kMaxBuffers = 64;
constexpr size_t kStack = 64 << 10, kSpacing = size_t(1) << 30, kThreadgroupBytes = 32 << 10, kGranule = 2;

// Switching lanes is most of the work. Clang's own jumps save three registers, the C library's save and scramble them all.
#if defined(__x86_64__)
typedef void* Jump[5];
#define SET_JUMP(jump) __builtin_setjmp(jump)
#define LONG_JUMP(jump) __builtin_longjmp(jump, 1)
#else
typedef jmp_buf Jump;
#define SET_JUMP(jump) _setjmp(jump)
#define LONG_JUMP(jump) _longjmp(jump, 1)
#endif

enum State { kReady, kExchange, kSimdBarrier, kBarrier, kDone };
const char* const kStateNames[] = {"running", "in a simdgroup function", "at a simdgroup barrier",
                                   "at a threadgroup barrier", "ended"};

struct Position {  // as the kernel's wrapper reads it
  uint32_t in_grid[3], in_threadgroup[3], threadgroup[3], threads[3], grid[3], groups[3];
  uint32_t index, lane, simdgroup, simdgroups;
};

struct Lane {
  State state;
  const void* site;
  int flags;
  unsigned turn;  // of the two exchange boards
  bool started;  // its fiber
  Jump at;
  ucontext_t context;
  char* stack;
  Position position;
};

struct Buffer {
  char* at;
  size_t bytes;
  bool output;
  const char* name;
  uint32_t* writers;  // by byte, one more than the lane's number in the grid
};

// Who touched a granule of threadgroup memory, and when: `barrier` counts the threadgroup's barriers, `simd` its simdgroup's.
struct Touch {
  uint32_t barrier;
  uint32_t simd;
  int16_t lane;  // kMany: lanes of one simdgroup; kAll: of several
  int16_t simdgroup;
};
constexpr int16_t kMany = -1, kAll = -2;
struct Cell {
  Touch write, read;
};

typedef void (*Entry)(void** buffers, const Position* position);

Lane lanes[kMaxLanes];
Buffer buffers[kMaxBuffers];
void* pointers[kMaxBuffers];
Cell cells[kThreadgroupBytes / kGranule];
alignas(16) char boards[kMaxLanes / kSimd][2][kSimd][16];
uint32_t simd_barriers[kMaxLanes / kSimd];
char* arena;
int buffer_count, lane_count;
char *shared_begin, *shared_end;
uint32_t barriers, first_barrier;
Lane* current;
Entry entry;
Jump scheduler;
bool faulted;
char* message;
size_t message_bytes;

[[noreturn]] void fault(const char* format, ...) {
  char what[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  if (current) {
    const Position& p = current->position;
    snprintf(message, message_bytes, "%s (thread %u of threadgroup %u,%u,%u)", what, p.index, p.threadgroup[0],
             p.threadgroup[1], p.threadgroup[2]);
  } else {
    snprintf(message, message_bytes, "%s", what);
  }
  faulted = true;
  LONG_JUMP(scheduler);
}

// A fiber serves one lane after another: making one costs system calls.
void serve_lanes() {
  for (;;) {
    Lane& lane = *current;
    entry(pointers, &lane.position);
    lane.state = kDone;
    if (!SET_JUMP(lane.at)) LONG_JUMP(scheduler);
  }
}

void resume(Lane& lane) {
  current = &lane;
  if (lane.started) LONG_JUMP(lane.at);
  lane.started = true;
  if (!lane.stack)
    lane.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  getcontext(&lane.context);
  lane.context.uc_stack.ss_sp = lane.stack;
  lane.context.uc_stack.ss_size = kStack;
  lane.context.uc_link = nullptr;
  makecontext(&lane.context, serve_lanes, 0);
  setcontext(&lane.context);
  abort();
}

void wait_in(State state, const void* site, int flags) {
  Lane& lane = *current;
  lane.state = state;
  lane.site = site;
  lane.flags = flags;
  if (!SET_JUMP(lane.at)) LONG_JUMP(scheduler);
}

bool earlier(const Touch& touch) {  // whether a barrier lies between that touch and now
  if (touch.barrier < barriers) return true;
  const unsigned simdgroup = current->position.simdgroup;
  return touch.lane != kAll && unsigned(touch.simdgroup) == simdgroup && touch.simd < simd_barriers[simdgroup];
}

void touch_shared(size_t offset, size_t bytes, bool write) {
  const int16_t me = int16_t(current->position.index), group = int16_t(current->position.simdgroup);
  for (size_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    Cell& cell = cells[i];
    const bool written = cell.write.barrier >= first_barrier;
    if (!write && !written) fault("reads threadgroup byte %zu, which nothing has written", i * kGranule);
    if (written && cell.write.lane != me && !earlier(cell.write))
      fault("race: threads %d and %d on threadgroup byte %zu, no barrier between", cell.write.lane, me, i * kGranule);
    const Touch now = {barriers, simd_barriers[group], me, group};
    Touch& read = cell.read;
    const bool read_now = read.barrier >= first_barrier && !earlier(read);
    if (write) {
      if (read_now && read.lane != me)
        fault("race: thread %d writes threadgroup byte %zu that others read, no barrier between", me, i * kGranule);
      cell.write = now;
    } else if (!read_now || read.lane == me) {
      read = now;
    } else {
      read.lane = read.lane != kAll && read.simdgroup == group ? kMany : kAll;
      read.simd = simd_barriers[group];
    }
  }
}

void touch(const void* address, size_t bytes, bool write, bool aligned = true) {
  char* at = const_cast<char*>(static_cast<const char*>(address));
  if (at >= current->stack && at + bytes <= current->stack + kStack) return;
  if (at >= arena && at < arena + kMaxBuffers * kSpacing) {
    // A buffer lies in the middle of its own spacing, so an index that is a little too small or too large stays in it.
    const size_t number = size_t(at - arena) / kSpacing;
    const Buffer* buffer = &buffers[number];
    if (number >= size_t(buffer_count)) fault("%s outside of every buffer", write ? "writes" : "reads");
    const int64_t offset = at - buffer->at;
    if (offset < 0 || offset + int64_t(bytes) > int64_t(buffer->bytes))
      fault("%s byte %lld of %s, out of bounds", write ? "writes" : "reads", (long long)offset, buffer->name);
    if (aligned && size_t(offset) % bytes) fault("%zu bytes at byte %lld of %s, unaligned", bytes, (long long)offset, buffer->name);
    if (write && !buffer->output) fault("writes %s, an input", buffer->name);
    if (!buffer->output) return;
    const Position& p = current->position;
    const uint32_t me = 1 + p.in_grid[0] + p.grid[0] * (p.in_grid[1] + p.grid[1] * p.in_grid[2]);
    for (size_t i = size_t(offset); i < size_t(offset) + bytes; ++i) {
      if (buffer->writers[i] && buffer->writers[i] != me)
        fault("race: %s byte %zu of %s, which thread %u of the grid wrote", write ? "writes" : "reads", i, buffer->name,
              buffer->writers[i] - 1);
      if (!write && !buffer->writers[i]) fault("reads byte %zu of %s, which nothing has written", i, buffer->name);
      if (write) buffer->writers[i] = me;
    }
    return;
  }
  if (at >= shared_begin && at + bytes <= shared_end) {
    if (aligned && (at - shared_begin) % bytes)
      fault("%zu bytes at threadgroup byte %zu, unaligned", bytes, size_t(at - shared_begin));
    return touch_shared(size_t(at - shared_begin), bytes, write);
  }
  const char* board = boards[current->position.simdgroup][(current->turn - 1) % 2][0];
  if (!write && current->turn && at >= board && at + bytes <= board + kSimd * 16) return;
  if (at >= boards[0][0][0] && at < boards[0][0][0] + sizeof boards) fault("reads from a lane that does not exist");
  fault("%s %zu bytes outside of every buffer", write ? "writes" : "reads", bytes);
}

// Moves on every lane that may; false once all have ended.
bool release() {
  bool moved = false, waiting = false, ended = false;
  current = nullptr;
  for (int first = 0; first < lane_count; first += kSimd) {
    const int count = lane_count - first < kSimd ? lane_count - first : kSimd;
    Lane* group = lanes + first;
    for (int i = 1; i < count; ++i)
      if (group[i].state != group[0].state || (group[0].state != kDone && group[i].site != group[0].site))
        fault("simdgroup %d diverges: lane 0 is %s, lane %d %s%s", first / kSimd, kStateNames[group[0].state], i,
              kStateNames[group[i].state], group[i].state == group[0].state ? " elsewhere" : "");
    const State state = group[0].state;
    if (state == kExchange && count < kSimd) fault("a simdgroup function in a simdgroup of %d lanes", count);
    if (state == kExchange || state == kSimdBarrier) {
      if (state == kSimdBarrier && group[0].flags & 2) ++simd_barriers[first / kSimd];
      for (int i = 0; i < count; ++i) group[i].state = kReady;
      moved = true;
    }
    waiting |= state == kBarrier;
    ended |= state == kDone;
  }
  if (moved || !waiting) return moved;
  if (ended) fault("a threadgroup barrier that some simdgroups never reach");
  for (int i = 0; i < lane_count; ++i) {
    if (lanes[i].site != lanes[0].site) fault("simdgroups wait at different threadgroup barriers");
    lanes[i].state = kReady;
  }
  if (lanes[0].flags & 2) ++barriers;
  return true;
}

// False where a lane or their meeting went wrong.
bool run_threadgroup() {
  first_barrier = ++barriers;
  memset(shared_begin, 0xff, size_t(shared_end - shared_begin));
  memset(simd_barriers, 0, sizeof simd_barriers);
  for (int i = 0; i < lane_count; ++i) {
    Lane& lane = lanes[i];
    lane.state = kReady;
    lane.turn = 0;
  }
  volatile int next = 0;  // lives across the jumps back from lanes
  do {
    for (next = 0; next < lane_count; next = next + 1)
      if (lanes[next].state == kReady) {
        if (!SET_JUMP(scheduler)) resume(lanes[next]);
        if (faulted) return false;
      }
  } while (release());
  return true;
}

}  // namespace

extern "C" {

const void* mtl_exchange(const void* value, size_t bytes) {
  const Position& p = current->position;
  char(*board)[16] = boards[p.simdgroup][current->turn++ % 2];
  if (bytes > 16) fault("a simdgroup function on %zu bytes", bytes);
  memcpy(board[p.lane], value, bytes);
  wait_in(kExchange, __builtin_return_address(0), 0);
  return board;
}
void mtl_threadgroup_barrier(int flags) { wait_in(kBarrier, __builtin_return_address(0), flags); }
void mtl_simdgroup_barrier(int flags) { wait_in(kSimdBarrier, __builtin_return_address(0), flags); }
uint32_t mtl_lane() { return current->position.lane; }

// Rounding to nearest, ties to even, as the float to half and bfloat conversions of Metal.
__bf16 __truncsfbf2(float value) {
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if ((bits & 0x7fffffff) > 0x7f800000) return __builtin_bit_cast(__bf16, uint16_t(bits >> 16 | 0x40));
  bits += 0x7fff + (bits >> 16 & 1);
  return __builtin_bit_cast(__bf16, uint16_t(bits >> 16));
}
_Float16 __truncsfhf2(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  uint32_t half;
  if (size > 0x7f800000) {
    half = 0x7e00;
  } else if (size >= 0x477ff000) {  // from halfway above the largest half
    half = 0x7c00;
  } else if (size < 0x38800000) {  // below the smallest normal half: the sum's own rounding rounds to its steps
    half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, size) + 0.5f) - 0x3f000000;
  } else {
    half = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
  }
  return __builtin_bit_cast(_Float16, uint16_t(sign | half));
}
float __extendhfsf2(_Float16 value) {
  const uint16_t bits = __builtin_bit_cast(uint16_t, value);
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, size = bits & 0x7fff;
  uint32_t wide;
  if (size >= 0x7c00) {
    wide = 0x7f800000 | (size & 0x3ff) << 13;
  } else if (size < 0x400) {
    wide = __builtin_bit_cast(uint32_t, float(size) * 0x1p-24f);
  } else {
    wide = (size << 13) + 0x38000000;
  }
  return __builtin_bit_cast(float, sign | wide);
}

#define SIZE(n)                                                                 \
  void __tsan_read##n(void* at) { touch(at, n, false); }                        \
  void __tsan_write##n(void* at) { touch(at, n, true); }                        \
  void __tsan_unaligned_read##n(void* at) { touch(at, n, false, false); }       \
  void __tsan_unaligned_write##n(void* at) { touch(at, n, true, false); }
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16)
void __tsan_init() {}
void* __tsan_memset(void* at, int value, size_t bytes) {
  touch(at, bytes, true, false);
  return memset(at, value, bytes);
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  touch(from, bytes, false, false);
  touch(to, bytes, true, false);
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  touch(from, bytes, false, false);
  touch(to, bytes, true, false);
  return memmove(to, from, bytes);
}

struct Place {  // that the sanitizer's records start with
  const char* file;
  uint32_t line, column;
};
#define CHECK(name, text) \
  void __ubsan_handle_##name##_abort(const Place* at) { fault("%s in line %u", text, at->line); }
CHECK(out_of_bounds, "an array index out of bounds")
CHECK(shift_out_of_bounds, "a shift by more than the width")
CHECK(add_overflow, "signed overflow")
CHECK(sub_overflow, "signed overflow")
CHECK(mul_overflow, "signed overflow")
CHECK(negate_overflow, "signed overflow")
CHECK(divrem_overflow, "division by zero")

// A copy of `bytes` bytes far from every other; null where there are too many.
void* mtl_buffer(int number, const void* from, size_t bytes, int output, const char* name) {
  if (!arena)
    arena = static_cast<char*>(
        mmap(nullptr, kMaxBuffers * kSpacing, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (arena == MAP_FAILED || number >= kMaxBuffers || bytes + 16 > kSpacing / 2) return nullptr;
  char* at = arena + size_t(number) * kSpacing + kSpacing / 2;
  mprotect(at, bytes + 16, PROT_READ | PROT_WRITE);
  if (output)
    memset(at, 0xff, bytes);  // a NaN in every floating-point type
  else
    memcpy(at, from, bytes);
  free(buffers[number].writers);
  buffers[number] = {at, bytes, bool(output), name, output ? static_cast<uint32_t*>(calloc(bytes, 4)) : nullptr};
  pointers[number] = at;
  return at;
}

// Runs the whole grid; 0, or 1 with what went wrong in `error`.
int mtl_launch(Entry kernel, char* begin, char* end, int count, const uint32_t* grid, const uint32_t* threads, char* error,
               size_t error_bytes) {
  entry = kernel;
  shared_begin = begin;
  shared_end = end;
  buffer_count = count;
  message = error;
  message_bytes = error_bytes;
  current = nullptr;
  faulted = false;
  if (size_t(end - begin) > kThreadgroupBytes) {
    snprintf(error, error_bytes, "%zu bytes of threadgroup memory", size_t(end - begin));
    return 1;
  }
  uint32_t size[3], groups[3];
  for (int d = 0; d < 3; ++d) {  // as MLX dispatches
    size[d] = threads[d] < grid[d] ? threads[d] : grid[d];
    groups[d] = (grid[d] + size[d] - 1) / size[d];
  }
  if (size[0] * size[1] * size[2] > kMaxLanes) {
    snprintf(error, error_bytes, "%u threads in a threadgroup", size[0] * size[1] * size[2]);
    return 1;
  }
  for (uint32_t g = 0; g < groups[0] * groups[1] * groups[2]; ++g) {
    const uint32_t at[3] = {g % groups[0], g / groups[0] % groups[1], g / groups[0] / groups[1]};
    lane_count = 0;
    for (uint32_t t = 0; t < size[0] * size[1] * size[2]; ++t) {
      const uint32_t in[3] = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
      Position p = {};
      bool inside = true;
      for (int d = 0; d < 3; ++d) {
        p.in_threadgroup[d] = in[d];
        p.threadgroup[d] = at[d];
        p.threads[d] = size[d];
        p.grid[d] = grid[d];
        p.groups[d] = groups[d];
        p.in_grid[d] = at[d] * size[d] + in[d];
        inside &= p.in_grid[d] < grid[d];
      }
      if (!inside) continue;
      p.index = uint32_t(lane_count);
      p.lane = p.index % kSimd;
      p.simdgroup = p.index / kSimd;
      lanes[lane_count++].position = p;
    }
    for (int i = 0; i < lane_count; ++i) lanes[i].position.simdgroups = uint32_t((lane_count + kSimd - 1) / kSimd);
    if (!run_threadgroup()) {
      for (Lane& lane : lanes) lane.started = false;  // fibers end in the midst of a kernel
      return 1;
    }
  }
  return 0;
}
}
