// What the attention kernels on Hopper share: the block's shared memory, the ring of KV tiles and who fetches them, the rows of Q, the
// scores up to their maxima, and the output. attend_wgmma.cuh says how a block works; a kernel brings the softmax and P·V.
#pragma once
#include "../block/core_matrix.cuh"
#include "../block/epilogue.cuh"
#include "../block/mask.cuh"
#include "../block/query.cuh"
#include "../block/softmax.cuh"
#include "../block/tile_list.cuh"
#include "../block/values.cuh"
#include "../ptx/copy.cuh"
#include "../ptx/special.cuh"
#include "../ptx/wgmma.cuh"
#include "params.cuh"

namespace sage {

// kQueryPlaces: with two places for Q nobody waits until the last turn's has been read.
template <class Layout_, Mask kMask_, int kStages_, int kQueryPlaces_>
struct WgmmaConfig {
  using Layout = Layout_;
  static constexpr int kHeadDim = Layout::kHeadDim, kTile = Layout::kTile, kStages = kStages_, kQueryPlaces = kQueryPlaces_;
  static constexpr Mask kMask = kMask_;
  static constexpr bool kLoneIsMasked = false;  // a single unmasked tile goes with the masked ones
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kConsumerWarps = 4 * kConsumers, kThreads = 128 * (kConsumers + 1), kBlockM = 64 * kConsumers;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // of 65536: 128 · 24 + 256 · 240
  static constexpr int kScoreRegisters = kTile / 2, kOutRegisters = Layout::kColumns / 2;
  static constexpr int kWeightRegisters = Layout::kVBytes / Layout::kColumns / 8;  // of P, in the type of V

  // Shared memory: Q in core-matrix order (64 rows after another), the tiles, their barriers, the bias of a dense mask
  static constexpr int kQueryPitch = 64 * 16, kQueryBytes = 64 * kHeadDim;
  static constexpr int kStage0 = kQueryPlaces * kConsumers * kQueryBytes;
  static constexpr int kBarriers = kStage0 + kStages * Layout::kTileBytes, kBarrierPitch = 32;
  // …, the rotation's matrix, for two turns a Turn and what the channels of its output are made of, and Q as it lies in memory
  static constexpr int kTurnBarriers = kBarriers + kStages * kBarrierPitch;
  static constexpr int kRotation = kTurnBarriers + 32, kFirstTurn = kRotation + 32 * 16;
  static constexpr int kTurnHead = 48, kTurnBytes = kTurnHead + 2 * kHeadDim * 4;
  static constexpr int kRawQueries = kFirstTurn + 2 * kTurnBytes, kRawPitch = 2 * kHeadDim + 64;  // a row's bytes; the 64 keep reads free of bank conflicts
  static constexpr int kSharedBytes = kRawQueries + kBlockM * kRawPitch;

  static __device__ __forceinline__ u32 queries(int number, int warpgroup) {
    return (number % (u32)kQueryPlaces * kConsumers + warpgroup) * kQueryBytes;
  }
  static __device__ __forceinline__ u32 turn(int number) { return kFirstTurn + number % 2u * kTurnBytes; }
  static __device__ __forceinline__ u32 channels(u32 turn) { return turn + kTurnHead; }
};

// A stage's barriers: K has landed, V has landed, K has been read by all consumer warps, V has.
enum StageBarrier : u32 { kKeysFull = 0, kValuesFull = 8, kKeysFree = 16, kValuesFree = 24 };
// What a turn needs besides has landed; its queries have been taken by all consumer warps; the fetching warps may read it.
enum TurnBarrier : u32 { kTurnFull = 0, kTurnFree = 8, kTurnFound = 16 };

// A position in the ring of stages.
template <int kStages>
struct Ring {
  u32 stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void retreat() {
    if (stage-- == 0) stage = kStages - 1, parity ^= 1;
  }
};

// The lane that speaks for its warp.
__device__ __forceinline__ bool elected() { return special_tid_x() % 32 == 0; }

// The same number, worked out from here on: what follows from it is not kept in registers over the main loop.
__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

enum TurnFlag : u32 {
  kTurnValid = 1,      // 0: nothing is left to do
  kWritesPartial = 2,  // the turn begins within an item: it leaves what it found to the block that has the tiles before
  kJoinsPartial = 4,   // it ends within one: it takes up what that block found
};

// What a block does in one turn: tiles of one item, which is a block of queries of one head, from row0 on. One of the fetching warps works
// it out and leaves it in shared memory, where all others read what they need when they do, so that none of it occupies registers
// in between:
//    0  masked, unmasked: how many tiles hold a masked or biased pair, which come first, and how many do not
//    8  flags
//   12  max_scale: the largest score scale of a query, so that no score leaves the range in which the softmax works
//   16  pair, batch, head, row0
//   32  out: how many elements into the output the head begins, 64 bits
//   40  first: the place of its first tile in the order of the item's tiles
//   44  partial: the place of the partial result that it writes or joins
namespace turn {
constexpr u32 kMaxScale = 12, kPair = 16, kOut = 32, kFirst = 40, kPartial = 44;
}

// The turn's tiles, for a warp. The shuffles tell the compiler that all lanes have the same.
struct Span {
  int masked, unmasked;
  u32 flags;

