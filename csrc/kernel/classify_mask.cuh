// Launch before the others: reads a dense mask once and stores, for each band of 32 queries, which KV tiles it sees, which of those hold a
// masked or biased pair, and which keys it sees at all. One band stands for all queries where the mask is the same for all and not causal.
//
// A warp goes over the rows of a band in strips of 32 lanes, each of which reads consecutive keys of a row; several warps may share the
// rows. A CTA has a part of a band's keys: whole bytes of its planes.
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
constexpr int kClassifyMaxKeys = 4096;  // of a CTA whose warps share rows

struct ClassifyShared {
  u32 plane[2][kMaxWords];           // the CTA's bytes of each
  u32 alive[kClassifyMaxKeys / 32];  // where warps share rows: the CTA's live keys
  i32 row_max[kBandRows];            // ordered(); −inf: no key of the row is negligible
  i32 lowest, highest;               // ordered(): of the biases that the CTA has read, but for −inf
};

// Integers that are ordered as the floats are, and back.
__device__ __forceinline__ i32 ordered(float x) {
  const i32 bits = __float_as_int(x);
  return bits ^ (bits >> 31 & 0x7FFFFFFF);
}
__device__ __forceinline__ float from_ordered(i32 x) { return __int_as_float(x ^ (x >> 31 & 0x7FFFFFFF)); }

// How MaskRun::kKeys consecutive elements of a row are loaded: one by one; they are consecutive in memory, 16 bytes of the 32 around them;
// they are also aligned.
enum class RunLoad { each, shifted, aligned };

// The 16 bytes at `at`, from the two aligned pieces that hold them. Lanes whose `at` differs by multiples of 16 do the same.
__device__ __forceinline__ uint4 load_shifted16(const u8* at) {
  const u32 offset = (u64)at % 16;
  const uint4* from = reinterpret_cast<const uint4*>(at - offset);
  const uint4 low = from[0], high = from[1];
  u32 w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int step = 2; step; step /= 2)
#pragma unroll
    for (int i = 0; i < 4 + step; ++i) w[i] = offset & 4 * step ? w[i + step] : w[i];
  const auto shifted = [&](int i) { return (u32)(((u64)w[i + 1] << 32 | w[i]) >> offset % 4 * 8); };
  return make_uint4(shifted(0), shifted(1), shifted(2), shifted(3));
}

// A lane's kKeys consecutive elements of a row, 16 bytes as they are in memory. kept(): bit e set unless the mask removes the key; plain():
// unless it biases or removes it. Keys beyond the end are removed.
template <int kKind>
struct MaskRun {
  static constexpr int kBytes = kKind == kMaskF32 ? 4 : 2, kKeys = 16 / kBytes, kPerWord = 4 / kBytes;
  static constexpr u32 kRemoved = kKind == kMaskF32 ? 0xFF800000u : kKind == kMaskF16 ? 0xFC00FC00u : 0xFF80FF80u;  // −inf
  u32 word[4];

