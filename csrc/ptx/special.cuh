// Values that the compiler does not see through: it keeps neither them nor what is computed from them in registers for longer than
// needed. Special registers are read again at each call.
#pragma once
#include "types.cuh"

namespace sage {

__device__ __forceinline__ int special_tid_x() {
  int x;
  asm volatile("mov.u32 %0,%%tid.x;" : "=r"(x));
  return x;
}

__device__ __forceinline__ int special_ctaid_x() {
  int x;
  asm volatile("mov.u32 %0,%%ctaid.x;" : "=r"(x));
  return x;
}

// x; what depends on it is computed from here on.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

}  // namespace sage