  __device__ __forceinline__ explicit Span(u32 own) {
    const uint4 v = load_shared16(own);
    masked = __shfl_sync(kAllLanes, v.x, 0), unmasked = __shfl_sync(kAllLanes, v.y, 0), flags = __shfl_sync(kAllLanes, v.z, 0);
  }
};

// Deals out turns. First come p.rounds whole items for each block, gridDim.x apart, or, where the items are not alike, whole items for
// whoever asks first. If p.partials, what is left over is cut into one share for each block: at least as many parts as an item has, so
// that no more than two blocks work on one. Where an item is cut follows from its own tiles, and not from who works on it.
template <class C>
struct Scheduler {
  static constexpr bool kDynamic = C::kMask != Mask::none;
  int number = 0;       // of requests so far
  int at = 0, end = 0;  // of the share under way, in parts of an item, of which each has gridDim.x
  int share = 0;

  // Leaves the next turn at `to`, but for its max_scale. Returns false where nothing is left to do. All lanes of the warp take part.
  __device__ __forceinline__ bool next(const AttendParams& p, u32 to_shared) {
    const int blocks = gridDim.x;
    int item, from = 0, to = blocks;
    u32 flags = kTurnValid;
    if (at == end) {
      item = blockIdx.x + number * blocks;
      if (kDynamic && p.next_item && number) {
        wait_for_previous_launch();  // which sets the counter to 0
        if (elected()) item = blocks + atomicAdd(p.next_item, 1);
        item = __shfl_sync(kAllLanes, item, 0);
      }
      ++number;
      const int items = p.blocks_q * p.pairs * p.ratio, whole = p.rounds * blocks;
      if (item >= whole) {
        // From the last one on: who waits for another block's part waits for one that asked earlier, even where few blocks are resident.
        share = blocks - 1 - (item - whole);
        if (p.partials && share >= 0)
          at = (items - whole) * share, end = at + items - whole;
        else
          flags = 0;
      } else if (item >= items) {
        flags = 0;
      }
    }
    if (!flags) {
      if (elected()) store_shared16(to_shared, {0u, 0u, 0u, 0u});
      return false;
    }
    if (at != end) {
      const int own = at / blocks;
      from = at - own * blocks, to = min(end - own * blocks, blocks), item = p.rounds * blocks + own, at += to - from;
      flags |= (from > 0 ? kWritesPartial : 0u) | (to < blocks ? kJoinsPartial : 0u);
    }
    // Consecutive blocks share a head, so that its K and V stay in L2. Causal: the longest rows first.
    int row0, batch, head;
    {
      const auto [head_in_group, rows] = divide(item, p.blocks_q, p.per_blocks_q);
      const auto [pair, head_of_pair] = divide(head_in_group, p.ratio, p.per_ratio);
      const auto [batch_, head_kv] = divide(p.first + pair, p.heads_kv, p.per_heads_kv);
      row0 = (C::kMask == Mask::none ? rows : p.blocks_q - 1 - rows) * C::kBlockM;
      batch = batch_, head = head_kv * p.ratio + head_of_pair;
      const i64 out = batch * p.out_stride_b + head * p.out_stride_h;
      if (elected()) {
        store_shared16(to_shared + 16, {(u32)pair, (u32)batch, (u32)head, (u32)row0});
        store_shared8(to_shared + 32, (u32)out, (u32)(out >> 32));
      }
    }
    int tiles, masked;  // of the item
    if constexpr (C::kMask == Mask::list) {
      const int2 count = TileList(p.lists, batch, head, row0, C::kBlockM, p.len_q).count();
      tiles = count.x + count.y, masked = count.x;
    } else {
      int full = p.len_kv / C::kTile;
      tiles = p.tiles;
      if (C::kMask == Mask::causal) tiles = min(tiles, (row0 + C::kBlockM - 1) / C::kTile + 1), full = min(full, (row0 + 1) / C::kTile);
      masked = tiles - full;
    }
    const int begin = tiles * from / blocks, count = tiles * to / blocks - begin;
    masked = min(max(masked - begin, 0), count);
    if (C::kLoneIsMasked && count - masked == 1) masked = count;
    if (elected()) {  // where all tiles are there in order, the last one comes first
      store_shared16(to_shared, {(u32)masked, (u32)(count - masked), flags, 0u});
      store_shared8(to_shared + 40, (u32)(C::kMask == Mask::list ? begin : tiles - 1 - begin), (u32)(to < blocks ? share + 1 : share));
    }
    return true;
  }
};

// And which rows of which head the lane has.
template <class C>
struct Rows {
  int t, g, warp, pair, batch, head, row0;  // row0: of the warp's sixteen

