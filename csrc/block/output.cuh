// O / sum, V's channel scales, the output's dtype; LSE.
#pragma once
#include "../common/tensor.cuh"

namespace sage {

// Eight channels of a token. No finite value becomes infinite. kVectors: as for load8.
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

}  // namespace sage
