// Fragment order: the layout of a tile of kKvTile quantised keys and values for mma.sync, the same in global and shared memory.
//
// A tile is {K in INT8, V in one or two bytes an element, four fp32 K scales}, contiguous, so a plain copy loads it. K and V consist of
// 512-byte blocks: a warp loads block b with one 16-byte load a lane, lane l at 512·b + 16·l, and gets the lane's B operands of two
// MMAs. So shared memory has no bank conflicts and no kernel computes a swizzle. Lane = 4·g + t throughout.
//
//   K, block 8·c2 + j: key 8j + g, quantised channels 16·c2 … 16·c2 + 15 in the lane's order (rotate.cuh, `quantized_register`), as
//      {b0, b1} of two MMAs.
//   V, block (D/16)·c + p: columns g of n-tiles 2p and 2p + 1, {b0, b1} each. Their keys are those whose scores the lane's accumulators
//      hold, so P needs no shuffle: the score accumulators, converted, are the A fragments of P.
//      2 bytes, c counting 16 keys: b0 = keys 16c + {2t, 2t+1}, b1 = 16c + {2t+8, 2t+9}.
//      1 byte, c counting 32 keys: b0 = keys 32c + {2t, 2t+1, 2t+8, 2t+9}, b1 = 32c + 16 + the same. Then a0 of m16n8k32 is row g of
//      n-tiles 4c and 4c + 1 of the scores, a1 row g + 8 of them, a2 and a3 those of n-tiles 4c + 2 and 4c + 3.
//
// Column c of V's n-tile i is channel 32·(i/4) + 8·(c/2) + 2·(i%4) + c%2: a lane, which holds columns 2t and 2t+1 of four n-tiles, then
// owns eight consecutive channels of the output and stores them together.
#pragma once
#include <sage/constants.cuh>

#include "../ptx/types.cuh"

namespace sage {

constexpr int kBlockBytes = 512;
constexpr int kScalesPerTile = 4;  // scale t is that of keys 8j + 2t and 8j + 2t + 1, those of one lane's accumulators

template <int kHeadDim_, int kVElementBytes_>
struct Fragment {
  static_assert(kHeadDim_ == 64 || kHeadDim_ == 128 || kHeadDim_ == 256, "head_dim is padded to 64, 128 or 256");
  static constexpr int kHeadDim = kHeadDim_, kVElementBytes = kVElementBytes_;
  static constexpr int kTile = kKvTile, kScaleKeys = kTile;
  static constexpr int kVBlockKeys = 32 / kVElementBytes;  // keys of a block of V
  static constexpr int kV = kTile * kHeadDim;              // byte offset of V's first block
  static constexpr int kScaleOffset = kV + kTile * kHeadDim * kVElementBytes;
  static constexpr bool kNumbered = false;  // no room for the tile's number
  static constexpr bool kOrdered = true;    // serves block-sparse calls, whose tokens may lie in an order
  static constexpr int kScalePitch = 4;     // bytes from scale t to t + 1
  static constexpr int kTileBytes = kScaleOffset + kScalesPerTile * kScalePitch;
  static __host__ __device__ constexpr int k_block(int c2, int j) { return (8 * c2 + j) * kBlockBytes; }
  static __host__ __device__ constexpr int v_block(int c, int p) { return kV + (kHeadDim / 16 * c + p) * kBlockBytes; }
  // quantize_k uses only the next two, which do not depend on the size of V's elements: one kernel serves both.
  static __host__ __device__ constexpr int scale_offset(int tile_bytes) { return tile_bytes - kScalesPerTile * kScalePitch; }
  // Byte offset of lane t's quantised channels 16·c2 … 16·c2 + 15 of a key.
  static __host__ __device__ constexpr int k_chunk(int c2, int key, int t) { return k_block(c2, key / 8) + (key % 8 * 4 + t) * 16; }
};

}  // namespace sage