  __device__ __forceinline__ explicit Rows(u32 own) {
    const int thread = special_tid_x() - 128;
    const uint4 v = load_shared16(own + turn::kPair);
    t = thread % 4, g = thread % 32 / 4, warp = thread / 32;
    pair = v.x, batch = v.y, head = v.z, row0 = (int)v.w + 16 * warp;
  }

  __device__ __forceinline__ int row(int half) const { return row0 + 8 * half + g; }
  __device__ __forceinline__ float* lse(const AttendParams& p, int row) const {
    return p.lse + ((i64)batch * p.heads_kv * p.ratio + head) * p.len_q + row;
  }
};

// The producer, one warp: K and V of every tile of every turn, in the order of the walk.
template <class C>
__device__ __forceinline__ void fetch_tiles(const AttendParams& p, u32 shared) {
  using Layout = typename C::Layout;
  wait_for_previous_launch();
  Ring<C::kStages> ring{0, 1};  // every stage is free at first: a wait for the phase before the first returns at once
  for (int number = 0;; ++number) {
    mbarrier_wait(shared + C::kTurnBarriers + kTurnFound, number & 1);
    const u32 at = shared + C::turn(number);
    const Span span(at);
    if (!(span.flags & kTurnValid)) break;
    const auto fetch = [&](const u8* tile) {
      const u32 stage = shared + C::kStage0 + ring.stage * Layout::kTileBytes;
      const u32 barrier = shared + C::kBarriers + ring.stage * C::kBarrierPitch;
      mbarrier_wait(barrier + kKeysFree, ring.parity);
      copy_bulk(elected(), stage, tile, Layout::kKBytes, barrier + kKeysFull);
      mbarrier_wait(barrier + kValuesFree, ring.parity);
      copy_bulk(elected(), stage + Layout::kV, tile + Layout::kV, Layout::kVBytes, barrier + kValuesFull);
      ring.advance();
    };
    int left = span.masked + span.unmasked;
    const int first = (int)load_shared(at + turn::kFirst);
    const u8* tiles = p.kv + (i64)load_shared(at + turn::kPair) * p.tiles * Layout::kTileBytes;
    if constexpr (C::kMask == Mask::list) {
      const auto load = [&](int w) {
        const uint4 v = load_shared16(at + turn::kPair);
        return TileList(p.lists, v.y, v.z, v.w, C::kBlockM, p.len_q).word(w);
      };
      ListCursor cursor;
      cursor.skip(first, p.lists.words, load);
      for (; left; --left) fetch(tiles + (i64)cursor.next(p.lists.words, load) * Layout::kTileBytes);
    } else {
      for (const u8* tile = tiles + (i64)first * Layout::kTileBytes; left; --left, tile -= Layout::kTileBytes) fetch(tile);
    }
  }
}

// Whether Q's rows can be fetched ahead: 16-bit, aligned, a multiple of 16 bytes.
template <class C>
__device__ __forceinline__ bool stages_queries(const AttendParams& p) {
  return p.dtype != kFloat32 && p.q_vectors;
}

// Two warps beside the producer fetch what a turn needs, so that no consumer waits for memory between two walks. One: Q as it is.
template <class C>
__device__ __forceinline__ void fetch_queries(const AttendParams& p, u32 shared) {
  constexpr int kPieces = C::kHeadDim / kChunk, kRows = 32 / kPieces;  // 16-byte pieces of a row; rows at a time
  const u32 barrier = shared + C::kTurnBarriers, lane = special_tid_x() % 32;
  for (int number = 0;; ++number) {
    mbarrier_wait(barrier + kTurnFound, number & 1);  // and the queries of the turn before have been taken
    const u32 own = shared + C::turn(number);
    const bool valid = Span(own).flags & kTurnValid;
    if (valid && stages_queries<C>(p)) {
      const uint4 at = load_shared16(own + turn::kPair);
      const int channel = lane % kPieces * kChunk, row = lane / kPieces, batch = at.y, head = at.z, row0 = at.w;
      const u8* from = static_cast<const u8*>(p.q.data) +
                       (batch * p.q.stride_b + head * p.q.stride_h + (row0 + row) * p.q.stride_n + channel) * 2;
      const u32 to = shared + C::kRawQueries + row * C::kRawPitch + 2 * channel;
      // Nothing is fetched for rows beyond the end: whatever is there in their place does not get beyond them.
      const int rows = channel < p.head_dim ? min(C::kBlockM, p.len_q - row0) - row : 0;
#pragma unroll 4
      for (int i = 0; i < rows; i += kRows, from += 2 * kRows * p.q.stride_n) copy16_async(to + i * C::kRawPitch, from);
    }
    mbarrier_arrive_copied(barrier + kTurnFull);
    if (!valid) break;
  }
}

// The other: the turn itself, and of each channel what O is multiplied with and what is added to it.
template <class C>
__device__ __forceinline__ void fetch_channels(const AttendParams& p, u32 shared) {
  const u32 barrier = shared + C::kTurnBarriers;
  Scheduler<C> scheduler;
  for (int number = 0;; ++number) {
    mbarrier_wait(barrier + kTurnFree, (number & 1) ^ 1);  // the turn before the last is over
    const u32 to = shared + C::turn(number), channels = C::channels(to);
    const bool valid = scheduler.next(p, to);
    mbarrier_arrive(elected(), barrier + kTurnFound);
    wait_for_previous_launch();
    if (valid) {
      __syncwarp();  // the turn is there
      const int pair = (int)load_shared(to + turn::kPair);
#pragma unroll 1
      for (int c = special_tid_x() % 32; c < C::kHeadDim; c += 32) {
        const float scale = p.v_amax[pair * C::kHeadDim + c];
        store_shared_float(channels + 4 * c, scale);
        if constexpr (C::Layout::kValueBytes == 1) {
          const float mean = p.v_mean[pair * C::kHeadDim + c];
          const i32 codes = p.v_codes[pair * C::kHeadDim + c];
          store_shared_float(channels + 4 * (C::kHeadDim + c),
                             mean_beside_codes<Values::fp8>(mean, scale, codes, p.inv_v_max, p.live_keys[pair]));
        }
      }
      // A largest K scale of 0 (all keys alike) must not make the bound infinite; the scores are 0 then whatever it is.
      if (elected()) store_shared_float(to + turn::kMaxScale, p.score_limit / fmaxf(__int_as_float(p.k_scale_max[pair]), 7.5e-37f));
    }
    __syncwarp();
    mbarrier_arrive(elected(), barrier + kTurnFull);
    if (!valid) break;
  }
}

// The lane's two rows of what was fetched, as load_raw would load them.
template <class C, int kDtype>
__device__ __forceinline__ void take_raw(u32 shared, const Rows<C>& at, int head_dim, Raw8<kDtype> (&raw)[2][C::kHeadDim / 32]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int c = 0; c < C::kHeadDim / 32; ++c) {
      const u32 from = shared + C::kRawQueries + (16 * at.warp + 8 * half + at.g) * C::kRawPitch + 64 * c + 16 * at.t;
      const uint4 v = 32 * c + kChunk * at.t < head_dim ? load_shared16(from) : uint4{};
      raw[half][c].word[0] = v.x, raw[half][c].word[1] = v.y, raw[half][c].word[2] = v.z, raw[half][c].word[3] = v.w;
    }
}

