// Second launch for the wgmma kernel: as quantise.cuh, but tiles of 96 keys in core-matrix order.
//
// A warp owns eight keys of the tile: lane 4g + t has key g and every fourth chunk of its channels. V goes through shared memory,
// where ldmatrix transposes it. One template for both orders was tried: it changed the compiler's schedule of the mma.sync
// quantiser, which then spilled on sm_75.
#pragma once
#include "../block/core_matrix.cuh"
#include "quantise.cuh"

namespace sage {

template <class Layout>
struct CoreShared {
  static constexpr int kHeadDim = Layout::kHeadDim, kThreads = 4 * Layout::kTile, kWarps = kThreads / 32;
  static constexpr int kPitch = kHeadDim * 2 + 16;  // bytes of a row of V; the 16 keep ldmatrix free of bank conflicts
  alignas(16) u8 v[Layout::kTile * kPitch];
  alignas(16) float anchor[kHeadDim];       // already times the rotation's power of two
  alignas(16) float v_inverse[kHeadDim];    // 1 / amax
  float k_amax[kWarps][4];
};

// Reduces the partial results of the first launch. The head's first block keeps them for the attention kernel's epilogue.
template <class Layout>
__device__ __forceinline__ void finish_stats(const QuantiseParams& p, int pair, bool keep, CoreShared<Layout>& shared) {
  constexpr int kHeadDim = Layout::kHeadDim;
  for (int c = threadIdx.x; c < kHeadDim; c += CoreShared<Layout>::kThreads) {
    float amax = 0.0f, mean = 0.0f;
    for (int s = 0; s < p.splits; ++s) amax = fmaxf(amax, p.v_amax_parts[((i64)pair * p.splits + s) * kHeadDim + c]);
    for (int s = 0; s < p.k_splits; ++s) mean += p.k_mean_parts[((i64)pair * p.k_splits + s) * kHeadDim + c];
    shared.anchor[c] = mean * (0.5f / kHeadDim);
    shared.v_inverse[c] = amax < kSmallest ? 0.0f : 1.0f / amax;
    if (keep) {
      p.v_amax[pair * kHeadDim + c] = amax < kSmallest ? 0.0f : amax;
      p.v_mean[pair * kHeadDim + c] = 0.0f;
      p.anchor[pair * kHeadDim + c] = mean;
    }
  }
}

// The lane's key in fp32, times the rotation's power of two, anchor taken off. Keys beyond the end are zero.
template <class Layout, int kHeadDim, int kDtype>
__device__ __forceinline__ void unpack_key(const RawRow<kHeadDim, kDtype>& raw, bool valid, const CoreShared<Layout>& shared,
                                           float (&x)[kHeadDim / 4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int c = 0; c < kHeadDim / 32; ++c) {
    unpack8<kDtype>(raw.chunk[c], x + kChunk * c);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      float& value = x[kChunk * c + e];
      value = valid ? fmaf(value, 0.5f / kHeadDim, -shared.anchor[32 * c + kChunk * t + e]) : 0.0f;
    }
  }
}

// Rotates the lane's key, agrees on the scales, writes the codes; returns the scale. All threads of the block take part.
template <class Layout, int kHeadDim>
__device__ __forceinline__ float quantise_keys(float (&x)[kHeadDim / 4], const Signs<kHeadDim>& signs,
                                               CoreShared<Layout>& shared, u8* out) {
  constexpr int kScaleWarps = Layout::kScaleKeys / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
  rotate<kHeadDim>(x, signs, t);
  float amax = largest(x);
#pragma unroll
  for (int other = 1; other <= 4; other *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, other));
  const int group = lane / 8;  // keys 2·group, 2·group + 1 of each eight
  if (lane % 8 == 0) shared.k_amax[warp][group] = amax;
  __syncthreads();  // every warp's maxima are in k_amax
  const int part = warp / kScaleWarps;
#pragma unroll
  for (int w = 0; w < kScaleWarps; ++w) amax = fmaxf(amax, shared.k_amax[part * kScaleWarps + w][group]);
  const float inverse = int8_inverse(amax), scale = inverse > 0.0f ? amax / 127.0f : 0.0f;
  if (warp % kScaleWarps == 0 && lane % 8 == 0)
    *reinterpret_cast<float*>(out + Layout::kScales + Layout::kScalesPitch * group + 4 * part) = scale;
#pragma unroll
  for (int c2 = 0; c2 < kHeadDim / 64; ++c2) {
    const float* y = x + 16 * c2;
    uint4 codes;
    codes.x = int8_codes(y[0], y[1], y[2], y[3], inverse), codes.y = int8_codes(y[4], y[5], y[6], y[7], inverse);
    codes.z = int8_codes(y[8], y[9], y[10], y[11], inverse), codes.w = int8_codes(y[12], y[13], y[14], y[15], inverse);
    *reinterpret_cast<uint4*>(out + Layout::k_chunk(c2, threadIdx.x / 4, t)) = codes;
  }
  return scale;
}

// Eight channels of a token, scaled, into the row of shared memory in the order of V's n-tiles (fragment.cuh).
template <class Layout, int kDtype>
__device__ __forceinline__ void stage_core_values(const Raw8<kDtype>& raw, int token, int channel, float v_max,
                                             CoreShared<Layout>& shared) {
  float x[kChunk];
  unpack8<kDtype>(raw, x);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = x[i] * shared.v_inverse[channel + i] * v_max;
  u8* row = shared.v + token * CoreShared<Layout>::kPitch + (channel / 32 * 32 + channel % 32 / kChunk * 2) * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) *reinterpret_cast<u32*>(row + 16 * i) = pack_f16(x[2 * i], x[2 * i + 1]);
}

