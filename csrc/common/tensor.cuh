// Reads and writes eight consecutive channels of a token, the unit in which every kernel accesses tensors; dispatch on dtype.
#pragma once
#include <sage/constants.cuh>

#include "../ptx/convert.cuh"
#include "math.cuh"

namespace sage {

constexpr int kChunk = 8;  // channels

template <int kDtype>
struct Raw8 {
  u32 word[kDtype == kFloat32 ? 8 : 4];
};

template <int kDtype>
constexpr int kElementBytes = kDtype == kFloat32 ? 4 : 2;

// Loads channels [channel, channel + 8) of the row at `row` into `raw`, where channels ≥ head_dim must be zero and stay so. kVectors: the
// row is 16-byte aligned and head_dim a multiple of 8. Callers branch on that once, outside all loads that should be in flight together.
template <int kDtype, bool kVectors>
__device__ __forceinline__ void load8(const void* row, int channel, int head_dim, Raw8<kDtype>& raw) {
  constexpr int kBytes = kElementBytes<kDtype>;
  const u8* at = static_cast<const u8*>(row) + channel * kBytes;
  if constexpr (kVectors) {
    if (channel < head_dim) {
#pragma unroll
      for (int i = 0; i < kChunk * kBytes / 16; ++i) {
        const uint4 v = reinterpret_cast<const uint4*>(at)[i];
        raw.word[4 * i] = v.x, raw.word[4 * i + 1] = v.y, raw.word[4 * i + 2] = v.z, raw.word[4 * i + 3] = v.w;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (channel + i >= head_dim) continue;
      if constexpr (kDtype == kFloat32)
        raw.word[i] = reinterpret_cast<const u32*>(at)[i];
      else
        raw.word[i / 2] = (i & 1 ? raw.word[i / 2] : 0) | (u32) reinterpret_cast<const u16*>(at)[i] << (16 * (i & 1));
    }
  }
}

// The same into registers of its own; channels ≥ head_dim are zero.
template <int kDtype, bool kVectors>
__device__ __forceinline__ Raw8<kDtype> load8(const void* row, int channel, int head_dim) {
  Raw8<kDtype> raw{};
  load8<kDtype, kVectors>(row, channel, head_dim, raw);
  return raw;
}

// x[0 … 7]: the eight channels in fp32.
template <int kDtype>
__device__ __forceinline__ void unpack8(const Raw8<kDtype>& raw, float* x) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if constexpr (kDtype == kFloat32)
      x[i] = __uint_as_float(raw.word[i]);
    else if constexpr (kDtype == kBfloat16)
      x[i] = __uint_as_float(i & 1 ? raw.word[i / 2] & 0xFFFF0000u : raw.word[i / 2] << 16);
    else
      x[i] = f16_to_f32(i & 1 ? raw.word[i / 2] >> 16 : raw.word[i / 2] & 0xFFFFu);
  }
}

// Stores channels [channel, channel + 8) of a row, those ≥ head_dim left out. Finite values stay finite: they are clamped to the dtype's
// range. kVectors: as for load8.
template <int kDtype, bool kVectors>
__device__ __forceinline__ void store8(void* row, int channel, int head_dim, float (&x)[kChunk]) {
  u32 word[kDtype == kFloat32 ? 8 : 4];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if constexpr (kDtype == kFloat32)
      word[i] = __float_as_uint(fminf(fmaxf(x[i], -3.40282347e38f), 3.40282347e38f));
    else if (i % 2 == 0)
      word[i / 2] = kDtype == kFloat16 ? pack_f16_finite(x[i], x[i + 1]) : pack_bf16_finite(x[i], x[i + 1]);
  }
  u8* at = static_cast<u8*>(row) + channel * kElementBytes<kDtype>;
  if constexpr (kVectors) {
    if (channel >= head_dim) return;
#pragma unroll
    for (int i = 0; i < kChunk * kElementBytes<kDtype> / 16; ++i)
      reinterpret_cast<uint4*>(at)[i] = make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (channel + i >= head_dim) continue;
      if constexpr (kDtype == kFloat32)
        reinterpret_cast<u32*>(at)[i] = word[i];
      else
        reinterpret_cast<u16*>(at)[i] = (u16)(word[i / 2] >> (16 * (i % 2)));
    }
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
  __device__ constexpr operator int() const { return kValue; }
};

// Calls body(Constant<dtype>): one branch outside, straight-line code inside.
template <class Body>
__device__ __forceinline__ void with_dtype(i32 dtype, Body body) {
  if (dtype == kBfloat16)
    body(Constant<kBfloat16>{});
  else if (dtype == kFloat16)
    body(Constant<kFloat16>{});
  else
    body(Constant<kFloat32>{});
}

// Calls body(Constant<dtype>, Constant<vectors>).
template <class Body>
__device__ __forceinline__ void with_access(i32 dtype, i32 vectors, Body body) {
  with_dtype(dtype, [&](auto type) {
    if (vectors)
      body(type, Constant<1>{});
    else
      body(type, Constant<0>{});
  });
}

}  // namespace sage