// Rotates and quantises the warp's rows into shared memory; scale: of the lane's two rows.
template <class C>
__device__ __forceinline__ void load_queries(const AttendParams& p, u32 shared, int number, float (&scale)[2]) {
  constexpr int kHeadDim = C::kHeadDim;
  const Rows<C> at(shared + C::turn(number));
  with_dtype(p.dtype, [&](auto type) {
    constexpr int kDtype = decltype(type)::value;
    const u8* head = static_cast<const u8*>(p.q.data) + (at.batch * p.q.stride_b + at.head * p.q.stride_h) * kElementBytes<kDtype>;
    Raw8<kDtype> raw[2][kHeadDim / 32];
    if (kDtype != kFloat32 && stages_queries<C>(p))
      take_raw<C>(shared, at, p.head_dim, raw);
    else if (p.q_vectors)
      load_raw<kHeadDim, 2, kDtype, true>(head, p.q.stride_n, at.row(0), p.len_q, at.t, p.head_dim, raw);
    else
      load_raw<kHeadDim, 2, kDtype, false>(head, p.q.stride_n, at.row(0), p.len_q, at.t, p.head_dim, raw);
    __syncwarp();
    mbarrier_arrive(elected(), shared + C::kTurnBarriers + kTurnFree);
    const u32 row0 = shared + C::queries(number, at.warp / 4) + 16 * (at.warp % 4) * 16;
    const auto wait = [&] {  // the Q before in this place is not read any more; of two, the barrier of the last turn has seen to that
      if (C::kQueryPlaces == 1) named_barrier<128>(1 + at.warp / 4);
    };
    if constexpr (kDtype == kFloat32) {
      u32 a[kHeadDim / 32][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[kHeadDim / 4];
        unpack_row<kHeadDim>(raw[half], x);
        scale[half] = quantise_row<kHeadDim>(x, at.t, p.score_scale, p.sign, a, half);
      }
      wait();
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int c2 = 0; c2 < kHeadDim / 64; ++c2)
          store_shared16(row0 + (4 * c2 + at.t) * C::kQueryPitch + (8 * half + at.g) * 16,
                         {a[2 * c2][half], a[2 * c2][half + 2], a[2 * c2 + 1][half], a[2 * c2 + 1][half + 2]});
    } else {
      const int lane = 4 * at.g + at.t;
      const Rotation<kHeadDim, kDtype> rotation(load_shared16(shared + C::kRotation + 16 * lane));
      u32 codes[2][2][kHeadDim / 32];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        scale[half] = quantise_eight(raw[half], rotation, lane, p.score_scale, p.sign, codes[half]);
      wait();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& own = codes[i / 2][i % 2];
        const u32 to = row0 + (8 * (i / 2) + 2 * at.t + i % 2) * 16;
        if constexpr (kHeadDim == 64)
          store_shared8(to + at.g % 4 * C::kQueryPitch + at.g / 4 * 8, own[0], own[1]);
        else
          store_shared16(to + at.g * C::kQueryPitch, own);
      }
    }
  });
  fence_async_proxy();
  const float max_scale = load_shared_float(shared + C::turn(number) + turn::kMaxScale);
  named_barrier<128>(1 + at.warp / 4);  // the warpgroup's Q is complete in shared memory
