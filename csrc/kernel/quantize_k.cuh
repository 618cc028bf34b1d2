// First launch: quantises K into the attention kernel's tiles (k_mean subtracted, rotated, INT8), and computes V's channel statistics,
// which the second launch needs before it can quantise any of V: maximum, minimum, mean.
//
// The first bh_count · v_chunks CTAs compute statistics of V. The second launch waits for nothing else, so its CTAs start as soon as there
// is room. The other CTAs quantise K: they compute while those of V wait for memory. A CTA works on scale blocks (keys that share four
// scales), eight keys a warp; the lanes' quantised registers are pieces of the tile. Each CTA computes its head's k_mean, the mean of a
// strided sample of K, itself.
//
// CTAs store partial results that the second launch reduces in a fixed order, so every run gives the same bits.
#pragma once
#include "../layout/core_matrix.cuh"
#include "../layout/fragment.cuh"
#include "../block/live_keys.cuh"
#include "../block/packed.cuh"
#include "../block/rotate.cuh"
#include "../ptx/grid.cuh"
#include "params.cuh"

namespace sage {

template <class Layout>
struct QuantizeKShared {
  static constexpr int kHeadDim = Layout::kHeadDim, kThreads = 4 * Layout::kScaleKeys, kWarps = kThreads / 32;
  static constexpr int kLanes = kHeadDim / kChunk, kRows = kThreads / kLanes;  // threads of a row; rows at a time
  static_assert(kThreads % kLanes == 0, "a thread keeps its channels from row to row");
  alignas(16) float partial[kThreads][kChunk];
  alignas(16) float k_mean[kHeadDim];  // times 0.5/D, the rotation's factor
  float4 start[kHeadDim / 16][8];      // −k_mean after the MMAs of Rotation, by MMA and g
  float k_amax[2][kWarps][4];
  LiveWindow<kLiveWords> live;  // where not all keys are live
  i32 sample[kMaxKMeanTokens];  // the keys whose mean is k_mean, where not all keys are live
  i32 live_samples, samples_of_warp[4];

  // The threads that share the scales of a scale block: the number of this one, where they keep the block's maxima, a barrier of theirs.
  static __device__ __forceinline__ u32 thread() { return threadIdx.x; }
  __device__ __forceinline__ float (&maxima(int scale_block))[kWarps][4] { return k_amax[scale_block % 2]; }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
};

// Sums over a thread's rows of its eight channels. get(result, i), combine(result, a, b): result number `result` of channel i.
struct ChannelSum {
  static constexpr int kResults = 1;
  float sum[kChunk] = {};

  __device__ __forceinline__ void add(int i, float x, float weight) { sum[i] = fmaf(x, weight, sum[i]); }
  __device__ __forceinline__ float get(int, int i) const { return sum[i]; }
  static __device__ __forceinline__ float combine(int, float a, float b) { return a + b; }
};

// Maximum, minimum and sum of the same.
struct ChannelStats {
  static constexpr int kResults = 3;
  float largest[kChunk], smallest[kChunk], sum[kChunk];

