// Second launch: K → anchor taken off, rotated, INT8; V → scaled fp16; both written as tiles in fragment order.
//
// A warp owns eight keys of the 64-key tile: lane 4g + t has key g and every fourth chunk of its channels, so the codes of its
// registers are already the lane's piece of the fragment. V goes through shared memory, where ldmatrix transposes it.
#pragma once
#include "../block/fragment.cuh"
#include "../block/rotate.cuh"
#include "../ptx/copy.cuh"
#include "params.cuh"
#include "stats.cuh"

namespace sage {

constexpr int kQuantiseThreads = 256;
constexpr int kQuantiseWarps = kQuantiseThreads / 32;
static_assert(kQuantiseWarps * 8 == kKvTile, "a warp owns eight keys");

template <int kHeadDim>
struct QuantiseShared {
  static constexpr int kPitch = kHeadDim * 2 + 16;  // bytes of a row of V; the 16 keep ldmatrix free of bank conflicts
  alignas(16) u8 v[kKvTile * kPitch];
  alignas(16) float anchor[kHeadDim];       // already times the rotation's power of two
  alignas(16) float v_inverse[kHeadDim];    // 1 / amax
  float k_amax[kQuantiseWarps][kScalesPerTile];
};

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

// Reduces the partial results of the first launch. The head's first block keeps them for the attention kernel's epilogue.
template <int kHeadDim>
__device__ __forceinline__ void finish_stats(const QuantiseParams& p, int pair, bool keep, QuantiseShared<kHeadDim>& shared) {
  for (int c = threadIdx.x; c < kHeadDim; c += kQuantiseThreads) {
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
template <int kHeadDim, int kDtype>
__device__ __forceinline__ void unpack_key(const RawRow<kHeadDim, kDtype>& raw, bool valid, const QuantiseShared<kHeadDim>& shared,
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
template <int kHeadDim>
__device__ __forceinline__ float quantise_keys(float (&x)[kHeadDim / 4], const Signs<kHeadDim>& signs,
                                               QuantiseShared<kHeadDim>& shared, u8* out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
  rotate<kHeadDim>(x, signs, t);
  float amax = largest(x);
#pragma unroll
  for (int other = 1; other <= 4; other *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, other));
  const int group = lane / 8;  // keys 2·group, 2·group + 1 of each eight
  if (lane % 8 == 0) shared.k_amax[warp][group] = amax;
  __syncthreads();  // every warp's maxima are in k_amax
#pragma unroll
  for (int w = 0; w < kQuantiseWarps; ++w) amax = fmaxf(amax, shared.k_amax[w][group]);
  const float inverse = int8_inverse(amax), scale = inverse > 0.0f ? amax / 127.0f : 0.0f;
  if (warp == 0 && lane % 8 == 0) reinterpret_cast<float*>(out + Fragment<kHeadDim, 2>::kScales)[group] = scale;
#pragma unroll
  for (int c2 = 0; c2 < kHeadDim / 64; ++c2) {
    const float* y = x + 16 * c2;
    uint4 codes;
    codes.x = int8_codes(y[0], y[1], y[2], y[3], inverse), codes.y = int8_codes(y[4], y[5], y[6], y[7], inverse);
    codes.z = int8_codes(y[8], y[9], y[10], y[11], inverse), codes.w = int8_codes(y[12], y[13], y[14], y[15], inverse);
    *reinterpret_cast<uint4*>(out + Fragment<kHeadDim, 2>::k_block(c2, warp) + 16 * lane) = codes;
  }
  return scale;
}

// Eight channels of a token, scaled, into the row of shared memory in the order of V's n-tiles (fragment.cuh).
template <int kHeadDim, int kDtype>
__device__ __forceinline__ void stage_values(const Raw8<kDtype>& raw, int token, int channel, float v_max,
                                             QuantiseShared<kHeadDim>& shared) {
  float x[kChunk];
  unpack8<kDtype>(raw, x);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = x[i] * shared.v_inverse[channel + i] * v_max;
  u8* row = shared.v + token * QuantiseShared<kHeadDim>::kPitch + (channel / 32 * 32 + channel % 32 / kChunk * 2) * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) *reinterpret_cast<u32*>(row + 16 * i) = pack_f16(x[2 * i], x[2 * i + 1]);
}

template <int kHeadDim>
__device__ __forceinline__ void write_values(const QuantiseShared<kHeadDim>& shared, u8* out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kPairs = kHeadDim / 16, kBlocks = kKvTile / 16 * kPairs;
#pragma unroll
  for (int i = 0; i < kBlocks / kQuantiseWarps; ++i) {
    const int block = warp + i * kQuantiseWarps, c = block / kPairs, pair = block % kPairs;
    const int token = 16 * c + lane % 16, column = 16 * pair + lane / 16 * 8;
    const uint4 v = load_matrices_transposed(shared_address(shared.v + token * QuantiseShared<kHeadDim>::kPitch + column * 2));
    *reinterpret_cast<uint4*>(out + Fragment<kHeadDim, 2>::v_block(c, pair) + 16 * lane) = v;
  }
}

// One thread's share of a tile as it lies in memory: a quarter of a key, 16 to 64 bytes of several values.
template <int kHeadDim, int kDtype>
struct RawTile {
  static constexpr int kLanes = kHeadDim / kChunk, kRows = kQuantiseThreads / kLanes, kPasses = kKvTile / kRows;
  RawRow<kHeadDim, kDtype> k;
  Raw8<kDtype> v[kPasses];

  template <bool kVectors>
  __device__ __forceinline__ void load_k(const QuantiseParams& p, const u8* head, int token) {
    const int key = token + threadIdx.x / 4;
    if (key < p.len) k.template load<kVectors>(head + key * p.k.stride_n * kElementBytes<kDtype>, threadIdx.x % 4, p.head_dim);
  }

  template <bool kVectors>
  __device__ __forceinline__ void load_v(const QuantiseParams& p, const u8* head, int token) {
    const int channel = threadIdx.x % kLanes * kChunk, row = threadIdx.x / kLanes;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int at = token + row + i * kRows;
      v[i] = at < p.len ? load8<kDtype, kVectors>(head + at * p.v.stride_n * kElementBytes<kDtype>, channel, p.head_dim) : Raw8<kDtype>{};
    }
  }

  __device__ __forceinline__ void stage(float v_max, QuantiseShared<kHeadDim>& shared) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i)
      stage_values<kHeadDim, kDtype>(v[i], threadIdx.x / kLanes + i * kRows, threadIdx.x % kLanes * kChunk, v_max, shared);
  }
};