#pragma unroll
  for (int half = 0; half < 2; ++half) scale[half] = fminf(scale[half], max_scale);
}

// The rows' LSE, with what the shift of K took out of it. Seldom wanted: Q is read again, by code as small as may be.
template <class C>
__device__ __forceinline__ void store_lse(const AttendParams& p, const Rows<C>& at, const float (&sums)[2], const float (&reference)[2]) {
  wait_for_previous_launch();
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int row = min(at.row(half), p.len_q - 1);
    const i64 offset = at.batch * p.q.stride_b + at.head * p.q.stride_h + row * p.q.stride_n;
    float shift;
    with_dtype(p.dtype, [&](auto type) {
      constexpr int kDtype = decltype(type)::value;
      const u8* q = static_cast<const u8*>(p.q.data) + offset * kElementBytes<kDtype>;
      shift = anchor_score<kDtype>(q, p.head_dim, p.anchor + at.pair * C::kHeadDim, at.t, p.sm_scale);
    });
    const float sum = half ? sums[1] : sums[0], base = half ? reference[1] : reference[0];  // not by an index: they are registers
    if (at.t == 0 && at.row(half) < p.len_q) *at.lse(p, row) = sum > 0.0f ? shift + (base + log2_approx(sum)) * kLn2 : -kInf;
  }
}

