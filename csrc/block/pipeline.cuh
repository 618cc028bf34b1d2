// The pipeline of KV tiles for mma.sync: global memory → a ring of stages in shared memory, ahead of their use.
//
// Every warp visits the same tiles: acquire<kBack>(n) → use tile() → release(). Tile n − kBack, none if that is negative, is the one that
// is visited kStages − 1 after the current one (with one stage: the current one). From Hopper on one thread copies whole tiles and warps
// need not keep in step: each stage has a `full` barrier (its tile is loaded) and an `empty` one (all warps have released it). Before
// Hopper every thread copies its share and __syncthreads() keeps the CTA in step.
#pragma once
#include "../ptx/async_copy.cuh"
#include "../ptx/shared.cuh"
#include "../ptx/special.cuh"

namespace sage {

// kFirstInSmem: `first` is kept behind the ring in shared memory instead of a register.
template <int kTileBytes, int kStages, int kWarps, bool kFirstInSmem>
struct KvPipeline {
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBytes = kStages * kTileBytes + (kBulkCopy ? 16 * kStages : 0) + (kFirstInSmem ? 16 : 0);
  static constexpr int kFirst = kBytes - 16;                  // its offset there
  static constexpr int kCopies = kTileBytes / 16 / kThreads;  // 16-byte copies of every thread; the first threads make one more

  u32 shared;        // address of the ring; the {full, empty} barriers follow
  const u8* source;  // all tiles; a kernel parameter, so it takes no register
  int first;         // the head's tile 0 is this one of `source`
  int stage;         // of the current tile
  u32 phase;         // of its barriers

  __device__ __forceinline__ u32 tile() const { return shared + stage * kTileBytes; }
  __device__ __forceinline__ u32 full(int s) const { return shared + kStages * kTileBytes + 16 * s; }
  __device__ __forceinline__ u32 empty(int s) const { return full(s) + 8; }

  __device__ __forceinline__ int before() const { return stage == 0 ? kStages - 1 : stage - 1; }

  // Starts the first kStages − 1 copies. next(): the next tile's number, −1 after the last.
  template <class Next>
  __device__ __forceinline__ void start(u32 ring, const u8* all_tiles, int tile0, Next next) {
    shared = ring, source = all_tiles, first = tile0, stage = 0, phase = 0;
    if constexpr (kFirstInSmem)  // a __syncthreads() follows, here or in acquire(), before it is read
      if (threadIdx.x == 0) store_shared_float(shared + kFirst, __int_as_float(tile0));
    if constexpr (kBulkCopy) {
      if (threadIdx.x == 0)
#pragma unroll
        for (int s = 0; s < kStages; ++s) mbarrier_init(full(s), 1), mbarrier_init(empty(s), kWarps);
      __syncthreads();  // the barriers are initialised
    }
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fetch<0, true>(s, next());
  }

  // Waits for the current tile: all threads call it and may then read tile().
  template <int kBack>
  __device__ __forceinline__ void acquire(int n) {
    if constexpr (kBulkCopy) {
      if constexpr (kStages == 1) {  // no copy ahead: starts once all warps have released the previous tile
        mbarrier_wait(empty(0), phase ^ 1);
        fetch<kBack>(0, n);
      }
      mbarrier_wait(full(stage), phase);
    } else if constexpr (kStages == 1) {
      __syncthreads();  // every warp has released the stage
      fetch<kBack>(0, n);
      cp_async_wait<0>();
      __syncthreads();  // every thread's copies are visible
    } else {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the tile is visible to all, and every warp has released the previous stage
      fetch<kBack>(before(), n);
    }
  }

  // From Hopper on: refills the previous stage once all warps have released it.
  template <int kBack>
  __device__ __forceinline__ void refill(int n) {
    if constexpr (kBulkCopy && kStages > 1) {
      if (n >= kBack) mbarrier_wait(empty(before()), stage == 0 ? phase ^ 1 : phase);
      fetch<kBack>(before(), n);
    }
  }

  // The warp releases the current tile and moves to the next.
  __device__ __forceinline__ void release() {
    if constexpr (kBulkCopy) mbarrier_arrive(threadIdx.x % 32 == 0, empty(stage));
    if (++stage == kStages) stage = 0, phase ^= 1;
  }

 private:
  // Starts the copies of tile n − kBack into stage s.
  template <int kBack, bool kStart = false>
  __device__ __forceinline__ void fetch(int s, int n) {
    const int tile0 = kFirstInSmem && !kStart ? __float_as_int(load_shared_float(shared + kFirst)) : first;
    const u8* from = source + (i64)(tile0 + n - kBack) * kTileBytes;
    const u32 to = shared + s * kTileBytes;
    if constexpr (kBulkCopy) {
      cp_async_bulk(threadIdx.x == 0 && n >= kBack, to, from, kTileBytes, full(s));
    } else {
      if (n >= kBack) {
        const u32 at = 16 * special_tid_x();  // read again, so that no register keeps it from tile to tile
#pragma unroll
        for (int c = 0; c < kCopies; ++c) cp_async16(to + at + 16 * kThreads * c, from + at + 16 * kThreads * c);
        if (at < kTileBytes - 16 * kThreads * kCopies) cp_async16(to + at + 16 * kThreads * kCopies, from + at + 16 * kThreads * kCopies);
      }
      cp_async_commit();  // also without a copy, so that the group count of the waits stays the same
    }
  }
};

}  // namespace sage
