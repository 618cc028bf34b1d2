// Second launch: quantises V into the attention kernel's tiles – subtracts its channel means where the scheme says so, scales, rounds,
// transposes. Its CTAs start while those of the first launch quantise K, and wait only for their head's statistics of V.
//
// Each warp works on its own: it stages a unit of 16 keys (32 where elements are bytes) in shared memory, from where ldmatrix transposes
// it. Bytes are transposed in pairs: ldmatrix's 16-bit element is the same column of n-tiles 2p and 2p + 1.
#pragma once
#include "../layout/core_matrix.cuh"
#include "../layout/fragment.cuh"
#include "../block/live_keys.cuh"
#include "../block/packed.cuh"
#include "../common/tensor.cuh"
#include "../block/rotate.cuh"
#include "../common/pv_type.cuh"
#include "../ptx/grid.cuh"
#include "../ptx/shared.cuh"
#include "../ptx/special.cuh"
#include "params.cuh"

namespace sage {

constexpr int kQuantizeVThreads = 128, kQuantizeVWarps = kQuantizeVThreads / 32;

template <class Layout>
struct QuantizeVShared {
  static constexpr int kHeadDim = Layout::kHeadDim, kUnitKeys = 32 / Layout::kVElementBytes;
  static constexpr int kPitch = kHeadDim * Layout::kVElementBytes + 16;  // bytes of a staged row; + 16 avoids bank conflicts of ldmatrix
  static constexpr int kRows = kQuantizeVThreads * 4 / kHeadDim;         // chunks' statistics read at a time
  union {
    alignas(16) u8 rows[kQuantizeVWarps][kUnitKeys * kPitch];
    alignas(16) float partial[kRows][3][kHeadDim];
  };
  alignas(16) float mean[kHeadDim];
  alignas(16) float scale[kHeadDim];
  // Channel sums of quantised V, of one-byte types only: lanes that share a channel have a sum each; + 2 puts them on different banks.
  static constexpr int kSums = Layout::kVElementBytes == 1 ? 4 : 1;
  i32 quant_sum[kSums][kHeadDim + 2];
  bool mean_subtracted[kHeadDim];
  // Where not all keys need be live: whether those of the head are; of each warp's unit, which ones.
  bool all_live;
  u32 counts[kQuantizeVWarps];
};

// Waits for the head's statistics of V from the first launch and reduces them to mean and scale of each channel. The head's first CTA
// (`keep`) stores them for the attention kernel.
template <class Layout, bool kLiveMask>
__device__ __forceinline__ void reduce_v_stats(const QuantizeVParams& p, int bh, bool keep, QuantizeVShared<Layout>& shared) {
  constexpr int kHeadDim = Layout::kHeadDim, kRows = QuantizeVShared<Layout>::kRows;
  const int channel = threadIdx.x % (kHeadDim / 4) * 4, row = threadIdx.x / (kHeadDim / 4);
  float most[4] = {-kInf, -kInf, -kInf, -kInf}, least[4] = {kInf, kInf, kInf, kInf}, sum[4] = {};
  const float* stats = p.v_stats + ((i64)bh * p.v_chunks) * 3 * kHeadDim + channel;
  for (int s = threadIdx.x; s < p.v_chunks; s += kQuantizeVThreads)
    while (!load_acquire(p.v_stats_ready + bh * p.v_chunks + s)) {
    }
  __syncthreads();  // all chunks' statistics are visible
  int live = p.len;
  if (kLiveMask && p.live.bits) {
    live = 0;
    for (int s = 0; s < p.v_chunks; ++s) live += p.v_stats_live[bh * p.v_chunks + s];
  }
  if (kLiveMask && threadIdx.x == 0) shared.all_live = live == p.len;
  if (keep && threadIdx.x == 0) p.live_keys[bh] = (float)max(live, 1);
  const float share = live == p.len ? 1.0f : (float)p.len / (float)max(live, 1);
#pragma unroll 4
  for (int s = row; s < p.v_chunks; s += kRows) {
    const float4 a = *reinterpret_cast<const float4*>(stats + s * 3 * kHeadDim);
    const float4 b = *reinterpret_cast<const float4*>(stats + s * 3 * kHeadDim + kHeadDim);
    const float4 c = *reinterpret_cast<const float4*>(stats + s * 3 * kHeadDim + 2 * kHeadDim);
    const float larger[4] = {a.x, a.y, a.z, a.w}, smaller[4] = {b.x, b.y, b.z, b.w}, more[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) most[i] = fmaxf(most[i], larger[i]), least[i] = fminf(least[i], smaller[i]), sum[i] += more[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    shared.partial[row][0][channel + i] = most[i], shared.partial[row][1][channel + i] = least[i],
                                     shared.partial[row][2][channel + i] = sum[i];
  __syncthreads();  // every thread's part is there
  for (int c = threadIdx.x; c < kHeadDim; c += kQuantizeVThreads) {
    float high = shared.partial[0][0][c], low = shared.partial[0][1][c], mean = shared.partial[0][2][c];
#pragma unroll
    for (int r = 1; r < kRows; ++r)
      high = fmaxf(high, shared.partial[r][0][c]), low = fminf(low, shared.partial[r][1][c]), mean += shared.partial[r][2][c];
    mean *= share;
    if (live == 0) high = low = mean = 0.0f;
    mean = mean > high ? high : mean < low ? low : mean;  // rounding may have moved it out; NaN stays NaN
    shared.mean_subtracted[c] = p.subtract_v_mean && 0.5f * high - 0.5f * low <= kFiniteMax;  // else V − mean could overflow
    if (mean == mean && !shared.mean_subtracted[c]) mean = 0.0f;
    float amax = fmaxf(high - mean, mean - low);
    if (amax < kAmaxMin) amax = 0.0f;
    shared.mean[c] = mean;
    shared.scale[c] = amax == 0.0f ? 0.0f : p.v_max / amax;
#pragma unroll
    for (int i = 0; i < QuantizeVShared<Layout>::kSums; ++i) shared.quant_sum[i][c] = 0;
    if (keep) p.v_amax[bh * kHeadDim + c] = amax, p.v_mean[bh * kHeadDim + c] = mean;
  }
  __syncthreads();  // mean and scale are complete
}

// Reduces K's largest scale, in each head's first CTA. That CTA waits for the whole K launch, so waiting for this launch implies waiting
// for that one.
template <class Block>
__device__ __forceinline__ void reduce_k_scale(const QuantizeVParams& p, Block block) {
  const int bh = block() / p.ctas_per_head;
  if (block() % p.ctas_per_head != 0 || special_tid_x() >= 32) return;
  grid_dependency_wait();
  float top = 0.0f;
  for (int r = special_tid_x(); r < p.k_ctas_per_head; r += 32) top = fmaxf(top, p.k_scale_partial[bh * p.k_ctas_per_head + r]);
#pragma unroll
  for (int other = 1; other < 32; other *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, other));
  if (special_tid_x() == 0) p.k_scale_max[bh] = __float_as_int(top);
}

// Rounds eight channels of a token and stores them in its staged row, in the order of V's n-tiles (fragment.cuh).
template <PvType kPvType>
__device__ __forceinline__ void stage8(u8* row, int chunk, const float (&y)[kChunk]) {
  if constexpr (kPvType == PvType::fp16) {
    u8* to = row + chunk / 4 * 64 + chunk % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) *reinterpret_cast<u32*>(to + 16 * i) = pack_f16(y[2 * i], y[2 * i + 1]);
  } else {
    u8* to = row + chunk / 4 * 32 + chunk % 4 * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* z = y + 4 * i;
      *reinterpret_cast<u32*>(to + 16 * i) =
          kPvType == PvType::fp8 ? pack_e4m3(z[0], z[2], z[1], z[3]) : quantize_s8x4(z[0], z[2], z[1], z[3], 1.0f);
    }
  }
}