// O / sum, times V's channel scales, in the output's dtype; LSE. Of o, the first kHeadDim / 2 registers.
template <class C>
__device__ __forceinline__ void store_output(const AttendParams& p, const float (&o)[C::kOutRegisters], const float (&sums)[2],
                                             const float (&reference)[2], u32 own) {
  constexpr int kHeadDim = C::kHeadDim;
  const int t = special_tid_x() % 4;
  // First of all what the channels are multiplied with and what is added to them: it takes a while to come.
  float scale[kHeadDim / 32][kChunk], mean[kHeadDim / 32][kChunk] = {};
  const auto take = [&](u32 from, float (&x)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; i += 4) {
      const uint4 v = load_shared16(from + 4 * i);
      x[i] = __uint_as_float(v.x), x[i + 1] = __uint_as_float(v.y), x[i + 2] = __uint_as_float(v.z), x[i + 3] = __uint_as_float(v.w);
    }
  };
#pragma unroll
  for (int c = 0; c < kHeadDim / 32; ++c) {
    const u32 channels = C::channels(own) + 4 * (32 * c + kChunk * t);
    take(channels, scale[c]);
    if constexpr (C::Layout::kValueBytes == 1) take(channels + 4 * kHeadDim, mean[c]);
  }
  const Rows<C> at(own);
  const uint2 out = load_shared8(own + turn::kOut);
  const i64 head = (i64)((u64)out.y << 32 | out.x);
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    inverse[half] = sums[half] > 0.0f ? p.inv_v_max * reciprocal_approx(sums[half]) : 0.0f;  // 0: all keys masked out, by a dense mask
  with_access(p.dtype, p.out_vectors, [&](auto type, auto vectors) {
    constexpr int kDtype = decltype(type)::value;
    u8* row[2];
    int width[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = static_cast<u8*>(p.out) + (head + at.row(half) * p.out_stride_n) * kElementBytes<kDtype>;
      width[half] = at.row(half) < p.len_q ? p.head_dim : 0;
    }
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float y[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e)
          y[e] = fmaf(o[16 * c + e / 2 * 4 + 2 * half + e % 2] * inverse[half], scale[c][e],
                      C::kMask == Mask::list && !(inverse[half] > 0.0f) ? 0.0f : mean[c][e]);
        store8<kDtype, decltype(vectors)::value>(row[half], 32 * c + kChunk * t, width[half], y);
      }
    }
  });
  if (p.lse) store_lse<C>(p, at, sums, reference);
}

// What two blocks that share an item have found about their tiles, joined: O, its sums and what they are relative to. The block that
// begins with such an item's later tiles writes them down, the one before it, which has its earlier tiles at the end, takes them up.
// Every thread finds the other's registers that are its own.
template <class C>
struct Partial {
  static constexpr int kCount = C::kHeadDim / 2, kFours = kCount / 4 + 1, kThreads = 128 * C::kConsumers;

  float4* to;
  i32* done;
  int warpgroup;

  __device__ __forceinline__ Partial(const AttendParams& p, int block) {
    const int thread = special_tid_x() - 128;
    warpgroup = thread / 128;
    to = reinterpret_cast<float4*>(p.partials) + (i64)block * kFours * kThreads + thread;
    done = p.partials_done + block * C::kConsumers + warpgroup;
  }

  __device__ __forceinline__ void write(const float (&o)[C::kOutRegisters], const float (&sums)[2], const float (&reference)[2]) const {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) __stcg(to + i * kThreads, make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]));
    __stcg(to + kCount / 4 * kThreads, make_float4(sums[0], sums[1], reference[0], reference[1]));
    __threadfence();
    named_barrier<128>(1 + warpgroup);  // all have written
    if (special_tid_x() % 128 == 0) store_release(done, 1);
  }

  // And leaves `done` as it was before the launch.
  __device__ __forceinline__ void join(float (&o)[C::kOutRegisters], float (&sums)[2], float (&reference)[2]) const {
    while (!load_acquire(done)) {
    }
    named_barrier<128>(1 + warpgroup);  // all have seen it
    if (special_tid_x() % 128 == 0) store_release(done, 0);
    const float4 rest = __ldcg(to + kCount / 4 * kThreads);
    const float other_sum[2] = {rest.x, rest.y}, other_reference[2] = {rest.z, rest.w};
    float own[2], other[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = fmaxf(reference[half], other_reference[half]), base = most == -kInf ? 0.0f : most;
      own[half] = exp2_approx(reference[half] - base), other[half] = exp2_approx(other_reference[half] - base);
      sums[half] = fmaf(other[half], other_sum[half], own[half] * sums[half]);
      reference[half] = most;
    }
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const float4 x = __ldcg(to + i * kThreads);
      o[4 * i] = fmaf(other[0], x.x, own[0] * o[4 * i]), o[4 * i + 1] = fmaf(other[0], x.y, own[0] * o[4 * i + 1]);
      o[4 * i + 2] = fmaf(other[1], x.z, own[1] * o[4 * i + 2]), o[4 * i + 3] = fmaf(other[1], x.w, own[1] * o[4 * i + 3]);
    }
  }
};

