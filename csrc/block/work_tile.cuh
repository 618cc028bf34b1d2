// Work tiles: which queries of which head a CTA has, which KV tiles those see without a list, and which rows a lane has.
#pragma once
#include "../kernel/params.cuh"
#include "mask.cuh"

namespace sage {

// The queries from row0 on of one query head. bh: the number, in the launch, of its (batch, kv head).
struct WorkTile {
  int bh, batch, head, row0;
};

// Work tile number `index` of a launch, of block_m queries. Consecutive ones share a head, so its K and V stay in L2. Causal: the longest
// rows first.
template <Mask kMask>
__device__ __forceinline__ WorkTile work_tile(const AttendParams& p, int index, int block_m) {
  const auto [head_in_group, block] = fast_divmod(index, p.q_tiles, p.rcp_q_tiles);
  const auto [bh, head_of_bh] = fast_divmod(head_in_group, p.heads_per_kv, p.rcp_heads_per_kv);
  const auto [batch, head_kv] = fast_divmod(p.bh_first + bh, p.heads_kv, p.rcp_heads_kv);
  return {bh, batch, head_kv * p.heads_per_kv + head_of_bh, (kMask == Mask::none ? block : p.q_tiles - 1 - block) * block_m};
}

// Without a list: some query of the work tile sees a key of the first `seen` KV tiles, and every query sees all keys of the first `full`.
struct KvTileCount {
  int seen, full;
};

template <int kTile>
__device__ __forceinline__ KvTileCount count_kv_tiles(const AttendParams& p, int row0, int block_m, bool causal) {
  int seen = p.kv_tiles, full = p.len_kv / kTile;
  if (causal) seen = min(seen, (row0 + block_m - 1) / kTile + 1), full = min(full, (row0 + 1) / kTile);
  return {seen, full};
}

// The lane's rows: g and g + 8 of each row tile, sixteen rows, of its warp.
struct RowCoord {
  WorkTile tile;
  int t, g, warp, row0;  // row0: the warp's first row

  __device__ __forceinline__ RowCoord(const WorkTile& tile, int thread, int warp_rows)
      : tile(tile), t(thread % 4), g(thread % 32 / 4), warp(thread / 32), row0(tile.row0 + thread / 32 * warp_rows) {}

  __device__ __forceinline__ int row(int half) const { return row0 + 8 * half + g; }
  __device__ __forceinline__ int row(int r, int half) const { return row(half) + 16 * r; }
  __device__ __forceinline__ float* lse(const AttendParams& p, int row) const {
    return p.lse + ((i64)tile.batch * p.heads_kv * p.heads_per_kv + tile.head) * p.len_q + row;
  }
};

}  // namespace sage
