// Between CTAs and between launches: programmatic dependent launch (PTX ISA, "griddepcontrol"), release and acquire of a flag.
#pragma once
#include "types.cuh"

namespace sage {

// Whether a launch may begin before the previous one has ended.
#if __CUDA_ARCH__ >= 900
constexpr bool kProgrammaticLaunch = true;
#else
constexpr bool kProgrammaticLaunch = false;
#endif

// Waits until all previous launches are complete and their writes are visible; lets the next launch start. Both do nothing in a launch
// without the programmatic attribute.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A flag between CTAs: a thread that reads a released value with load_acquire sees all that was written before its release.
__device__ __forceinline__ void store_release(i32* to, i32 x) { asm volatile("st.release.gpu.s32 [%0],%1;" ::"l"(to), "r"(x) : "memory"); }

__device__ __forceinline__ i32 load_acquire(const i32* from) {
  i32 x;
  asm volatile("ld.acquire.gpu.s32 %0,[%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

}  // namespace sage