  __device__ __forceinline__ ChannelStats() {
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

// Row number i of a statistic, and whether a sum counts it. A row that does not count repeats one that does.
struct Row {
  i64 at;
  bool counts;
};

// Statistics of `count` rows, number i being row_of(i).at of those at `rows`. Calls out(result, channel, value) for each. Summands are
// multiplied by `weight` first: a plain sum could overflow. kAhead: row_of() reads memory, so it is asked while the rows before are under
// way. A collective of the CTA.
template <class Statistics, int kDtype, bool kVectors, bool kAhead, class Shared, class RowOf, class Out>
__device__ __forceinline__ void reduce_rows(const u8* rows, i64 row_bytes, int count, int head_dim, float weight, Shared& shared,
                                            RowOf row_of, Out out) {
  constexpr int kUnroll = !kVectors ? 1 : kDtype == kFloat32 ? 2 : 4;
  const int channel = threadIdx.x % Shared::kLanes * kChunk;
  Statistics statistics;
  Row row[kUnroll];
  const auto find_rows = [&](int base) {  // rows beyond the end repeat the last
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) row[u] = row_of(min(base + u * Shared::kRows, count - 1));
  };
  if (kAhead && count > 0) find_rows(threadIdx.x / Shared::kLanes);
  for (int base = threadIdx.x / Shared::kLanes; base < count; base += Shared::kRows * kUnroll) {
    Raw8<kDtype> raw[kUnroll];
    float weights[kUnroll];
    if (!kAhead) find_rows(base);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      raw[u] = load8<kDtype, kVectors>(rows + row[u].at * row_bytes, channel, head_dim);
      weights[u] = base + u * Shared::kRows < count && row[u].counts ? weight : 0.0f;
    }
    if (kAhead) find_rows(base + Shared::kRows * kUnroll);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[kChunk];
      unpack8<kDtype>(raw[u], x);
      const float w = weights[u];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) statistics.add(i, x[i], w);
    }
  }
#pragma unroll
  for (int result = 0; result < Statistics::kResults; ++result) {
    if (result) __syncthreads();  // the last result has been read
#pragma unroll
    for (int i = 0; i < kChunk; ++i) shared.partial[threadIdx.x][i] = statistics.get(result, i);
    __syncthreads();  // every thread's results are stored
    for (int c = threadIdx.x; c < Shared::kHeadDim; c += Shared::kThreads) {
      float total = shared.partial[c / kChunk][c % kChunk];
#pragma unroll
      for (int r = 1; r < Shared::kRows; ++r)
        total = Statistics::combine(result, total, shared.partial[r * Shared::kLanes + c / kChunk][c % kChunk]);
      out(result, c, total);
    }
  }
}

// The lane's channels of a row of K, as in memory; channels ≥ head_dim stay zero.
template <int kHeadDim, int kDtype>
struct RawRow {
  Raw8<kDtype> chunk[kHeadDim / 32]{};

  template <bool kVectors>
  __device__ __forceinline__ void load(const void* row, int t, int head_dim) {
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) load8<kDtype, kVectors>(row, 32 * c + kChunk * t, head_dim, chunk[c]);
  }
};

// x: the lane's channels of its key in fp32, times 0.5/D, minus k_mean; zero for a key that does not count.
template <int kHeadDim, int kDtype, class Shared>
__device__ __forceinline__ void unpack_key(const RawRow<kHeadDim, kDtype>& raw, bool valid, const Shared& shared,
                                           float (&x)[kHeadDim / 4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int c = 0; c < kHeadDim / 32; ++c) {
    unpack8<kDtype>(raw.chunk[c], x + kChunk * c);
    const float4* four = reinterpret_cast<const float4*>(shared.k_mean + 32 * c + kChunk * t);
    const float4 a = four[0], b = four[1];
    const float k_mean[kChunk] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      float& value = x[kChunk * c + e];
      value = valid ? fmaf(value, 0.5f / kHeadDim, -k_mean[e]) : 0.0f;
    }
  }
}