template <int kHeadDim, int kDtype, bool kVectors>
__device__ __forceinline__ void quantise_tiles(const QuantiseParams& p, int pair, int first_tile, int last_tile,
                                               QuantiseShared<kHeadDim>& shared) {
  // The next tile's loads are under way while this one is rotated, where the registers allow it.
  constexpr bool kAhead = kHeadDim <= 128 && kDtype != kFloat32 && kVectors;
  constexpr int kBytes = kElementBytes<kDtype>;
  const int batch = (p.first + pair) / p.heads, head = (p.first + pair) % p.heads;
  const u8* k = static_cast<const u8*>(p.k.data) + (batch * p.k.stride_b + head * p.k.stride_h) * kBytes;
  const u8* v = static_cast<const u8*>(p.v.data) + (batch * p.v.stride_b + head * p.v.stride_h) * kBytes;
  const Signs<kHeadDim> signs(threadIdx.x % 4);
  RawTile<kHeadDim, kDtype> raw{};
  if (kAhead) raw.template load_k<kVectors>(p, k, first_tile * kKvTile), raw.template load_v<kVectors>(p, v, first_tile * kKvTile);
  float top = 0.0f;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    if (!kAhead) raw.template load_v<kVectors>(p, v, tile * kKvTile);
    raw.stage(p.v_max, shared);
    if (!kAhead) raw.template load_k<kVectors>(p, k, tile * kKvTile);
    float x[kHeadDim / 4];
    unpack_key<kHeadDim, kDtype>(raw.k, tile * kKvTile + threadIdx.x / 4 < p.len, shared, x);
    if (kAhead && tile + 1 < last_tile)
      raw.template load_k<kVectors>(p, k, (tile + 1) * kKvTile), raw.template load_v<kVectors>(p, v, (tile + 1) * kKvTile);
    u8* out = p.kv + ((i64)pair * p.tiles + tile) * Fragment<kHeadDim, 2>::kTileBytes;
    top = fmaxf(top, quantise_keys<kHeadDim>(x, signs, shared, out));  // the barrier inside: V is staged as well
    write_values<kHeadDim>(shared, out);
    __syncthreads();  // k_amax and v are free for the next tile
  }
  top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 8));
  top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 16));
  if (threadIdx.x == 0) atomicMax(p.k_scale_max + pair, __float_as_int(top));  // both non-negative: ordered as integers
}

template <int kHeadDim>
__device__ void quantise(const QuantiseParams& p) {
  __shared__ QuantiseShared<kHeadDim> shared;
  const int pair = blockIdx.x / p.runs, run = blockIdx.x % p.runs;
  wait_for_previous_launch();
  let_next_launch_start();
  finish_stats<kHeadDim>(p, pair, run == 0, shared);
  __syncthreads();  // anchor and v_inverse are complete
  const int length = (p.tiles + p.runs - 1) / p.runs, first = run * length, last = min(first + length, p.tiles);
  with_access(p.dtype, p.vectors, [&](auto type, auto vectors) {
    quantise_tiles<kHeadDim, decltype(type)::value, decltype(vectors)::value>(p, pair, first, last, shared);
  });
}

}  // namespace sage
