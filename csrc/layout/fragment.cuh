// Fragment order: how a tile of 64 quantised keys (or values) lies in memory, global and shared alike, for mma.sync.
//
// A tile is {K's codes, V's values of one or two bytes, four fp32 K scales}, one contiguous run of bytes: a straight copy fetches
// it. K and V are runs of 512-byte blocks; block b is one 16-byte load of all 32 lanes, lane l at 512·b + 16·l, and what the lane
// finds there is its B operand of two MMAs. So nothing conflicts in shared memory and no kernel computes a swizzle.
// Lane = 4·g + t throughout.
//
//   K, block 8·c2 + j: key 8j + g, codes 16·c2 … of those that rotate.cuh (`quantized_register`) gives the lane, {b0, b1} of two MMAs.
//   V, block (D/16)·c + p: the output columns g of n-tiles 2p and 2p + 1, {b0, b1} each. Its keys are those whose scores an
//      accumulator of the lane's row holds, so that P needs no shuffle: P's A fragments are the accumulators as they are.
//      2 bytes, c counting 16 keys: b0 = keys 16c + {2t, 2t+1}, b1 = 16c + {2t+8, 2t+9}.
//      1 byte, c counting 32 keys: b0 = keys 32c + {2t, 2t+1, 2t+8, 2t+9}, b1 = 32c + 16 + the same. Then a0 of m16n8k32 is row g of
//      n-tiles 4c and 4c + 1 of the scores, a1 row g + 8 of them, a2 and a3 those of n-tiles 4c + 2 and 4c + 3.
//
// Column c of V's n-tile i is channel 32·(i/4) + 8·(c/2) + 2·(i%4) + c%2: then the lane that holds columns 2t and 2t+1 of four
// n-tiles owns eight consecutive channels of the output and stores them at once.
#pragma once
#include <sage/constants.cuh>

#include "../ptx/types.cuh"

namespace sage {

constexpr int kBlockBytes = 512;
constexpr int kScalesPerTile = 4;  // scale t belongs to keys 8j + 2t, 8j + 2t + 1: those of one lane's accumulators

template <int kHeadDim_, int kVElementBytes_>
struct Fragment {
  static_assert(kHeadDim_ == 64 || kHeadDim_ == 128 || kHeadDim_ == 256, "head_dim is padded to 64, 128 or 256");
  static constexpr int kHeadDim = kHeadDim_, kVElementBytes = kVElementBytes_;
  static constexpr int kTile = kKvTile, kScaleKeys = kTile;
  static constexpr int kVBlockKeys = 32 / kVElementBytes;                       // of a block of V
  static constexpr int kV = kTile * kHeadDim;                               // offset of V's first block
  static constexpr int kScaleOffset = kV + kTile * kHeadDim * kVElementBytes;       // of the scales
  static constexpr bool kNumbered = false;
  static constexpr int kScalePitch = 4;                                    // from scale t to t + 1
  static constexpr int kTileBytes = kScaleOffset + kScalesPerTile * kScalePitch;
  static __host__ __device__ constexpr int k_block(int c2, int j) { return (8 * c2 + j) * kBlockBytes; }
  static __host__ __device__ constexpr int v_block(int c, int p) { return kV + (kHeadDim / 16 * c + p) * kBlockBytes; }
  // What follows is all that the quantiser of K knows of a tile; it is the same for both sizes of V.
  static __host__ __device__ constexpr int scale_offset(int tile_bytes) { return tile_bytes - kScalesPerTile * kScalePitch; }
  // Of the 16 codes that lane t of the four has of a key.
  static __host__ __device__ constexpr int k_chunk(int c2, int key, int t) { return k_block(c2, key / 8) + (key % 8 * 4 + t) * 16; }
};

}  // namespace sage
