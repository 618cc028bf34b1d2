// Second launch: V → its mean taken out where the scheme says so, scaled, narrowed, transposed, in the attention kernel's tiles. Its blocks
// start while the first one's quantise K, and wait for their head's statistics alone.
//
// A warp works on its own: it stages a unit of 16 keys (of 32 where values are bytes) in shared memory, where ldmatrix transposes it.
// Bytes travel as pairs: what ldmatrix takes for one 16-bit element are the same column of n-tiles 2p and 2p + 1.
#pragma once
#include "../block/core_matrix.cuh"
#include "../block/fragment.cuh"
#include "../block/live_keys.cuh"
#include "../block/load.cuh"
#include "../block/rotate.cuh"
#include "../block/values.cuh"
#include "../ptx/copy.cuh"
#include "../ptx/special.cuh"
#include "params.cuh"

namespace sage {

constexpr int kValuesThreads = 128, kValuesWarps = kValuesThreads / 32;

template <class Layout>
struct ValuesShared {
  static constexpr int kHeadDim = Layout::kHeadDim, kUnitKeys = 32 / Layout::kValueBytes;
  static constexpr int kPitch = kHeadDim * Layout::kValueBytes + 16;  // bytes of a row; the 16 keep ldmatrix free of bank conflicts
  static constexpr int kRows = kValuesThreads * 4 / kHeadDim;         // of partial statistics, read at a time
  union {
    alignas(16) u8 rows[kValuesWarps][kUnitKeys * kPitch];
    alignas(16) float parts[kRows][3][kHeadDim];
  };
  alignas(16) float mean[kHeadDim];
  alignas(16) float scale[kHeadDim];
  // Sums to be added up, of bytes only: lanes that meet in a channel have one each. The 2 keep them off the same bank.
  static constexpr int kSums = Layout::kValueBytes == 1 ? 4 : 1;
  i32 codes[kSums][kHeadDim + 2];
  bool centred[kHeadDim];
};

// Where V − mean could overflow, the mean stays in (reference.quantise_v).
constexpr float kWidest = 1e38f;  // variants.FINITE_MAX

// Reduces the partial results of the first launch, once they are there. The head's first block keeps them for the attention kernel.
template <class Layout>
__device__ __forceinline__ void finish_statistics(const ValuesParams& p, int pair, bool keep, ValuesShared<Layout>& shared) {
  constexpr int kHeadDim = Layout::kHeadDim, kRows = ValuesShared<Layout>::kRows;
  const int channel = threadIdx.x % (kHeadDim / 4) * 4, row = threadIdx.x / (kHeadDim / 4);
  float most[4] = {-kInf, -kInf, -kInf, -kInf}, least[4] = {kInf, kInf, kInf, kInf}, sum[4] = {};
  const float* parts = p.v_parts + ((i64)pair * p.splits) * 3 * kHeadDim + channel;
  for (int s = threadIdx.x; s < p.splits; s += kValuesThreads)
    while (!load_acquire(p.v_parts_done + pair * p.splits + s)) {
    }
  __syncthreads();  // every part is there
  int live = p.len;
  if (p.live.bits) {
    live = 0;
    for (int s = 0; s < p.splits; ++s) live += p.v_parts_live[pair * p.splits + s];
  }
  if (keep && threadIdx.x == 0) p.live_keys[pair] = (float)max(live, 1);
  const float share = live == p.len ? 1.0f : (float)p.len / (float)max(live, 1);
#pragma unroll 4
  for (int s = row; s < p.splits; s += kRows) {
    const float4 a = *reinterpret_cast<const float4*>(parts + s * 3 * kHeadDim);
    const float4 b = *reinterpret_cast<const float4*>(parts + s * 3 * kHeadDim + kHeadDim);
    const float4 c = *reinterpret_cast<const float4*>(parts + s * 3 * kHeadDim + 2 * kHeadDim);
    const float larger[4] = {a.x, a.y, a.z, a.w}, smaller[4] = {b.x, b.y, b.z, b.w}, more[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) most[i] = fmaxf(most[i], larger[i]), least[i] = fminf(least[i], smaller[i]), sum[i] += more[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    shared.parts[row][0][channel + i] = most[i], shared.parts[row][1][channel + i] = least[i], shared.parts[row][2][channel + i] = sum[i];
  __syncthreads();  // every thread's part is there
  for (int c = threadIdx.x; c < kHeadDim; c += kValuesThreads) {
    float high = shared.parts[0][0][c], low = shared.parts[0][1][c], mean = shared.parts[0][2][c];
#pragma unroll
    for (int r = 1; r < kRows; ++r)
      high = fmaxf(high, shared.parts[r][0][c]), low = fminf(low, shared.parts[r][1][c]), mean += shared.parts[r][2][c];
    mean *= share;
    if (live == 0) high = low = mean = 0.0f;
    mean = mean > high ? high : mean < low ? low : mean;  // however it was rounded; NaN stays
    shared.centred[c] = p.centred && 0.5f * high - 0.5f * low <= kWidest;
    if (mean == mean && !shared.centred[c]) mean = 0.0f;
    float amax = fmaxf(high - mean, mean - low);
    if (amax < kSmallest) amax = 0.0f;
    shared.mean[c] = mean;
    shared.scale[c] = amax == 0.0f ? 0.0f : p.v_max / amax;
#pragma unroll
    for (int i = 0; i < ValuesShared<Layout>::kSums; ++i) shared.codes[i][c] = 0;
    if (keep) p.v_amax[pair * kHeadDim + c] = amax, p.v_mean[pair * kHeadDim + c] = mean;
  }
  __syncthreads();  // mean and scale are complete
}

// What is left to do once K is quantised. As each head's first block waits for the whole of the first launch here, so does who waits for
// this one.
__device__ __forceinline__ void finish_keys(const ValuesParams& p) {
  const int pair = special_ctaid_x() / p.runs;
  if (special_ctaid_x() % p.runs != 0 || special_tid_x() >= 32) return;
  wait_for_previous_launch();
  float top = 0.0f;
  for (int r = special_tid_x(); r < p.k_runs; r += 32) top = fmaxf(top, p.k_scale_parts[pair * p.k_runs + r]);
#pragma unroll
  for (int other = 1; other < 32; other *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, other));
  if (special_tid_x() == 0) p.k_scale_max[pair] = __float_as_int(top);
}

// Eight channels of a token, narrowed, into its row in the order of V's n-tiles (fragment.cuh).
template <Values kValues>
__device__ __forceinline__ void stage8(u8* row, int chunk, const float (&y)[kChunk]) {
  if constexpr (kValues == Values::fp16) {
    u8* to = row + chunk / 4 * 64 + chunk % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) *reinterpret_cast<u32*>(to + 16 * i) = pack_f16(y[2 * i], y[2 * i + 1]);
  } else {
    u8* to = row + chunk / 4 * 32 + chunk % 4 * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* z = y + 4 * i;
      *reinterpret_cast<u32*>(to + 16 * i) =
          kValues == Values::fp8 ? pack_e4m3(z[0], z[2], z[1], z[3]) : int8_codes(z[0], z[2], z[1], z[3], 1.0f);
    }
  }
}

