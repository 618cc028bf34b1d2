// Launch before the others: reads a dense mask once and stores, for each band of 32 queries, which KV tiles it sees, which of those hold a
// masked or biased pair, and which keys it sees at all. One CTA a band; one band stands for all queries where the mask is the same for all
// and not causal.
//
// A lane reads four consecutive keys of a row at a time, a warp 128, row by row.
#pragma once
#include <sage/constants.cuh>

#include "../block/mask.cuh"
#include "../common/warp.cuh"
#include "../ptx/async_copy.cuh"
#include "../ptx/grid.cuh"
#include "../ptx/special.cuh"
#include "params.cuh"

namespace sage {

constexpr int kClassifyThreads = 256, kClassifyWarps = kClassifyThreads / 32;

struct ClassifyShared {
  u32 plane[2][kMaxWords];
  float row_max[kBandRows];
};

// Four consecutive elements of a row. kept: bit e set unless the mask removes the key; plain: unless it is biased or removed.
struct Quad {
  u32 kept, plain;
  float bias[4];
};

__device__ __forceinline__ Quad load_quad(const ClassifyParams& p, const u8* row, int key) {
  Quad quad{0, 0, {}};
  if (p.mask_kind == kMaskBool) {
    u32 bytes = 0;
    if (p.quads && key + 3 < p.len_kv)
      bytes = *reinterpret_cast<const u32*>(row + key);
    else
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (key + e < p.len_kv) bytes |= (u32)row[(key + e) * p.stride_k] << 8 * e;
#pragma unroll
    for (int e = 0; e < 4; ++e) quad.kept |= (bytes >> 8 * e & 0xFF ? 1u : 0u) << e;
    quad.plain = quad.kept;
    return quad;
  }
  const int bytes = mask_element_bytes(p.mask_kind);
  const auto element = [&](const u8* at) {
    return p.mask_kind == kMaskF32   ? mask_element<kMaskF32>(at)
           : p.mask_kind == kMaskF16 ? mask_element<kMaskF16>(at)
                                     : mask_element<kMaskBf16>(at);
  };
  if (p.quads && key + 3 < p.len_kv) {
    if (p.mask_kind == kMaskF32) {
      const float4 v = *reinterpret_cast<const float4*>(row + 4 * (i64)key);
      quad.bias[0] = v.x, quad.bias[1] = v.y, quad.bias[2] = v.z, quad.bias[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(row + 2 * (i64)key);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const u32 half = (e < 2 ? v.x : v.y) >> 16 * (e % 2) & 0xFFFF;
        quad.bias[e] = p.mask_kind == kMaskF16 ? f16_to_f32(half) : __uint_as_float(half << 16);
      }
    }
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) quad.bias[e] = key + e < p.len_kv ? element(row + (key + e) * p.stride_k * bytes) : -kInf;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    quad.kept |= (quad.bias[e] == -kInf ? 0u : 1u) << e;
    quad.plain |= (quad.bias[e] == 0.0f ? 1u : 0u) << e;
  }
  return quad;
}

// Joins four bits of each of eight consecutive lanes to a word, in all of them.
__device__ __forceinline__ u32 word_of_eight(u32 bits) {
  u32 word = bits << 4 * (special_tid_x() % 8);
#pragma unroll
  for (int other = 1; other < 8; other *= 2) word |= __shfl_xor_sync(kAllLanes, word, other);
  return word;
}

// Sets the lowest `count` of four bits.
__device__ __forceinline__ u32 first_bits(int count) { return count >= 4 ? 15u : count > 0 ? (1u << count) - 1 : 0u; }

