// Masks of one KV tile's scores: which keys the lane's two rows (g and g + 8 of sixteen) see, biases, −inf for the others.
//
// score(half, j, e): the fp32 bits, 32 of them, of row half and column 2t + e of n-tile j, as an lvalue.
#pragma once
#include "../common/math.cuh"
#include "work_tile.cuh"

namespace sage {

// The keys from key0 on that rows row[half] see, for sees(); a bias of −inf removes more. `at` is a function, so that the coordinates are
// computed only where a bool mask wants them.
template <Mask kMask, int kKeys, class Tile>
__device__ __forceinline__ KeyBits<kKeys> visible_keys(const AttendParams& p, Tile tile, const int (&row)[2], int key0, bool causal,
                                                       int t) {
  KeyBits<kKeys> keys;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    keys.below(half, (kMask != Mask::none && causal ? min(row[half] + 1, p.len_kv) : p.len_kv) - key0);
    if (kMask == Mask::list && p.kept && key0 < p.len_kv) {
      const WorkTile at = tile();
      keys.keep(half, p.kept + at.batch * p.kept_stride_b + at.head * p.kept_stride_h + min(row[half], p.len_q - 1) * p.kept_stride_q +
                          key0 / 32);
    }
  }
  keys.align(t);
  return keys;
}

// Of an additive mask with one row for all queries (kMaskBiasRow), the biases of the lane's keys: of n-tile j those of columns 2t, 2t + 1.
template <int kNTiles>
__device__ __forceinline__ void load_bias_row(const AttendParams& p, const WorkTile& tile, int key0, int t, float2 (&bias)[kNTiles]) {
  const float* row = static_cast<const float*>(p.mask) + tile.batch * p.mask_stride_b + tile.head * p.mask_stride_h + key0 + 2 * t;
#pragma unroll
  for (int j = 0; j < kNTiles; ++j) bias[j] = *reinterpret_cast<const float2*>(row + 8 * j);
}

template <int kNTiles, class Score>
__device__ __forceinline__ void add_bias_row(const float2 (&bias)[kNTiles], Score score) {
#pragma unroll
  for (int i = 0; i < 4 * kNTiles; ++i) {
    auto& bits = score(i % 2, i / 4, i / 2 % 2);
    bits = __float_as_uint(__uint_as_float(bits) + (i / 2 % 2 ? bias[i / 4].y : bias[i / 4].x));
  }
}

// Adds any other additive mask's biases for rows row[half].
template <int kNTiles, class Score>
__device__ __forceinline__ void add_bias(const AttendParams& p, const WorkTile& tile, const int (&row)[2], int key0, int t, Score score) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const i64 offset = tile.batch * p.mask_stride_b + tile.head * p.mask_stride_h + min(row[half], p.len_q - 1) * p.mask_stride_q;
    const BiasRow bias{static_cast<const u8*>(p.mask) + offset * mask_element_bytes(p.mask_kind), p.mask_stride_k, p.mask_kind, p.len_kv,
                       p.mask_pairs};
    bias.template each<kNTiles>(key0 + 2 * t, [&](int j, float x, float y) {
      auto& first = score(half, j, 0);
      auto& second = score(half, j, 1);
      first = __float_as_uint(__uint_as_float(first) + x), second = __float_as_uint(__uint_as_float(second) + y);
    });
  }
}

// Hides the keys that a row does not see. sees(half, j, e): whether it does. top: the lane's largest score of each half.
template <int kNTiles, class Score, class Sees>
__device__ __forceinline__ void hide_keys(Score score, Sees sees, float (&top)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    top[half] = -kInf;
#pragma unroll
    for (int i = 0; i < 2 * kNTiles; ++i) {
      auto& bits = score(half, i / 2, i % 2);
      bits = sees(half, i / 2, i % 2) ? bits : __float_as_uint(-kInf);
      top[half] = fmaxf(top[half], __uint_as_float(bits));
    }
  }
}

}  // namespace sage