// Stages zeros for eight channels of a token: the same places as stage8's. The compiler packs e4m3 zeros with what a register happens to
// hold (docs/compiler.md), so these are stored as bits.
template <PvType kPvType>
__device__ __forceinline__ void stage_zeros8(u8* row, int chunk) {
  constexpr int kRowBytes = 32 * kVElementBytes<kPvType>, kWords = 2 * kVElementBytes<kPvType>;  // of four chunks; of this one
  u8* to = row + chunk / 4 * kRowBytes + chunk % 4 * 4;
#pragma unroll
  for (int i = 0; i < kWords; ++i) *reinterpret_cast<u32*>(to + 16 * i) = 0;
}

// sum[8] += (the eight e4m3 values that stage8 wrote at `row` + those at `other`) / 256, read as fp16 after moving e4m3's bits to fp16's
// places. Each pair's sum is rounded to eleven bits; the pairs are always the same two keys, so results are reproducible.
__device__ __forceinline__ void sum_rounded_e4m3(const u8* row, const u8* other, int chunk, float (&sum)[kChunk]) {
  const int from = chunk / 4 * 32 + chunk % 4 * 4;
  const auto halves = [](u32 bytes) { return (bytes & 0x80008000u) | (bytes & 0x7F007F00u) >> 1; };  // bytes 1 and 3 as fp16 pairs
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 a = *reinterpret_cast<const u32*>(row + from + 16 * i), b = *reinterpret_cast<const u32*>(other + from + 16 * i);
    const float2 odd = unpack_f16(add_f16(halves(a), halves(b))), even = unpack_f16(add_f16(halves(a << 8), halves(b << 8)));
    float* to = sum + 4 * i;  // the bytes are values 0, 2, 1, 3 of the four
    to[0] += even.x, to[2] += odd.x, to[1] += even.y, to[3] += odd.y;
  }
}

