// Online softmax in base 2 over the score accumulators of a warp.
//
// A lane holds, for each of its row tiles (16 rows), rows g and g + 8, and of each n-tile of eight keys the columns 2t, 2t + 1.
// All 16 keys that a lane holds of a tile share one K scale, so S · scale is one product per row and the maximum is taken over
// integers.
//
// Integer to float for nothing: the accumulator starts at 0x4B400000, the bits of 1.5·2^23, so that its bits read as the float
// 12582912 + S, exactly, for |S| < 2^22. The constant is taken off in the FMA that applies the scale. That rounds a score by up
// to 0.75·scale, below the rounding noise of INT8 codes by two orders of magnitude.
#pragma once
#include "fragment.cuh"
#include "mask.cuh"
#include "rotate.cuh"

namespace sage {

constexpr u32 kPresetBits = 0x4B400000u;
constexpr float kPreset = 12582912.0f;

// The maximum over the four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

constexpr int kColumns = kKvTile / 8;  // n-tiles of the scores

template <int kRowTiles>
struct Softmax {
  float reference[kRowTiles][2];  // P = 2^(score − reference); log2(p_max) below the maximum the row was last scaled to
  float sum[kRowTiles][2];        // of P, this lane's keys only

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) reference[i][0] = reference[i][1] = -kInf, sum[i][0] = sum[i][1] = 0.0f;
  }

  // Given the tile's row maxima, moves the references of rows that outgrew theirs by more than `slack`. Returns whether any row
  // of the warp moved; then factor[] is what O and the sums so far are worth now.
  __device__ __forceinline__ bool update(const float (&top)[kRowTiles][2], float log2_p_max, float slack,
                                         float (&factor)[kRowTiles][2]) {
    bool grew = false;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) grew |= top[i / 2][i % 2] - log2_p_max > reference[i / 2][i % 2] + slack;
    if (!__any_sync(kAllLanes, grew)) return false;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      float& old = reference[i / 2][i % 2];
      const float now = fmaxf(old, top[i / 2][i % 2] - log2_p_max);
      factor[i / 2][i % 2] = now == old ? 1.0f : exp2_approx(old - now);  // equal: also two −inf
      sum[i / 2][i % 2] *= factor[i / 2][i % 2];
      old = now;
    }
    return true;
  }
};

// max over the lane's keys of one row, as integers: positive floats order like their bits.
__device__ __forceinline__ float largest_score(const u32 (&s)[kColumns][4], int half) {
  i32 top = max((i32)s[0][2 * half], (i32)s[0][2 * half + 1]);
#pragma unroll
  for (int j = 1; j < kColumns; ++j) top = max(max(top, (i32)s[j][2 * half]), (i32)s[j][2 * half + 1]);
  return __int_as_float(top);
}

// The score of preset accumulator bits, rounded up: no other score of the lane comes out above the one of its largest.
__device__ __forceinline__ float score_above(float preset_score, float scale) { return __fmaf_ru(preset_score, scale, -kPreset * scale); }

}  // namespace sage
