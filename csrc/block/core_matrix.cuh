// Core-matrix order: how a tile of quantised keys and values lies in memory, global and shared alike, for wgmma.
//
// wgmma reads its operands in core matrices of 8 rows × 16 bytes; without swizzle a core matrix is 128 contiguous bytes. A tile is
// {K's codes, scales, V}, one contiguous run of bytes that two bulk copies fetch.
//
//   K: 16-byte chunk b of key n at b·16·kTile + 16·n. Chunk 4·c2 + t holds the codes x[16·c2 …] of the lane t that quantised the
//      key (rotate.cuh): any order of the contracted channels is right as long as Q has the same one.
//   Scales: for t = 0..3, 16 bytes {scale of the tile's first half, of its second, INT_MIN, 0}. Scale t belongs to keys 8j + 2t,
//      8j + 2t + 1: those of one lane's accumulators. The INT_MIN starts the lane's row maxima: a register that is loaded only
//      after the next product was issued keeps the compiler from moving the maxima in front of it.
//   V: transposed, 8 keys of a column in 16 bytes: keys 8·b … 8·b + 7 of column n at 16·(b·kColumns + n). Column 8i + c is channel
//      32·(i/4) + 8·(c/2) + 2·(i%4) + c%2, so that the lane which holds columns 2t and 2t + 1 of four i owns eight consecutive
//      channels of the output. The last eight columns are ones: their products sum P, rounded as V's factors are.
#pragma once
#include "../ptx/types.cuh"

namespace sage {

template <int kHeadDim_>
struct CoreMatrix {
  static_assert(kHeadDim_ == 64 || kHeadDim_ == 128, "with the ones, 256 channels exceed a wgmma's 256 columns");
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTile = 96;  // keys: two score arrays and the weights of more do not fit the registers
  static constexpr int kScaleKeys = kTile / 2;
  static constexpr int kScales = kTile * kHeadDim, kScalesBytes = 128;
  static constexpr int kScalesPitch = 16;
  static constexpr int kKBytes = kScales + kScalesBytes;
  static constexpr int kV = kKBytes, kColumns = kHeadDim + 8;
  static constexpr int kVBytes = kTile * kColumns * 2;
  static constexpr int kTileBytes = kKBytes + kVBytes;
  static constexpr int kKPitch = kTile * 16, kVPitch = kColumns * 16;  // between neighbours along k
  static constexpr i32 kLeast = -2147483647 - 1;
  static __host__ __device__ constexpr int k_chunk(int c2, int key, int t) { return (4 * c2 + t) * kKPitch + key * 16; }
};

}  // namespace sage