template <class Layout>
__device__ __forceinline__ void write_values(const CoreShared<Layout>& shared, u8* out) {
  using Shared = CoreShared<Layout>;
  constexpr int kHeadDim = Layout::kHeadDim;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u8* keys = out + Layout::kV + warp * Layout::kVPitch;  // a warp has the eight keys of one core matrix
#pragma unroll
  for (int i = 0; i < kHeadDim / 32; ++i) {
    const int token = 8 * warp + lane % 8, column = 32 * i + lane / 8 * 8;
    const uint4 v = load_matrices_transposed(shared_address(shared.v + token * Shared::kPitch + column * 2));
    u32* to = reinterpret_cast<u32*>(keys + 4 * i * 128) + lane;  // lane 4g + t: keys 2t, 2t + 1 of column g
    to[0] = v.x, to[32] = v.y, to[64] = v.z, to[96] = v.w;
  }
  reinterpret_cast<u32*>(keys + kHeadDim * 16)[lane] = 0x3C003C00u;  // the columns of ones
  if (threadIdx.x < 4) *reinterpret_cast<i32*>(out + Layout::kScales + Layout::kScalesPitch * threadIdx.x + 8) = Layout::kLeast;
}

// One thread's share of a tile as it lies in memory: a quarter of a key, 16 to 64 bytes of several values.
template <class Layout, int kDtype>
struct RawCoreTile {
  static constexpr int kHeadDim = Layout::kHeadDim;
  static constexpr int kLanes = kHeadDim / kChunk, kRows = CoreShared<Layout>::kThreads / kLanes, kPasses = Layout::kTile / kRows;
  RawRow<kHeadDim, kDtype> k;
  Raw8<kDtype> v[kPasses];

  template <bool kVectors>
  __device__ __forceinline__ void load(const QuantiseParams& p, const u8* k_head, const u8* v_head, int token) {
    constexpr int kBytes = kElementBytes<kDtype>;
    const int key = token + threadIdx.x / 4, channel = threadIdx.x % kLanes * kChunk, row = threadIdx.x / kLanes;
    if (key < p.len) k.template load<kVectors>(k_head + key * p.k.stride_n * kBytes, threadIdx.x % 4, p.head_dim);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int at = token + row + i * kRows;
      v[i] = at < p.len ? load8<kDtype, kVectors>(v_head + at * p.v.stride_n * kBytes, channel, p.head_dim) : Raw8<kDtype>{};
    }
  }

  __device__ __forceinline__ void stage(float v_max, CoreShared<Layout>& shared) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i)
      stage_core_values<Layout, kDtype>(v[i], threadIdx.x / kLanes + i * kRows, threadIdx.x % kLanes * kChunk, v_max, shared);
  }
};

template <class Layout, int kDtype, bool kVectors>
__device__ __forceinline__ void quantise_core_tiles(const QuantiseParams& p, int pair, int first_tile, int last_tile,
                                               CoreShared<Layout>& shared) {
  constexpr int kHeadDim = Layout::kHeadDim, kTile = Layout::kTile;
  // The next tile's loads are under way while this one is rotated, where the registers allow it.
  constexpr bool kAhead = kHeadDim <= 128 && kDtype != kFloat32 && kVectors;
  constexpr int kBytes = kElementBytes<kDtype>;
  const int batch = (p.first + pair) / p.heads, head = (p.first + pair) % p.heads;
  const u8* k = static_cast<const u8*>(p.k.data) + (batch * p.k.stride_b + head * p.k.stride_h) * kBytes;
  const u8* v = static_cast<const u8*>(p.v.data) + (batch * p.v.stride_b + head * p.v.stride_h) * kBytes;
  const Signs<kHeadDim> signs(threadIdx.x % 4);
  RawCoreTile<Layout, kDtype> raw{};
  if (kAhead) raw.template load<kVectors>(p, k, v, first_tile * kTile);
  float top = 0.0f;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    if (!kAhead) raw.template load<kVectors>(p, k, v, tile * kTile);
    raw.stage(p.v_max, shared);
    float x[kHeadDim / 4];
    unpack_key(raw.k, tile * kTile + threadIdx.x / 4 < p.len, shared, x);
    if (kAhead && tile + 1 < last_tile) raw.template load<kVectors>(p, k, v, (tile + 1) * kTile);
    u8* out = p.kv + ((i64)pair * p.tiles + tile) * Layout::kTileBytes;
    top = fmaxf(top, quantise_keys(x, signs, shared, out));  // the barrier inside: V is staged as well
    write_values(shared, out);
    __syncthreads();  // k_amax and v are free for the next tile
  }
  top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 8));
  top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 16));
  if (threadIdx.x % (4 * Layout::kScaleKeys) == 0)
    atomicMax(p.k_scale_max + pair, __float_as_int(top));  // both non-negative: ordered as integers
}

template <class Layout>
__device__ void quantise_core(const QuantiseParams& p) {
  __shared__ CoreShared<Layout> shared;
  const int pair = blockIdx.x / p.runs, run = blockIdx.x % p.runs;
  wait_for_previous_launch();
  let_next_launch_start();
  finish_stats(p, pair, run == 0, shared);
  __syncthreads();  // anchor and v_inverse are complete
  const int length = (p.tiles + p.runs - 1) / p.runs, first = run * length, last = min(first + length, p.tiles);
  with_access(p.dtype, p.vectors, [&](auto type, auto vectors) {
    quantise_core_tiles<Layout, decltype(type)::value, decltype(vectors)::value>(p, pair, first, last, shared);
  });
}

}  // namespace sage
