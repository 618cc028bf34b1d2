// What the lanes of a warp do together. Lane = 4·g + t: in accumulators of MMAs the four lanes of one g share a row.
#pragma once
#include "../ptx/types.cuh"

namespace sage {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The maximum over the four lanes that share a row, in each of them.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// The sum over the same lanes.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

}  // namespace sage
