// Kernels for the tests of build, loader and launchers.
#include "sub/params.cuh"
#include "sub/size.cuh"

namespace sage {

// y[i] = x[i · stride] · factor · kTimes, through shared memory. May start before the launch ahead of it has ended.
template <int kTimes>
__device__ __forceinline__ void scale(const DemoParams& p) {
  extern __shared__ float staged[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (i < p.n) {
    staged[threadIdx.x] = p.x.data[i * p.x.stride];
    p.y[i] = staged[threadIdx.x] * p.factor * kTimes * kSize;
  }
}

// 100 values that live through a loop do not fit 32 registers.
template <int kTimes>
__device__ __forceinline__ void spill(const DemoParams& p) {
  float held[100];
#pragma unroll
  for (int i = 0; i < 100; ++i) held[i] = p.x.data[i * threadIdx.x];
  for (int n = 0; n < p.n; ++n)
#pragma unroll
    for (int i = 0; i < 100; ++i) p.y[i + n] += held[i] * held[99 - i] * kTimes;
}

}  // namespace sage
