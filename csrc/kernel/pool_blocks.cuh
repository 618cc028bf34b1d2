// First launches of a block-sparse call: means of K and sums of V over blocks of 64 tokens, in one read of each, then what the block means
// of a head have in common.
#pragma once
#include "../block/live_keys.cuh"
#include "../common/tensor.cuh"
#include "../common/warp.cuh"
#include "params.cuh"

namespace sage {

constexpr int kPoolThreads = 256, kCenterThreads = 512;

// Which tokens of a block exist, a bit each.
struct BlockTokens {
  u32 word[kKvBlock / 32];

  // bits: of the tokens before `len`; null where all of those exist.
  __device__ __forceinline__ BlockTokens(const u32* bits, int words, int block, int len) {
#pragma unroll
    for (int i = 0; i < kKvBlock / 32; ++i) {
      const int w = block * (kKvBlock / 32) + i, left = len - 32 * w;
      word[i] = left <= 0 ? 0u : bits ? bits[w] : left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1;
    }
  }
  __device__ __forceinline__ bool has(int token) const { return (token < 32 ? word[0] : word[1]) >> token % 32 & 1; }
  __device__ __forceinline__ int count() const { return __popc(word[0]) + __popc(word[1]); }
};

__device__ __forceinline__ BlockTokens tokens_of_block(const LiveKeys& live, int batch, int block, int len) {
  return BlockTokens(live.bits ? live.bits + batch * live.stride_b : nullptr, live.words, block, len);
}

// A warp's sum over the tokens of a block that exist: the eight channels from kChunk · (lane % kLanes) on, in each lane.
template <int kHeadDim>
struct BlockSum {
  static constexpr int kLanes = kHeadDim / kChunk, kRows = 32 / kLanes, kPasses = kKvBlock / kRows;  // lanes of a row; rows of a pass
  float sum[kChunk] = {};

  // rows: of the (batch, head), stride_n elements apart; order: the row at each position, or null. Each lane finds two of the block's rows
  // first, so that no load of a row waits for one of its number.
  template <int kDtype, bool kVectors>
  __device__ __forceinline__ void add(const void* rows, i64 stride_n, const i32* order, int block, const BlockTokens& tokens,
                                      int head_dim) {
    constexpr int kInFlight = kDtype == kFloat32 ? 4 : 8;
    const int lane = threadIdx.x % 32, channel = lane % kLanes * kChunk;
    const u8* const from = static_cast<const u8*>(rows);
    static_assert(32 % (kInFlight * kRows) == 0, "the rows under way together are of one half of the block");
    int row[kKvBlock / 32];
#pragma unroll
    for (int i = 0; i < kKvBlock / 32; ++i) {
      row[i] = block * kKvBlock + 32 * i + lane;
      if (order) row[i] = tokens.has(32 * i + lane) ? order[row[i]] : 0;
    }
#pragma unroll 1
    for (int pass = 0; pass < kPasses; pass += kInFlight) {
      const int rows_of_half = pass * kRows < 32 ? row[0] : row[1];
      Raw8<kDtype> raw[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int token = (pass + i) * kRows + lane / kLanes;
        const i64 at = __shfl_sync(kAllLanes, rows_of_half, token % 32, 32);
        raw[i] = {};
        if (tokens.has(token)) load8<kDtype, kVectors>(from + at * stride_n * kElementBytes<kDtype>, channel, head_dim, raw[i]);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        float x[kChunk];
        unpack8<kDtype>(raw[i], x);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) sum[e] += x[e];
      }
    }
#pragma unroll
    for (int other = kLanes; other < 32; other *= 2)
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sum[e] += __shfl_xor_sync(kAllLanes, sum[e], other);
  }

  // The same, of a tensor.
  __device__ __forceinline__ void add(const Tokens& t, int batch, int head, i32 dtype, i32 vectorized, const i32* order, int block,
                                      const BlockTokens& tokens, int head_dim) {
    const i64 first = batch * t.stride_b + head * t.stride_h;
    with_access(dtype, vectorized, [&](auto type, auto vectors) {
      constexpr int kDtype = decltype(type)::value;
      add<kDtype, decltype(vectors)::value>(static_cast<const u8*>(t.data) + first * kElementBytes<kDtype>, t.stride_n, order, block,
                                            tokens, head_dim);
    });
  }
};

