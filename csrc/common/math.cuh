// Arithmetic that neither overflows nor traps.
#pragma once
#include <sage/constants.cuh>

#include "../ptx/types.cuh"

namespace sage {

constexpr float kInf = __builtin_bit_cast(float, 0x7F800000);
constexpr float kNoScore = -3e38f;  // a running maximum below all scores, and finite

__device__ __forceinline__ float clamp_finite(float x) { return fminf(fmaxf(x, -kFiniteMax), kFiniteMax); }

}  // namespace sage
