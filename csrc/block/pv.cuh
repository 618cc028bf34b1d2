// P·V of one KV tile for a warp's rows with mma.sync, by the types of P and V and of the MMA's accumulator.
//
// fp16 with fp32 accumulators adds to O directly. The others sum one tile in an accumulator of its own (exact integers; fp16, which must
// not overflow; FP8, which loses bits as it grows) and add it to O in fp32, times the tile's scale in its row.
//
// int32 sums become floats by a conversion from sm_86 on. Before, conversions have an eighth of the rate: there the sums start at the bits
// of kPreset, as in softmax.cuh, and read as the float kPreset + sum (|sum| ≤ 64·255·127 < 2^21).
#pragma once
#include "../common/pv_type.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/shared.cuh"
#include "softmax.cuh"

namespace sage {

enum class PvAccum { fp32, fp16, fp8, int32 };  // fp8: the fp32 accumulator of an FP8 MMA, of about 14 bits

// The accumulator of one n-tile (16 rows × 8 columns) over one KV tile. add(p, b0, b1, first): one MMA; get(half): columns 2t and 2t + 1 of
// row g + 8·half.
template <PvType kPvType, PvAccum kPvAccum>
struct TileSum;

template <>
struct TileSum<PvType::fp16, PvAccum::fp16> {
  u32 c[2] = {};
  __device__ __forceinline__ void add(const u32 (&p)[4], u32 b0, u32 b1, bool) { mma_f16_f16(c, p, b0, b1); }
  __device__ __forceinline__ float2 get(int half) const { return unpack_f16(c[half]); }
};

template <>
struct TileSum<PvType::fp8, PvAccum::fp16> {
  u32 c[2] = {};
  __device__ __forceinline__ void add(const u32 (&p)[4], u32 b0, u32 b1, bool) { mma_e4m3_f16(c, p, b0, b1); }
  __device__ __forceinline__ float2 get(int half) const { return unpack_f16(c[half]); }
};

template <>
struct TileSum<PvType::fp8, PvAccum::fp8> {
  float c[4] = {};
  __device__ __forceinline__ void add(const u32 (&p)[4], u32 b0, u32 b1, bool) { mma_e4m3(c, p, b0, b1); }
  __device__ __forceinline__ float2 get(int half) const { return {c[2 * half], c[2 * half + 1]}; }
};

template <>
struct TileSum<PvType::int8, PvAccum::int32> {
  u32 c[4];
  __device__ __forceinline__ void add(const u32 (&p)[4], u32 b0, u32 b1, bool first) {
    constexpr u32 kStart = kFastIntToFloat ? 0 : kPresetBits;
    const u32 start[4] = {kStart, kStart, kStart, kStart};
    if (first)
      mma_u8_s8(c, p, b0, b1, start);
    else
      mma_u8_s8(c, p, b0, b1, c);
  }
  __device__ __forceinline__ float2 get(int half) const { return {value(c[2 * half]), value(c[2 * half + 1])}; }
  __device__ __forceinline__ static float value(u32 sum) { return kFastIntToFloat ? (float)(i32)sum : __uint_as_float(sum) - kPreset; }
};

// A register of a P fragment: two fp16 values of a row, or four of one byte.
template <PvType kPvType>
__device__ __forceinline__ u32 pack_p(const float (&x)[4 / kVElementBytes<kPvType>]) {
  if constexpr (kPvType == PvType::fp16)
    return pack_f16(x[0], x[1]);
  else if constexpr (kPvType == PvType::fp8)
    return pack_e4m3(x[0], x[1], x[2], x[3]);
  else
    return pack_u8(x[0], x[1], x[2], x[3]);
}

// O += tile_scale · P·V of the tile at shared address `tile` (lane offset included). o: [row tile][n-tile][accumulator register],
// p: [row tile][fragment of 16 or 32 keys][register], tile_scale: [row tile][half].
template <class C>
__device__ __forceinline__ void accumulate_pv(float (&o)[C::kRowTiles][C::kHeadDim / 8][4], const u32 (&p)[C::kRowTiles][C::kPFragments][4],
                                              const float (&tile_scale)[C::kRowTiles][2], u32 tile) {
  if constexpr (C::kPvType == PvType::fp16 && C::kPvAccum == PvAccum::fp32) {
#pragma unroll
    for (int c = 0; c < C::kPFragments; ++c)
#pragma unroll
      for (int i = 0; i < C::kHeadDim / 16; ++i) {
        const uint4 b = load_shared16(tile + C::Layout::v_block(c, i));
#pragma unroll
        for (int r = 0; r < C::kRowTiles; ++r) mma_f16(o[r][2 * i], p[r][c], b.x, b.y), mma_f16(o[r][2 * i + 1], p[r][c], b.z, b.w);
      }
  } else {
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      TileSum<C::kPvType, C::kPvAccum> sum[C::kRowTiles][2];
#pragma unroll
      for (int c = 0; c < C::kPFragments; ++c) {
        const uint4 b = load_shared16(tile + C::Layout::v_block(c, i));
#pragma unroll
        for (int r = 0; r < C::kRowTiles; ++r) sum[r][0].add(p[r][c], b.x, b.y, c == 0), sum[r][1].add(p[r][c], b.z, b.w, c == 0);
      }
#pragma unroll
      for (int r = 0; r < C::kRowTiles; ++r)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 x = sum[r][n].get(half);
            float* to = o[r][2 * i + n] + 2 * half;
            if constexpr (C::kTileMax)
              to[0] = fmaf(x.x, tile_scale[r][half], to[0]), to[1] = fmaf(x.y, tile_scale[r][half], to[1]);
            else
              to[0] += x.x, to[1] += x.y;
          }
    }
  }
}

}  // namespace sage
