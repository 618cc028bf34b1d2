// Prologue of a Hopper work tile: the consumers quantise their rows of Q into shared memory.
#pragma once
#include "../block/query.cuh"
#include "producer_sm90.cuh"

namespace sage {

// load_raw of the lane's two rows, from the copied raw Q.
template <class C, int kDtype>
__device__ __forceinline__ void read_raw_q(u32 shared, const RowCoord& at, int head_dim, Raw8<kDtype> (&raw)[2][C::kHeadDim / 32]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int c = 0; c < C::kHeadDim / 32; ++c) {
      const u32 from = shared + C::kRawQ + (16 * at.warp + 8 * half + at.g) * C::kRawQPitch + 64 * c + 16 * at.t;
      const uint4 v = 32 * c + kChunk * at.t < head_dim ? load_shared16(from) : uint4{};
      raw[half][c].word[0] = v.x, raw[half][c].word[1] = v.y, raw[half][c].word[2] = v.z, raw[half][c].word[3] = v.w;
    }
}

// Rotates and quantises the warp's rows into shared memory. scale: score scales of the lane's two rows.
template <class C>
__device__ __forceinline__ void quantize_q(const AttendParams& p, u32 shared, int iteration, float (&scale)[2]) {
  constexpr int kHeadDim = C::kHeadDim;
  const RowCoord at = consumer_rows<C>(p, shared + C::work_slot(iteration));
  with_dtype(dtype_of<C>(p), [&](auto type) {
    constexpr int kDtype = decltype(type)::value;
    const u8* head =
        static_cast<const u8*>(p.q.data) + (at.tile.batch * p.q.stride_b + at.tile.head * p.q.stride_h) * kElementBytes<kDtype>;
    const auto token = [&](int row) { return token_of<C::kMask>(p, at.tile.span, row); };
    Raw8<kDtype> raw[2][kHeadDim / 32];
    if (kDtype != kFloat32 && prefetches_raw_q<C>(p))
      read_raw_q<C>(shared, at, p.head_dim, raw);
    else if (C::kResident || p.q_vectorized)
      load_raw<kHeadDim, 2, kDtype, true>(head, token, p.q.stride_n, at.row(0), at.tile.span.len_q, at.t, p.head_dim, raw);
    else
      load_raw<kHeadDim, 2, kDtype, false>(head, token, p.q.stride_n, at.row(0), at.tile.span.len_q, at.t, p.head_dim, raw);
    __syncwarp();
    if constexpr (!C::kResident) mbarrier_arrive(elected(), shared + C::kWorkBarriers + kWorkEmpty);
    const u32 row0 = shared + C::q_offset(iteration, at.warp / 4) + 16 * (at.warp % 4) * 16;
    const auto wait = [&] {  // this Q stage is no longer read; with two stages, the last work tile's barrier has ensured that
      if (C::kQStages == 1 && !C::kResident) named_barrier<128>(1 + at.warp / 4);
    };
    if constexpr (kDtype == kFloat32) {
      u32 a[kHeadDim / 32][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[kHeadDim / 4];
        unpack_row<kHeadDim>(raw[half], x);
        scale[half] = quantize_row<kHeadDim>(x, at.t, p.score_scale, p.sign, a, half);
      }
      wait();
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int c2 = 0; c2 < kHeadDim / 64; ++c2)
          store_shared16(row0 + (4 * c2 + at.t) * C::kQPitch + (8 * half + at.g) * 16,
                         {a[2 * c2][half], a[2 * c2][half + 2], a[2 * c2 + 1][half], a[2 * c2 + 1][half + 2]});
    } else {
      const int lane = 4 * at.g + at.t;
      const Rotation<kHeadDim, kDtype> rotation(load_shared16(shared + C::kRotation + 16 * lane));
      u32 quantized[2][2][kHeadDim / 32];
#pragma unroll
      for (int half = 0; half < 2; ++half) scale[half] = quantize_rows8(raw[half], rotation, lane, p.score_scale, p.sign, quantized[half]);
      wait();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& own = quantized[i / 2][i % 2];
        const u32 to = row0 + (8 * (i / 2) + 2 * at.t + i % 2) * 16;
        if constexpr (kHeadDim == 64)
          store_shared8(to + at.g % 4 * C::kQPitch + at.g / 4 * 8, own[0], own[1]);
        else
#pragma unroll
          for (int c = 0; c < kHeadDim / 128; ++c)
            store_shared16(to + (8 * c + at.g) * C::kQPitch, {own[4 * c], own[4 * c + 1], own[4 * c + 2], own[4 * c + 3]});
      }
    }
  });
  fence_async_proxy();
  const float max_scale = load_shared_float(shared + C::work_slot(iteration) + work::kMaxScale);
  named_barrier<128>(1 + at.warp / 4);  // the warpgroup's Q is complete in shared memory
#pragma unroll
  for (int half = 0; half < 2; ++half) scale[half] = fminf(scale[half], max_scale);
}

}  // namespace sage