  template <RunLoad kLoad>
  __device__ __forceinline__ void load(const u8* row, int key, i64 stride_k, int len_kv) {
    if constexpr (kLoad == RunLoad::each) {
      load_each(row, key, stride_k, len_kv);
    } else {
      const u8* at = row + (i64)key * kBytes;
      const uint4 v = kLoad == RunLoad::aligned ? *reinterpret_cast<const uint4*>(at) : load_shifted16(at);
      word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    }
  }
  __device__ __forceinline__ void load_each(const u8* row, int key, i64 stride_k, int len_kv) {
#pragma unroll
    for (int w = 0; w < 4; ++w) word[w] = kRemoved;
#pragma unroll
    for (int e = 0; e < kKeys; ++e) {
      if (key + e >= len_kv) continue;
      const u8* at = row + (key + e) * stride_k * kBytes;
      if constexpr (kKind == kMaskF32)
        word[e] = *reinterpret_cast<const u32*>(at);
      else
        word[e / 2] = __byte_perm(word[e / 2], *reinterpret_cast<const u16*>(at), e % 2 ? 0x5410 : 0x3254);
    }
  }
  __device__ __forceinline__ float bias(int e) const {
    const u32 bits = word[e / kPerWord];
    if constexpr (kKind == kMaskF32) return __uint_as_float(bits);
    if constexpr (kKind == kMaskF16) return f16_to_f32(bits >> 16 * (e % 2) & 0xFFFF);
    return __uint_as_float(e % 2 ? bits & 0xFFFF0000u : bits << 16);
  }
  __device__ __forceinline__ u32 kept() const {
    u32 bits = 0;
#pragma unroll
    for (int e = 0; e < kKeys; ++e) bits |= (bias(e) == -kInf ? 0u : 1u) << e;
    return bits;
  }
  __device__ __forceinline__ u32 plain() const {
    u32 bits = 0;
#pragma unroll
    for (int e = 0; e < kKeys; ++e) bits |= (bias(e) == 0.0f ? 1u : 0u) << e;
    return bits;
  }
  // All elements 0; all −inf.
  __device__ __forceinline__ bool all_plain() const {
    return ((word[0] | word[1] | word[2] | word[3]) & (kKind == kMaskF32 ? 0x7FFFFFFFu : 0x7FFF7FFFu)) == 0;
  }
  __device__ __forceinline__ bool all_removed() const {
    return ((word[0] ^ kRemoved) | (word[1] ^ kRemoved) | (word[2] ^ kRemoved) | (word[3] ^ kRemoved)) == 0;
  }
};

template <>
struct MaskRun<kMaskBool> {
  static constexpr int kKeys = 16;
  u32 bytes[kKeys / 4];

  template <RunLoad kLoad>
  __device__ __forceinline__ void load(const u8* row, int key, i64 stride_k, int len_kv) {
    if constexpr (kLoad == RunLoad::each) {
      load_each(row, key, stride_k, len_kv);
    } else {
      const uint4 v = kLoad == RunLoad::aligned ? *reinterpret_cast<const uint4*>(row + key) : load_shifted16(row + key);
      bytes[0] = v.x, bytes[1] = v.y, bytes[2] = v.z, bytes[3] = v.w;
    }
  }
  __device__ __forceinline__ void load_each(const u8* row, int key, i64 stride_k, int len_kv) {
#pragma unroll
    for (int w = 0; w < kKeys / 4; ++w) bytes[w] = 0;
#pragma unroll
    for (int e = 0; e < kKeys; ++e)
      if (key + e < len_kv) bytes[e / 4] |= (u32)row[(key + e) * stride_k] << 8 * (e % 4);
  }
  // Adds the bytes that are set in this run, too, to `all`, and those that are set in one of both to `any`.
  __device__ __forceinline__ void add(u32& all, u32& any) const {
    all &= bytes[0] & bytes[1] & bytes[2] & bytes[3], any |= bytes[0] | bytes[1] | bytes[2] | bytes[3];
  }
  __device__ __forceinline__ u32 kept() const {
    u32 half[2];  // eight bits each, in bits 7 to 14
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // The top bit of each byte that is not 0, then these bits side by side.
      const auto set = [&](int w) { return (bytes[w] | (bytes[w] & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) & 0x80808080u; };
      half[i] = __dp4a(set(2 * i + 1), 0x80402010u, __dp4a(set(2 * i), 0x08040201u, 0u));
    }
    return half[0] >> 7 | half[1] << 1;
  }
};

// Sets the lowest `count` of kKeys bits.
template <int kKeys>
__device__ __forceinline__ u32 first_bits(int count) {
  return count >= kKeys ? (1u << kKeys) - 1 : count > 0 ? (1u << count) - 1 : 0u;
}