// The unit's n-tiles 2p and 2p + 1, transposed. Lane 4g + t gets {column g of n-tile 2p: first and second half of the keys; the same of
// n-tile 2p + 1}. A word holds keys 2t and 2t + 1 of eight as fp16, or 2t, 2t + 1, 2t + 8 and 2t + 9 of sixteen as bytes.
template <PvType kPvType>
__device__ __forceinline__ uint4 transpose(const u8* rows, int pitch, int p) {
  const int lane = threadIdx.x % 32;
  if constexpr (kPvType == PvType::fp16) return ldmatrix_x4_trans(shared_address(rows + lane % 16 * pitch + 32 * p + lane / 16 * 16));
  const uint4 v = ldmatrix_x4_trans(shared_address(rows + lane * pitch + 16 * p));
  return make_uint4(__byte_perm(v.x, v.y, 0x6420), __byte_perm(v.z, v.w, 0x6420), __byte_perm(v.x, v.y, 0x7531),
                    __byte_perm(v.z, v.w, 0x7531));
}

// For the lane's words of `transpose`, by half of the keys: `one` for each of the unit's keys that there is, 0 for others. counts: bit i is
// key i of the unit.
template <int kBytes>
__device__ __forceinline__ uint2 ones_of_keys(u32 counts, u32 one) {
  counts >>= threadIdx.x % 4 * 2;
  const auto of = [&](int key, int place) { return counts >> key & 1 ? one << place : 0u; };
  if constexpr (kBytes == 2) return make_uint2(of(0, 0) | of(1, 16), of(8, 0) | of(9, 16));
  const auto word = [&](int first) { return of(first, 0) | of(first + 1, 8) | of(first + 8, 16) | of(first + 9, 24); };
  return make_uint2(word(0), word(16));
}

// Adds INT8 values from `transpose` to the sums of their channels; of the four lanes that share a column, lane t adds to sums[t].
template <int kPitch>
__device__ __forceinline__ void sum_quantized_s8(i32 (&sums)[4][kPitch], int p, uint4 v) {
  constexpr i32 kOnes = 0x01010101;
  const int t = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
  i32* to = sums[t] + p / 2 * 32 + g / 2 * 8 + p % 2 * 4 + g % 2;
  atomicAdd(to, __dp4a((i32)v.y, kOnes, __dp4a((i32)v.x, kOnes, 0)));
  atomicAdd(to + 2, __dp4a((i32)v.w, kOnes, __dp4a((i32)v.z, kOnes, 0)));
}

// Stores n-tiles 2p and 2p + 1 of unit `unit` of the tile at `tile`.
template <int kHeadDim, int kBytes>
__device__ __forceinline__ void store_v(Fragment<kHeadDim, kBytes>, u8* tile, int unit, int p, uint4 v) {
  *reinterpret_cast<uint4*>(tile + Fragment<kHeadDim, kBytes>::v_block(unit, p) + 16 * (threadIdx.x % 32)) = v;
}

