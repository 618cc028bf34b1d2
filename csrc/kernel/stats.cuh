// First launch: what must be known of all keys and values before any of them can be quantised – the largest |v| of each
// channel (one pass over V) and an anchor for K (the mean of a strided sample, at most 512 tokens).
//
// Blocks write partial results; the quantise launch reduces them. No atomics, so no zeroing beforehand, and the same bits on
// every run.
#pragma once
#include "../block/load.cuh"
#include "../ptx/copy.cuh"
#include "params.cuh"

namespace sage {

constexpr int kStatsThreads = 512;

// out[channel] = combination of weight · x over `count` rows.
template <int kHeadDim, int kDtype, bool kVectors, class Combine>
__device__ __forceinline__ void reduce_rows(const u8* rows, i64 row_bytes, int count, int head_dim, float weight,
                                            float* out, float (*shared)[kChunk], Combine combine) {
  constexpr int kLanes = kHeadDim / kChunk, kRows = kStatsThreads / kLanes, kUnroll = !kVectors ? 1 : kDtype == kFloat32 ? 2 : 4;
  const int channel = threadIdx.x % kLanes * kChunk, row = threadIdx.x / kLanes;
  float acc[kChunk] = {};
  for (int base = row; base < count; base += kRows * kUnroll) {
    Raw8<kDtype> raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      raw[u] = base + u * kRows < count ? load8<kDtype, kVectors>(rows + (base + u * kRows) * row_bytes, channel, head_dim)
                                        : Raw8<kDtype>{};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[kChunk];
      unpack8<kDtype>(raw[u], x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) acc[i] = combine(acc[i], weight * x[i]);
    }
  }
  __syncthreads();  // the previous use of `shared` is over
#pragma unroll
  for (int i = 0; i < kChunk; ++i) shared[threadIdx.x][i] = acc[i];
  __syncthreads();  // every thread's partial result is in `shared`
  for (int c = threadIdx.x; c < kHeadDim; c += kStatsThreads) {
    float total = 0.0f;
    for (int r = 0; r < kRows; ++r) total = combine(total, shared[r * kLanes + c / kChunk][c % kChunk]);
    out[c] = total;
  }
}

template <int kHeadDim>
__device__ void stats(const StatsParams& p) {
  __shared__ float shared[kStatsThreads][kChunk];
  wait_for_previous_launch();
  let_next_launch_start();
  const int pair = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
  const int batch = (p.first + pair) / p.heads, head = (p.first + pair) % p.heads;
  if (split == 0 && threadIdx.x == 0) p.k_scale_max[pair] = 0;
  with_access(p.dtype, p.vectors, [&](auto type, auto vectors) {
    constexpr int kDtype = decltype(type)::value;
    const auto reduce = [&](const Tokens& x, i64 first, i64 step, int count, float weight, float* out, auto combine) {
      const i64 offset = batch * x.stride_b + head * x.stride_h + first * x.stride_n;
      reduce_rows<kHeadDim, kDtype, decltype(vectors)::value>(static_cast<const u8*>(x.data) + offset * kElementBytes<kDtype>,
                                    step * x.stride_n * kElementBytes<kDtype>, count, p.head_dim, weight, out, shared,
                                    combine);
    };
    const int first = split * p.split_tokens;
    reduce(p.v, first, 1, min(p.split_tokens, p.len - first), 1.0f, p.v_amax + (i64)blockIdx.x * kHeadDim,
           [](float top, float x) { return fmaxf(top, fabsf(x)); });
    if (split < p.k_splits)  // each summand already divided: a plain sum could overflow
      reduce(p.k, (i64)split * p.sample_step, (i64)p.k_splits * p.sample_step,
             (p.samples - split + p.k_splits - 1) / p.k_splits, 1.0f / p.samples,
             p.k_mean + ((i64)pair * p.k_splits + split) * kHeadDim, [](float sum, float x) { return sum + x; });
  });
}

}  // namespace sage
