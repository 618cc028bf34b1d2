// First launch: K → anchor taken off, rotated, INT8, in the attention kernel's tiles; and what must be known of all of V before any of
// it can be quantised: each channel's largest and smallest value and its mean.
//
// The first pairs · runs blocks quantise K. A block works on units of as many keys as share scales; a warp owns eight of them: lane
// 4g + t has key g and every fourth chunk of its channels, so the codes of its registers are already the lane's piece of the tile.
// Each block works out its head's anchor, the mean of a strided sample of K, for itself. The other blocks take V's statistics: they
// wait for memory where the first compute.
//
// Blocks write partial results, which the next launch reduces: the same bits on every run.
#pragma once
#include "../block/core_matrix.cuh"
#include "../block/fragment.cuh"
#include "../block/rotate.cuh"
#include "../ptx/copy.cuh"
#include "params.cuh"

namespace sage {

template <class Layout>
struct KeysShared {
  static constexpr int kHeadDim = Layout::kHeadDim, kThreads = 4 * Layout::kScaleKeys, kWarps = kThreads / 32;
  static constexpr int kLanes = kHeadDim / kChunk, kRows = kThreads / kLanes;  // threads of a row, rows at a time
  static_assert(kThreads % kLanes == 0, "a thread keeps its channels from row to row");
  alignas(16) float parts[kThreads][kChunk];
  alignas(16) float anchor[kHeadDim];  // times the rotation's power of two
  float k_amax[2][kWarps][4];
};

// Of one thread's eight channels, over its rows.
struct Sum {
  static constexpr int kResults = 1;
  float sum[kChunk] = {};

  __device__ __forceinline__ void add(int i, float x, float weight) { sum[i] = fmaf(x, weight, sum[i]); }
  __device__ __forceinline__ float get(int, int i) const { return sum[i]; }
  static __device__ __forceinline__ float combine(int, float a, float b) { return a + b; }
};

struct Spread {
  static constexpr int kResults = 3;
  float largest[kChunk], smallest[kChunk], sum[kChunk];

  __device__ __forceinline__ Spread() {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) largest[i] = -kInf, smallest[i] = kInf, sum[i] = 0.0f;
  }
  __device__ __forceinline__ void add(int i, float x, float weight) {
    largest[i] = fmaxf(largest[i], x), smallest[i] = fminf(smallest[i], x), sum[i] = fmaf(x, weight, sum[i]);
  }
  __device__ __forceinline__ float get(int result, int i) const { return result == 0 ? largest[i] : result == 1 ? smallest[i] : sum[i]; }
  static __device__ __forceinline__ float combine(int result, float a, float b) {
    return result == 0 ? fmaxf(a, b) : result == 1 ? fminf(a, b) : a + b;
  }
};

// Statistics of `count` rows at `rows`; out(result, channel, value) for each. Summands are multiplied by `weight` at once: a plain
// sum could overflow. All threads of the block take part.
template <class Statistics, int kDtype, bool kVectors, class Shared, class Out>
__device__ __forceinline__ void reduce_rows(const u8* rows, i64 row_bytes, int count, int head_dim, float weight, Shared& shared, Out out) {
  constexpr int kUnroll = !kVectors ? 1 : kDtype == kFloat32 ? 2 : 4;
  const int channel = threadIdx.x % Shared::kLanes * kChunk;
  Statistics statistics;
  for (int base = threadIdx.x / Shared::kLanes; base < count; base += Shared::kRows * kUnroll) {
    Raw8<kDtype> raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)  // rows beyond the end repeat the last, and count for nothing in a sum
      raw[u] = load8<kDtype, kVectors>(rows + min(base + u * Shared::kRows, count - 1) * row_bytes, channel, head_dim);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[kChunk];
      unpack8<kDtype>(raw[u], x);
      const float w = base + u * Shared::kRows < count ? weight : 0.0f;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) statistics.add(i, x[i], w);
    }
  }
