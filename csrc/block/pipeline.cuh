// The pipeline of KV tiles: global memory → a ring of stages in shared memory, ahead of their use.
//
// Every warp walks over the same tiles: acquire(ahead) → use the stage → release(), `ahead` being the tile that comes kStages − 1 after the
// current one, −1 where there is none (the current one itself where there is one stage). From Hopper on one thread has
// whole tiles fetched and the warps need not keep step: a `full` barrier a stage says that its tile has landed, an `empty` one
// that all warps are done with it. Before Hopper every thread copies its share and the block keeps step with __syncthreads().
#pragma once
#include "../ptx/async_copy.cuh"
#include "../ptx/shared.cuh"
#include "../ptx/special.cuh"

namespace sage {

// kFirstInSmem: the number of the walk's tile 0 waits behind the ring, not in a register.
template <int kTileBytes, int kStages, int kWarps, bool kFirstInSmem>
struct KvPipeline {
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBytes = kStages * kTileBytes + (kBulkCopy ? 16 * kStages : 0) + (kFirstInSmem ? 16 : 0);
  static constexpr int kFirst = kBytes - 16;  // of `first` there
  static constexpr int kCopies = kTileBytes / 16 / kThreads;  // of 16 bytes, by every thread; the first few make one more

  u32 shared;        // the ring, then {full, empty} barriers
  const u8* source;  // tiles of kTileBytes; a kernel parameter, so that it occupies no register
  int first;         // tile 0 of the walk is this one of them
  int stage;         // of the acquired tile
  u32 phase;         // of its barriers

  __device__ __forceinline__ u32 tile() const { return shared + stage * kTileBytes; }
  __device__ __forceinline__ u32 full(int s) const { return shared + kStages * kTileBytes + 16 * s; }
  __device__ __forceinline__ u32 empty(int s) const { return full(s) + 8; }

  __device__ __forceinline__ int before() const { return stage == 0 ? kStages - 1 : stage - 1; }

  // next(): the number of the walk's next tile, −1 behind the last.
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
    for (int s = 0; s < kStages - 1; ++s) fetch<true>(s, next());
  }

  // Waits for the next tile. Called by all threads, which may then read tile().
  __device__ __forceinline__ void acquire(int ahead) {
    if constexpr (kBulkCopy) {
      if constexpr (kStages == 1) {  // nothing is fetched ahead: once all warps are done with the tile before
        mbarrier_wait(empty(0), phase ^ 1);
        fetch(0, ahead);
      }
      mbarrier_wait(full(stage), phase);
    } else if constexpr (kStages == 1) {
      __syncthreads();  // every warp is done with the one stage
      fetch(0, ahead);
      cp_async_wait<0>();
      __syncthreads();  // every thread's part of the tile has landed
    } else {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the tile has landed for all, and every warp is done with the stage before it
      fetch(before(), ahead);
    }
  }

  // From Hopper on: refills the stage of the tile before the current one, once all warps are done with that.
  __device__ __forceinline__ void refill(int ahead) {
    if constexpr (kBulkCopy && kStages > 1) {
      if (ahead >= 0) mbarrier_wait(empty(before()), stage == 0 ? phase ^ 1 : phase);
      fetch(before(), ahead);
    }
  }

  // The warp is done with the current tile: on to the next.
  __device__ __forceinline__ void release() {
    if constexpr (kBulkCopy) mbarrier_arrive(threadIdx.x % 32 == 0, empty(stage));
    if (++stage == kStages) stage = 0, phase ^= 1;
  }

 private:
  template <bool kStart = false>
  __device__ __forceinline__ void fetch(int s, int n) {
    const u8* from = source + (i64)((kFirstInSmem && !kStart ? __float_as_int(load_shared_float(shared + kFirst)) : first) + n) * kTileBytes;
    const u32 to = shared + s * kTileBytes;
    if constexpr (kBulkCopy) {
      cp_async_bulk(threadIdx.x == 0 && n >= 0, to, from, kTileBytes, full(s));
    } else {
      if (n >= 0) {
        const u32 at = 16 * special_tid_x();  // read anew: no register holds it from tile to tile
#pragma unroll
        for (int c = 0; c < kCopies; ++c) cp_async16(to + at + 16 * kThreads * c, from + at + 16 * kThreads * c);
        if (at < kTileBytes - 16 * kThreads * kCopies)
          cp_async16(to + at + 16 * kThreads * kCopies, from + at + 16 * kThreads * kCopies);
      }
      cp_async_commit();  // also where nothing is left to fetch, so that the waits count the same
    }
  }
};

}  // namespace sage
