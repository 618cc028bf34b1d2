// Eight consecutive channels of a token as fp32: the unit in which every kernel reads its tensors.
#pragma once
#include <sage/constants.cuh>

#include "../ptx/convert.cuh"

namespace sage {

constexpr int kChunk = 8;  // channels
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr float kInf = __builtin_bit_cast(float, 0x7F800000);

template <int kDtype>
struct Raw8 {
  u32 word[kDtype == kFloat32 ? 8 : 4];
};

template <int kDtype>
constexpr int kElementBytes = kDtype == kFloat32 ? 4 : 2;

// Channels [channel, channel + 8) of the row at `row`; in `raw`, those ≥ head_dim must be and stay zero. kVectors: the row is 16-byte
// aligned and head_dim a multiple of 8. Callers branch on that once around all the loads they want under way together.
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

// The same; channels ≥ head_dim are zero.
template <int kDtype, bool kVectors>
__device__ __forceinline__ Raw8<kDtype> load8(const void* row, int channel, int head_dim) {
  Raw8<kDtype> raw{};
  load8<kDtype, kVectors>(row, channel, head_dim, raw);
  return raw;
}

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

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls `body` with a Constant<Dtype>: one branch outside, straight code inside.
template <class Body>
__device__ __forceinline__ void with_dtype(i32 dtype, Body body) {
  if (dtype == kBfloat16)
    body(Constant<kBfloat16>{});
  else if (dtype == kFloat16)
    body(Constant<kFloat16>{});
  else
    body(Constant<kFloat32>{});
}

// body(dtype, vectors) with both as Constants.
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