#pragma unroll
  for (int result = 0; result < Statistics::kResults; ++result) {
    if (result) __syncthreads();  // the last result has been read
#pragma unroll
    for (int i = 0; i < kChunk; ++i) shared.parts[threadIdx.x][i] = statistics.get(result, i);
    __syncthreads();  // every thread's part is there
    for (int c = threadIdx.x; c < Shared::kHeadDim; c += Shared::kThreads) {
      float total = shared.parts[c / kChunk][c % kChunk];
#pragma unroll
      for (int r = 1; r < Shared::kRows; ++r)
        total = Statistics::combine(result, total, shared.parts[r * Shared::kLanes + c / kChunk][c % kChunk]);
      out(result, c, total);
    }
  }
}

// One lane's row of K: its channels as they lie in memory.
template <int kHeadDim, int kDtype>
struct RawRow {
  Raw8<kDtype> chunk[kHeadDim / 32];

  template <bool kVectors>
  __device__ __forceinline__ void load(const void* row, int t, int head_dim) {
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) chunk[c] = load8<kDtype, kVectors>(row, 32 * c + kChunk * t, head_dim);
  }
};

// The lane's key in fp32, times the rotation's power of two, anchor taken off. Keys beyond the end are zero.
template <int kHeadDim, int kDtype, class Shared>
__device__ __forceinline__ void unpack_key(const RawRow<kHeadDim, kDtype>& raw, bool valid, const Shared& shared, float (&x)[kHeadDim / 4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int c = 0; c < kHeadDim / 32; ++c) {
    unpack8<kDtype>(raw.chunk[c], x + kChunk * c);
    const float4* four = reinterpret_cast<const float4*>(shared.anchor + 32 * c + kChunk * t);
    const float4 a = four[0], b = four[1];
    const float anchor[kChunk] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      float& value = x[kChunk * c + e];
      value = valid ? fmaf(value, 0.5f / kHeadDim, -anchor[e]) : 0.0f;
    }
  }
}

// Rotates the lane's key, agrees on the scales, writes the codes; returns the scale. All threads of the block take part.
template <class Layout, int kHeadDim, class Shared>
__device__ __forceinline__ float quantise_unit(float (&x)[kHeadDim / 4], const Signs<kHeadDim>& signs, int unit, int tile_bytes,
                                               Shared& shared, u8* out) {
  constexpr int kParts = Layout::kTile / Layout::kScaleKeys;  // units of a tile
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4, part = unit % kParts;
  rotate<kHeadDim>(x, signs, t);
  float amax = largest(x);
#pragma unroll
  for (int other = 1; other <= 4; other *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, other));
  const int group = lane / 8;  // keys 2·group, 2·group + 1 of each eight
  float(&k_amax)[Shared::kWarps][4] = shared.k_amax[unit % 2];
  if (lane % 8 == 0) k_amax[warp][group] = amax;
  __syncthreads();  // every warp's maxima are there; whoever writes the next ones to the same place has seen the barrier after this
#pragma unroll
  for (int w = 0; w < Shared::kWarps; ++w) amax = fmaxf(amax, k_amax[w][group]);
  const float inverse = int8_inverse(amax), scale = inverse > 0.0f ? amax / 127.0f : 0.0f;
  u8* scales = out + Layout::scales(tile_bytes);
  if (warp == 0 && lane % 8 == 0) *reinterpret_cast<float*>(scales + Layout::kScalesPitch * group + 4 * part) = scale;
  if (Layout::kLeast && part == 0 && threadIdx.x < 4) *reinterpret_cast<i32*>(scales + Layout::kScalesPitch * threadIdx.x + 8) = Layout::kLeast;
#pragma unroll
  for (int c2 = 0; c2 < kHeadDim / 64; ++c2) {
    const float* y = x + 16 * c2;
    uint4 codes;
    codes.x = int8_codes(y[0], y[1], y[2], y[3], inverse), codes.y = int8_codes(y[4], y[5], y[6], y[7], inverse);
    codes.z = int8_codes(y[8], y[9], y[10], y[11], inverse), codes.w = int8_codes(y[12], y[13], y[14], y[15], inverse);
    *reinterpret_cast<uint4*>(out + Layout::k_chunk(c2, part * Layout::kScaleKeys + threadIdx.x / 4, t)) = codes;
  }
  return scale;
}

