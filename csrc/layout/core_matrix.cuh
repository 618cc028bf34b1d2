// Core-matrix order: the layout of a tile of quantised keys and values for wgmma, the same in global and shared memory.
//
// wgmma reads its operands in core matrices of 8 rows × 16 bytes; without swizzle a core matrix is 128 contiguous bytes. A tile is
// {K in INT8, scales, V in one or two bytes an element}, contiguous; two bulk copies load it.
//
//   K: 16-byte chunk b of key n at b·16·kTile + 16·n. Chunk 4·c2 + t holds quantised channels 16·c2 … 16·c2 + 15 in the order of lane t
//      (rotate.cuh, `quantized_register`).
//   Scales: for t = 0..3, 16 bytes {scale of the tile's first half, of its second, unused, the tile's number}. Scale t belongs to keys
//      8j + 2t, 8j + 2t + 1: those of one lane's accumulators. With one scale block in a tile both halves have the same scale.
//   V: transposed, consecutive keys of a column in 16 bytes: chunk b of column n at 16·(b·kVColumns + n).
//      2 bytes an element: keys 8b … 8b + 7. 1 byte: position 4t + i of chunk b holds key 16b + 8·(i/2) + 2t + i%2, so the score
//      accumulators, converted in place, are the A fragments of P.
//      Column 8i + c is channel 32·(i/4) + 8·(c/2) + 2·(i%4) + c%2, so a lane, which holds columns 2t and 2t + 1 of four i, owns eight
//      consecutive channels of the output. With kOnes eight columns of ones follow: P·V's extra columns are the row sums of rounded P.
//      Keys that do not exist, or that nobody sees, have zeros in all columns, those of ones included, and zeros in K: they take no part
//      whatever P is, and no mask need hide them.
#pragma once
#include "../ptx/types.cuh"

namespace sage {

template <int kHeadDim_, int kVElementBytes_, int kTile_, bool kOnes_, int kScaleBlocks_ = 2>
struct CoreMatrix {
  static constexpr int kHeadDim = kHeadDim_, kVElementBytes = kVElementBytes_, kTile = kTile_, kScaleBlocks = kScaleBlocks_;
  static constexpr bool kOnes = kOnes_;
  static constexpr bool kOrdered = kScaleBlocks == 1;  // serves block-sparse calls, whose tokens may lie in an order
  static constexpr int kScaleKeys = kTile / kScaleBlocks;
  static constexpr int kScaleOffset = kTile * kHeadDim, kScaleBytes = 128;
  static constexpr int kScalePitch = 16;
  static constexpr bool kNumbered = true;  // a tile says its number
  static constexpr int kKBytes = kScaleOffset + kScaleBytes;
  static constexpr int kV = kKBytes, kVColumns = kHeadDim + (kOnes ? 8 : 0);
  static constexpr int kVBytes = kTile * kVColumns * kVElementBytes;
  static constexpr int kTileBytes = kKBytes + kVBytes;
  static constexpr int kKPitch = kTile * 16, kVPitch = kVColumns * 16;  // bytes to the next core matrix along k
  static __host__ __device__ constexpr int scale_offset(int) { return kScaleOffset; }
  static __host__ __device__ constexpr int k_chunk(int c2, int key, int t) { return (4 * c2 + t) * kKPitch + key * 16; }
};

}  // namespace sage
