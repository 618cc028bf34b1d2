// A work tile's list of KV tiles, read from the planes of its bands (TileLists): first the mixed tiles, which hold a masked or biased pair,
// then the full ones, each in ascending order.
#pragma once
#include "../common/warp.cuh"
#include "../kernel/params.cuh"
#include "../ptx/special.cuh"
#include "work_tile.cuh"

namespace sage {

// The token at position `row` of the sequence, for Q and the output.
template <Mask kMask>
__device__ __forceinline__ int token_of(const AttendParams& p, const Span& span, int row) {
  return kMask == Mask::list && p.order ? p.order[row] : span.token0 + row;
}

struct TileList {
  const u32* bits;  // of the work tile's first band
  i64 stride_band;
  int words, bands;

  // For the block_m queries from row0 on.
  __device__ __forceinline__ TileList(const TileLists& lists, int batch, int head, int row0, int block_m, int len_q) {
    const int first = row0 / lists.band_rows, last = (min(row0 + block_m, len_q) - 1) / lists.band_rows;
    bits = lists.bits + batch * lists.stride_b + head * lists.stride_h + first * lists.stride_band;
    stride_band = lists.stride_band, words = lists.words;
    bands = last - first + 1;
  }

  // Word w of the list: w < words selects mixed tiles, word w − words full ones.
  __device__ __forceinline__ u32 word(int w) const {
    const bool full = w >= words;
    const u32* at = bits + (full ? w - words : w);
    u32 seen = 0, uneven = 0;
#pragma unroll 1
    for (int b = 0; b < bands; ++b, at += stride_band) seen |= at[0], uneven |= at[words];
    return full ? seen & ~uneven : seen & uneven;
  }

  // Number of {mixed, full} tiles. A collective of the warp.
  __device__ __forceinline__ int2 count() const {
    int mixed = 0, full = 0;
#pragma unroll 1
    for (int w = special_tid_x() % 32; w < 2 * words; w += 32) {
      const int tiles = __popc(word(w));
      (w < words ? mixed : full) += tiles;
    }
#pragma unroll
    for (int other = 1; other < 32; other *= 2)
      mixed += __shfl_xor_sync(kAllLanes, mixed, other), full += __shfl_xor_sync(kAllLanes, full, other);
    return {mixed, full};
  }
};

// A warp's position in a list. It reads 32 words at a time, one a lane. All calls are collectives of the warp and return the same in each
// lane.
struct ListCursor {
  int chunk = 0;    // of 32 words, the next to read
  u32 own = 0;      // the lane's word of the current chunk
  u32 waiting = 0;  // lanes whose words are nonempty and not visited yet
  u32 left = 0;     // tiles of the current word, not visited yet
  int base = 0;     // the number of that word's first tile

  // Moves to the next nonempty word; false after the last. words: of a plane; load(w): word w of the list.
  template <class Load>
  __device__ __forceinline__ bool next_word(int words, Load load) {
    while (!waiting) {
      if (32 * chunk >= 2 * words) return false;
      const int w = 32 * chunk + special_tid_x() % 32;
      own = w < 2 * words ? load(w) : 0u;
      waiting = __ballot_sync(kAllLanes, own != 0);
      ++chunk;
    }
    const int lane = __ffs(waiting) - 1, w = 32 * (chunk - 1) + lane;
    waiting &= waiting - 1;
    left = __shfl_sync(kAllLanes, own, lane, 32);
    base = 32 * (w >= words ? w - words : w);
    return true;
  }

  // The next tile's number, −1 after the last.
  template <class Load>
  __device__ __forceinline__ int next(int words, Load load) {
    if (!left && !next_word(words, load)) return -1;
    const int bit = __ffs(left) - 1;
    left &= left - 1;
    return base + bit;
  }

  // Leaves out the next `count` tiles.
  template <class Load>
  __device__ __forceinline__ void skip(int count, int words, Load load) {
#pragma unroll 1
    while (count) {
      if (!left && !next_word(words, load)) return;
      const int most = __popc(left);
      if (most <= count) {
        count -= most, left = 0;
      } else {
#pragma unroll 1
        for (; count; --count) left &= left - 1;
      }
    }
  }
};

}  // namespace sage
