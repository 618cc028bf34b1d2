// Online softmax in base 2 over a warp's score accumulators, for mma.sync.
//
// A lane holds rows g and g + 8 of each of its row tiles (16 rows) and columns 2t and 2t + 1 of each n-tile (8 keys): [row tile][half]
// indexes its rows. The 16 keys that it holds of a KV tile share one K scale, so it finds the maximum over the integer scores and
// multiplies once.
//
// The conversion from integer to float costs no instruction: the accumulator starts at the bits of kPreset = 1.5·2^23, so its bits read
// as the float kPreset + S, exactly, for |S| < 2^22. The FMA that applies the scale subtracts kPreset·scale. That rounds a score by up to
// 0.75·scale, two orders of magnitude below the rounding noise of INT8.
#pragma once
#include "../layout/fragment.cuh"
#include "mask.cuh"
#include "rescale.cuh"
#include "rotate.cuh"

namespace sage {

constexpr u32 kPresetBits = __builtin_bit_cast(u32, kPreset);

constexpr int kScoreNTiles = kKvTile / 8;  // n-tiles of the scores

// P against the running row maximum.
template <int kRowTiles>
struct Softmax {
  float m_i[kRowTiles][2];  // P = 2^(score − m_i): log2(p_max) below the row maximum at the row's last rescaling
  float l_i[kRowTiles][2];  // sum of P over this lane's keys

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) m_i[i][0] = m_i[i][1] = MmaReference::kEmpty, l_i[i][0] = l_i[i][1] = 0.0f;
  }

  // Begins with sums l, relative to m, of which lane t = 0 of the four that share a row keeps the books.
  __device__ __forceinline__ void begin(const float (&m)[kRowTiles], const float (&l)[kRowTiles], int t) {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) m_i[i / 2][i % 2] = m[i / 2], l_i[i / 2][i % 2] = t == 0 ? l[i / 2] : 0.0f;
  }

  __device__ __forceinline__ void get_m(float (&out)[kRowTiles][2]) const {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) out[i / 2][i % 2] = m_i[i / 2][i % 2];
  }

  // top: the lane's own maxima of a tile. Raises m_i of rows whose maximum exceeds it by more than rescale_threshold, and scales l_i.
  // Returns whether any row of the warp did; O has to be multiplied by alpha then. Only then do the lanes of a row agree on its maximum.
  __device__ __forceinline__ bool update(const float (&top)[kRowTiles][2], float log2_p_max, float rescale_threshold,
                                         float (&alpha)[kRowTiles][2]) {
    bool grew = false;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i)
      grew |= MmaReference::of(top[i / 2][i % 2], log2_p_max) > rescale_limit(m_i[i / 2][i % 2], rescale_threshold);
    if (!__any_sync(kAllLanes, grew)) return false;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      float& old = m_i[i / 2][i % 2];
      const float now = fmaxf(old, MmaReference::of(row_max(top[i / 2][i % 2]), log2_p_max));
      alpha[i / 2][i % 2] = MmaReference::alpha(old, now);
      l_i[i / 2][i % 2] *= alpha[i / 2][i % 2];
      old = now;
    }
    return true;
  }
};

// P against the tile's own row maximum m_tile: a tile's P·V counts tile_scale = 2^(m_tile − m_i) ≤ 2^rescale_threshold in its row, and
// nothing else depends on m_i. Lane t keeps m_i of one of the four rows that its quad shares, which saves registers.
template <int kRowTiles>
struct TileSoftmax {
  float m_i = MmaReference::kEmpty;  // of the lane's own row
  float l_i[kRowTiles][2] = {};      // sum of P over this lane's keys

  // The value of the lane's own row.
  __device__ __forceinline__ static float own(const float (&x)[kRowTiles][2], int t) {
    const float last = t & 1 ? x[kRowTiles - 1][1] : x[kRowTiles - 1][0];
    return kRowTiles == 1 || t & 2 ? last : t & 1 ? x[0][1] : x[0][0];
  }

  // All rows' values from the lanes that own them.
  __device__ __forceinline__ static void share(float x, float (&out)[kRowTiles][2]) {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) out[i / 2][i % 2] = __shfl_sync(kAllLanes, x, i, 4);
  }

  // As Softmax::begin.
  __device__ __forceinline__ void begin(const float (&m)[kRowTiles], const float (&l)[kRowTiles], int t) {
    m_i = kRowTiles == 1 || t & 2 ? m[kRowTiles - 1] : m[0];
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) l_i[i / 2][i % 2] = t == 0 ? l[i / 2] : 0.0f;
  }

  __device__ __forceinline__ void get_m(float (&out)[kRowTiles][2]) const { share(m_i, out); }

  // As Softmax::update, with m_tile: log2(p_max) below the tile's row maxima.
  __device__ __forceinline__ bool update(const float (&m_tile)[kRowTiles][2], float rescale_threshold, int t,
                                         float (&alpha)[kRowTiles][2]) {
    const float row = own(m_tile, t);
    if (!__any_sync(kAllLanes, row > rescale_limit(m_i, rescale_threshold))) return false;
    const float now = fmaxf(m_i, row), own_alpha = MmaReference::alpha(m_i, now);
    m_i = now;
    share(own_alpha, alpha);
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) l_i[i / 2][i % 2] *= alpha[i / 2][i % 2];
    return true;
  }

  // What the tile's P·V counts in each row.
  __device__ __forceinline__ void tile_scales(const float (&m_tile)[kRowTiles][2], int t, float (&tile_scale)[kRowTiles][2]) const {
    const float row = own(m_tile, t);
    share(row == -kInf ? 0.0f : exp2_approx(row - m_i), tile_scale);
  }
};

template <bool kTileMax, int kRowTiles>
struct SoftmaxOf {
  using type = TileSoftmax<kRowTiles>;
};
template <int kRowTiles>
struct SoftmaxOf<false, kRowTiles> {
  using type = Softmax<kRowTiles>;
};

// The largest preset score of one row half over the lane's keys, found as integers: positive floats order like their bits.
__device__ __forceinline__ float score_max(const u32 (&s)[kScoreNTiles][4], int half) {
  i32 top = max((i32)s[0][2 * half], (i32)s[0][2 * half + 1]);
#pragma unroll
  for (int j = 1; j < kScoreNTiles; ++j) top = max(max(top, (i32)s[j][2 * half]), (i32)s[j][2 * half + 1]);
  return __int_as_float(top);
}

// The score of a preset accumulator, rounded up, so that none of the lane's scores exceeds that of its largest accumulator.
__device__ __forceinline__ float score_above(float preset_score, float scale) { return __fmaf_ru(preset_score, scale, -kPreset * scale); }

}  // namespace sage
