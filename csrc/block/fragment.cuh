// Fragment order: how a tile of 64 quantised keys (or values) lies in memory, global and shared alike.
//
// A tile is {K's codes, V's halves, four fp32 K scales}, one contiguous run of bytes: a straight copy fetches it.
// K and V are runs of 512-byte blocks; block b is one 16-byte load of all 32 lanes, lane l at 512·b + 16·l, and what the lane
// finds there is its B operand of two MMAs. So nothing conflicts in
// shared memory and no kernel computes a swizzle. Lane = 4·g + t throughout.
//
//   K, block 8·c2 + j: key 8j + g, the lane's 16 codes x[16·c2 …] as rotate.cuh orders them: chunks 2·c2 and 2·c2 + 1 of 32
//      channels, {b0, b1} each. Any order of the contracted channels is right as long as Q has the same one.
//   V, block (D/16)·c + p: keys 16c + {2t, 2t+1, 2t+8, 2t+9} (the A fragment that a score accumulator already is), for the
//      output columns g of n-tiles 2p and 2p + 1.
//
// Column c of V's n-tile i is channel 32·(i/4) + 8·(c/2) + 2·(i%4) + c%2: then the lane that holds columns 2t and 2t+1 of four
// n-tiles owns eight consecutive channels of the output and stores them at once.
#pragma once
#include "../ptx/types.cuh"

namespace sage {

constexpr int kKvTile = 64;      // keys
constexpr int kBlockBytes = 512;
constexpr int kScalesPerTile = 4;  // scale t belongs to keys 8j + 2t, 8j + 2t + 1: those of one lane's accumulators

template <int kHeadDim>
struct Fragment {
  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "head_dim is padded to 64, 128 or 256");
  static constexpr int kV = kKvTile * kHeadDim;               // offset of V's first block
  static constexpr int kScales = kV + kKvTile * kHeadDim * 2;  // of the scales
  static constexpr int kTileBytes = kScales + kScalesPerTile * 4;
  static __host__ __device__ constexpr int k_block(int c2, int j) { return (8 * c2 + j) * kBlockBytes; }
  static __host__ __device__ constexpr int v_block(int c, int p) { return kV + (kHeadDim / 16 * c + p) * kBlockBytes; }
};

}  // namespace sage
