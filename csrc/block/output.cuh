// Softmax's sums and quantised O → what is stored; and back, for an initial state.
#pragma once
#include "../common/math.cuh"
#include "../ptx/convert.cuh"
#include "work_tile.cuh"

namespace sage {

// What O is multiplied by, beside V's scale per channel, for a sum l of P; 0 if every key is masked out.
__device__ __forceinline__ float inverse_sum(float l, float inv_v_max) { return l > 0.0f ? inv_v_max * rcp_approx(l) : 0.0f; }

// Natural log of the sum of exponentials, of P against m, in base 2. shift: what subtracting k_mean took from the row's scores. A row that
// sees keys has a finite one even where every P has become 0: m may come from the zeros behind the last key (core_matrix.cuh), and where
// scores are in the billions their rounding alone puts all keys far below.
__device__ __forceinline__ float log_sum_exp(float l, float m, float shift) {
  constexpr float kLeast = 0x1p-126f;
  return l > 0.0f || m > 0.5f * kNoScore ? shift + (m + log2_approx(fmaxf(l, kLeast))) * kLn2 : -kInf;
}

// An element of O; scale, mean: of its channel of V. A row without keys gets 0, whatever the scale of V is then.
template <Mask kMask>
__device__ __forceinline__ float dequantize_o(float o, float inverse, float scale, float mean) {
  if (kMask == Mask::packed) return inverse > 0.0f ? fmaf(o * inverse, scale, mean) : 0.0f;
  return fmaf(o * inverse, scale, kMask == Mask::list && !(inverse > 0.0f) ? 0.0f : mean);
}

// The initial state {m, l, unused, unused, O[D]} of the 64 queries that `row` is one of.
template <int kHeadDim>
__device__ __forceinline__ const float* initial_state(const AttendParams& p, const WorkTile& tile, int row) {
  const int groups = (p.len_q + 63) / 64;
  return p.tail + (((i64)tile.batch * p.heads_kv * p.heads_per_kv + tile.head) * groups + min(row / 64, groups - 1)) * (4 + kHeadDim);
}

// An element of the initial O, in units of quantised V and P. l: the state's sum; amax, mean: of its channel of V.
__device__ __forceinline__ float quantize_o(const AttendParams& p, float o, float l, float amax, float mean, float p_max) {
  return amax > 0.0f ? fmaf(-l, mean, o) * p_max / (amax * p.inv_v_max) : 0.0f;
}

}  // namespace sage
