// Conversions between fp32 and narrower types; the hardware's approximations of 2^x, log2 and 1/x.
#pragma once
#include "types.cuh"

namespace sage {

__device__ __forceinline__ float f16_to_f32(u32 low16) {
  float f;
  asm("{.reg .b16 h; cvt.u16.u32 h,%1; cvt.f32.f16 %0,h;}" : "=f"(f) : "r"(low16));
  return f;
}

__device__ __forceinline__ u32 add_f16(u32 pair, u32 other) {
  u32 sum;
  asm("add.f16x2 %0,%1,%2;" : "=r"(sum) : "r"(pair), "r"(other));
  return sum;
}

__device__ __forceinline__ float2 unpack_f16(u32 pair) {
  float2 f;
  asm("{.reg .b16 a,b; mov.b32 {a,b},%2; cvt.f32.f16 %0,a; cvt.f32.f16 %1,b;}" : "=f"(f.x), "=f"(f.y) : "r"(pair));
  return f;
}

// {hi, lo} as two fp16, lo in bits 0–15, rounded to nearest even; infinity beyond the range.
__device__ __forceinline__ u32 pack_f16(float lo, float hi) {
  u32 r;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0,%2,%1;" : "=r"(r) : "f"(lo), "f"(hi));
#else
  asm("{.reg .b16 a,b; cvt.rn.f16.f32 a,%1; cvt.rn.f16.f32 b,%2; mov.b32 %0,{a,b};}" : "=r"(r) : "f"(lo), "f"(hi));
#endif
  return r;
}

// Whether int32 → fp32 conversions have half the rate of an FMA; before sm_86 they have an eighth.
#if __CUDA_ARCH__ >= 860
constexpr bool kFastIntToFloat = true;
#else
constexpr bool kFastIntToFloat = false;
#endif

// Four values of 0 to 255 as bytes, rounded to nearest even, x0 lowest.
__device__ __forceinline__ u32 pack_u8(float x0, float x1, float x2, float x3) {
#if __CUDA_ARCH__ >= 860  // one instruction for two values (F2IP), which also cuts off at 0 and 255
  u32 r;
  asm("{.reg .s32 a,b,c,d; .reg .b32 high; cvt.rni.s32.f32 a,%1; cvt.rni.s32.f32 b,%2; cvt.rni.s32.f32 c,%3; cvt.rni.s32.f32 d,%4;"
      "cvt.pack.sat.u8.s32.b32 high,d,c,0; cvt.pack.sat.u8.s32.b32 %0,b,a,high;}"
      : "=r"(r)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return r;
#else  // adding 2^23 leaves the integer in the lowest byte; F2I would have a quarter of the rate
  constexpr float kMagic = 8388608.0f;
  const u32 a = __float_as_uint(x0 + kMagic), b = __float_as_uint(x1 + kMagic);
  const u32 c = __float_as_uint(x2 + kMagic), d = __float_as_uint(x3 + kMagic);
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
#endif
}

// Four values as e4m3, rounded to nearest even and clamped to ±448, x0 lowest. From sm_89 on.
__device__ __forceinline__ u32 pack_e4m3(float x0, float x1, float x2, float x3) {
  u32 r;
  asm("{.reg .b16 low,high; cvt.rn.satfinite.e4m3x2.f32 low,%2,%1; cvt.rn.satfinite.e4m3x2.f32 high,%4,%3; mov.b32 %0,{low,high};}"
      : "=r"(r)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return r;
}

// Four e4m3 numbers: the lowest two from their bit patterns, 0 to 126 as floats (rounded to nearest even, clamped at 0), the others from
// their values.
__device__ __forceinline__ u32 pack_e4m3_bits(float bits0, float bits1, float x2, float x3) {
  u32 r;
  asm("{.reg .s32 a,b; .reg .b16 high,none; .reg .b32 c; cvt.rn.satfinite.e4m3x2.f32 high,%4,%3; mov.b16 none,0; mov.b32 c,{high,none};"
      "cvt.rni.s32.f32 a,%1; cvt.rni.s32.f32 b,%2; cvt.pack.sat.u8.s32.b32 %0,b,a,c;}"
      : "=r"(r)
      : "f"(bits0), "f"(bits1), "f"(x2), "f"(x3));
  return r;
}

// {hi, lo} as two bf16 of finite inputs, lo in bits 0–15.
__device__ __forceinline__ u32 pack_bf16(float lo, float hi) {
#if __CUDA_ARCH__ >= 800
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0,%2,%1;" : "=r"(r) : "f"(lo), "f"(hi));
  return r;
#else  // round to nearest even by hand
  const u32 a = __float_as_uint(lo), b = __float_as_uint(hi);
  return ((a + 0x7FFF + ((a >> 16) & 1)) >> 16) | ((b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000u);
#endif
}

// pack_f16, but clamped to the largest finite value.
__device__ __forceinline__ u32 pack_f16_finite(float lo, float hi) {
#if __CUDA_ARCH__ >= 800
  u32 r;
  asm("cvt.rn.satfinite.f16x2.f32 %0,%2,%1;" : "=r"(r) : "f"(lo), "f"(hi));
  return r;
#else
  return pack_f16(fminf(fmaxf(lo, -65504.0f), 65504.0f), fminf(fmaxf(hi, -65504.0f), 65504.0f));
#endif
}

__device__ __forceinline__ u32 pack_bf16_finite(float lo, float hi) {
#if __CUDA_ARCH__ >= 800
  u32 r;
  asm("cvt.rn.satfinite.bf16x2.f32 %0,%2,%1;" : "=r"(r) : "f"(lo), "f"(hi));
  return r;
#else
  constexpr float kTop = 3.38953139e38f;
  return pack_bf16(fminf(fmaxf(lo, -kTop), kTop), fminf(fmaxf(hi, -kTop), kTop));
#endif
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace sage