__device__ void classify_band(const ClassifyParams& p) {
  __shared__ ClassifyShared shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int band = blockIdx.x % p.bands, matrix = blockIdx.x / p.bands;
  const int row0 = p.bands == 1 ? 0 : band * kBandRows;
  const bool one_row = p.stride_q == 0;
  // Rows of the band; a causal band sees keys up to last_row. A band for all queries sees what the last query sees.
  const int rows = one_row ? 1 : min(kBandRows, p.len_q - row0);
  const int last_row = min(p.bands == 1 && one_row ? p.len_q : row0 + kBandRows, p.len_q) - 1;
  const i64 row_bytes = p.stride_q * mask_element_bytes(p.mask_kind);
  const u8* mask = static_cast<const u8*>(p.mask) +
                   (matrix / p.heads * p.stride_b + matrix % p.heads * p.stride_h) * mask_element_bytes(p.mask_kind) + row0 * row_bytes;
  grid_launch_dependents();
  const int last_tile = (p.len_kv - 1) / p.tile;
  for (int w = threadIdx.x; w < 2 * p.words; w += kClassifyThreads)  // a ragged last tile is mixed: its keys beyond the end are masked
    shared.plane[w / p.words][w % p.words] = w == p.words + last_tile / 32 && p.len_kv % p.tile ? 1u << last_tile % 32 : 0u;
  if (p.mask_kind != kMaskBool)
    for (int r = warp; r < rows; r += kClassifyWarps) {  // the largest bias of each row, up to the diagonal
      const int keys = p.causal ? min(row0 + r + 1, p.len_kv) : p.len_kv;
      float top = -kInf;
#pragma unroll 4
      for (int key = 4 * lane; key < keys; key += 128) {
        const Quad quad = load_quad(p, mask + r * row_bytes, key);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (key + e < keys) top = fmaxf(top, quad.bias[e]);
      }
#pragma unroll
      for (int other = 1; other < 32; other *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, other));
      if (lane == 0) shared.row_max[r] = top;
    }
  __syncthreads();  // planes and maxima are initialised
  u32* live = p.live + (i64)blockIdx.x * p.live_words;
  u32* kept_bits = p.kept + ((i64)matrix * (one_row ? 1 : p.len_q) + (one_row ? 0 : row0)) * p.live_words;
  for (int unit = warp; 128 * unit < p.len_kv; unit += kClassifyWarps) {
    const int key = 128 * unit + 4 * lane;
    u32 seen = 0, uneven = 0, alive = 0;
#pragma unroll 8
    for (int r = 0; r < rows; ++r) {
      const Quad quad = load_quad(p, mask + r * row_bytes, key);
      // One row for all queries: some query sees keys up to last_row, every one up to row0.
      const u32 some = p.causal ? first_bits((one_row ? last_row : row0 + r) - key + 1) : 15u;
      const u32 every = p.causal ? first_bits(row0 + r - key + 1) : 15u;
      const u32 kept = quad.kept & some;
      seen |= kept, uneven |= ~(quad.plain & kept & every) & 15u;
      if (p.kept) {
        const u32 word = word_of_eight(quad.kept);
        if (lane % 8 == 0 && key < p.len_kv) kept_bits[(i64)r * p.live_words + key / 32] = word;
      }
      if (p.mask_kind == kMaskBool) {
        alive |= kept;
      } else {
        const float least = shared.row_max[r] - kNegligibleBias;
#pragma unroll
        for (int e = 0; e < 4; ++e) alive |= quad.bias[e] < least ? 0u : kept & 1u << e;
      }
    }
    const u32 seen_lanes = __ballot_sync(kAllLanes, seen != 0), uneven_lanes = __ballot_sync(kAllLanes, uneven != 0);
    if (lane < 4) {  // lane i speaks for keys 32·i …, which belong to one tile
      const int tile = (128 * unit + 32 * lane) / p.tile;
      if (seen_lanes >> 8 * lane & 0xFF) atomicOr(&shared.plane[0][tile / 32], 1u << tile % 32);
      if (uneven_lanes >> 8 * lane & 0xFF && 128 * unit + 32 * lane < p.len_kv) atomicOr(&shared.plane[1][tile / 32], 1u << tile % 32);
    }
    const u32 word = word_of_eight(alive);
    if (lane % 8 == 0 && key < p.len_kv) live[key / 32] = word;
  }
  __syncthreads();  // the planes are complete
  u32* lists = p.lists + (i64)blockIdx.x * 2 * p.words;
  for (int w = threadIdx.x; w < 2 * p.words; w += kClassifyThreads) lists[w] = shared.plane[w / p.words][w % p.words];
}

}  // namespace sage
