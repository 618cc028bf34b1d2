// Launch before the others of a packed call: cu_seqlens → where each sequence lies and what is computed for it, in a work list of blocks of
// queries and one of runs of keys. A CTA places the sequences of a group, which is what the other launches compute at once.
//
// Nothing is read where wrong offsets point: a sequence ends within the packed tensors and has at most the tokens that the host reckons
// with.
#pragma once
#include "../common/warp.cuh"
#include "../ptx/grid.cuh"
#include "params.cuh"

namespace sage {

constexpr int kPlaceThreads = 256, kPlaceWarps = kPlaceThreads / 32;

struct PlaceShared {
  i64 of_warp[3][kPlaceWarps];
  i64 before[3];  // blocks, tiles and runs of the sequences that are placed; of wrong offsets more than 32 bits hold
  i32 ends[2];    // of both work lists
};

struct Extent {
  i32 start, length;
};

// Where sequence i lies among `total` tokens.
__device__ __forceinline__ Extent extent_of(const void* cu_seqlens, bool wide, int i, int total, int longest) {
  const auto offset = [&](int at, i64 least) -> i64 {
    const i64 given = wide ? static_cast<const i64*>(cu_seqlens)[at] : static_cast<const i32*>(cu_seqlens)[at];
    return given < least ? least : given > total ? total : given;
  };
  const i64 start = offset(i, 0), end = offset(i + 1, start);
  return {(i32)start, (i32)min(end - start, (i64)longest)};
}

// The sum of x over the threads before this one, plus `before`; adds the sum over all threads to `before`. A collective of the CTA.
template <int kSums>
__device__ __forceinline__ void exclusive_sums(i64 (&x)[kSums], PlaceShared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  i64 own[kSums];
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    own[s] = x[s];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const i64 other = __shfl_sync(kAllLanes, x[s], max(lane - distance, 0), 32);
      if (lane >= distance) x[s] += other;
    }
    if (lane == 31) shared.of_warp[s][warp] = x[s];
  }
  __syncthreads();  // the warps' sums are stored
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    i64 sum = shared.before[s];
    for (int w = 0; w < warp; ++w) sum += shared.of_warp[s][w];
    x[s] += sum - own[s];
  }
  __syncthreads();  // all have read them
  if (threadIdx.x < kSums)
    for (int w = 0; w < kPlaceWarps; ++w) shared.before[threadIdx.x] += shared.of_warp[threadIdx.x][w];
}

__device__ void place_group(const PlaceSequencesParams& p) {
  __shared__ PlaceShared shared;
  const int group = blockIdx.x, first = group * p.sequences_per_group, count = min(p.sequences_per_group, p.batch - first);
  Sequence* sequences = p.sequences + first;
  i32* q_blocks = p.q_blocks + (i64)group * p.max_q_blocks;
  i32* runs = p.runs + (i64)group * p.max_runs;
  if (threadIdx.x < 3) shared.before[threadIdx.x] = 0;
  if (threadIdx.x < 2) shared.ends[threadIdx.x] = 0;
  __syncthreads();                   // nothing is placed yet
  int blocks_end = 0, runs_end = 0;  // behind this thread's sequences
  for (int base = 0; base < count; base += kPlaceThreads) {
    const int number = base + threadIdx.x;
    Extent q{}, k{};
    if (number < count) {
      q = extent_of(p.cu_seqlens_q, p.wide_q, first + number, p.total_q, p.max_len_q);
      k = extent_of(p.cu_seqlens_k, p.wide_k, first + number, p.total_k, p.max_len_k);
      if (q.length == 0) k.length = 0;  // nobody sees these keys
    }
    const int tiles = ceil_div(k.length, p.tile), own_runs = ceil_div(k.length, p.run_keys), blocks = ceil_div(q.length, p.block_m);
    i64 at[3] = {blocks, tiles, own_runs};
    exclusive_sums(at, shared);
    if (number < count) {
      if (at[0] + blocks > p.max_q_blocks) q.length = 0;  // only where offsets are wrong
      if (at[1] + tiles > p.max_kv_tiles || at[2] + own_runs > p.max_runs) k.length = 0;
      sequences[number] = {q.start, q.length, k.start, k.length, (i32)at[0], (i32)at[1], (i32)at[2], number};
      if (q.length) blocks_end = (i32)at[0] + blocks;
      if (k.length) runs_end = (i32)at[2] + own_runs;
    }
    __syncthreads();  // these sequences are stored
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, end = min(base + kPlaceThreads, count);
    for (int i = base + warp; i < end; i += kPlaceWarps) {
      const Sequence own = sequences[i];
      for (int b = lane; b < ceil_div(own.q_len, p.block_m); b += 32) q_blocks[own.q_block + b] = i;
      for (int r = lane; r < ceil_div(own.k_len, p.run_keys); r += 32) runs[own.run + r] = i;
    }
  }
  atomicMax(&shared.ends[0], blocks_end), atomicMax(&shared.ends[1], runs_end);
  __syncthreads();  // every thread's ends are in
  if (threadIdx.x < 2) p.counts[2 * group + threadIdx.x] = shared.ends[threadIdx.x];
}

}  // namespace sage
