// Work tiles: which queries of which head a CTA has, which KV tiles those see without a list, and which rows a lane has.
#pragma once
#include "../kernel/params.cuh"
#include "mask.cuh"

namespace sage {

// The queries of a work tile and the keys that there are for them, both counted from the start of their sequence: in a packed call one of
// the sequences, else all tokens.
struct Span {
  int token0;              // where the sequence's queries start
  int len_q, len_kv;       // of the sequence
  int kv_tile0, kv_tiles;  // its head's tiles of K and V: the first, and their number
};

// The queries from row0 on of one query head. bh: the number, in the launch, of its (batch or sequence, kv head).
struct WorkTile {
  int bh, batch, head, row0;
  Span span;
};

__device__ __forceinline__ Span dense_span(const AttendParams& p, int bh) { return {0, p.len_q, p.len_kv, bh * p.kv_tiles, p.kv_tiles}; }

// Work tiles of a launch. The host does not know how many a packed one has.
template <Mask kMask>
__device__ __forceinline__ int count_work_tiles(const AttendParams& p) {
  return (kMask == Mask::packed ? p.packed.counts[0] : p.q_tiles) * p.bh_count * p.heads_per_kv;
}

// Work tile number `index` of a launch, of block_m queries. Consecutive ones share a head, so its K and V stay in L2. Causal: the longest
// rows first.
template <Mask kMask, int kTile>
__device__ __forceinline__ WorkTile work_tile(const AttendParams& p, int index, int block_m) {
  if constexpr (kMask == Mask::packed) {
    const int blocks = p.packed.counts[0], head_in_group = index / blocks, block = blocks - 1 - index % blocks;
    const Sequence own = p.packed.sequences[p.packed.q_blocks[block]];
    const int bh = head_in_group / p.heads_per_kv, tiles = ceil_div(own.k_len, kTile);
    return {own.number * p.bh_count + bh,
            0,
            p.bh_first * p.heads_per_kv + head_in_group,
            (block - own.q_block) * block_m,
            {own.q_start, own.q_len, own.k_len, own.kv_tile * p.bh_count + bh * tiles, tiles}};
  } else {
    const auto [head_in_group, block] = fast_divmod(index, p.q_tiles, p.rcp_q_tiles);
    const auto [bh, head_of_bh] = fast_divmod(head_in_group, p.heads_per_kv, p.rcp_heads_per_kv);
    const auto [batch, head_kv] = fast_divmod(p.bh_first + bh, p.heads_kv, p.rcp_heads_kv);
    return {bh, batch, head_kv * p.heads_per_kv + head_of_bh, (kMask == Mask::none ? block : p.q_tiles - 1 - block) * block_m,
            dense_span(p, bh)};
  }
}

// Without a list: some query of the work tile sees a key of the first `seen` KV tiles, and every query sees all keys of the first `full`.
struct KvTileCount {
  int seen, full;
};

template <int kTile>
__device__ __forceinline__ KvTileCount count_kv_tiles(const WorkTile& tile, int block_m, bool causal) {
  int seen = tile.span.kv_tiles, full = tile.span.len_kv / kTile;
  if (causal) seen = min(seen, (tile.row0 + block_m - 1) / kTile + 1), full = min(full, (tile.row0 + 1) / kTile);
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
  __device__ __forceinline__ bool has(int row) const { return row < tile.span.len_q; }
  __device__ __forceinline__ float* lse(const AttendParams& p, int row) const {
    return p.lse + ((i64)tile.batch * p.heads_kv * p.heads_per_kv + tile.head) * p.len_q + row;
  }
};

}  // namespace sage
