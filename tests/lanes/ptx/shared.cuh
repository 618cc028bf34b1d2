#pragma once
#include "block.h"

namespace sage {
inline u32 shared_address(const void* p) { return (u32)(int)((const char*)p - address_base); }
inline uint4 load_shared16(u32 a) { return *(uint4*)at_shared(a, 16); }
inline void store_shared16(u32 a, const u32 (&v)[4]) { memcpy(at_shared(a, 16), v, 16); }
inline void store_shared8(u32 a, u32 x, u32 y) { *(uint2*)at_shared(a, 8) = {x, y}; }
inline uint2 load_shared8(u32 a) { return *(uint2*)at_shared(a, 8); }
inline void store_shared(u32 a, u32 x) { *(u32*)at_shared(a, 4) = x; }
inline u32 load_shared(u32 a) { return *(u32*)at_shared(a, 4); }
inline float load_shared_float(u32 a) { return *(float*)at_shared(a, 4); }
inline void load_shared8_floats(u32 a, float (&x)[8]) { memcpy(x, at_shared(a, 16), 32); }
inline float2 load_shared_float2(u32 a) { return *(float2*)at_shared(a, 8); }
inline void store_shared_float(u32 a, float x) { *(float*)at_shared(a, 4) = x; }

struct Matrices { u32 address, out[4]; };
inline uint4 ldmatrix_x4_trans(u32 a) {
  Matrices own{a, {}};
  collective(&own, [](void** lanes) {
    for (int i = 0; i < 32; ++i)
      for (int m = 0; m < 4; ++m) {
        const auto row = [&](int r) { return ((u16*)at_shared(((Matrices*)lanes[8 * m + r])->address, 16))[i / 4]; };
        ((Matrices*)lanes[i])->out[m] = row(2 * (i % 4)) | (u32)row(2 * (i % 4) + 1) << 16;
      }
  });
  return {own.out[0], own.out[1], own.out[2], own.out[3]};
}

struct Transposed { u32 in, out; };
inline u32 movmatrix_trans(u32 x) {
  Transposed own{x, 0};
  collective(&own, [](void** lanes) {
    const auto element = [&](int row, int column) { return ((Transposed*)lanes[4 * row + column / 2])->in >> column % 2 * 16 & 0xFFFF; };
    for (int i = 0; i < 32; ++i) ((Transposed*)lanes[i])->out = element(i % 4 * 2, i / 4) | element(i % 4 * 2 + 1, i / 4) << 16;
  });
  return own.out;
}
}  // namespace sage
