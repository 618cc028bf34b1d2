// Which keys a row sees, and the additive bias of a dense mask.
#pragma once
#include "../ptx/shared.cuh"
#include "../layout/fragment.cuh"
#include "../common/tensor.cuh"

namespace sage {

enum class Mask { none, causal, dense };  // compile time; `dense` may be causal as well

// Natural-log bias → base 2. A finite bias stays finite: only −inf masks out.
__device__ __forceinline__ float bias_to_base2(float bias) {
  return bias == -kInf ? -kInf : fminf(fmaxf(bias * kLog2e, -kFiniteMax), kFiniteMax);
}

// A dense mask as it lies in memory, at one (batch, head): strides in elements, 0 where it broadcasts.
struct MaskView {
  const void* data;
  i64 stride_q, stride_k;
  i32 kind, len_q, len_kv;
};

// The bias of 16 queries × 64 keys, staged in shared memory by one warp: read coalesced from memory, converted once.
struct BiasTile {
  static constexpr int kRows = 16, kAtOnce = 4, kPitch = (kKvTile + 8) * 4;  // bytes a row; the 8 keep the reads free of bank conflicts
  static constexpr int kBytes = kRows * kPitch;
  u32 shared;

  template <class Element, class Convert>
  __device__ __forceinline__ void stage_as(const MaskView& mask, int row0, int key0, Convert convert) const {
    const int lane = threadIdx.x % 32, last = mask.len_q - 1 - row0;
    const Element* from[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      from[half] = static_cast<const Element*>(mask.data) + (row0 + min(last, 0)) * mask.stride_q +
                   min(key0 + 32 * half + lane, mask.len_kv - 1) * mask.stride_k;
    if (mask.stride_q == 0) {  // one row for all queries; conditions on single rows in the loop would cost registers
      const Element x[2] = {*from[0], *from[1]};  // both before the first store, which no load passes
#pragma unroll
      for (int half = 0; half < 2; ++half) store_shared_float(shared + (32 * half + lane) * 4, convert(x[half]));
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kRows; i += kAtOnce) {
      Element x[kAtOnce][2];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          x[r][half] = *from[half];
          if (i + r < last) from[half] += mask.stride_q;
        }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) store_shared_float(shared + (i + r) * kPitch + (32 * half + lane) * 4, convert(x[r][half]));
    }
  }

  __device__ __forceinline__ void stage(const MaskView& mask, int row0, int key0) const {
    __syncwarp();  // the last tile's bias has been read
    if (mask.kind == kMaskBool)
      stage_as<u8>(mask, row0, key0, [](u8 keep) { return keep ? 0.0f : -kInf; });
    else if (mask.kind == kMaskF32)
      stage_as<float>(mask, row0, key0, [](float x) { return bias_to_base2(x); });
    else if (mask.kind == kMaskF16)
      stage_as<u16>(mask, row0, key0, [](u16 x) { return bias_to_base2(f16_to_f32(x)); });
    else
      stage_as<u16>(mask, row0, key0, [](u16 x) { return bias_to_base2(__uint_as_float((u32)x << 16)); });
    __syncwarp();  // every lane's part is there
  }

  // Of keys `column` and `column` + 1 for one row; a mask that is the same for all queries has one row.
  __device__ __forceinline__ float2 get(const MaskView& mask, int row, int column) const {
    return load_shared_float2(shared + (mask.stride_q ? row : 0) * kPitch + 4 * column);
  }
};

}  // namespace sage
