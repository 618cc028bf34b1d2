// Epilogue of a Hopper work tile: split-KV merge, output, LSE.
#pragma once
#include "../block/output.cuh"
#include "../block/query.cuh"
#include "scheduler_sm90.cuh"

namespace sage {

// Stores the rows' LSE, adding back what subtracting k_mean took from it. Rarely requested: optimised for code size, reads Q again.
template <class C>
__device__ __forceinline__ void store_lse(const AttendParams& p, u32 own, const RowCoord& at, const float (&l_i)[2],
                                          const float (&m_i)[2]) {
  grid_dependency_wait();
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int row = token_in<C>(p, own, at.tile, min(at.row(half), at.tile.span.len_q - 1));
    const i64 offset = at.tile.batch * p.q.stride_b + at.tile.head * p.q.stride_h + row * p.q.stride_n;
    float shift;
    with_dtype(dtype_of<C>(p), [&](auto type) {
      constexpr int kDtype = decltype(type)::value;
      const u8* q = static_cast<const u8*>(p.q.data) + offset * kElementBytes<kDtype>;
      shift = k_mean_score<kDtype>(q, p.head_dim, C::k_mean(p, at.tile.bh), at.t, p.sm_scale);
    });
    const float sum = half ? l_i[1] : l_i[0], m = half ? m_i[1] : m_i[0];  // selected without an index: they are registers
    if (at.t == 0 && at.has(at.row(half))) *at.lse(p, row) = log_sum_exp(sum, m, shift);
  }
}

// Stores O / l, scaled and shifted by V's scale and mean per channel, in the output's dtype, and LSE. o: accumulators of 64 rows ×
// kHeadDim columns (the first kHeadDim / 2 registers), l_i and m_i: [half].
template <class C>
__device__ __forceinline__ void store_output(const AttendParams& p, const float (&o)[C::kOutRegisters], const float (&l_i)[2],
                                             const float (&m_i)[2], u32 own) {
  constexpr int kHeadDim = C::kHeadDim;
  constexpr int kHeld = kHeadDim <= 128 ? kHeadDim / 32 : 1;  // chunks whose scale and mean fit the registers beside O
  const int t = special_tid_x() % 4;
  float scale[kHeld][kChunk], mean[kHeld][kChunk] = {};
  const auto take_chunk = [&](int c) {
    const u32 channels = C::channel_scales(own) + 4 * (32 * c + kChunk * t);
    load_shared8_floats(channels, scale[c % kHeld]);
    if constexpr (C::Layout::kVElementBytes == 1) load_shared8_floats(channels + 4 * kHeadDim, mean[c % kHeld]);
  };
#pragma unroll
  for (int c = 0; c < kHeld; ++c) take_chunk(c);  // first, to hide their latency
  const RowCoord at = consumer_rows<C>(p, own);
  const uint2 out = load_shared8(own + work::kOut);
  const i64 head = (i64)((u64)out.y << 32 | out.x);
  const float inverse[2] = {inverse_sum(l_i[0], p.inv_v_max), inverse_sum(l_i[1], p.inv_v_max)};
  with_access(dtype_of<C>(p), C::kResident ? 1 : p.out_vectorized, [&](auto type, auto vectors) {
    constexpr int kDtype = decltype(type)::value;
    u8* row[2];
    int width[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] =
          static_cast<u8*>(p.out) +
          (head + (C::kMask == Mask::list ? token_in<C>(p, own, at.tile, min(at.row(half), p.len_q - 1)) : at.row(half)) * p.out_stride_n) *
              kElementBytes<kDtype>;
      width[half] = at.has(at.row(half)) ? p.head_dim : 0;
    }
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
      if (c >= kHeld) take_chunk(c);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float y[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e)
          y[e] = dequantize_o<C::kMask>(o[16 * c + e / 2 * 4 + 2 * half + e % 2], inverse[half], scale[c % kHeld][e], mean[c % kHeld][e]);
        store8<kDtype, decltype(vectors)::value>(row[half], 32 * c + kChunk * t, width[half], y);
      }
    }
  });
  if (p.lse) store_lse<C>(p, own, at, l_i, m_i);
}

// Split-KV merge of two CTAs: the one with the later KV tiles of a work tile writes unnormalised O, l and m; the one with the earlier tiles
// merges and stores. Each thread reads the registers of the same thread of the other CTA.
template <class C>
struct SplitKvPartial {
  static constexpr int kCount = C::kHeadDim / 2, kFours = kCount / 4 + 1, kThreads = 128 * C::kConsumers;
  static constexpr int kCtaBytes = kFours * kThreads * 16;  // of p.split_kv_workspace

  float4* to;
  i32* ready;
  int warpgroup;

  __device__ __forceinline__ SplitKvPartial(const AttendParams& p, int block) {
    const int thread = special_tid_x() - 128;
    warpgroup = thread / 128;
    to = reinterpret_cast<float4*>(p.split_kv_workspace) + (i64)block * kFours * kThreads + thread;
    ready = p.split_kv_ready + block * C::kConsumers + warpgroup;
  }

  __device__ __forceinline__ void write(const float (&o)[C::kOutRegisters], const float (&l_i)[2], const float (&m_i)[2]) const {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) __stcg(to + i * kThreads, make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]));
    __stcg(to + kCount / 4 * kThreads, make_float4(l_i[0], l_i[1], m_i[0], m_i[1]));
    __threadfence();
    named_barrier<128>(1 + warpgroup);  // all have written
    if (special_tid_x() % 128 == 0) store_release(ready, 1);
  }

  // Waits for the other CTA's result and merges it. Resets `ready` to 0 for the next launch.
  __device__ __forceinline__ void join(float (&o)[C::kOutRegisters], float (&l_i)[2], float (&m_i)[2]) const {
    while (!load_acquire(ready)) {
    }
    named_barrier<128>(1 + warpgroup);  // all have seen it
    if (special_tid_x() % 128 == 0) store_release(ready, 0);
    const float4 rest = __ldcg(to + kCount / 4 * kThreads);
    const float other_l[2] = {rest.x, rest.y}, other_m[2] = {rest.z, rest.w};
    float own[2], other[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = fmaxf(m_i[half], other_m[half]), m = most == -kInf ? 0.0f : most;
      own[half] = exp2_approx(m_i[half] - m), other[half] = exp2_approx(other_m[half] - m);
      l_i[half] = fmaf(other[half], other_l[half], own[half] * l_i[half]);
      m_i[half] = most;
    }
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const float4 x = __ldcg(to + i * kThreads);
      o[4 * i] = fmaf(other[0], x.x, own[0] * o[4 * i]), o[4 * i + 1] = fmaf(other[0], x.y, own[0] * o[4 * i + 1]);
      o[4 * i + 2] = fmaf(other[1], x.z, own[1] * o[4 * i + 2]), o[4 * i + 3] = fmaf(other[1], x.w, own[1] * o[4 * i + 3]);
    }
  }
};

}  // namespace sage
