// The keys of a step that a row sees, as bits, and the additive bias of a dense mask.
#pragma once
#include "../ptx/shared.cuh"
#include "../ptx/special.cuh"
#include "../layout/fragment.cuh"
#include "../common/tensor.cuh"

namespace sage {

enum class Mask {
  none,
  causal,
  list
};  // at compile time; list: KV tiles from lists (a dense mask, perhaps causal as well, or block-sparse)

// Natural-log bias → base 2. A finite bias stays finite: only −inf masks out.
__device__ __forceinline__ float bias_to_base2(float bias) {
  return bias == -kInf ? -kInf : fminf(fmaxf(bias * kLog2e, -kFiniteMax), kFiniteMax);
}

__device__ __forceinline__ int mask_element_bytes(i32 kind) {
  return kind == kMaskBool ? 1 : kind == kMaskF32 || kind == kMaskBiasRow ? 4 : 2;
}

template <int kKind>
__device__ __forceinline__ float mask_element(const void* at) {
  if constexpr (kKind == kMaskF32) return *static_cast<const float*>(at);
  const u32 bits = *static_cast<const u16*>(at);
  return kKind == kMaskF16 ? f16_to_f32(bits) : __uint_as_float(bits << 16);
}

// One row of an additive mask in memory.
struct BiasRow {
  const u8* data;
  i64 stride_k;  // in elements
  i32 kind, len_kv, pairs;

  template <int kKind, int kPairs, class Add>
  __device__ __forceinline__ void each_of(int key, Add add) const {
    constexpr int kBytes = kKind == kMaskF32 ? 4 : 2;
    if (pairs && key + 8 * kPairs <= len_kv) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const u8* at = data + (i64)key * kBytes + 8 * j * kBytes;
        if constexpr (kKind == kMaskF32) {
          const float2 x = *reinterpret_cast<const float2*>(at);
          add(j, bias_to_base2(x.x), bias_to_base2(x.y));
        } else {
          const u32 x = *reinterpret_cast<const u32*>(at);
          if constexpr (kKind == kMaskF16) {
            const float2 y = unpack_f16(x);
            add(j, bias_to_base2(y.x), bias_to_base2(y.y));
          } else {
            add(j, bias_to_base2(__uint_as_float(x << 16)), bias_to_base2(__uint_as_float(x & 0xFFFF0000u)));
          }
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const auto element = [&](int i) {
          return bias_to_base2(mask_element<kKind>(data + min(key + 8 * j + i, len_kv - 1) * stride_k * kBytes));
        };
        add(j, element(0), element(1));
      }
    }
  }

  // Calls add(j, x, y) with the base-2 biases of keys key + 8j and key + 8j + 1, j < kPairs. Keys beyond the end repeat the last.
  template <int kPairs, class Add>
  __device__ __forceinline__ void each(int key, Add add) const {
    if (kind == kMaskF32)
      each_of<kMaskF32, kPairs>(key, add);
    else if (kind == kMaskF16)
      each_of<kMaskF16, kPairs>(key, add);
    else
      each_of<kMaskBf16, kPairs>(key, add);
  }
};

// Of the kKeys keys from key0 on, those that the lane's two rows (g and g + 8 of sixteen) see: bit k % 32 of row[half][k / 32] is key0 + k.
template <int kKeys>
struct KeyBits {
  static_assert(kKeys % 32 == 0, "whole words");
  u32 row[2][kKeys / 32];

  // Sees keys below `limit`, counted from key0.
  __device__ __forceinline__ void below(int half, int limit) {
#pragma unroll
    for (int w = 0; w < kKeys / 32; ++w) {
      const int left = limit - 32 * w;
      row[half][w] = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0u;
    }
  }

  // Removes keys that a bool mask removes. kept: its bits from key0 on.
  __device__ __forceinline__ void keep(int half, const u32* kept) {
#pragma unroll
    for (int w = 0; w < kKeys / 32; ++w) row[half][w] &= kept[w];
  }

  // Shifts the rows so that bit 8·j + e is the lane's column 2t + e of n-tile j, for sees().
  __device__ __forceinline__ void align(int t) {
#pragma unroll
    for (int i = 0; i < 2 * (kKeys / 32); ++i) row[i % 2][i / 2] >>= 2 * t;
  }

  __device__ __forceinline__ bool sees(int half, int j, int e) const { return row[half][j / 4] >> (j % 4 * 8 + e) & 1; }
};

}  // namespace sage