// The four scales of a scale block. amax: the warp's largest magnitude for scale number `group`, in lanes that are `whole`. Stores the
// scales in the tile; returns the inverse of scale lane % 4 and, in `scale`, that scale. A collective of the threads of `shared`.
template <class Layout, class Shared>
__device__ __forceinline__ float share_scales(float amax, int group, bool whole, int scale_block, int tile_bytes, Shared& shared, u8* out,
                                              float& scale) {
  constexpr int kBlocksPerTile = Layout::kTile / Layout::kScaleKeys;  // of a tile
  const int lane = threadIdx.x % 32, part = scale_block % kBlocksPerTile;
  float (&k_amax)[Shared::kWarps][4] = shared.maxima(scale_block);
  if (whole) k_amax[Shared::thread() / 32][group] = amax;
  Shared::sync();  // every warp's maxima are stored; the next but one call reuses their place, after the next call's barrier
  amax = k_amax[min(lane / 4, Shared::kWarps - 1)][lane % 4];
#pragma unroll
  for (int other = 4; other <= 16; other *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, other));
  const float inverse = int8_inverse(amax);
  scale = inverse > 0.0f ? amax * (1.0f / kInt8Max) : 0.0f;
  if (Shared::thread() < 4) {
    u8* scales = out + Layout::scale_offset(tile_bytes) + Layout::kScalePitch * lane;
    *reinterpret_cast<float*>(scales + 4 * part) = scale;
    if constexpr (Layout::kNumbered) {
      if (kBlocksPerTile == 1) *reinterpret_cast<float*>(scales + 4) = scale;
      *reinterpret_cast<i32*>(scales + 12) = scale_block / kBlocksPerTile;
    }
  }
  return inverse;
}

// Quantises a scale block's keys; lane 4g + t reads its channels (rotate.cuh) of key row(). load() starts the next block's loads, to be in
// flight meanwhile. A collective of the threads of `shared`. This one: rotate() in fp32, each quad one key.
template <class Layout, int kDtype, class Shared>
struct RotateKByLane {
  static constexpr int kHeadDim = Layout::kHeadDim;

  static __device__ __forceinline__ int row() { return Shared::thread() / 4; }
  __device__ __forceinline__ void prepare(Shared&) {}

  // counts(i): whether key i of the block is quantised; others become 0. Returns scale lane % 4.
  template <class Counts, class Load>
  __device__ __forceinline__ float quantize(const RawRow<kHeadDim, kDtype>& raw, Counts counts, Load load, int scale_block, int tile_bytes,
                                            Shared& shared, u8* out) const {
    const int lane = threadIdx.x % 32, t = lane % 4;
    float x[kHeadDim / 4], scale;
    unpack_key(raw, counts(row()), shared, x);
    load();
    rotate<kHeadDim>(x, t);
    float amax = abs_max(x);
#pragma unroll
    for (int other = 1; other <= 4; other *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, other));
    const float inverse = __shfl_sync(
        kAllLanes, share_scales<Layout>(amax, lane / 8, lane % 8 == 0, scale_block, tile_bytes, shared, out, scale), lane / 8, 32);
    u8* to = out + Layout::k_chunk(0, scale_block * Layout::kScaleKeys % Layout::kTile + row(), t);
#pragma unroll
    for (int c2 = 0; c2 < kHeadDim / 64; ++c2) {
      const auto quantized = [&](int i) {
        const auto channel = [&](int j) { return x[quantized_register<kHeadDim>(16 * c2 + 4 * i + j)]; };
        return quantize_s8x4(channel(0), channel(1), channel(2), channel(3), inverse);
      };
      *reinterpret_cast<uint4*>(to + Layout::k_chunk(c2, 0, 0)) = {quantized(0), quantized(1), quantized(2), quantized(3)};
    }
    return scale;
  }
};

// The same by a Rotation, whose accumulators start at −k_mean, rotated as far as the MMAs go. Lane 4g + t gets 16 consecutive quantised
// channels of each of two keys, t and t + 4 of eight, so that stores fill whole sectors.
template <class Layout, int kDtype, class Shared>
struct RotateKByMma {
  static constexpr int kHeadDim = Layout::kHeadDim;
  const Rotation<kHeadDim, kDtype> rotation{(int)threadIdx.x % 32};

  static __device__ __forceinline__ int row() { return Shared::thread() / 32 * 8 + threadIdx.x % 8 / 4 * 4 + threadIdx.x % 32 / 8; }

  // Stores where the accumulators start. A thread needs but the k_mean of its warp's channels, if a warp has 32.
  __device__ __forceinline__ void store_start(Shared& shared) const {
    for (int i = threadIdx.x; i < kHeadDim; i += Shared::kThreads) {
      const float x = -rotation.product(shared.k_mean, i / 16, i % 16);
      reinterpret_cast<float2*>(&shared.start[i / 16][i % 8])[i / 8 % 2] = {x, x};
    }
  }

