// The signed Hadamard rotation of a row that four lanes share, and its INT8 codes.
//
// Rotating Q and K by the same orthogonal matrix leaves q·k alone and spreads outlier channels over all of them, so that one
// scale per row (or group of rows) wastes little of the INT8 range.
//
// Lane t of the four holds channels 32c + 8t + e (c < D/32, e < 8) as x[8c + e]. After `rotate` the same registers hold rotated
// channels; an output's sign may differ between lanes' views, but always alike for Q and K, so the products agree.
#pragma once
#include "load.cuh"

namespace sage {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Bit i: whether the lane's channel x[i] is negated, the top bit of channel · 0x9E3779B1 (Fibonacci hashing).
template <int kHeadDim>
struct Signs {
  u32 bits[(kHeadDim / 4 + 31) / 32];

  __device__ explicit Signs(int t) : bits{} {
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) {
      const u32 channel = 32 * (i / kChunk) + kChunk * t + i % kChunk;
      bits[i / 32] |= (channel * 0x9E3779B1u >> 31) << (i % 32);
    }
  }

  __device__ float apply(float x, int i) const {
    return __uint_as_float(__float_as_uint(x) ^ (bits[i / 32] << (31 - i % 32) & 0x80000000u));
  }
};

// x becomes R·x, up to the power of two that the caller has multiplied in: R = diag(signs) · Hadamard.
template <int kHeadDim>
__device__ __forceinline__ void rotate(float (&x)[kHeadDim / 4], const Signs<kHeadDim>& signs, int t) {
  constexpr int kCount = kHeadDim / 4;
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = signs.apply(x[i], i);
#pragma unroll
  for (int step = 1; step < kCount; step *= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (!(i & step)) {
        const float a = x[i], b = x[i + step];
        x[i] = a + b, x[i + step] = a - b;
      }
#pragma unroll
  for (int lane = 1; lane < 4; lane *= 2) {
    const float own = t & lane ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fmaf(x[i], own, __shfl_xor_sync(kAllLanes, x[i], lane));
  }
}

// The largest |x| of the lane's channels.
template <int kCount>
__device__ __forceinline__ float largest(const float (&x)[kCount]) {
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) top = fmaxf(top, fabsf(x[i]));
  return top;
}

// A magnitude below this counts as zero, so that 127 divided by it is finite (variants.AMAX_MIN).
constexpr float kSmallest = 7.8886090522101181e-31f;  // 2^-100

__device__ __forceinline__ float int8_inverse(float amax) { return amax < kSmallest ? 0.0f : 127.0f / amax; }

// rint(x · inverse) of four values as bytes. Adding 1.5·2^23 leaves the integer, two's complement, in the low mantissa bits.
__device__ __forceinline__ u32 int8_codes(float x0, float x1, float x2, float x3, float inverse) {
  constexpr float kMagic = 12582912.0f;
  const u32 a = __float_as_uint(fmaf(x0, inverse, kMagic)), b = __float_as_uint(fmaf(x1, inverse, kMagic));
  const u32 c = __float_as_uint(fmaf(x2, inverse, kMagic)), d = __float_as_uint(fmaf(x3, inverse, kMagic));
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

}  // namespace sage