// A warp has one block of K or V.
template <int kHeadDim>
__device__ __forceinline__ void pool_keys_values(const PoolParams& p) {
  using Sum = BlockSum<kHeadDim>;
  const int task = blockIdx.x * (kPoolThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int bh = task / p.blocks % p.bh_count, block = task % p.blocks;
  const bool values = task >= p.blocks * p.bh_count;
  if (task >= p.blocks * p.bh_count * (p.v.data ? 2 : 1)) return;
  const BlockTokens tokens = tokens_of_block(p.live, bh / p.heads, block, p.len);
  Sum s;
  s.add(values ? p.v : p.k, bh / p.heads, bh % p.heads, p.dtype, p.vectorized, p.order, block, tokens, p.head_dim);
  const int count = tokens.count();
  if (!values && bh % p.heads == 0) {
    float* const counts = p.counts + (i64)(bh / p.heads) * p.pitch;
    if (lane == 0) counts[block] = (float)count;
    if (block == p.blocks - 1)
      for (int beyond = p.blocks + lane; beyond < p.pitch; beyond += 32) counts[beyond] = 0.0f;
  }
  if (lane >= Sum::kLanes) return;
  const float factor = values ? 1.0f : 1.0f / max(count, 1);
  float* const to = (values ? p.v_sum : p.k_mean) + ((i64)bh * p.blocks + block) * kHeadDim + lane * kChunk;
#pragma unroll
  for (int e = 0; e < kChunk; e += 4)
    *reinterpret_cast<float4*>(to + e) = float4{s.sum[e] * factor, s.sum[e + 1] * factor, s.sum[e + 2] * factor, s.sum[e + 3] * factor};
}

// A CTA has one (batch, KV head): the mean of its block means, and the mean square of what is left of them; empty blocks take no part.
template <int kHeadDim>
__device__ __forceinline__ void center_keys(const PoolParams& p) {
  constexpr int kLanes = kHeadDim / 4, kSlices = kCenterThreads / kLanes;  // threads of a row; rows at a time
  __shared__ float4 partial[kSlices][kLanes];
  __shared__ float partial_used[kSlices];
  const int bh = blockIdx.x, lane = threadIdx.x % kLanes, slice = threadIdx.x / kLanes;
  const float* const counts = p.counts + (i64)(bh / p.heads) * p.pitch;
  const float4* const mean = reinterpret_cast<const float4*>(p.k_mean + (i64)bh * p.blocks * kHeadDim) + lane;
  // The mean of term(block mean) over the blocks that are not empty.
  const auto mean_of = [&](auto term) {
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
    float used = 0.0f;
#pragma unroll 8
    for (int block = slice; block < p.blocks; block += kSlices) {
      const float4 x = mean[block * kLanes];
      const float weight = counts[block] > 0.0f ? 1.0f : 0.0f;
      sum.x = fmaf(weight, term(x.x, 0), sum.x), sum.y = fmaf(weight, term(x.y, 1), sum.y);
      sum.z = fmaf(weight, term(x.z, 2), sum.z), sum.w = fmaf(weight, term(x.w, 3), sum.w);
      used += weight;
    }
    partial[slice][lane] = sum;
    if (lane == 0) partial_used[slice] = used;
    __syncthreads();  // the partial results are stored
    sum = float4{0.0f, 0.0f, 0.0f, 0.0f}, used = 0.0f;
    for (int i = 0; i < kSlices; ++i) {
      const float4 x = partial[i][lane];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w, used += partial_used[i];
    }
    __syncthreads();  // … and read
    const float factor = 1.0f / fmaxf(used, 1.0f);
    return float4{sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
  };
  const float4 means = mean_of([](float x, int) { return x; });
  const float shift[4] = {means.x, means.y, means.z, means.w};
  const float4 squares = mean_of([&](float x, int i) { return (x - shift[i]) * (x - shift[i]); });
  if (slice > 0) return;
  reinterpret_cast<float4*>(p.k_shift + bh * kHeadDim)[lane] = means;
  reinterpret_cast<float4*>(p.k_var + bh * kHeadDim)[lane] = squares;
}

}  // namespace sage
