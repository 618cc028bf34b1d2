// What the device code's types.cuh needs beside it on the host.
#pragma once
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static

#include "csrc/ptx/types.cuh"
