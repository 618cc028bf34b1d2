// The products, from the fragment layouts of the PTX ISA: lane 4g + t has rows g, g + 8 of A and C, column g of B.
#pragma once
#include "block.h"

namespace sage {
struct Operands { const u32* a; u32 b[2]; const void* c; void* d; };

// store(d, element, sum) for each of the lane's four elements of A·B. A register holds as many elements as fit; left and right make
// numbers of A's and of B's.
template <class Element, class Left, class Right, class Store>
void product(const u32* a, u32 b0, u32 b1, const void* c, void* d, Left left, Right right, Store store) {
  constexpr int kElements = 4 / sizeof(Element), kDepth = 8 * kElements;
  Operands own{a, {b0, b1}, c, d};
  collective(&own, [=](void** lanes) {
    static float rows[16][kDepth], columns[8][kDepth];
    for (int i = 0; i < 32; ++i) {
      auto* o = (Operands*)lanes[i];
      for (int part = 0; part < 4; ++part)
        for (int e = 0; e < kElements; ++e) {
          const int k = part / 2 * (kDepth / 2) + i % 4 * kElements + e;
          rows[i / 4 + part % 2 * 8][k] = left(((const Element*)&o->a[part])[e]);
          if (part % 2) columns[i / 4][k] = right(((const Element*)&o->b[part / 2])[e]);
        }
    }
    for (int i = 0; i < 32; ++i)
      for (int e = 0; e < 4; ++e) {
        float sum = 0;  // exact for the INT8 products: below 2^24
        for (int k = 0; k < kDepth; ++k) sum += rows[i / 4 + e / 2 * 8][k] * columns[i % 4 * 2 + e % 2][k];
        store(*(Operands*)lanes[i], e, sum);
      }
  });
}

inline float signed_byte(u8 x) { return (float)(signed char)x; }
inline float unsigned_byte(u8 x) { return (float)x; }
inline float half(u16 x) { return half_to_float(x); }
inline float tensor_float(u32 x) { return __uint_as_float(x & 0xFFFFE000u); }
inline float brain(u16 x) { return __uint_as_float((u32)x << 16); }

template <class Left>
void mma_int(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const u32 (&c)[4], Left left) {
  const u32 before[4] = {c[0], c[1], c[2], c[3]};
  product<u8>(a, b0, b1, before, d, left, signed_byte,
              [](Operands& o, int e, float sum) { ((u32*)o.d)[e] = ((const u32*)o.c)[e] + (u32)(int)sum; });
}
inline void mma_s8(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const u32 (&c)[4]) { mma_int(d, a, b0, b1, c, signed_byte); }
inline void mma_u8_s8(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const u32 (&c)[4]) { mma_int(d, a, b0, b1, c, unsigned_byte); }

template <class Element, class Convert>
void mma_to_f32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Convert convert) {
  product<Element>(a, b0, b1, c, c, convert, convert, [](Operands& o, int e, float sum) { ((float*)o.d)[e] += sum; });
}
inline void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_to_f32<u16>(c, a, b0, b1, half); }
constexpr bool kMma16 = ARCH >= 80;
inline void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_to_f32<u16>(c, a, b0, b1, brain); }
inline void mma_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_to_f32<u32>(c, a, b0, b1, tensor_float); }
inline void mma_e4m3(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_to_f32<u8>(c, a, b0, b1, e4m3_value); }

template <class Element, class Convert>
void mma_to_f16(u32 (&c)[2], const u32 (&a)[4], u32 b0, u32 b1, Convert convert) {
  product<Element>(a, b0, b1, c, c, convert, convert, [](Operands& o, int e, float sum) {
    u16& h = ((u16*)o.d)[e];
    h = (u16)float_to_half(half_to_float(h) + sum);
  });
}
inline void mma_f16_f16(u32 (&c)[2], const u32 (&a)[4], u32 b0, u32 b1) { mma_to_f16<u16>(c, a, b0, b1, half); }
inline void mma_e4m3_f16(u32 (&c)[2], const u32 (&a)[4], u32 b0, u32 b1) { mma_to_f16<u8>(c, a, b0, b1, e4m3_value); }
}  // namespace sage