// What the eight values that stage8 wrote at `row` and at `other` were rounded to, over 256, added to `sum`: e4m3's bits in the place
// of fp16's. The sum of two is rounded to eleven bits, always of the same two keys.
__device__ __forceinline__ void add_rounded(const u8* row, const u8* other, int chunk, bool counts, bool other_counts,
                                            float (&sum)[kChunk]) {
  const int from = chunk / 4 * 32 + chunk % 4 * 4;
  const auto halves = [](u32 bytes) { return (bytes & 0x80008000u) | (bytes & 0x7F007F00u) >> 1; };  // of bytes 1 and 3
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 a = counts ? *reinterpret_cast<const u32*>(row + from + 16 * i) : 0;
    const u32 b = other_counts ? *reinterpret_cast<const u32*>(other + from + 16 * i) : 0;
    const float2 odd = unpack_f16(add_f16(halves(a), halves(b))), even = unpack_f16(add_f16(halves(a << 8), halves(b << 8)));
    float* to = sum + 4 * i;  // the bytes are values 0, 2, 1, 3 of the four
    to[0] += even.x, to[2] += odd.x, to[1] += even.y, to[3] += odd.y;
  }
}

// Lane 4g + t of the result, of the unit's first and second half: {column g of n-tile 2p, both halves; of n-tile 2p + 1, both halves}.
// Of eight keys a word holds 2t and 2t + 1 as fp16, of sixteen 2t, 2t + 1, 2t + 8, 2t + 9 as bytes.
template <Values kValues>
__device__ __forceinline__ uint4 transpose(const u8* rows, int pitch, int p) {
  const int lane = threadIdx.x % 32;
  if constexpr (kValues == Values::fp16)
    return load_matrices_transposed(shared_address(rows + lane % 16 * pitch + 32 * p + lane / 16 * 16));
  const uint4 v = load_matrices_transposed(shared_address(rows + lane * pitch + 16 * p));
  return make_uint4(__byte_perm(v.x, v.y, 0x6420), __byte_perm(v.z, v.w, 0x6420), __byte_perm(v.x, v.y, 0x7531),
                    __byte_perm(v.z, v.w, 0x7531));
}

