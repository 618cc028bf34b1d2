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

constexpr int kWorkTileCost = 3;      // what prologue and epilogue of a work tile take, in full KV tiles
constexpr int kMixedCost = 2;         // what a mixed tile takes more than a full one
constexpr int kHeadsInL2 = 16 << 20;  // bytes of K and V of the heads whose causal work tiles are dealt out together

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
// requests. With p.split_kv_workspace the remaining ones are then cut into one share for each CTA, at places that are a work tile apart or
// more, so no more than two CTAs have parts of one. With p.full_waves < 0 all work tiles are cut into shares, of equal cost, if they are long
// enough for that. Where a work tile is cut depends on lists only, so results are reproducible.
template <class C>
struct Scheduler {
  static constexpr bool kDynamic = C::kMask != Mask::none;
  static constexpr bool kWeighs = C::kMask == Mask::list && !C::kRouted;  // block-sparse lists differ from head to head
  int iteration = 0;                                                      // requests so far
  int at = 0, end = 0;                                                    // rest of the current share, in 1/gridDim.x of a work tile
  int share = 0;
  int own = -1;  // of a share of equal cost the next work tile, from whose start `at` and `end` count costs then

  // The work tile that holds position `position` of a head's costs, and where it begins. Beyond the last: where that ends, and what the
  // most expensive one takes.
  struct Place {
    int index, first, most;
  };

