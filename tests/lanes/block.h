// A thread block on the host: every CUDA thread is a fiber, and what a warp does together (shuffles, votes, MMAs) runs once all 32
// lanes have arrived. Slow and exact: it executes the device code as written, with every race a missing barrier would cause.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#include "ptx/types.cuh"

struct uint4 { u32 x, y, z, w; };
struct uint2 { u32 x, y; };
struct float4 { float x, y, z, w; };
struct float2 { float x, y; };
struct int2 { int x, y; };
struct Index { unsigned x, y, z; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcg(T* p, T x) { *p = x; }

struct Fiber {
  ucontext_t context;  // its beginning
  jmp_buf place;       // where it waits
  bool begun;
  Index thread;
  bool done;
};

struct Warp {
  int arrived = 0;
  unsigned generation = 0;
  void* argument[32];
  std::deque<std::vector<std::function<void()>>> products{1};  // asynchronous ones, by group; the last group is not committed
};

inline void let_others_run();

struct NamedBarrier {
  int arrived = 0;
  unsigned generation = 0;
  inline bool arrive(int threads);  // whether it is the last of them
  inline void wait(int threads);
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  NamedBarrier barriers[16];
  int arrived = 0, alive = 0;
  unsigned generation = 0;
  long progress = 0;  // grows whenever something happens that a waiting fiber may wait for
};

static Block block;
static Fiber* current;
static jmp_buf scheduler;
static Index block_index, grid_size;
static std::function<void()>* kernel;
alignas(1024) static u8 dynamic_shared[232 * 1024];
static char address_base[8];  // shared addresses are distances from here

#define threadIdx (current->thread)
#define blockIdx block_index
#define gridDim grid_size

// Jumps, as swapcontext asks the kernel about signals each time.
inline void let_others_run() {
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

inline bool NamedBarrier::arrive(int threads) {
  if (++arrived < threads) return false;
  arrived = 0, ++generation, ++block.progress;
  return true;
}

inline void NamedBarrier::wait(int threads) {
  const unsigned own = generation;
  if (!arrive(threads))
    while (generation == own) let_others_run();
}

inline void run(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

inline void fiber_main() {
  (*kernel)();
  current->done = true, --block.alive, ++block.progress;
  _longjmp(scheduler, 1);
}

// The last of the warp's lanes to arrive runs `together` on all lanes' arguments.
template <class Together>
void collective(void* argument, Together together) {
  Warp& warp = block.warps[threadIdx.x / 32];
  warp.argument[threadIdx.x % 32] = argument;
  const unsigned generation = warp.generation;
  if (++warp.arrived == 32) {
    together(warp.argument);
    warp.arrived = 0, ++warp.generation, ++block.progress;
  } else {
    while (warp.generation == generation) let_others_run();
  }
}

inline void __syncwarp() { collective(nullptr, [](void**) {}); }

inline void __syncthreads() {
  const unsigned generation = block.generation;
  if (++block.arrived == (int)block.fibers.size())
    block.arrived = 0, ++block.generation, ++block.progress;
  else
    while (block.generation == generation) let_others_run();
}

inline bool __syncthreads_and(bool x) {
  static bool all;
  __syncthreads();  // every thread has the last answer
  all = true;
  __syncthreads();
  all = all && x;
  __syncthreads();
  return all;
}

// Runs the blocks one after the other; shared memory starts as garbage. Aborts where all threads wait for ever.
constexpr size_t kStackBytes = 96 * 1024;
static std::vector<char*> stacks;  // by thread, kept from one block to the next

static void run_grid(unsigned blocks, int threads, std::function<void()> body) {
  kernel = &body, grid_size = {blocks, 1, 1};
  for (unsigned b = 0; b < blocks; ++b) {
    memset(dynamic_shared, 0xFF, sizeof dynamic_shared);
    block = Block();
    block.fibers.resize(threads), block.warps.resize(threads / 32), block.alive = threads, block_index = {b, 0, 0};
    for (int t = 0; t < threads; ++t) {
      Fiber& f = block.fibers[t];
      f.thread = {(unsigned)t, 0, 0}, f.done = f.begun = false;
      if ((int)stacks.size() == t) stacks.push_back((char*)malloc(kStackBytes));
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = stacks[t], f.context.uc_stack.ss_size = kStackBytes, f.context.uc_link = nullptr;
      makecontext(&f.context, fiber_main, 0);
    }
    for (long idle = 0, last = -1; block.alive; last = block.progress) {
      for (Fiber& f : block.fibers)
        if (!f.done) run(f);
      idle = block.progress == last ? idle + 1 : 0;
      if (idle > 50) fprintf(stderr, "deadlock: %d threads of block %u wait for ever\n", block.alive, b), abort();
    }
  }
}

inline u32 __float_as_uint(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline float __int_as_float(int bits) { return __uint_as_float((u32)bits); }

inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 bytes = (u64)b << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) out |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return out;
}

template <class T>
struct Exchange { T in, out; int lane; };  // lane: what the index of the other lane is made from

template <class T>
T __shfl_xor_sync(unsigned, T x, int lane_mask) {
  Exchange<T> e{x, T(), lane_mask};
  collective(&e, [](void** lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* own = (Exchange<T>*)lanes[i];
      own->out = ((Exchange<T>*)lanes[i ^ own->lane])->in;
    }
  });
  return e.out;
}

// lane: of the warp's groups of `width` lanes, which one's value each of them gets.
template <class T>
T __shfl_sync(unsigned, T x, int lane, int width = 32) {
  Exchange<T> e{x, T(), (int)threadIdx.x % 32 / width * width + lane};
  collective(&e, [](void** lanes) {
    for (int i = 0; i < 32; ++i) ((Exchange<T>*)lanes[i])->out = ((Exchange<T>*)lanes[((Exchange<T>*)lanes[i])->lane])->in;
  });
  return e.out;
}

inline u32 __ballot_sync(unsigned, bool x) {
  Exchange<u32> e{x ? 1u : 0u, 0, 0};
  collective(&e, [](void** lanes) {
    u32 votes = 0;
    for (int i = 0; i < 32; ++i) votes |= ((Exchange<u32>*)lanes[i])->in << i;
    for (int i = 0; i < 32; ++i) ((Exchange<u32>*)lanes[i])->out = votes;
  });
  return e.out;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == 0xFFFFFFFFu; }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __ffs(u32 x) { return __builtin_ffs((int)x); }

inline u32 __umulhi(u32 a, u32 b) { return (unsigned long long)a * b >> 32; }
inline void __threadfence() {}
inline int atomicAdd(int* p, int x) { return *p += x, *p - x; }
inline u64 atomicAdd(u64* p, u64 x) { return *p += x, *p - x; }
inline u32 atomicOr(u32* p, u32 x) { return *p |= x, *p; }
inline int atomicMin(int* p, int x) { return *p = *p < x ? *p : x; }
inline int atomicMax(int* p, int x) { return *p = *p > x ? *p : x; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a > b ? a : b; }

inline u8* at_shared(u32 address, int alignment) {
  u8* p = (u8*)address_base + (int)address;
  if ((uintptr_t)p % alignment) fprintf(stderr, "a misaligned shared address\n"), abort();
  return p;
}

inline float half_to_float(u32 bits) { const u16 low = (u16)bits; _Float16 h; memcpy(&h, &low, 2); return (float)h; }
inline u32 float_to_half(float x) { const _Float16 h = (_Float16)x; u16 bits; memcpy(&bits, &h, 2); return bits; }

// e4m3: a sign, four bits of exponent (bias 7), three of mantissa; 0x7F is NaN, there is no infinity.
inline float e4m3_value(u8 bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float x = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return (bits & 0x7F) == 0x7F ? NAN : bits & 0x80 ? -x : x;
}
// To nearest even; beyond ±448: ±448.
inline u32 e4m3_of(float x) {
  const u32 sign = std::signbit(x) ? 0x80u : 0u;
  const float size = fminf(fabsf(x), 448.0f);
  const int exponent = size < 0x1p-6f ? -6 : ilogbf(size);
  return sign | (u32)(8 * (exponent + 7) + (int)nearbyintf(ldexpf(size, 3 - exponent)) - 8);
}

// Rounded up and down: the sum in double, which holds the product exactly, then the neighbouring float where that is needed.
inline float __fmaf_ru(float a, float b, float c) {
  const double exact = (double)a * b + c;
  const float x = (float)exact;
  return x < exact ? nextafterf(x, INFINITY) : x;
}
inline float __fsub_ru(float a, float b) { return __fmaf_ru(1.0f, a, -b); }
inline float __fadd_rd(float a, float b) { return -__fmaf_ru(1.0f, -a, -b); }

inline u32 __vmaxu2(u32 a, u32 b) { return max(a & 0xFFFF, b & 0xFFFF) | max(a >> 16, b >> 16) << 16; }
inline int __vimax3_s32(int a, int b, int c) { return max(a, max(b, c)); }

inline u32 __dp4a(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 0xFF) * (b >> 8 * i & 0xFF);
  return c;
}
inline i32 __dp4a(i32 a, i32 b, i32 c) {
  for (int i = 0; i < 4; ++i) c += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
  return c;
}
