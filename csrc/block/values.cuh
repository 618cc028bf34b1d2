// The types that P and V can have.
#pragma once
#include "../ptx/types.cuh"

namespace sage {

enum class Values { fp16, fp8, int8 };  // fp8: e4m3; int8: V signed, P unsigned

template <Values kValues>
constexpr int kValueBytes = kValues == Values::fp16 ? 2 : 1;

// Of a sum of codes for each 1 that they stand for. FP8's are not integers; a sum of 2 million, all rounded by half a step one way, fits
// 32 bits.
template <Values kValues>
constexpr int kCodeUnits = kValues == Values::fp8 ? 64 : 1;

// What is added to a channel's output so that V as it was rounded has V's mean: V's own mean, which was taken out, less that of the
// codes, which rounding moved off zero. amax: what the largest code, 1 / inv_v_max, stands for;
// keys: how many were summed.
template <Values kValues>
__device__ __forceinline__ float mean_beside_codes(float mean, float amax, i32 codes, float inv_v_max, float keys) {
  return fmaf(-amax * (inv_v_max / (kCodeUnits<kValues> * keys)), (float)codes, mean);
}

}  // namespace sage