  // Called once k_mean is complete. A collective of the CTA.
  __device__ __forceinline__ void prepare(Shared& shared) const {
    store_start(shared);
    __syncthreads();
  }

  // As in RotateKByLane; `raw` has to be finite, also of a key that does not count.
  template <class Counts, class Load>
  __device__ __forceinline__ float quantize(const RawRow<kHeadDim, kDtype>& raw, Counts counts, Load load, int scale_block, int tile_bytes,
                                            Shared& shared, u8* out) const {
    const int lane = threadIdx.x % 32, t = lane % 4, g = lane / 4, own = Shared::thread() / 32 * 8 + t;
    float y[2][kHeadDim / 8], scale;
    const auto start = [&](int m, float (&c)[4]) {
      const float4 four = shared.start[m][g];
      c[0] = four.x, c[1] = four.y, c[2] = four.z, c[3] = four.w;
    };
    rotation(raw.chunk, start, y);
    load();
    bool valid[2];
    float top[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) valid[j] = counts(own + 4 * j), top[j] = fminf(abs_max(y[j]), valid[j] ? kInf : 0.0f);
    // Keys t and t + 1 (t even) share a scale: lane t gets their maximum, lane t + 1 that of keys t + 4 and t + 5.
    float amax = fmaxf(t % 2 ? top[1] : top[0], __shfl_xor_sync(kAllLanes, t % 2 ? top[0] : top[1], 1));
#pragma unroll
    for (int other = 4; other <= 16; other *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, other));
    const float inverses = share_scales<Layout>(amax, t / 2 + t % 2 * 2, lane < 4, scale_block, tile_bytes, shared, out, scale);
    // Address of the lane's first 16 bytes (8 at head_dim 64); the others lie at constant distances.
    u8* to = out + Layout::k_chunk(kHeadDim == 64 ? 0 : g / 4, scale_block * Layout::kScaleKeys % Layout::kTile + own, g % 4);
    if (kHeadDim == 64) to += g / 4 * 8;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float inverse = __shfl_sync(kAllLanes, inverses, t / 2 + 2 * j, 32);
      if (!valid[j]) inverse = 0.0f;
      u32 quantized[kHeadDim / 32];
#pragma unroll
      for (int i = 0; i < kHeadDim / 32; ++i)
        quantized[i] = quantize_s8x4(y[j][4 * i], y[j][4 * i + 1], y[j][4 * i + 2], y[j][4 * i + 3], inverse);
      if constexpr (kHeadDim == 64) {
        *reinterpret_cast<uint2*>(to + Layout::k_chunk(0, 4 * j, 0)) = {quantized[0], quantized[1]};
      } else {
#pragma unroll
        for (int i = 0; i < kHeadDim / 128; ++i)
          *reinterpret_cast<uint4*>(to + Layout::k_chunk(2 * i, 4 * j, 0)) = {quantized[4 * i], quantized[4 * i + 1], quantized[4 * i + 2],
                                                                              quantized[4 * i + 3]};
      }
    }
    return scale;
  }
};

template <bool kMmas, class Layout, int kDtype, class Shared>
struct RotateKOf {
  using Type = RotateKByLane<Layout, kDtype, Shared>;
};
template <class Layout, int kDtype, class Shared>
struct RotateKOf<true, Layout, kDtype, Shared> {
  using Type = RotateKByMma<Layout, kDtype, Shared>;
};
template <class Layout, int kDtype, class Shared>
using RotateK = typename RotateKOf<kMma16 && kDtype != kFloat32, Layout, kDtype, Shared>::Type;