// Joins the kKeys bits of each of 32 / kKeys consecutive lanes to a word, in all of them.
template <int kKeys>
__device__ __forceinline__ u32 join_lanes(u32 bits) {
  constexpr int kLanes = 32 / kKeys;
  u32 word = bits << kKeys * (special_tid_x() % kLanes);
#pragma unroll
  for (int other = 1; other < kLanes; other *= 2) word |= __shfl_xor_sync(kAllLanes, word, other);
  return word;
}

// A band of one (batch, head) of the mask, and the part of its keys that the CTA has.
struct MaskBand {
  int matrix, row0, rows;
  bool one_row;       // the mask has one row for all queries
  int last_row;       // a causal band sees keys up to this one; one for all queries sees what the last query sees
  int byte0, bytes;   // of the planes
  int key0, key_end;  // whole tiles
  const u8* mask;     // row row0
  i64 row_bytes;

  __device__ __forceinline__ explicit MaskBand(const ClassifyParams& p) {
    const int part = blockIdx.x % p.parts, index = blockIdx.x / p.parts, band = index % p.bands;
    const int element = mask_element_bytes(p.mask_kind);
    matrix = index / p.bands, row0 = p.bands == 1 ? 0 : band * kBandRows, one_row = p.stride_q == 0;
    rows = one_row ? 1 : min(kBandRows, p.len_q - row0);
    last_row = min(p.bands == 1 && one_row ? p.len_q : row0 + kBandRows, p.len_q) - 1;
    byte0 = part * p.part_bytes, bytes = part == p.parts - 1 ? 4 * p.words - byte0 : p.part_bytes;
    key0 = byte0 * 8 * p.tile, key_end = min(key0 + bytes * 8 * p.tile, (p.len_kv + p.tile - 1) / p.tile * p.tile);
    row_bytes = p.stride_q * element;
    mask = static_cast<const u8*>(p.mask) + (matrix / p.heads * p.stride_b + matrix % p.heads * p.stride_h) * element + row0 * row_bytes;
  }

  // Leaves the band's rows from number `first` on, `count` at most; false if there are none.
  __device__ __forceinline__ bool narrow(int first, int count) {
    row0 += first, rows = min(rows - first, count), mask += first * row_bytes;
    return rows > 0;
  }
};

// The largest bias of each row of the band, up to the diagonal if causal, in shared.row_max. A collective of the CTA.
template <int kKind>
__device__ __forceinline__ void find_row_max(const ClassifyParams& p, const MaskBand& band, ClassifyShared& shared) {
  using Run = MaskRun<kKind>;
  constexpr int kBatch = 4, kStrip = 32 * Run::kKeys;  // strips that are loaded together
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // A single row is read by all warps, of several each warp has its own.
  const int first = band.one_row ? warp * kStrip : 0, step = band.one_row ? kClassifyWarps * kStrip : kStrip;
  for (int r = band.one_row ? 0 : warp; r < band.rows; r += kClassifyWarps) {
    const u8* row = band.mask + r * band.row_bytes;
    const int keys = p.causal ? min(band.row0 + r + 1, p.len_kv) : p.len_kv;
    float top = -kInf;
    for (int strip = first; strip < keys; strip += kBatch * step) {
      Run run[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int key = strip + i * step + Run::kKeys * lane;
        if (p.vectors == (i32)RunLoad::aligned && key + Run::kKeys <= keys)
          run[i].template load<RunLoad::aligned>(row, key, 1, keys);
        else if (p.vectors && key + 2 * Run::kKeys <= keys)
          run[i].template load<RunLoad::shifted>(row, key, 1, keys);
        else
          run[i].load_each(row, key, p.stride_k, keys);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
#pragma unroll
        for (int e = 0; e < Run::kKeys; ++e) top = fmaxf(top, run[i].bias(e));
    }
#pragma unroll
    for (int other = 1; other < 32; other *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, other));
    if (lane == 0) atomicMax(&shared.row_max[r], ordered(top));
  }
  __syncthreads();  // maxima are complete
}

// Bits of a lane's keys, over the rows of a band, and the range of their finite biases.
struct KeyState {
  u32 seen = 0, uneven = 0, alive = 0;
  float lowest = kInf, highest = -kInf;
};