// Where the lane has keys of the unit's `keys` first in a word of `transpose`: of each half a byte of 1 for each key, 0 beyond.
__device__ __forceinline__ uint2 ones_of(int keys) {
  const int left = keys - (int)threadIdx.x % 4 * 2;
  const auto word = [&](int first) {
    return (left > first ? 1u : 0u) | (left > first + 1 ? 1u << 8 : 0u) | (left > first + 8 ? 1u << 16 : 0u) |
           (left > first + 9 ? 1u << 24 : 0u);
  };
  return make_uint2(word(0), word(16));
}

// Adds the INT8 codes of `transpose` to their channels' sums (fragment.cuh), lane t of the four that share a column to sum t.
template <int kPitch>
__device__ __forceinline__ void add_codes(i32 (&sums)[4][kPitch], int p, uint4 v, uint2 ones) {
  const int t = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
  i32* to = sums[t] + p / 2 * 32 + g / 2 * 8 + p % 2 * 4 + g % 2;
  atomicAdd(to, __dp4a((i32)v.y, (i32)ones.y, __dp4a((i32)v.x, (i32)ones.x, 0)));
  atomicAdd(to + 2, __dp4a((i32)v.w, (i32)ones.y, __dp4a((i32)v.z, (i32)ones.x, 0)));
}

// Unit `unit` of a tile at `tile`, n-tiles 2p and 2p + 1.
template <int kHeadDim, int kBytes>
__device__ __forceinline__ void store_values(Fragment<kHeadDim, kBytes>, u8* tile, int unit, int p, uint4 v) {
  *reinterpret_cast<uint4*>(tile + Fragment<kHeadDim, kBytes>::v_block(unit, p) + 16 * (threadIdx.x % 32)) = v;
}

template <int kHeadDim, int kBytes, int kTile, bool kOnes>
__device__ __forceinline__ void store_values(CoreMatrix<kHeadDim, kBytes, kTile, kOnes>, u8* tile, int unit, int p, uint4 v) {
  using Layout = CoreMatrix<kHeadDim, kBytes, kTile, kOnes>;
  u32* first = reinterpret_cast<u32*>(tile + Layout::kV + 2 * unit * Layout::kVPitch + 256 * p) + threadIdx.x % 32;
  u32* second = first + Layout::kVPitch / 4;
  first[0] = v.x, second[0] = v.y, first[32] = v.z, second[32] = v.w;
  if (kOnes && p == 0) {
    constexpr u32 kOne = kBytes == 2 ? 0x3C003C00u : 0x38383838u;  // fp16, e4m3
    first[4 * kHeadDim] = kOne, second[4 * kHeadDim] = kOne;
  }
}

