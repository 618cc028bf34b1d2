// The tile scheduler of the persistent Hopper kernels: which queries and KV tiles a CTA computes next.
#pragma once
#include "../block/tile_list.cuh"
#include "../block/work_tile.cuh"
#include "../common/warp.cuh"
#include "../ptx/grid.cuh"
#include "../ptx/shared.cuh"
#include "config_sm90.cuh"

namespace sage {

enum WorkFlag : u32 {
  kWorkValid = 1,      // 0: no work is left
  kWritesPartial = 2,  // the CTA has the later KV tiles of a split work tile: it stores its partial result
  kJoinsPartial = 4,   // the CTA has the earlier ones: it merges that result and stores the output
};

// A work tile: kBlockM queries of one head, and which of their KV tiles this CTA has. Producer warp 2 computes it and publishes it in
// shared memory, so that the other warps keep none of it in registers:
//    0  masked, unmasked: KV tiles that hold a masked or biased pair, which come first, and KV tiles that do not
//    8  flags
//   12  max_scale: upper bound of a query's score scale, so that no score leaves the softmax's range
//   16  bh, batch, head, row0
//   32  out: the head's offset in the output, in elements, 64 bits
//   40  first: position of the first KV tile in the work tile's list (Mask::list) or its number
//   44  partial: number of the partial result that it writes or joins
//   48  span, of packed sequences: token0, len_q, len_kv, kv_tile0
namespace work {  // byte offsets
constexpr u32 kMaxScale = 12, kBh = 16, kRow0 = 28, kOut = 32, kFirst = 40, kPartial = 44, kSpan = 48;
}

// Numbers of a work tile's KV tiles, and its flags. The shuffles tell the compiler that the values are warp-uniform.
struct KvRange {
  int masked, unmasked;
  u32 flags;

  __device__ __forceinline__ explicit KvRange(u32 own) {
    const uint4 v = load_shared16(own);
    masked = __shfl_sync(kAllLanes, v.x, 0), unmasked = __shfl_sync(kAllLanes, v.y, 0), flags = __shfl_sync(kAllLanes, v.z, 0);
  }
};

// Offset in the output of a work tile's head.
__device__ __forceinline__ i64 output_offset(const AttendParams& p, const WorkTile& tile) {
  return tile.batch * p.out_stride_b + tile.head * p.out_stride_h + tile.span.token0 * p.out_stride_n;
}

// Stores where a work tile is, for load_work_tile(), and where its output is.
template <class C>
__device__ __forceinline__ void store_work_tile(const WorkTile& tile, i64 out, u32 to_shared) {
  if constexpr (C::kMask == Mask::packed)
    store_shared16(to_shared + work::kSpan, {(u32)tile.span.token0, (u32)tile.span.len_q, (u32)tile.span.len_kv, (u32)tile.span.kv_tile0});
  store_shared16(to_shared + work::kBh, {(u32)tile.bh, (u32)tile.batch, (u32)tile.head, (u32)tile.row0});
  store_shared8(to_shared + work::kOut, (u32)out, (u32)(out >> 32));
}

// The tile scheduler. First p.full_waves whole work tiles for each CTA: gridDim.x apart, or, where they differ in length, in the order of
// requests. With p.split_kv_workspace the remaining ones are then cut into one share for each CTA. A share is at least as long as a work
// tile, so no more than two CTAs have parts of one. Where a work tile is cut depends on its own KV tiles only, so results are reproducible.
template <class C>
struct Scheduler {
  static constexpr bool kDynamic = C::kMask != Mask::none;
  int iteration = 0;    // requests so far
  int at = 0, end = 0;  // rest of the current share, in 1/gridDim.x of a work tile
  int share = 0;

