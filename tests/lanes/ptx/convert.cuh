#pragma once
#include "block.h"

namespace sage {
inline float f16_to_f32(u32 low16) { return half_to_float(low16); }
inline float2 unpack_f16(u32 pair) { return {half_to_float(pair), half_to_float(pair >> 16)}; }
inline u32 pack_f16(float lo, float hi) { return float_to_half(lo) | float_to_half(hi) << 16; }
inline u32 add_f16(u32 pair, u32 other) {
  const float2 a = unpack_f16(pair), b = unpack_f16(other);
  return pack_f16(a.x + b.x, a.y + b.y);
}
inline u32 pack_bf16(float lo, float hi) {
  const u32 a = __float_as_uint(lo), b = __float_as_uint(hi);
  return (a + 0x7FFF + (a >> 16 & 1)) >> 16 | ((b + 0x7FFF + (b >> 16 & 1)) & 0xFFFF0000u);
}
inline u32 pack_f16_finite(float lo, float hi) { return pack_f16(fminf(fmaxf(lo, -65504.0f), 65504.0f), fminf(fmaxf(hi, -65504.0f), 65504.0f)); }
inline u32 pack_bf16_finite(float lo, float hi) {
  constexpr float kTop = 3.38953139e38f;
  return pack_bf16(fminf(fmaxf(lo, -kTop), kTop), fminf(fmaxf(hi, -kTop), kTop));
}
constexpr bool kFastIntToFloat = ARCH >= 86;
inline u32 pack_u8(float x0, float x1, float x2, float x3) {
  u32 r = 0;
  for (float x : {x3, x2, x1, x0}) {
    if (x < 0 || x >= 255.5f) fprintf(stderr, "%g does not fit a byte\n", x), abort();
    r = r << 8 | (u32)nearbyintf(x);
  }
  return r;
}
inline u32 pack_e4m3(float x0, float x1, float x2, float x3) {
  return e4m3_of(x0) | e4m3_of(x1) << 8 | e4m3_of(x2) << 16 | e4m3_of(x3) << 24;
}
inline u32 pack_e4m3_bits(float bits0, float bits1, float x2, float x3) {
  const auto byte = [](float x) { return (u32)fminf(fmaxf(nearbyintf(x), 0.0f), 255.0f); };
  return byte(bits0) | byte(bits1) << 8 | e4m3_of(x2) << 16 | e4m3_of(x3) << 24;
}
inline float exp2_approx(float x) { const float y = exp2f(x); return y < 1.17549435e-38f ? 0.0f : y; }
inline float rcp_approx(float x) { return 1.0f / x; }
inline float log2_approx(float x) { return log2f(x); }
}  // namespace sage