// Adds the band's rows of a bool mask to the state of the lane's keys from `key` on, and stores them as bits.
template <RunLoad kLoad>
__device__ __forceinline__ void add_bool_rows(const ClassifyParams& p, const MaskBand& band, int key, KeyState& state) {
  using Run = MaskRun<kMaskBool>;
  constexpr int kKeys = Run::kKeys, kBatch = kLoad == RunLoad::aligned ? 8 : 4;  // rows that are loaded together
  const i64 matrix_row0 = band.one_row ? band.matrix : (i64)band.matrix * p.len_q + band.row0;
  u32* kept_row0 = p.kept + matrix_row0 * p.live_words;
  u16* kept_bits = reinterpret_cast<u16*>(kept_row0) + key / kKeys;                                // the lane's own keys
  u32* kept_words = kept_row0 + (key - special_tid_x() % 32 * kKeys) / 32 + special_tid_x() % 16;  // of a strip; 16 lanes have a row
  // One row for all queries: some query sees keys up to last_row, every one up to row0.
  const int some = p.causal ? (band.one_row ? band.last_row : band.row0) - key + 1 : kKeys;
  const int every = p.causal ? band.row0 - key + 1 : kKeys;
  const u8* row = band.mask;
  // Rows beyond the end repeat the last, so that nothing branches.
  for (int base = 0; base < band.rows; base += kBatch) {
    Run run[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      run[i].template load<kLoad>(row, key, p.stride_k, p.len_kv);
      if (base + i < band.rows - 1) row += band.row_bytes;
    }
    const int last = min(base + kBatch, band.rows) - 1;
    if constexpr (kLoad != RunLoad::each) {
      // Masks of models consist of large areas of one value: of all rows and lanes here, then, as bytes 1 or 0.
      u32 all = ~0u, any = 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) run[i].add(all, any);
      const bool kept = __all_sync(kAllLanes, all == 0x01010101u && any == 0x01010101u);
      if (kept || __all_sync(kAllLanes, any == 0)) {
        if (kept) state.seen |= first_bits<kKeys>(some + last);
        if (!p.absent) state.uneven |= ~(kept ? first_bits<kKeys>(every + base) : 0u) & (1u << kKeys) - 1;
        for (int r = base + special_tid_x() % 32 / 16; r <= last; r += 2) kept_words[r * p.live_words] = kept ? ~0u : 0u;
        continue;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int r = min(base + i, band.rows - 1);
      const u32 kept = run[i].kept();
      state.seen |= kept & first_bits<kKeys>(some + r);
      if (!p.absent) state.uneven |= ~(kept & first_bits<kKeys>(every + r)) & (1u << kKeys) - 1;
      if (kLoad != RunLoad::each || key < 32 * p.live_words) kept_bits[2 * r * p.live_words] = kept;
    }
  }
  state.alive = state.seen;
}