// What lives in registers during the walk of one consumer warpgroup over the KV tiles, but for scores, weights and O.
template <class C>
struct ScoreWalk {
  using Layout = typename C::Layout;
  static constexpr int kHeadDim = C::kHeadDim, kColumns8 = C::kScoreRegisters / 4;  // groups of eight keys in one step of the softmax
  using Scores = i32[C::kScoreRegisters];
  using Weights = u32[C::kWeightRegisters];

  const AttendParams& p;
  u32 shared, queries;  // the warpgroup's
  float q_scale[2];
  uint2 k_scales;  // of the current tile
  int tile_number;  // of a masked tile
  Ring<C::kStages> ring;
  float reference[2];  // P = 2^(score − reference); log2(p_max) below the maximum that the row was last scaled to
  bool causal;
  int number;  // of the turn

  // The largest of the lane's scores in one of kParts parts of the keys and one row half.
  template <int kParts>
  static __device__ __forceinline__ i32 largest(const Scores& s, int part, int half) {
    constexpr int kCount = kColumns8 / kParts;
    const int i0 = 4 * part * kCount + 2 * half;
    i32 a = max(s[i0], s[i0 + 1]), b = max(s[i0 + 4], s[i0 + 5]);
#pragma unroll
    for (int j = 2; j < kCount; ++j) {
      const int i = 4 * (part * kCount + j) + 2 * half;
      if (j % 2)
        b = __vimax3_s32(b, s[i], s[i + 1]);
      else
        a = __vimax3_s32(a, s[i], s[i + 1]);
    }
    return max(a, b);
  }

  // K scales of the tile in `stage`, ahead of their use.
  __device__ __forceinline__ void fetch_scales(u32 stage) {
    const uint4 v = load_shared16(tile(stage) + Layout::kScales + Layout::kScalesPitch * (special_tid_x() % 4u));
    k_scales = {v.x, v.y}, tile_number = v.w;
  }

  __device__ __forceinline__ u32 barrier(u32 stage) const { return shared + C::kBarriers + stage * C::kBarrierPitch; }
  __device__ __forceinline__ u32 tile(u32 stage) const { return shared + C::kStage0 + stage * Layout::kTileBytes; }

  using Keys = KeyBits<8 * kColumns8>;

  // Which keys from key0 on the lane's rows see, but for what a bias removes.
  __device__ __forceinline__ Keys visible(int key0) const {
    const Rows<C> at(shared + C::turn(number));
    Keys keys;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.row(half);
      keys.below(half, (causal ? min(row + 1, p.len_kv) : p.len_kv) - key0);
      if (C::kMask == Mask::list && p.kept && key0 < p.len_kv)
        keys.keep(half, p.kept + at.batch * p.kept_stride_b + at.head * p.kept_stride_h + min(row, p.len_q - 1) * p.kept_stride_q + key0 / 32);
    }
    keys.align(at.t);
    return keys;
  }

  // The scores themselves of the keys from key0 on, −inf where masked out, in place; top: the lane's largest of each half. kScales:
  // how many K scales follow one another along the keys.
  template <int kScales>
  __device__ __forceinline__ void mask_scores(Scores& s, const float (&scale)[kScales][2], const Keys& keys, int key0, float (&top)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2 * kColumns8; ++i) {
        i32& bits = s[i / 2 * 4 + 2 * half + i % 2];
        bits = __float_as_int((float)bits * scale[i / 2 * kScales / kColumns8][half]);
      }
    if (C::kMask == Mask::list && p.mask_kind != kMaskBool) {
      const Rows<C> at(shared + C::turn(number));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const i64 offset = at.batch * p.mask_stride_b + at.head * p.mask_stride_h + min(at.row(half), p.len_q - 1) * p.mask_stride_q;
        const BiasRow row{static_cast<const u8*>(p.mask) + offset * mask_element_bytes(p.mask_kind), p.mask_stride_k, p.mask_kind, p.len_kv,
                          p.mask_pairs};
        row.template each<kColumns8>(key0 + 2 * at.t, [&](int j, float x, float y) {
          i32* pair = s + 4 * j + 2 * half;
          pair[0] = __float_as_int(__int_as_float(pair[0]) + x), pair[1] = __float_as_int(__int_as_float(pair[1]) + y);
        });
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = -kInf;
#pragma unroll
      for (int i = 0; i < 2 * kColumns8; ++i) {
        i32& bits = s[i / 2 * 4 + 2 * half + i % 2];
        bits = keys.sees(half, i / 2, i % 2) ? bits : __float_as_int(-kInf);
        top[half] = fmaxf(top[half], __int_as_float(bits));
      }
    }
  }
};