// Chooses the keys of k_mean where not all keys are live: of each `k_mean_step` keys, the first live one in the 32-key word that they begin
// in; if that finds none, the first live key of all. Returns their number (0 if no key is live). A collective of the CTA.
template <class Layout>
__device__ __forceinline__ int find_samples(const QuantizeKParams& p, const LiveRows& live, QuantizeKShared<Layout>& shared) {
  static_assert(kMaxKMeanTokens == 128, "four warps look for samples");
  int key = -1;
  if (threadIdx.x < p.k_mean_samples) {
    const int start = threadIdx.x * p.k_mean_step, word = start / 32, end = start + p.k_mean_step - word * 32;
    u32 bits = live.word(word) >> start % 32 << start % 32;
    if (end < 32) bits &= (1u << end) - 1;
    if (bits) key = word * 32 + __ffs(bits) - 1;
  }
  // Compacted in order, so that every CTA and every run gets the same bits.
  const u32 found = __ballot_sync(kAllLanes, key >= 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < 4 && lane == 0) shared.samples_of_warp[warp] = __popc(found);
  __syncthreads();  // the counts are there
  int place = __popc(found & ((1u << lane) - 1)), count = 0;
  for (int w = 0; w < 4; ++w) place += w < warp ? shared.samples_of_warp[w] : 0, count += shared.samples_of_warp[w];
  if (key >= 0) shared.sample[place] = key;
  if (threadIdx.x == 0) shared.live_samples = count;
  __syncthreads();  // the samples are there
  if (!shared.live_samples && threadIdx.x == 0)
    for (int w = 0; w < live.live.words && !shared.live_samples; ++w)
      if (const u32 bits = live.word(w)) shared.sample[0] = w * 32 + __ffs(bits) - 1, shared.live_samples = 1;
  __syncthreads();  // and the one there is instead
  return shared.live_samples;
}

// Whether all keys are live whose mean is k_mean where all are. A collective of the CTA.
__device__ __forceinline__ bool samples_live(const QuantizeKParams& p, const LiveRows& live) {
  bool all = true;
  if (threadIdx.x < p.k_mean_samples) {
    const int key = threadIdx.x * p.k_mean_step;
    all = live.word(key / 32) >> key % 32 & 1;
  }
  return __syncthreads_and(all);
}

// Lets the next launch start, of which no CTA does before all CTAs of this one, number `block` among them, have come here.
__device__ __forceinline__ void let_next_launch_start(const QuantizeKParams& p, int block) {
  if (threadIdx.x == 0) {
    if (block < p.bh_count * p.v_chunks) p.v_stats_ready[block] = 0;
    __threadfence();
    grid_launch_dependents();
  }
}

// Whether the mask whose live keys these are may still be being read when the launch starts. Its CTAs then begin as if all keys were live.
template <class Layout, bool kLiveMask>
constexpr bool kGuessesLive = kLiveMask && !Layout::kOrdered;