template <int kHeadDim, int kBytes, int kTile, bool kOnes, int kScaleBlocks>
__device__ __forceinline__ void store_v(CoreMatrix<kHeadDim, kBytes, kTile, kOnes, kScaleBlocks>, u8* tile, int unit, int p, uint4 v) {
  using Layout = CoreMatrix<kHeadDim, kBytes, kTile, kOnes, kScaleBlocks>;
  u32* first = reinterpret_cast<u32*>(tile + Layout::kV + 2 * unit * Layout::kVPitch + 256 * p) + threadIdx.x % 32;
  u32* second = first + Layout::kVPitch / 4;
  first[0] = v.x, second[0] = v.y, first[32] = v.z, second[32] = v.w;
}

// Stores the unit's columns of ones. counts: bit i: key i of the unit is there, so its ones are; whole: all are.
template <int kHeadDim, int kBytes>
__device__ __forceinline__ void store_ones(Fragment<kHeadDim, kBytes>, u8*, int, u32, bool) {}

template <int kHeadDim, int kBytes, int kTile, bool kOnes, int kScaleBlocks>
__device__ __forceinline__ void store_ones(CoreMatrix<kHeadDim, kBytes, kTile, kOnes, kScaleBlocks>, u8* tile, int unit, u32 counts,
                                           bool whole) {
  if constexpr (kOnes) {
    using Layout = CoreMatrix<kHeadDim, kBytes, kTile, kOnes, kScaleBlocks>;
    constexpr u32 kOne = kBytes == 2 ? 0x3C00u : 0x38u, kWord = kOne * (kBytes == 2 ? 0x00010001u : 0x01010101u);  // fp16, e4m3
    u32* first = reinterpret_cast<u32*>(tile + Layout::kV + 2 * unit * Layout::kVPitch + 16 * kHeadDim) + threadIdx.x % 32;
    uint2 ones = {kWord, kWord};
    if (!whole) ones = ones_of_keys<kBytes>(counts, kOne);
    first[0] = ones.x, first[Layout::kVPitch / 4] = ones.y;
  }
}