// A block: one piece of work after another, the tiles of the next already on their way while the last is stored. Walk<C> is a
// ScoreWalk<C> with O in `o` and `all(span, sums)`, which goes over a turn's tiles.
// kSharedBytes: the dynamic shared memory that the launch has (sageattention/variants.py).
template <class C, template <class> class Walk, int kSharedBytes>
__device__ __forceinline__ void attend_block(const AttendParams& p) {
  static_assert(kSharedBytes == C::kSharedBytes, "the table of variants and the kernel disagree about shared memory");
  static_assert(C::kBarriers % 8 == 0 && C::kStage0 % 128 == 0 && C::Layout::kTileBytes % 128 == 0, "operands lie on 128 bytes");
  extern __shared__ __align__(128) u8 bytes[];
  const u32 shared = shared_address(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      const u32 barrier = shared + C::kBarriers + i * C::kBarrierPitch;
      mbarrier_init(barrier + kKeysFull, 1), mbarrier_init(barrier + kValuesFull, 1);
      mbarrier_init(barrier + kKeysFree, C::kConsumerWarps), mbarrier_init(barrier + kValuesFree, C::kConsumerWarps);
    }
    mbarrier_init(shared + C::kTurnBarriers + kTurnFull, 32 + 1);  // the lanes that copy Q, and the channels' warp
    mbarrier_init(shared + C::kTurnBarriers + kTurnFree, C::kConsumerWarps);
    mbarrier_init(shared + C::kTurnBarriers + kTurnFound, 1);
    fence_async_proxy();
  }
  if (threadIdx.x / 32 == 1) {  // meanwhile: for every prologue of every consumer
    with_dtype(p.dtype, [&](auto type) {
      if constexpr (decltype(type)::value != kFloat32) {
        const int lane = threadIdx.x % 32;
        store_shared16(shared + C::kRotation + 16 * lane, Rotation<C::kHeadDim, decltype(type)::value>(lane).matrix);
      }
    });
  }
  __syncthreads();  // the barriers are initialised, the matrix is there
  if (threadIdx.x < 128) {
    registers_shrink<C::kProducerRegisters>();
    if (threadIdx.x < 32)
      fetch_tiles<C>(p, shared);
    else if (threadIdx.x < 64)
      fetch_queries<C>(p, shared);
    else if (threadIdx.x < 96)
      fetch_channels<C>(p, shared);
  } else {
    registers_grow<C::kConsumerRegisters>();
    // The shuffle tells the compiler that all lanes have the same: descriptors are made in uniform registers.
    const u32 queries = __shfl_sync(kAllLanes, shared + C::queries(0, special_tid_x() / 128 - 1), 0);
    Walk<C> walk{p, shared, queries};
    walk.causal = C::kMask == Mask::causal || (C::kMask == Mask::list && p.causal);
    for (walk.number = 0;; ++walk.number) {
      mbarrier_wait(shared + C::kTurnBarriers + kTurnFull, walk.number & 1);
      const Span span(shared + C::turn(walk.number));
      if (!(span.flags & kTurnValid)) break;
      if constexpr (C::kQueryPlaces > 1) walk.queries = queries + C::queries(walk.number, 0);
      load_queries<C>(p, shared, walk.number, walk.q_scale);
      walk.reference[0] = walk.reference[1] = -kInf;
      float sums[2];
      walk.all(span, sums);
      const u32 to = shared + C::turn(walk.number);
      if (p.partials) {
        const u32 flags = Span(to).flags;
        if (flags & kWritesPartial) {
          Partial<C>(p, (int)load_shared(to + turn::kPartial)).write(walk.o, sums, walk.reference);
          continue;
        }
        if (flags & kJoinsPartial) Partial<C>(p, (int)load_shared(to + turn::kPartial)).join(walk.o, sums, walk.reference);
      }
      store_output<C>(p, walk.o, sums, walk.reference, to);
    }
  }
}

}  // namespace sage