// kLiveMask: p.live may say that some keys are not live. Stores the largest K scale at `scale_partial`.
template <class Layout, int kDtype, bool kVectors, bool kLiveMask>
__device__ __forceinline__ void quantize_cta(const QuantizeKParams& p, const u8* k, const LiveRows& live, int bh, int cta,
                                             float* scale_partial, QuantizeKShared<Layout>& shared) {
  constexpr int kHeadDim = Layout::kHeadDim, kKeys = Layout::kScaleKeys, kBlocksPerTile = Layout::kTile / kKeys;
  constexpr bool kOrdered = kLiveMask && Layout::kOrdered;
  using Rotate = RotateK<Layout, kDtype, QuantizeKShared<Layout>>;
  // Loads the next scale block while this one is rotated, where the registers allow it.
  constexpr bool kPrefetch = kHeadDim <= 128 && kDtype != kFloat32 && kVectors;
  const i64 row_bytes = p.k.stride_n * kElementBytes<kDtype>;
  const int scale_blocks = kBlocksPerTile * p.kv_tiles, length = (scale_blocks + p.ctas_per_head - 1) / p.ctas_per_head,
            first = cta * length, last = min(first + length, scale_blocks);
  RawRow<kHeadDim, kDtype> raw;
  const auto row_of = [&](int i) { return kOrdered && p.order ? p.order[i] : i; };
  // The lane's key of a scale block, an existing one at the end. Its row is found a scale block ahead.
  const auto row_in = [&](int scale_block) { return row_of(min(scale_block * kKeys + Rotate::row(), p.len - 1)); };
  int next_row = row_in(first);
  const u8* key = k + next_row * row_bytes;
  if (kOrdered) next_row = row_in(first + 1);
  const auto load = [&] { raw.template load<kVectors>(key, threadIdx.x % 4, p.head_dim); };
  const auto advance = [&](int scale_block) {
    if (kOrdered)
      key = k + next_row * row_bytes, next_row = row_in(scale_block + 1);
    else if (scale_block * kKeys + Rotate::row() < p.len)
      key += kKeys * row_bytes;
  };
  if (kPrefetch) load();
  constexpr int kThreads = QuantizeKShared<Layout>::kThreads;
  const auto take_k_mean = [&](int samples, auto key_of) {
    reduce_rows<ChannelSum, kDtype, kVectors, kOrdered>(
        k, row_bytes, samples, p.head_dim, 1.0f / (kLiveMask ? max(samples, 1) : samples), shared,
        [&](int i) -> Row { return {row_of(key_of(i)), true}; },
        [&](int, int c, float mean) {
          shared.k_mean[c] = mean * (0.5f / kHeadDim);
          if (cta == 0) p.k_mean[bh * kHeadDim + c] = mean;
        });
  };
  const auto take_live_k_mean = [&] { take_k_mean(find_samples(p, live, shared), [&](int i) { return shared.sample[i]; }); };
  const auto own_live = [&] { return shared.live.load(live, first * kKeys, (last - first) * kKeys, kThreads); };
  bool some = false;  // whether some of the CTA's keys are not live
  if (kOrdered && live.bits) some = !own_live();
  if (kOrdered && p.k_mean_given) {
    for (int c = threadIdx.x; c < kHeadDim; c += kThreads) shared.k_mean[c] = p.k_mean[bh * kHeadDim + c] * (0.5f / kHeadDim);
  } else if (kOrdered && live.bits) {
    take_live_k_mean();
  } else {
    take_k_mean(p.k_mean_samples, [&](int i) { return i * p.k_mean_step; });
  }
  if constexpr (kGuessesLive<Layout, kLiveMask>) {
    grid_dependency_wait();  // the live keys are known
    let_next_launch_start(p, p.bh_count * p.v_chunks);
    some = !own_live();
    if (!samples_live(p, live)) {
      take_live_k_mean();
      if (kPrefetch) load();  // again: `raw` need not be kept over this
    }
  }
  __syncthreads();  // k_mean is complete
  Rotate rotate_k;
  rotate_k.prepare(shared);
  float top = 0.0f;
  // some: as above, where it is known when this is compiled: a loop of its own over keys that are all live takes fewer registers.
  const auto quantize_blocks = [&](auto some) {
    for (int scale_block = first; scale_block < last; ++scale_block) {
      if (!kPrefetch) raw = {}, load();  // loaded here, `raw` takes no registers in between
      u8* out = p.kv + ((i64)bh * p.kv_tiles + scale_block / kBlocksPerTile) * p.tile_bytes;
      const auto load_next = [&] {
        advance(scale_block + 1);
        if (kPrefetch && scale_block + 1 < last) load();
      };
      const int first_key = scale_block * kKeys;
      const auto counts = [&](int i) { return some ? shared.live.get(first_key + i, first * kKeys) : first_key + i < p.len; };
      if (some && !counts(Rotate::row())) raw = {};
      top = fmaxf(top, rotate_k.quantize(raw, counts, load_next, scale_block, p.tile_bytes, shared, out));
    }
  };
  if constexpr (kOrdered)
    quantize_blocks(some);
  else if (kLiveMask && some)
    quantize_blocks(Constant<1>{});
  else
    quantize_blocks(Constant<0>{});
  top = row_max(top);
  if (threadIdx.x == 0) *scale_partial = top;
}

