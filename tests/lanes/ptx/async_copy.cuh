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
inline void prefetch_l2(const void* global, u32 bytes) {
  if ((uintptr_t)global % 16 || bytes % 16) fprintf(stderr, "a misaligned prefetch\n"), abort();
  for (u32 i = 0; i < bytes; i += 16) (void)*((const volatile u8*)global + i);  // readable
}
inline void cp_async16(u32 shared, const void* global) { copy_checked(shared, global, 16); }
inline void cp_async16_or_zeros(u32 shared, const void* global, bool copies) {
  if (copies) copy_checked(shared, global, 16); else memset(at_shared(shared, 16), 0, 16);
}
inline void prefetch_l2(const void* global) {
  volatile u8 first = *(const u8*)global;  // it has to be there
  (void)first;
}
inline void cp_async_commit() {}
template <int kPending> void cp_async_wait() {}
inline void cp_async_mbarrier_arrive(u32 b) { mbarrier_arrive(true, b); }
}  // namespace sage