  // Stores the next work tile, without max_scale, at `to_shared`. Returns false if no work is left. A collective of the warp.
  __device__ __forceinline__ bool next(const AttendParams& p, u32 to_shared) {
    const int blocks = gridDim.x;
    int work_idx, from = 0, to = blocks;
    u32 flags = kWorkValid;
    if (at == end) {
      work_idx = blockIdx.x + iteration * blocks;
      if (kDynamic && p.next_work_idx && iteration) {
        grid_dependency_wait();  // which sets the counter to 0
        if (elected()) work_idx = blocks + atomicAdd(p.next_work_idx, 1);
        work_idx = __shfl_sync(kAllLanes, work_idx, 0);
      }
      ++iteration;
      const int work_count = count_work_tiles<C::kMask>(p), whole = p.full_waves * blocks;
      if (C::kMask != Mask::packed && work_idx >= whole) {
        // Shares are taken from the last to the first: a CTA that waits for a partial result waits for one whose share was taken earlier,
        // so that there is no deadlock even if few CTAs are resident.
        share = blocks - 1 - (work_idx - whole);
        if (p.split_kv_workspace && share >= 0)
          at = (work_count - whole) * share, end = at + work_count - whole;
        else
          flags = 0;
      } else if (work_idx >= work_count) {
        flags = 0;
      }
    }
    if (!flags) {
      if (elected()) store_shared16(to_shared, {0u, 0u, 0u, 0u});
      return false;
    }
    if (at != end) {
      const int own = at / blocks;
      from = at - own * blocks, to = min(end - own * blocks, blocks), work_idx = p.full_waves * blocks + own, at += to - from;
      flags |= (from > 0 ? kWritesPartial : 0u) | (to < blocks ? kJoinsPartial : 0u);
    }
    const WorkTile tile = work_tile<C::kMask, C::kTile>(p, work_idx, C::kBlockM);
    const i64 out = output_offset(p, tile);
    if (elected()) store_work_tile<C>(tile, out, to_shared);
    int tiles, masked;  // of the work tile
    if constexpr (C::kMask == Mask::list) {
      const int2 count = TileList(p.lists, tile.batch, tile.head, tile.row0, C::kBlockM, p.len_q).count();
      tiles = count.x + count.y, masked = count.x;
    } else {
      const bool causal = C::kMask == Mask::causal || (kCausalAtRunTime<C::kMask> && p.causal);
      const auto [seen, full] = count_kv_tiles<C::kTile>(tile, C::kBlockM, causal);
      tiles = seen, masked = causal ? seen - full : 0;  // keys beyond the end take no part (core_matrix.cuh)
    }
    const int begin = from ? tiles * from / blocks : 0, count = (to == blocks ? tiles : tiles * to / blocks) - begin;
    masked = min(max(masked - begin, 0), count);
    masked += (count - masked) % C::kUnmaskedMultiple;
    if (count - masked < C::kUnmaskedLeast) masked = count;
    if (elected()) {  // without a list the last KV tile comes first
      store_shared16(to_shared, {(u32)masked, (u32)(count - masked), flags, 0u});
      store_shared8(to_shared + work::kFirst, (u32)(C::kMask == Mask::list ? begin : tiles - 1 - begin),
                    (u32)(to < blocks ? share + 1 : share));
    }
    return true;
  }
};

// The work tile stored at `own`.
template <class C>
__device__ __forceinline__ WorkTile load_work_tile(const AttendParams& p, u32 own) {
  const uint4 v = load_shared16(own + work::kBh);
  Span span = dense_span(p, v.x);
  if constexpr (C::kMask == Mask::packed) {
    const uint4 s = load_shared16(own + work::kSpan);
    span = {(int)s.x, (int)s.y, (int)s.z, (int)s.w, ceil_div(s.z, C::kTile)};
  }
  return {(int)v.x, (int)v.y, (int)v.z, (int)v.w, span};
}

// A consumer lane's rows of it: a warp has sixteen.
template <class C>
__device__ __forceinline__ RowCoord consumer_rows(const AttendParams& p, u32 own) {
  return {load_work_tile<C>(p, own), (int)special_tid_x() - C::kFirstConsumer, 16};
}

}  // namespace sage