// Counts the live keys of [first, first + count) into *total; returns the first of them relative to `first`, −1 if there is none. A
// collective of the CTA.
template <class Layout>
__device__ __forceinline__ int count_live(const LiveRows& live, int first, int count, i32* total, QuantizeKShared<Layout>& shared) {
  shared.live.load(live, first, count, QuantizeKShared<Layout>::kThreads);
  int number = 0, substitute = -1;
  for (int key = first; key < first + count;) {
    const int end = min(first + count, key / 32 * 32 + 32);
    u32 bits = shared.live.word[key / 32 - first / 32] >> key % 32 << key % 32;
    if (end % 32) bits &= (1u << end % 32) - 1;
    if (bits && substitute < 0) substitute = key / 32 * 32 + __ffs(bits) - 1 - first;
    number += __popc(bits), key = end;
  }
  if (threadIdx.x == 0) *total = number;
  return substitute;
}

// A dense launch's CTA number `block`.
template <class Layout, bool kLiveMask>
__device__ __forceinline__ void quantize_k_block(const QuantizeKParams& p, int block, QuantizeKShared<Layout>& shared) {
  constexpr bool kGuesses = kGuessesLive<Layout, kLiveMask>;
  const int stats_ctas = p.bh_count * p.v_chunks;
  if (!kGuesses) let_next_launch_start(p, block);
  const auto body = [&](auto type, auto vectors) {
    constexpr int kDtype = decltype(type)::value;
    const auto head_of = [&](const Tokens& x, int bh) {
      const int batch = (p.bh_first + bh) / p.heads, head = (p.bh_first + bh) % p.heads;
      return static_cast<const u8*>(x.data) + (batch * x.stride_b + head * x.stride_h) * kElementBytes<kDtype>;
    };
    const auto live_of = [&](int bh) { return LiveRows(p.live, (p.bh_first + bh) / p.heads, (p.bh_first + bh) % p.heads, p.len); };
    if (block >= stats_ctas) {
      const int cta = block - stats_ctas, bh = cta / p.ctas_per_head;
      quantize_cta<Layout, kDtype, decltype(vectors)::value, kLiveMask>(p, head_of(p.k, bh), live_of(bh), bh, cta - bh * p.ctas_per_head,
                                                                        p.k_scale_partial + cta, shared);
    } else {
      const int bh = block / p.v_chunks, first = block % p.v_chunks * p.v_chunk_tokens;
      const i64 row_bytes = p.v.stride_n * kElementBytes<kDtype>;
      float* to = p.v_stats + (i64)block * 3 * Layout::kHeadDim;
      if (first == 0 && threadIdx.x < Layout::kHeadDim) p.v_quant_sum[bh * Layout::kHeadDim + threadIdx.x] = 0;
      const int count = min(p.v_chunk_tokens, p.len - first);
      const u8* rows = head_of(p.v, bh) + first * row_bytes;
      const auto keep = [&](int result, int c, float value) { to[result * Layout::kHeadDim + c] = value; };
      const LiveRows live = live_of(bh);
      const auto row_of = [&](int i) { return kLiveMask && Layout::kOrdered && p.order ? p.order[first + i] - first : i; };
      const auto reduce = [&](auto row) {
        reduce_rows<ChannelStats, kDtype, decltype(vectors)::value, kLiveMask && Layout::kOrdered>(rows, row_bytes, count, p.head_dim,
                                                                                                   1.0f / p.len, shared, row, keep);
      };
      bool some = kLiveMask && live.bits;
      if (kGuesses || !some) reduce([&](int i) -> Row { return {row_of(i), true}; });
      if constexpr (kGuesses) {
        grid_dependency_wait();  // the live keys are known
        let_next_launch_start(p, block);
        some = !shared.live.load(live, first, count, QuantizeKShared<Layout>::kThreads);
        if (!some && threadIdx.x == 0) p.v_stats_live[block] = count;
      }
      if (some) {
        const int substitute = count_live(live, first, count, p.v_stats_live + block, shared);
        if (substitute < 0)
          for (int c = threadIdx.x; c < Layout::kHeadDim; c += QuantizeKShared<Layout>::kThreads)
            keep(0, c, -kInf), keep(1, c, kInf), keep(2, c, 0.0f);
        else
          reduce([&](int i) -> Row {
            const bool counts = shared.live.get(first + i, first);
            return {row_of(counts ? i : substitute), counts};
          });
      }
      __threadfence();
      __syncthreads();  // all statistics are stored
      if (threadIdx.x == 0) store_release(p.v_stats_ready + block, 1);
    }
  };
  with_dtype(p.dtype, [&](auto type) {
    if constexpr (kLiveMask && decltype(type)::value == kFloat32)  // rare, so it gets no code for vectors
      body(type, Constant<0>{});
    else if (p.vectorized)
      body(type, Constant<1>{});
    else
      body(type, Constant<0>{});
  });
}

