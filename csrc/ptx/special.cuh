// Special registers, read again at each call: the compiler keeps neither their values nor what is computed from them in registers.
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

}  // namespace sage