// Adds the band's rows of an additive mask to the state of the lane's keys from `key` on.
template <int kKind, RunLoad kLoad>
__device__ __forceinline__ void add_bias_rows(const ClassifyParams& p, const MaskBand& band, const ClassifyShared& shared, int key,
                                              KeyState& state) {
  using Run = MaskRun<kKind>;
  constexpr int kKeys = Run::kKeys, kBatch = kLoad == RunLoad::aligned ? 8 : kLoad == RunLoad::shifted ? 4 : 2;  // rows loaded together
  constexpr u32 kAll = (1u << kKeys) - 1;
  const int last_seen = (p.causal ? (band.one_row ? band.last_row : band.row0) - key + 1 : kKeys), seen_by_all = band.row0 - key + 1;
  const u8* row = band.mask;
  for (int base = 0; base < band.rows; base += kBatch) {
    Run run[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {  // rows beyond the end repeat the last
      run[i].template load<kLoad>(row, key, p.stride_k, p.len_kv);
      if (base + i < band.rows - 1) row += band.row_bytes;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int r = min(base + i, band.rows - 1);
      const float least = from_ordered(shared.row_max[r]) - kNegligibleBias;
      const u32 reached = p.causal ? first_bits<kKeys>(last_seen + r) : kAll;
      u32 kept = kAll, plain = kAll;
      // Masks of models are mostly 0 and −inf, in long runs.
      if (!__any_sync(kAllLanes, !run[i].all_plain())) {
        state.lowest = fminf(state.lowest, 0.0f), state.highest = fmaxf(state.highest, 0.0f);
        state.alive |= 0.0f < least ? 0u : reached;
      } else if (!__any_sync(kAllLanes, !run[i].all_removed())) {
        kept = plain = 0;
      } else {
        kept = run[i].kept(), plain = run[i].plain();
#pragma unroll
        for (int e = 0; e < kKeys; ++e) {
          const float bias = run[i].bias(e);
          state.alive |= bias < least ? 0u : kept & reached & 1u << e;
          state.lowest = fminf(state.lowest, bias == -kInf ? kInf : bias), state.highest = fmaxf(state.highest, bias);
        }
      }
      const u32 some = kept & reached, every = p.causal ? some & first_bits<kKeys>(seen_by_all + r) : some;
      // Biased keys, or removed ones too.
      state.seen |= some, state.uneven |= p.absent ? kept & ~plain : ~(plain & every) & kAll;
      if (p.bias && key < band.key_end) {
        float4* to = reinterpret_cast<float4*>(p.bias + (i64)band.matrix * p.bias_len + key);
        const auto bias = [&](int e) { return bias_to_base2(run[i].bias(e)); };
#pragma unroll
        for (int e = 0; e < kKeys; e += 4) to[e / 4] = make_float4(bias(e), bias(e + 1), bias(e + 2), bias(e + 3));
      }
    }
  }
}

// Adds the CTA's keys to its planes, and stores which are live. A collective of the CTA.
template <int kKind>
__device__ __forceinline__ void classify_keys(const ClassifyParams& p, const MaskBand& band, ClassifyShared& shared) {
  constexpr int kKeys = MaskRun<kKind>::kKeys, kStrip = 32 * kKeys, kLanes = 32 / kKeys;  // lanes of a word
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, groups = kKind == kMaskBool ? p.row_groups : 1;
  u32* live = p.live + (i64)(blockIdx.x / p.parts) * p.live_words;
  float lowest = kInf, highest = -kInf;
  MaskBand own = band;
  const bool any = groups == 1 || own.narrow(warp % groups * (kBandRows / groups), kBandRows / groups);
  for (int strip = band.key0 + warp / groups * kStrip; any && strip < band.key_end; strip += kClassifyWarps / groups * kStrip) {
    const int key = strip + kKeys * lane;
    KeyState state;
    const auto add = [&](auto how) {
      constexpr RunLoad kLoad = (RunLoad) decltype(how)::value;
      if constexpr (kKind == kMaskBool)
        add_bool_rows<kLoad>(p, own, key, state);
      else
        add_bias_rows<kKind, kLoad>(p, own, shared, key, state);
    };
    // Of what is beyond the last key nothing is loaded.
    if (p.vectors == (i32)RunLoad::aligned && strip + kStrip <= p.len_kv)
      add(Constant<(int)RunLoad::aligned>{});
    else if (p.vectors && strip + kStrip + kKeys <= p.len_kv)
      add(Constant<(int)RunLoad::shifted>{});
    else
      add(Constant<(int)RunLoad::each>{});
    const u32 seen = __ballot_sync(kAllLanes, state.seen != 0), uneven = __ballot_sync(kAllLanes, state.uneven != 0);
    const u32 word = join_lanes<kKeys>(state.alive);
    if (lane % kLanes == 0 && key < p.len_kv) {  // 32 keys, which belong to one tile
      const int tile = key / p.tile - 8 * band.byte0;
      const u32 lanes = (1u << kLanes) - 1 << lane;
      if (seen & lanes) atomicOr(&shared.plane[0][tile / 32], 1u << tile % 32);
      if (uneven & lanes) atomicOr(&shared.plane[1][tile / 32], 1u << tile % 32);
      if (groups == 1)
        live[key / 32] = word;
      else
        atomicOr(&shared.alive[(key - band.key0) / 32], word);
    }
    lowest = fminf(lowest, state.lowest), highest = fmaxf(highest, state.highest);
  }
  if constexpr (kKind != kMaskBool) {
    atomicMin(&shared.lowest, ordered(lowest));
    atomicMax(&shared.highest, ordered(highest));
  }
  __syncthreads();  // planes, live keys and range are complete
  if (groups > 1)
    for (int i = threadIdx.x; band.key0 + 32 * i < min(band.key_end, p.len_kv); i += kClassifyThreads)
      live[band.key0 / 32 + i] = shared.alive[i];
}

template <int kKind>
__device__ __forceinline__ void classify(const ClassifyParams& p, ClassifyShared& shared) {
  const MaskBand band(p);
  const int last_tile = (p.len_kv - 1) / p.tile - 8 * band.byte0, words = (band.bytes + 3) / 4;
  for (int i = threadIdx.x; i < 2 * words; i += kClassifyThreads) {
    const int plane = i / words, w = i % words;  // a ragged last tile is mixed: its keys beyond the end are masked
    shared.plane[plane][w] = plane && w == last_tile / 32 && p.len_kv % p.tile && !p.absent ? 1u << last_tile % 32 : 0u;
  }
  for (int i = threadIdx.x; i < kClassifyMaxKeys / 32; i += kClassifyThreads) shared.alive[i] = 0;
  if (threadIdx.x < kBandRows) shared.row_max[threadIdx.x] = ordered(-kInf);
  if (threadIdx.x == 0) shared.lowest = ordered(kInf), shared.highest = ordered(-kInf);
  __syncthreads();  // planes, maxima and range are initialised
  if constexpr (kKind == kMaskBool) {
    classify_keys<kKind>(p, band, shared);
  } else {
    // The loads that follow are a few rows at a time, so the whole band is asked for first.
    if (p.vectors == (i32)RunLoad::aligned && threadIdx.x % 32 == 0)
      for (int r = threadIdx.x / 32; r < band.rows; r += kClassifyWarps)
        prefetch_l2(band.mask + r * band.row_bytes + band.key0 * (i64)MaskRun<kKind>::kBytes,
                    (min(band.key_end, p.len_kv) - band.key0) / MaskRun<kKind>::kKeys * 16);
    // Of a band of many rows the CTA has all keys, and knows by the range of their biases whether any can be negligible. If so, a second
    // turn: the planes are the same then, and fewer keys live.
    for (bool known = band.one_row;; known = true) {
      if (known) find_row_max<kKind>(p, band, shared);
      classify_keys<kKind>(p, band, shared);
      if (known || from_ordered(shared.highest) - from_ordered(shared.lowest) <= kNegligibleBias) break;
    }
  }
  u8* lists = reinterpret_cast<u8*>(p.lists + (i64)(blockIdx.x / p.parts) * 2 * p.words) + band.byte0;
  for (int i = threadIdx.x; i < 2 * band.bytes; i += kClassifyThreads)
    lists[i / band.bytes * 4 * p.words + i % band.bytes] = reinterpret_cast<const u8*>(shared.plane[i / band.bytes])[i % band.bytes];
}

__device__ void classify_band(const ClassifyParams& p) {
  __shared__ ClassifyShared shared;
  grid_launch_dependents();
  if (p.mask_kind == kMaskBool)
    classify<kMaskBool>(p, shared);
  else if (p.mask_kind == kMaskF32)
    classify<kMaskF32>(p, shared);
  else if (p.mask_kind == kMaskF16)
    classify<kMaskF16>(p, shared);
  else
    classify<kMaskBf16>(p, shared);
}

}  // namespace sage