// The launch of one sequence, as which the CTA works, and its number there. p.v_chunks and p.ctas_per_head count the runs that there may be
// of each head; a run is a chunk of V's statistics and a CTA's share of K. Returns false if there is nothing to do.
template <class Layout>
__device__ __forceinline__ bool narrow_to_sequence(QuantizeKParams& p, int& block) {
  const int heads = p.bh_count, stats_ctas = heads * p.v_chunks, kind = block >= stats_ctas;
  PackedRun run;
  if (!run.find(p.packed, block - kind * stats_ctas, p.v_chunks, p.v_chunk_tokens)) return false;
  p.k.data = run.tokens(p.k, p.dtype), p.v.data = run.tokens(p.v, p.dtype);
  p.kv = run.tiles(p.kv, heads, p.tile_bytes);
  p.k_mean = run.of_sequence(p.k_mean, heads, Layout::kHeadDim), p.v_quant_sum = run.of_sequence(p.v_quant_sum, heads, Layout::kHeadDim);
  p.k_scale_partial = run.of_runs(p.k_scale_partial, heads), p.v_stats_ready = run.of_runs(p.v_stats_ready, heads);
  p.v_stats = run.of_runs(p.v_stats, heads, 3 * Layout::kHeadDim);
  p.len = run.sequence.k_len, p.kv_tiles = ceil_div(p.len, Layout::kTile), p.v_chunks = p.ctas_per_head = run.parts;
  p.k_mean_step = ceil_div(p.len, kMaxKMeanTokens), p.k_mean_samples = ceil_div(p.len, p.k_mean_step);
  block = (kind * heads + run.head) * run.parts + run.part;
  return true;
}

// Layout: of either size of V's elements. Keys::live: p.live may say that some keys are not live, p.order where tokens lie.
template <class Layout, Keys kKeys>
__device__ __forceinline__ void quantize_k(const QuantizeKParams& p) {
  __shared__ QuantizeKShared<Layout> shared;
  const int block = blockIdx.x;
  if (!kGuessesLive < Layout, kKeys == Keys::live >) grid_dependency_wait();
  if (block == 0) {
    for (int i = threadIdx.x; i < p.split_kv_flags; i += QuantizeKShared<Layout>::kThreads) p.split_kv_ready[i] = 0;
    __syncthreads();  // thread 0 publishes all of them when it lets the next launch start
  }
  if constexpr (kKeys == Keys::packed) {
    __shared__ SequenceLaunch<QuantizeKParams> own;
    if (threadIdx.x == 0) {
      own.params = p, own.block = block;
      own.any = narrow_to_sequence<Layout>(own.params, own.block);
    }
    __syncthreads();  // it is complete
    if (own.any) quantize_k_block<Layout, false>(own.params, own.block, shared);
  } else {
    quantize_k_block<Layout, kKeys == Keys::live>(p, block, shared);
  }
}

}  // namespace sage