template <class Layout, Values kValues, int kDtype, bool kVectors>
__device__ __forceinline__ void quantise_run(const ValuesParams& p, int pair, int run, ValuesShared<Layout>& shared) {
  using Shared = ValuesShared<Layout>;
  constexpr int kHeadDim = Layout::kHeadDim, kLanes = kHeadDim / kChunk, kRows = 32 / kLanes;  // rows that the warp loads at a time
  constexpr int kUnits = Layout::kTile / Shared::kUnitKeys;                                   // of a tile
  constexpr int kPasses = Shared::kUnitKeys / kRows;
  constexpr int kMost = kDtype == kFloat32 || !kVectors ? 4 : 8, kBatch = kPasses < kMost ? kPasses : kMost;  // under way together
  static_assert(kPasses % kBatch == 0, "no pass is left over");
  const int batch = (p.first + pair) / p.heads, head = (p.first + pair) % p.heads;
  const LiveRows live(p.live, batch, head);
  const i64 row_bytes = p.v.stride_n * kElementBytes<kDtype>;
  const u8* v = static_cast<const u8*>(p.v.data) + (batch * p.v.stride_b + head * p.v.stride_h) * kElementBytes<kDtype>;
  const int warp = threadIdx.x / 32, chunk = threadIdx.x % kLanes, row = threadIdx.x % 32 / kLanes;
  const int units = kUnits * p.tiles, length = (units + p.runs - 1) / p.runs, first = run * length, last = min(first + length, units);
  u8* rows = shared.rows[warp];
  float mean[kChunk], scale[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) mean[i] = shared.mean[chunk * kChunk + i], scale[i] = shared.scale[chunk * kChunk + i];
  // Of 16-bit values, the spread is too large against the mean for one FMA to lose anything.
  constexpr bool kOneStep = kDtype != kFloat32;
  if (kOneStep)
#pragma unroll
    for (int i = 0; i < kChunk; ++i) mean[i] *= -scale[i];
  __syncthreads();  // the statistics have been read: `rows` lies where their parts were
  for (int unit = first + warp; unit < last; unit += kValuesWarps) {
    // Bit i: key i of the unit is live. A unit of 16 keys has half of a word.
    const int first_key = unit * Shared::kUnitKeys;
    const u32 counts = live.bits ? first_key < p.len ? live.word_by_warp(first_key / 32) >> first_key % 32 : 0u : ~0u;
#pragma unroll 1
    for (int pass = 0; pass < kPasses; pass += kBatch) {
      Raw8<kDtype> raw[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {  // keys beyond the end repeat the last: they weigh nothing
        const int key = min(unit * Shared::kUnitKeys + (pass + i) * kRows + row, p.len - 1);
        raw[i] = load8<kDtype, kVectors>(v + key * row_bytes, kChunk * chunk, p.head_dim);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        float x[kChunk];
        unpack8<kDtype>(raw[i], x);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) x[e] = kOneStep ? fmaf(x[e], scale[e], mean[e]) : (x[e] - mean[e]) * scale[e];
        if (live.bits && !(counts >> (pass + i) * kRows + row & 1))  // whatever a key that nobody sees holds, it is 0
#pragma unroll
          for (int e = 0; e < kChunk; ++e) x[e] = 0.0f;
        stage8<kValues>(rows + ((pass + i) * kRows + row) * Shared::kPitch, chunk, x);
      }
    }
    if constexpr (kValues == Values::fp8) {
      float rounded[kChunk] = {};
#pragma unroll 2
      for (int pass = 0; pass < kPasses; pass += 2) {
        const u8* at = rows + (pass * kRows + row) * Shared::kPitch;
        const int beyond = p.len - unit * Shared::kUnitKeys - pass * kRows - row;  // keys beyond the end do not count
        add_rounded(at, at + kRows * Shared::kPitch, chunk, beyond > 0, beyond > kRows, rounded);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        atomicAdd(shared.codes[row] + chunk * kChunk + i, __float2int_rn(rounded[i] * (256.0f * kCodeUnits<kValues>)));
    }
    __syncwarp();  // the unit is staged
    u8* tile = p.kv + ((i64)pair * p.tiles + unit / kUnits) * Layout::kTileBytes;
    const uint2 ones = ones_of(p.len - unit * Shared::kUnitKeys);
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      const uint4 values = transpose<kValues>(rows, Shared::kPitch, n);
      store_values(Layout{}, tile, unit % kUnits, n, values);
      if constexpr (kValues == Values::int8) add_codes(shared.codes, n, values, ones);
    }
    __syncwarp();  // and has been read
  }
}

// The block's part of the codes' sums: integers, so the same in whatever order. What it is about is read anew, registers being short
// before.
template <class Layout>
__device__ __forceinline__ void add_sums(const ValuesParams& p, const ValuesShared<Layout>& shared) {
  __syncthreads();  // every thread's part is there
  const int pair = special_ctaid_x() / p.runs;
  for (int c = special_tid_x(); c < Layout::kHeadDim; c += kValuesThreads)
    if (shared.centred[c])
      atomicAdd(p.v_codes + pair * Layout::kHeadDim + c, shared.codes[0][c] + shared.codes[1][c] + shared.codes[2][c] + shared.codes[3][c]);
}

template <class Layout, Values kValues>
__device__ void quantise_values(const ValuesParams& p) {
  static_assert(kValueBytes<kValues> == Layout::kValueBytes, "the tile has room for other values");
  __shared__ ValuesShared<Layout> shared;
  const int pair = blockIdx.x / p.runs, run = blockIdx.x % p.runs;
  let_next_launch_start();
  finish_statistics<Layout>(p, pair, run == 0, shared);
  if constexpr (!kLaunchesOverlap) finish_keys(p);  // here, where it costs the loops no registers
  with_access(p.dtype, p.vectors, [&](auto type, auto vectors) {
    quantise_run<Layout, kValues, decltype(type)::value, decltype(vectors)::value>(p, pair, run, shared);
  });
  if constexpr (kValues != Values::fp16) add_sums(p, shared);  // the attention kernel makes up for the rounding of bytes
  if constexpr (kLaunchesOverlap) finish_keys(p);
}

}  // namespace sage
