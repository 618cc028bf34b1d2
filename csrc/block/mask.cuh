// Which keys of a step a row sees, as bits, and the additive bias of a dense mask.
#pragma once
#include "../ptx/special.cuh"
#include "fragment.cuh"
#include "load.cuh"

namespace sage {

enum class Mask { none, causal, list };  // compile time; `list`: a dense mask, perhaps causal as well, by lists of KV tiles
enum MaskKind : i32 { kMaskF16 = kFloat16, kMaskBf16 = kBfloat16, kMaskF32 = kFloat32, kMaskBool = 3 };

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Natural-log bias → base 2. A finite bias stays finite: only −inf masks out.
__device__ __forceinline__ float bias_to_base2(float bias) {
  return bias == -kInf ? -kInf : fminf(fmaxf(bias * kLog2e, -1e38f), 1e38f);
}

__device__ __forceinline__ float mask_element(i32 kind, const void* at) {
  if (kind == kMaskF32) return *static_cast<const float*>(at);
  const u32 bits = *static_cast<const u16*>(at);
  return kind == kMaskF16 ? f16_to_f32(bits) : __uint_as_float(bits << 16);
}

__device__ __forceinline__ int mask_element_bytes(i32 kind) { return kind == kMaskBool ? 1 : kind == kMaskF32 ? 4 : 2; }

// A dense mask as it lies in memory, at one (batch, head): strides in elements, 0 where it broadcasts.
struct MaskView {
  const u8* data;
  i64 stride_q, stride_k;
  i32 kind, len_q, len_kv, pairs;

  __device__ __forceinline__ const u8* at(int row, int key) const {
    return data + (min(row, len_q - 1) * stride_q + min(key, len_kv - 1) * stride_k) * mask_element_bytes(kind);
  }

  // Bias of keys `key` and `key` + 1 of a row, in natural-log units.
  __device__ __forceinline__ float2 bias(int row, int key) const {
    if (kind == kMaskF32) {
      if (pairs) return *reinterpret_cast<const float2*>(at(row, min(key, len_kv - 2)));
      return {*reinterpret_cast<const float*>(at(row, key)), *reinterpret_cast<const float*>(at(row, key + 1))};
    }
    const u32 both = pairs ? *reinterpret_cast<const u32*>(at(row, min(key, len_kv - 2)))
                           : *reinterpret_cast<const u16*>(at(row, key)) | (u32)*reinterpret_cast<const u16*>(at(row, key + 1)) << 16;
    if (kind == kMaskF16) return unpack_f16(both);
    return {__uint_as_float(both << 16), __uint_as_float(both & 0xFFFF0000u)};
  }
};

// The keys that a lane's two rows, g and g + 8 of sixteen, see of kKeys from key0 on: bit k % 32 of word k / 32 is key0 + k.
template <int kKeys>
struct KeyBits {
  static_assert(kKeys % 32 == 0, "whole words");
  u32 row[2][kKeys / 32];

  // Those below `limit`, counted from key0.
  __device__ __forceinline__ void below(int half, int limit) {
#pragma unroll
    for (int w = 0; w < kKeys / 32; ++w) {
      const int left = limit - 32 * w;
      row[half][w] = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0u;
    }
  }

  // … and not removed by a bool mask. All lanes of the warp take part: a lane reads one key of each of the sixteen rows from row0 on.
  __device__ __forceinline__ void keep(const MaskView& mask, int row0, int key0) {
    const int lane = special_tid_x() % 32, g = lane / 4;
    constexpr int kAtOnce = 8;
#pragma unroll
    for (int w = 0; w < kKeys / 32; ++w) {
      if (mask.stride_q == 0) {
        const u32 word = __ballot_sync(kAllLanes, *mask.at(0, key0 + 32 * w + lane) != 0);
        row[0][w] &= word, row[1][w] &= word;
        continue;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u8 x[kAtOnce];
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) x[r] = *mask.at(row0 + 8 * half + r, key0 + 32 * w + lane);
        u32 own = 0;
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          const u32 word = __ballot_sync(kAllLanes, x[r] != 0);
          if (g == r) own = word;
        }
        row[half][w] &= own;
      }
    }
  }

  // Makes bit 8·j + e of a row, j counting groups of eight keys, the lane's own column 2t + e.
  __device__ __forceinline__ void align(int t) {
#pragma unroll
    for (int i = 0; i < 2 * (kKeys / 32); ++i) row[i % 2][i / 2] >>= 2 * t;
  }

  __device__ __forceinline__ bool sees(int half, int j, int e) const { return row[half][j / 4] >> (j % 4 * 8 + e) & 1; }
};

}  // namespace sage
