// The signed Hadamard rotation of rows of Q and K, and their rounding to INT8.
//
// Rotating Q and K by the same orthogonal matrix keeps q·k and spreads outlier channels over all channels, so one scale per row (or
// group of rows) wastes little of INT8's range.
//
// R negates a channel with bits b0 … b7 where b0·b3 + b1·b4 + b2·b5 + b6·b7 is odd (hadamard.py). Each product is a constant or one bit
// of the register's number times one of the lane's, so the butterfly over the first bit applies the sign.
//
// Lane t of the four that share a row holds channels 32c + 8t + e (c < D/32, e < 8) as x[8c + e]. `rotate` replaces them by the rotated
// channels, in fp32. `Rotation` rotates eight rows of 16-bit inputs at once, half of the butterflies as MMAs.
#pragma once
#include "../common/tensor.cuh"
#include "../common/warp.cuh"
#include "../ptx/mma.cuh"

namespace sage {

// The register, after `rotate`, of number `code` among a lane's quantised channels in a tile of K. The order of the contracted channels
// is free as long as Q and K share it: this one is the order in which `Rotation` leaves a key's channels in a lane.
template <int kHeadDim>
__host__ __device__ constexpr int quantized_register(int code) {
  const int bit3 = code >> 3 & 1, bit4 = code >> 4 & 1, bit5 = code >> 5;
  return (code & 1) + (code >> 1 & 3) * 4 + (kHeadDim == 64 ? 2 * bit3 : 16 * bit3 + 2 * bit4 + 32 * bit5);
}

// x = R·x, with R = Hadamard · diag(signs) unnormalised: the caller has multiplied x by the power of two that keeps sums finite.
template <int kHeadDim>
__device__ __forceinline__ void rotate(float (&x)[kHeadDim / 4], int t) {
  constexpr int kCount = kHeadDim / 4;
  const float bit3 = t & 1 ? -1.0f : 1.0f, bit4 = t & 2 ? -1.0f : 1.0f;
#pragma unroll
  for (int step = 1; step < kCount; step *= 2)  // bits 0, 1, 2, 5, 6, 7 of the channel
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (!(i & step)) {
        const float sign = step == 1 ? bit3 : step == 2 ? bit4 : (step == 4 && i & 8) || (step == 16 && i & 32) ? -1.0f : 1.0f;
        const float a = x[i], b = x[i + step];
        x[i] = fmaf(b, sign, a), x[i + step] = fmaf(b, -sign, a);
      }
#pragma unroll
  for (int lane = 1; lane < 4; lane *= 2) {
    const float own = lane == 1 ? bit3 : bit4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fmaf(x[i], own, __shfl_xor_sync(kAllLanes, x[i], lane));
  }
}

// A warp's R·x · 0.5/D of eight rows. In: lane 4g + t has channels 32c + 8t + e of row g as raw[c], 16-bit as in memory; these are B
// operands of MMAs. The MMAs contract bits 0, 1, 3 and 4 of the channel, butterflies over registers the other bits.
// Out: lane 4g + t has D/8 channels of rows 2t and 2t + 1 as y[row][i]; bits 3, 4, 1 of the channel are g, bits 0, 2, 5, 6, 7 are i.
template <int kHeadDim, int kDtype>
struct Rotation {
  static_assert(kMma16 && kDtype != kFloat32, "there is an MMA of the input's type");
  static constexpr int kMmas = kHeadDim / 16;
  u32 matrix[4];  // A fragment of the 16 × 16 factor

  // Bits 0 to 3 of the contracted index k are bits 0, 3, 4, 1 of the channel; those of A's row are bits 3, 4, 1, 0.
  __device__ explicit Rotation(int lane) {
    constexpr u32 kOne = kDtype == kBfloat16 ? 0x3F80 : 0x3C00, kStep = kDtype == kBfloat16 ? 0x80 : 0x400;  // 1.0; one binade
    constexpr u32 kEntry = kOne - (kHeadDim == 64 ? 7 : kHeadDim == 128 ? 8 : 9) * kStep;                    // 0.5 / D
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 row3 = i & 1, k3 = i >> 1;  // k1, k2 are t's bits
      const u32 even = (t & g) ^ (t & g) >> 1 ^ k3 * (g >> 2 ^ t >> 1), odd = even ^ row3 ^ t;
      matrix[i] = (kEntry | kEntry << 16) ^ (even & 1) << 15 ^ odd << 31;
    }
  }
  __device__ explicit Rotation(uint4 kept) : matrix{kept.x, kept.y, kept.z, kept.w} {}  // from another Rotation's matrix

  // start(m, c) sets the accumulator c[4] of MMA m.
  template <class Start>
  __device__ __forceinline__ void operator()(const Raw8<kDtype> (&raw)[kHeadDim / 32], Start start, float (&y)[2][kHeadDim / 8]) const {
#pragma unroll
    for (int m = 0; m < kMmas; ++m) {
      float c[4];
      start(m, c);
      const u32 b0 = raw[m / 2].word[m % 2 * 2], b1 = raw[m / 2].word[m % 2 * 2 + 1];
      if constexpr (kDtype == kBfloat16)
        mma_bf16(c, matrix, b0, b1);
      else
        mma_f16(c, matrix, b0, b1);
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i % 2][2 * m + i / 2] = c[i];
    }
#pragma unroll
    for (int step = 2; step < kHeadDim / 8; step *= 2)  // bits 2, 5, 6, 7
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i)
        if (!(i & step)) {
          const float sign = (step == 2 && i & 4) || (step == 8 && i & 16) ? -1.0f : 1.0f;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float a = y[j][i], b = y[j][i + step];
            y[j][i] = fmaf(b, sign, a), y[j][i + step] = fmaf(b, -sign, a);
          }
        }
  }

  // Element `row` of MMA m's product for an fp32 vector x[D] that is multiplied by 0.5/D already.
  static __device__ __forceinline__ float product(const float* x, int m, int row) {
    float v[16];
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      v[k] = x[m / 2 * 32 + m % 2 * 4 + k % 2 + k / 2 % 4 * 8 + k / 8 * 2];
      if ((k & k >> 1 & 1) ^ (k >> 2 & k >> 3)) v[k] = -v[k];
    }
#pragma unroll
    for (int bit = 0; bit < 4; ++bit) {  // of k
      const float sign = row >> (bit + 3) % 4 & 1 ? -1.0f : 1.0f;
#pragma unroll
      for (int k = 0; k < 16; k += 2 << bit) v[k] = fmaf(v[k + (1 << bit)], sign, v[k]);
    }
    return v[0];
  }
};

// The largest |x[i]| of the lane's channels.
template <int kCount>
__device__ __forceinline__ float abs_max(const float (&x)[kCount]) {
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) top = fmaxf(top, fabsf(x[i]));
  return top;
}

// 127 / amax; 0 below kAmaxMin, where all counts as zero.
__device__ __forceinline__ float int8_inverse(float amax) { return amax < kAmaxMin ? 0.0f : rcp_approx(amax * (1.0f / kInt8Max)); }

// rint(x · inverse) of four values as bytes, x0 lowest: adding kPreset leaves the integer, two's complement, in the low mantissa bits.
__device__ __forceinline__ u32 quantize_s8x4(float x0, float x1, float x2, float x3, float inverse) {
  const u32 a = __float_as_uint(fmaf(x0, inverse, kPreset)), b = __float_as_uint(fmaf(x1, inverse, kPreset));
  const u32 c = __float_as_uint(fmaf(x2, inverse, kPreset)), d = __float_as_uint(fmaf(x3, inverse, kPreset));
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

}  // namespace sage
