// The types of P and V, and the correction of V's mean for their rounding.
#pragma once
#include "../ptx/types.cuh"

namespace sage {

enum class PvType { fp16, fp8, int8 };  // fp8: e4m3; int8: V signed, P unsigned

template <PvType kPvType>
constexpr int kVElementBytes = kPvType == PvType::fp16 ? 2 : 1;

// Units of a sum of quantised V per 1 of the values summed. e4m3 values are not integers: in 64ths a sum of 2 million, each off by half
// a step in one direction, fits 32 bits.
template <PvType kPvType>
constexpr int kQuantSumUnits = kPvType == PvType::fp8 ? 64 : 1;

// What is added to a channel of O so that dequantised V has V's mean: the mean that was subtracted, minus the mean of quantised V, which
// rounding moved off zero. amax: the value that quantised v_max = 1 / inv_v_max stands for; keys: the number of summed keys.
template <PvType kPvType>
__device__ __forceinline__ float corrected_v_mean(float mean, float amax, i32 quant_sum, float inv_v_max, float keys) {
  return fmaf(-amax * (inv_v_max / (kQuantSumUnits<kPvType> * keys)), (float)quant_sum, mean);
}

}  // namespace sage
