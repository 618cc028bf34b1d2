// Copies land at once; the barriers count as the hardware's do.
#pragma once
#include "block.h"

namespace sage {
constexpr bool kBulkCopy = ARCH >= 90;

struct Mbarrier { u32 phase; u16 arrivals, pending; };
inline Mbarrier* mbarrier(u32 address) { return (Mbarrier*)at_shared(address, 8); }
inline void mbarrier_init(u32 b, u32 arrivals) { *mbarrier(b) = {0, (u16)arrivals, (u16)arrivals}; }
inline void mbarrier_arrive(bool predicate, u32 b) {
  if (!predicate) return;
  Mbarrier* m = mbarrier(b);
  if (--m->pending == 0) m->pending = m->arrivals, ++m->phase;
  ++block.progress;
}
inline void mbarrier_wait(u32 b, u32 parity) { while ((mbarrier(b)->phase & 1) == parity) let_others_run(); }

inline void copy_checked(u32 shared, const void* global, u32 bytes) {
  if ((uintptr_t)global % 16 || bytes % 16) fprintf(stderr, "a misaligned copy\n"), abort();
  memcpy(at_shared(shared, 16), global, bytes);
}
inline void cp_async_bulk(bool predicate, u32 shared, const void* global, u32 bytes, u32 b) {
  if (predicate) copy_checked(shared, global, bytes), mbarrier_arrive(true, b);
}
inline void cp_async16(u32 shared, const void* global) { copy_checked(shared, global, 16); }
inline void cp_async_commit() {}
template <int kPending> void cp_async_wait() {}

inline u32 shared_address(const void* p) { return (u32)(int)((const char*)p - address_base); }
inline uint4 load_shared16(u32 a) { return *(uint4*)at_shared(a, 16); }
inline void store_shared16(u32 a, const u32 (&v)[4]) { memcpy(at_shared(a, 16), v, 16); }
inline void store_shared8(u32 a, u32 x, u32 y) { *(uint2*)at_shared(a, 8) = {x, y}; }
inline u32 load_shared(u32 a) { return *(u32*)at_shared(a, 4); }
inline float load_shared_float(u32 a) { return *(float*)at_shared(a, 4); }
inline float2 load_shared_float2(u32 a) { return *(float2*)at_shared(a, 8); }
inline void store_shared_float(u32 a, float x) { *(float*)at_shared(a, 4) = x; }

struct Matrices { u32 address, out[4]; };
inline uint4 ldmatrix_x4_trans(u32 a) {
  Matrices own{a, {}};
  collective(&own, [](void** lanes) {
    for (int i = 0; i < 32; ++i)
      for (int m = 0; m < 4; ++m) {
        const auto row = [&](int r) { return ((u16*)at_shared(((Matrices*)lanes[8 * m + r])->address, 16))[i / 4]; };
        ((Matrices*)lanes[i])->out[m] = row(2 * (i % 4)) | (u32)row(2 * (i % 4) + 1) << 16;
      }
  });
  return {own.out[0], own.out[1], own.out[2], own.out[3]};
}

constexpr bool kProgrammaticLaunch = ARCH >= 90;
inline void grid_dependency_wait() {}
inline void grid_launch_dependents() {}

inline void store_release(i32* to, i32 x) { *to = x; }
inline i32 load_acquire(const i32* from) { return *from; }
}  // namespace sage