template <class Layout, int kDtype, bool kVectors>
__device__ __forceinline__ void quantise_run(const KeysParams& p, const u8* k, int pair, int run, KeysShared<Layout>& shared) {
  constexpr int kHeadDim = Layout::kHeadDim, kKeys = Layout::kScaleKeys, kParts = Layout::kTile / kKeys;
  // The next unit's loads are under way while this one is rotated, where the registers allow it.
  constexpr bool kAhead = kHeadDim <= 128 && kDtype != kFloat32 && kVectors;
  const i64 row_bytes = p.k.stride_n * kElementBytes<kDtype>;
  const int units = kParts * p.tiles, length = (units + p.runs - 1) / p.runs, first = run * length, last = min(first + length, units);
  const int t = threadIdx.x % 4, row = threadIdx.x / 4;
  RawRow<kHeadDim, kDtype> raw;
  const auto load = [&](int unit) {  // keys beyond the end repeat the last
    raw.template load<kVectors>(k + min(unit * kKeys + row, p.len - 1) * row_bytes, t, p.head_dim);
  };
  if (kAhead) load(first);
  reduce_rows<Sum, kDtype, kVectors>(k, p.sample_step * row_bytes, p.samples, p.head_dim, 1.0f / p.samples, shared,
                                     [&](int, int c, float mean) {
                                       shared.anchor[c] = mean * (0.5f / kHeadDim);
                                       if (run == 0) p.anchor[pair * kHeadDim + c] = mean;
                                     });
  __syncthreads();  // the anchor is complete
  const Signs<kHeadDim> signs(t);
  float top = 0.0f;
  for (int unit = first; unit < last; ++unit) {
    if (!kAhead) load(unit);
    float x[kHeadDim / 4];
    unpack_key(raw, unit * kKeys + row < p.len, shared, x);
    if (kAhead && unit + 1 < last) load(unit + 1);
    u8* out = p.kv + ((i64)pair * p.tiles + unit / kParts) * p.tile_bytes;
    top = fmaxf(top, quantise_unit<Layout>(x, signs, unit, p.tile_bytes, shared, out));
  }
  top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 8));
  top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 16));
  if (threadIdx.x == 0) p.k_scale_parts[pair * p.runs + run] = top;
}

// Layout: with V of either size.
template <class Layout>
__device__ void quantise_keys(const KeysParams& p) {
  __shared__ KeysShared<Layout> shared;
  wait_for_previous_launch();
  let_next_launch_start();
  const int key_blocks = p.pairs * p.runs, block = blockIdx.x;
  with_access(p.dtype, p.vectors, [&](auto type, auto vectors) {
    constexpr int kDtype = decltype(type)::value;
    const auto head_of = [&](const Tokens& x, int pair) {
      const int batch = (p.first + pair) / p.heads, head = (p.first + pair) % p.heads;
      return static_cast<const u8*>(x.data) + (batch * x.stride_b + head * x.stride_h) * kElementBytes<kDtype>;
    };
    if (block < key_blocks) {
      const int pair = block / p.runs;
      quantise_run<Layout, kDtype, decltype(vectors)::value>(p, head_of(p.k, pair), pair, block % p.runs, shared);
    } else {
      const int part = block - key_blocks, pair = part / p.splits, first = part % p.splits * p.split_tokens;
      const i64 row_bytes = p.v.stride_n * kElementBytes<kDtype>;
      float* to = p.v_parts + (i64)part * 3 * Layout::kHeadDim;
      if (first == 0 && threadIdx.x < Layout::kHeadDim) p.v_codes[pair * Layout::kHeadDim + threadIdx.x] = 0;
      reduce_rows<Spread, kDtype, decltype(vectors)::value>(
          head_of(p.v, pair) + first * row_bytes, row_bytes, min(p.split_tokens, p.len - first), p.head_dim, 1.0f / p.len, shared,
          [&](int result, int c, float value) { to[result * Layout::kHeadDim + c] = value; });
    }
  });
}

}  // namespace sage