template <class Layout, PvType kPvType, int kDtype, bool kVectors, bool kLiveMask>
__device__ __forceinline__ void quantize_cta(const QuantizeVParams& p, int bh, int cta, QuantizeVShared<Layout>& shared) {
  using Shared = QuantizeVShared<Layout>;
  constexpr int kHeadDim = Layout::kHeadDim, kLanes = kHeadDim / kChunk, kRows = 32 / kLanes;  // rows a warp loads at a time
  constexpr int kUnits = Layout::kTile / Shared::kUnitKeys;                                    // of a tile
  constexpr int kPasses = Shared::kUnitKeys / kRows;
  constexpr int kMost = kDtype == kFloat32 || !kVectors ? 4 : 8, kBatch = kPasses < kMost ? kPasses : kMost;  // under way together
  static_assert(kPasses % kBatch == 0, "whole batches of passes");
  const int batch = (p.bh_first + bh) / p.heads, head = (p.bh_first + bh) % p.heads;
  const LiveRows live(p.live, batch, head, p.len);
  const i64 row_bytes = p.v.stride_n * kElementBytes<kDtype>;
  const u8* v = static_cast<const u8*>(p.v.data) + (batch * p.v.stride_b + head * p.v.stride_h) * kElementBytes<kDtype>;
  const int warp = threadIdx.x / 32, chunk = threadIdx.x % kLanes, row = threadIdx.x % 32 / kLanes;
  const int units = kUnits * p.kv_tiles, length = (units + p.ctas_per_head - 1) / p.ctas_per_head, first = cta * length,
            last = min(first + length, units);
  u8* rows = shared.rows[warp];
  float mean[kChunk], scale[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) mean[i] = shared.mean[chunk * kChunk + i], scale[i] = shared.scale[chunk * kChunk + i];
  // One FMA loses nothing of 16-bit inputs: their spread is too large compared to the mean.
  constexpr bool kOneStep = kDtype != kFloat32;
  if (kOneStep)
#pragma unroll
    for (int i = 0; i < kChunk; ++i) mean[i] *= -scale[i];
  __syncthreads();  // `partial` has been read: `rows` shares its memory
  // By p.order a lane finds one of a unit's rows, a unit ahead: no load of a row waits for one of its number.
  const auto row_at = [&](int position) { return p.order[min(position, p.len - 1)]; };
  const bool mapped = kLiveMask && Layout::kOrdered && p.order;
  int next_row = mapped && first + warp < last ? row_at((first + warp) * Shared::kUnitKeys + threadIdx.x % 32) : 0;
  for (int unit = first + warp; unit < last; unit += kQuantizeVWarps) {
    const int first_key = unit * Shared::kUnitKeys, own_row = next_row;
    if (mapped && unit + kQuantizeVWarps < last) next_row = row_at(first_key + kQuantizeVWarps * Shared::kUnitKeys + threadIdx.x % 32);
#pragma unroll 1
    for (int pass = 0; pass < kPasses; pass += kBatch) {
      Raw8<kDtype> raw[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {  // keys beyond the end repeat the last
        const int in_unit = (pass + i) * kRows + row;
        int key = min(first_key + in_unit, p.len - 1);
        if (mapped) key = __shfl_sync(kAllLanes, own_row, in_unit, 32);
        raw[i] = load8<kDtype, kVectors>(v + key * row_bytes, kChunk * chunk, p.head_dim);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        float x[kChunk];
        unpack8<kDtype>(raw[i], x);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) x[e] = kOneStep ? fmaf(x[e], scale[e], mean[e]) : (x[e] - mean[e]) * scale[e];
        stage8<kPvType>(rows + ((pass + i) * kRows + row) * Shared::kPitch, chunk, x);
      }
    }
    // Bit i: key i of the unit exists and is live. A unit of 16 keys has half of a word. Worked out behind the loads, and looked up or
    // worked out again behind the stores, which leave no register.
    constexpr u32 kAll = Shared::kUnitKeys == 32 ? ~0u : (1u << Shared::kUnitKeys % 32) - 1;
    const auto counted = [&] {
      const int own_key = opaque(unit) * Shared::kUnitKeys, left = p.len - own_key;
      u32 counts = left >= Shared::kUnitKeys ? kAll : left > 0 ? (1u << left) - 1 : 0u;
      if (kLiveMask && !shared.all_live && left > 0) counts &= live.word_by_warp(own_key / 32) >> own_key % 32;
      return counts;
    };
    u32 counts = counted();
    if (kLiveMask && threadIdx.x % 32 == 0) shared.counts[warp] = counts;
    if (counts != kAll)  // whatever a key that nobody sees holds, it is 0; rarely run, so that whole units pay nothing
#pragma unroll 1
      for (int key = row; key < Shared::kUnitKeys; key += kRows)
        if (!(counts >> key & 1)) stage_zeros8<kPvType>(rows + key * Shared::kPitch, chunk);
    if constexpr (kPvType == PvType::fp8) {
      float rounded[kChunk] = {};
#pragma unroll 2
      for (int pass = 0; pass < kPasses; pass += 2) {
        const u8* at = rows + (pass * kRows + row) * Shared::kPitch;
        sum_rounded_e4m3(at, at + kRows * Shared::kPitch, chunk, rounded);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        atomicAdd(shared.quant_sum[row] + chunk * kChunk + i, __float2int_rn(rounded[i] * (256.0f * kQuantSumUnits<kPvType>)));
    }
    __syncwarp();  // the unit is staged
    u8* tile = p.kv + ((i64)bh * p.kv_tiles + unit / kUnits) * Layout::kTileBytes;
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      const uint4 values = transpose<kPvType>(rows, Shared::kPitch, n);
      store_v(Layout{}, tile, unit % kUnits, n, values);
      if constexpr (kPvType == PvType::int8) sum_quantized_s8(shared.quant_sum, n, values);
    }
    counts = kLiveMask ? shared.counts[warp] : counted();
    store_ones(Layout{}, tile, unit % kUnits, counts, counts == kAll);
    __syncwarp();  // the staged unit has been read
  }
}

