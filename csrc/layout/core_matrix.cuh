// Core-matrix order: how a tile of quantised keys and values lies in memory, global and shared alike, for wgmma.
//
// wgmma reads its operands in core matrices of 8 rows × 16 bytes; without swizzle a core matrix is 128 contiguous bytes. A tile is
// {K's codes, scales, V's values of one or two bytes}, one contiguous run of bytes that two bulk copies fetch.
//
//   K: 16-byte chunk b of key n at b·16·kTile + 16·n. Chunk 4·c2 + t holds codes 16·c2 … of those that rotate.cuh (`quantized_register`)
//      gives lane t of the four that share a row.
//   Scales: for t = 0..3, 16 bytes {scale of the tile's first half, of its second, unused, the tile's number}. Scale t belongs to keys
//      8j + 2t, 8j + 2t + 1: those of one lane's accumulators.
//   V: transposed, a run of keys of a column in 16 bytes: chunk b of column n at 16·(b·kVColumns + n).
//      2 bytes: keys 8b … 8b + 7. 1 byte: of the keys 16b …, position 4t + i holds key 16b + 8·(i/2) + 2t + i%2, so that the
//      accumulators of the scores, narrowed in place, are the A fragments of P.
//      Column 8i + c is channel 32·(i/4) + 8·(c/2) + 2·(i%4) + c%2, so that the lane which holds columns 2t and 2t + 1 of four i
//      owns eight consecutive channels of the output. With kOnes, eight columns of ones follow: their products sum P, rounded as
//      V's factors are.
#pragma once
#include "../ptx/types.cuh"

namespace sage {

template <int kHeadDim_, int kVElementBytes_, int kTile_, bool kOnes_>
struct CoreMatrix {
  static constexpr int kHeadDim = kHeadDim_, kVElementBytes = kVElementBytes_, kTile = kTile_;
  static constexpr bool kOnes = kOnes_;
  static constexpr int kScaleKeys = kTile / 2;
  static constexpr int kScaleOffset = kTile * kHeadDim, kScaleBytes = 128;
  static constexpr int kScalePitch = 16;
  static constexpr bool kNumbered = true;  // a tile says its number
  static constexpr int kKBytes = kScaleOffset + kScaleBytes;
  static constexpr int kV = kKBytes, kVColumns = kHeadDim + (kOnes ? 8 : 0);
  static_assert(kVColumns <= 256, "a wgmma has 256 columns");
  static constexpr int kVBytes = kTile * kVColumns * kVElementBytes;
  static constexpr int kTileBytes = kKBytes + kVBytes;
  static constexpr int kKPitch = kTile * 16, kVPitch = kVColumns * 16;  // between neighbours along k
  static __host__ __device__ constexpr int scale_offset(int) { return kScaleOffset; }
  static __host__ __device__ constexpr int k_chunk(int c2, int key, int t) { return (4 * c2 + t) * kKPitch + key * 16; }
};

}  // namespace sage