  // A collective of the warp. A lane has a band of each kGroup work tiles.
  static __device__ __forceinline__ Place find(const AttendParams& p, int position) {
    constexpr int kBands = C::kBlockM / kBandRows, kGroup = 32 / kBands;
    const int lane = special_tid_x() % 32, bands = ceil_div(p.len_q, kBandRows);
    int first = 0, most = 0;
#pragma unroll 1
    for (int base = 0; base < p.q_tiles; base += kGroup) {
      const int block = p.q_tiles - 1 - base - lane / kBands, band = block * kBands + lane % kBands;
      const u32* at = p.lists.bits + band * p.lists.stride_band;
      int up_to = block < 0 || lane % kBands ? 0 : kWorkTileCost;
#pragma unroll 2
      for (int w = 0; w < p.lists.words; ++w) {
        const bool any = block >= 0 && band < bands;
        u32 seen = any ? at[w] : 0u, uneven = any ? at[p.lists.words + w] : 0u;
#pragma unroll
        for (int other = 1; other < kBands; other *= 2)
          seen |= __shfl_xor_sync(kAllLanes, seen, other), uneven |= __shfl_xor_sync(kAllLanes, uneven, other);
        if (lane % kBands == 0) up_to += __popc(seen) + kMixedCost * __popc(seen & uneven);
      }
      const int cost = up_to;
      most = max(most, cost);
#pragma unroll
      for (int other = kBands; other < 32; other *= 2) {
        const int before = __shfl_sync(kAllLanes, up_to, max(lane - other, 0));
        if (lane >= other) up_to += before;
      }
      const u32 beyond = __ballot_sync(kAllLanes, first + up_to > position && lane % kBands == 0);
      if (beyond) {
        const int at = __ffs(beyond) - 1;
        return {base + at / kBands, first + __shfl_sync(kAllLanes, up_to - cost, at), 0};
      }
      first += __shfl_sync(kAllLanes, up_to, 32 - kBands);
    }
#pragma unroll
    for (int other = 1; other < 32; other *= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, other));
    return {p.q_tiles, first, most};
  }

  // Makes the CTA's share one of equal cost, if shares are as long as any work tile then. All heads have the same lists.
  __device__ __forceinline__ void weigh(const AttendParams& p, int blocks) {
    const auto [_, of_head, most] = find(p, 0x7FFFFFFF);
    const int all = of_head * p.bh_count * p.heads_per_kv;
    if (all / blocks < most) return;
    share = blocks - 1 - blockIdx.x, iteration = 1;
    const int first = (i64)all * share / blocks, head = first / of_head;
    const Place place = find(p, first - head * of_head);
    own = head * p.q_tiles + place.index, at = first - head * of_head - place.first;
    end = at + (int)((i64)all * (share + 1) / blocks) - first;
  }

  // KV tiles of a work tile in front of a cut at `position` of its `length`. Its prologue and epilogue count as if they lay before the first
  // one, so that shares of equal length take equally long.
  static __device__ __forceinline__ int tiles_before(int tiles, int position, int length) {
    return max((tiles + kWorkTileCost) * position / length - kWorkTileCost, 0);
  }

  // Where the share begins that has the work tiles' `position`. A cut in front of all KV tiles is none.
  static __device__ __forceinline__ int share_begin(const AttendParams& p, int position, int blocks) {
    const int in_tile = position % blocks;
    return tiles_before(p.kv_tiles, in_tile, blocks) ? position : position - in_tile;
  }

  // Causal work tiles are dealt out longest first, so that the last ones level the CTAs: over as many heads as L2 holds K and V of.
  static __device__ __forceinline__ int longest_first(const AttendParams& p, int index) {
    const int heads = p.bh_count * p.heads_per_kv, fitting = max(kHeadsInL2 / (p.kv_tiles * C::Layout::kTileBytes), 1) * p.heads_per_kv;
    const int most = ceil_div(heads, ceil_div(heads, fitting)), first = index / (most * p.q_tiles) * most;
    const int together = min(most, heads - first), rest = index - first * p.q_tiles;
    return (first + rest % together) * p.q_tiles + rest / together;
  }

  // Stores the next work tile, without max_scale, at `to_shared`. Returns false if no work is left. A collective of the warp.
  __device__ __forceinline__ bool next(const AttendParams& p, u32 to_shared) {
    const int blocks = gridDim.x;
    int work_idx, parts = blocks, from = 0, to = blocks;
    u32 flags = kWorkValid;
    if (kWeighs && p.full_waves < 0 && iteration == 0) weigh(p, blocks);
    if (at == end) {
      work_idx = blockIdx.x + iteration * blocks;
      if (kDynamic && p.next_work_idx && iteration) {
        grid_dependency_wait();  // which sets the counter to 0
        if (elected()) work_idx = blocks + atomicAdd(p.next_work_idx, 1);
        work_idx = __shfl_sync(kAllLanes, work_idx, 0);
      }
      ++iteration;
      const int work_count = count_work_tiles<C::kMask>(p);
      const int whole = p.full_waves >= 0 ? p.full_waves * blocks : own < 0 ? work_count : 0;
      if (C::kMask != Mask::packed && work_idx >= whole) {
        // Shares are taken from the last to the first: a CTA that waits for a partial result waits for one whose share was taken earlier,
        // so that there is no deadlock even if few CTAs are resident.
        share = blocks - 1 - (work_idx - whole);
        if (p.split_kv_workspace && share >= 0 && whole < work_count)
          at = share_begin(p, (work_count - whole) * share, blocks), end = share_begin(p, (work_count - whole) * (share + 1), blocks);
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
    const bool weighed = kWeighs && own >= 0;
    const auto partial = [&] { return (from > 0 ? kWritesPartial : 0u) | (to < parts ? kJoinsPartial : 0u); };
    if (weighed) {
      from = at, work_idx = own++;
    } else if (at != end) {
      from = at % blocks, work_idx = p.full_waves * blocks + at / blocks;
      to = min(from + end - at, parts), at += to - from;
      flags |= partial();
    } else if (C::kMask == Mask::causal) {
      work_idx = longest_first(p, work_idx);
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
    if (weighed) {
      parts = tiles + kMixedCost * masked + kWorkTileCost, to = min(end, parts), at = 0, end -= to;
      flags |= partial();
    }
    const auto before = [&](int position) { return weighed ? tiles * position / parts : tiles_before(tiles, position, parts); };
    const int begin = from ? before(from) : 0, count = (to == parts ? tiles : before(to)) - begin;
    masked = min(max(masked - begin, 0), count);
    masked += (count - masked) % C::kUnmaskedMultiple;
    if (count - masked < C::kUnmaskedLeast) masked = count;
    if (elected()) {  // without a list the last KV tile comes first
      store_shared16(to_shared, {(u32)masked, (u32)(count - masked), flags, 0u});
      store_shared8(to_shared + work::kFirst, (u32)(C::kMask == Mask::list ? begin : tiles - 1 - begin),
                    (u32)(to < parts ? share + 1 : share));
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

// Where row `row` of the work tile at `own` lies among the tokens, for Q and the output.
template <class C>
__device__ __forceinline__ int token_in(const AttendParams& p, u32 own, const WorkTile& tile, int row) {
  if constexpr (C::kRouted) return p.order ? (int)load_shared(own + C::kTokens + 4 * (row - tile.row0)) : row;
  return token_of<C::kMask>(p, tile.span, row);
}

// A consumer lane's rows of it: a warp has sixteen.
template <class C>
__device__ __forceinline__ RowCoord consumer_rows(const AttendParams& p, u32 own) {
  return {load_work_tile<C>(p, own), (int)special_tid_x() - C::kFirstConsumer, 16};
}

}  // namespace sage