// Adds the CTA's channel sums of quantised V to the head's: integers, so any order gives the same bits.
template <class Layout, class Block>
__device__ __forceinline__ void store_quant_sums(const QuantizeVParams& p, Block block, const QuantizeVShared<Layout>& shared) {
  __syncthreads();  // every warp has added its units
  const int bh = block() / p.ctas_per_head;
  for (int c = special_tid_x(); c < Layout::kHeadDim; c += kQuantizeVThreads)
    if (shared.mean_subtracted[c])
      atomicAdd(p.v_quant_sum + bh * Layout::kHeadDim + c,
                shared.quant_sum[0][c] + shared.quant_sum[1][c] + shared.quant_sum[2][c] + shared.quant_sum[3][c]);
}

// A dense launch's CTA number block().
template <class Layout, PvType kPvType, bool kLiveMask, class Block>
__device__ __forceinline__ void quantize_v_block(const QuantizeVParams& p, Block block, QuantizeVShared<Layout>& shared) {
  const int bh = block() / p.ctas_per_head, cta = block() % p.ctas_per_head;
  reduce_v_stats<Layout, kLiveMask>(p, bh, cta == 0, shared);
  if constexpr (!kProgrammaticLaunch) reduce_k_scale(p, block);  // before the loops, where it costs no registers
  with_access(p.dtype, p.vectorized, [&](auto type, auto vectors) {
    quantize_cta<Layout, kPvType, decltype(type)::value, decltype(vectors)::value, kLiveMask>(p, bh, cta, shared);
  });
  if constexpr (kPvType != PvType::fp16) store_quant_sums(p, block, shared);  // attention corrects V's mean by them
  if constexpr (kProgrammaticLaunch) reduce_k_scale(p, block);
}

// As narrow_to_sequence() of the first launch, whose runs these are; p.run_keys.
template <class Layout>
__device__ __forceinline__ bool narrow_to_sequence(QuantizeVParams& p, int& block) {
  const int heads = p.bh_count;
  PackedRun run;
  if (!run.find(p.packed, block, p.v_chunks, p.run_keys)) return false;
  p.v.data = run.tokens(p.v, p.dtype);
  p.kv = run.tiles(p.kv, heads, Layout::kTileBytes);
  p.k_scale_partial = run.of_runs(p.k_scale_partial, heads), p.v_stats_ready = run.of_runs(p.v_stats_ready, heads);
  p.v_stats = run.of_runs(p.v_stats, heads, 3 * Layout::kHeadDim);
  p.k_scale_max = run.of_sequence(p.k_scale_max, heads), p.live_keys = run.of_sequence(p.live_keys, heads);
  p.v_amax = run.of_sequence(p.v_amax, heads, Layout::kHeadDim), p.v_mean = run.of_sequence(p.v_mean, heads, Layout::kHeadDim);
  p.v_quant_sum = run.of_sequence(p.v_quant_sum, heads, Layout::kHeadDim);
  p.len = run.sequence.k_len, p.kv_tiles = ceil_div(p.len, Layout::kTile);
  p.k_ctas_per_head = p.v_chunks = p.ctas_per_head = run.parts;
  block = run.head * run.parts + run.part;
  return true;
}

// Keys::live: p.live says which keys are live, or p.order where they lie.
template <class Layout, PvType kPvType, Keys kKeys>
__device__ void quantize_v(const QuantizeVParams& p) {
  static_assert(kVElementBytes<kPvType> == Layout::kVElementBytes, "the layout's elements are of another size");
  __shared__ QuantizeVShared<Layout> shared;
  grid_launch_dependents();
  if constexpr (kKeys == Keys::packed) {
    __shared__ SequenceLaunch<QuantizeVParams> own;
    if (threadIdx.x == 0) {
      own.params = p, own.block = blockIdx.x;
      own.any = narrow_to_sequence<Layout>(own.params, own.block);
    }
    __syncthreads();  // it is complete
    if (own.any) quantize_v_block<Layout, kPvType, false>(own.params, [&] { return own.block; }, shared);
  } else {  // reads the special register again because the loops leave no registers for the CTA's number
    quantize_v_block<Layout, kPvType, kKeys == Keys::live>(p, [] { return special_ctaid_x(); }, shared);
  }
}

}  // namespace sage
