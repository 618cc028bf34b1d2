// The attention kernel on Hopper but for its main loop: shared memory, work tiles, producer warps, quantisation of Q, masks, output, split-KV
// merge. mainloop_sm90_fp16.cuh describes a CTA; the two main loops bring the softmax and P·V.
#pragma once
#include "../layout/core_matrix.cuh"
#include "../block/mask.cuh"
#include "../block/query.cuh"
#include "../block/softmax.cuh"
#include "../block/tile_list.cuh"
#include "../common/pv_type.cuh"
#include "../ptx/async_copy.cuh"
#include "../ptx/grid.cuh"
#include "../ptx/shared.cuh"
#include "../ptx/special.cuh"
#include "../ptx/wgmma.cuh"
#include "params.cuh"

namespace sage {

// One kernel: a row of sageattention/kernels/wgmma.py.
struct WgmmaTile {
  Mask mask;
  int stages, q_stages;  // of KV tiles; of Q: with two, no consumer waits until the last work tile's Q has been read
};

template <class Layout_, WgmmaTile kWgmmaTile>
struct WgmmaConfig {
  using Layout = Layout_;
  static constexpr int kHeadDim = Layout::kHeadDim, kTile = Layout::kTile, kStages = kWgmmaTile.stages, kQStages = kWgmmaTile.q_stages;
  static constexpr Mask kMask = kWgmmaTile.mask;
  static constexpr int kUnmaskedLeast = 1, kUnmaskedMultiple = 1;  // tiles of unmasked_tiles(): at least, and a multiple of; the rest is done as masked
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kConsumerWarps = 4 * kConsumers, kThreads = 128 * (kConsumers + 1), kBlockM = 64 * kConsumers;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // of 65536: 128 · 24 + 256 · 240
  static constexpr int kScoreRegisters = kTile / 2, kOutRegisters = Layout::kVColumns / 2;
  static constexpr int kProbRegisters = Layout::kVBytes / Layout::kVColumns / 8;  // of P, in the type of V

  // Shared memory, byte offsets: Q in core-matrix order, 64 rows after another; KV stages; their barriers;
  static constexpr int kQPitch = 64 * 16, kQBytes = 64 * kHeadDim;
  static constexpr int kStage0 = kQStages * kConsumers * kQBytes;
  static constexpr int kBarriers = kStage0 + kStages * Layout::kTileBytes, kBarrierPitch = 32;
  // the barriers of work tiles; the rotation's matrix; two slots of {work tile, V's scale and mean per channel}; Q as in memory.
  static constexpr int kWorkBarriers = kBarriers + kStages * kBarrierPitch;
  static constexpr int kRotation = kWorkBarriers + 32, kWorkSlot0 = kRotation + 32 * 16;
  static constexpr int kWorkTileBytes = 48, kWorkSlotBytes = kWorkTileBytes + 2 * kHeadDim * 4;
  static constexpr int kRawQ = kWorkSlot0 + 2 * kWorkSlotBytes, kRawQPitch = 2 * kHeadDim + 64;  // bytes of a row; + 64 avoids bank conflicts
  static constexpr int kSharedBytes = kRawQ + kBlockM * kRawQPitch;

  static __device__ __forceinline__ u32 q_offset(int iteration, int warpgroup) {
    return (iteration % (u32)kQStages * kConsumers + warpgroup) * kQBytes;
  }
  static __device__ __forceinline__ u32 work_slot(int iteration) { return kWorkSlot0 + iteration % 2u * kWorkSlotBytes; }
  static __device__ __forceinline__ u32 channel_scales(u32 work) { return work + kWorkTileBytes; }
};

// A stage's barriers: K is loaded, V is loaded, all consumer warps have read K, have read V.
enum StageBarrier : u32 { kKFull = 0, kVFull = 8, kKEmpty = 16, kVEmpty = 24 };
// A work slot's barriers: its channels and Q are loaded; all consumer warps have read its Q; the producer warps may read its work tile.
enum WorkBarrier : u32 { kWorkFull = 0, kWorkEmpty = 8, kWorkPublished = 16 };

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

// The lane that acts for its warp: lane 0.
__device__ __forceinline__ bool elected() { return special_tid_x() % 32 == 0; }

// x, opaque to the compiler: it recomputes what depends on x instead of keeping it in registers across the main loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

enum WorkFlag : u32 {
  kWorkValid = 1,      // 0: no work is left
  kWritesPartial = 2,  // the CTA has the later KV tiles of a split work tile: it stores its partial result
  kJoinsPartial = 4,   // the CTA has the earlier ones: it merges that result and stores the output
};

// A work tile: kBlockM queries of one head, and which of their KV tiles this CTA has. Producer warp 2 computes it and publishes it in shared
// memory, so that the other warps keep none of it in registers:
//    0  masked, unmasked: KV tiles that hold a masked or biased pair, which come first, and KV tiles that do not
//    8  flags
//   12  max_scale: upper bound of a query's score scale, so that no score leaves the softmax's range
//   16  bh, batch, head, row0
//   32  out: the head's offset in the output, in elements, 64 bits
//   40  first: position of the first KV tile in the work tile's list (Mask::list) or its number
//   44  partial: number of the partial result that it writes or joins
namespace work {
constexpr u32 kMaxScale = 12, kBh = 16, kRow0 = 28, kOut = 32, kFirst = 40, kPartial = 44;
}

// Numbers of a work tile's KV tiles, and its flags. The shuffles tell the compiler that the values are warp-uniform.
struct KvRange {
  int masked, unmasked;
  u32 flags;

  __device__ __forceinline__ explicit KvRange(u32 own) {
    const uint4 v = load_shared16(own);
    masked = __shfl_sync(kAllLanes, v.x, 0), unmasked = __shfl_sync(kAllLanes, v.y, 0), flags = __shfl_sync(kAllLanes, v.z, 0);
  }
};

// The tile scheduler. First p.full_waves whole work tiles for each CTA: gridDim.x apart, or, where they differ in length, in the order of
// requests. With p.split_kv_workspace the remaining ones are then cut into one share for each CTA. A share is at least as long as a work
// tile, so no more than two CTAs have parts of one. Where a work tile is cut depends on its own KV tiles only, so results are reproducible.
template <class C>
struct Scheduler {
  static constexpr bool kDynamic = C::kMask != Mask::none;
  int iteration = 0;    // requests so far
  int at = 0, end = 0;  // rest of the current share, in 1/gridDim.x of a work tile
  int share = 0;

  // Stores the next work tile, without max_scale, at `to_shared`. Returns false if no work is left. A collective of the warp.
  __device__ __forceinline__ bool next(const AttendParams& p, u32 to_shared) {
    const int blocks = gridDim.x;
    int work_idx, from = 0, to = blocks;
    u32 flags = kWorkValid;
    if (at == end) {
      work_idx = blockIdx.x + iteration * blocks;
      if (kDynamic && p.next_work_idx && iteration) {
        grid_dependency_wait();  // which sets the counter to 0
        if (elected()) work_idx = blocks + atomicAdd(p.next_work_idx, 1);
        work_idx = __shfl_sync(kAllLanes, work_idx, 0);
      }
      ++iteration;
      const int work_count = p.q_tiles * p.bh_count * p.heads_per_kv, whole = p.full_waves * blocks;
      if (work_idx >= whole) {
        // Shares are taken from the last to the first: a CTA that waits for a partial result waits for one whose share was taken earlier,
        // so that there is no deadlock even if few CTAs are resident.
        share = blocks - 1 - (work_idx - whole);
        if (p.split_kv_workspace && share >= 0)
          at = (work_count - whole) * share, end = at + work_count - whole;
        else
          flags = 0;
      } else if (work_idx >= work_count) {
        flags = 0;
      }
    }
    if (!flags) {
      if (elected()) store_shared16(to_shared, {0u, 0u, 0u, 0u});
      return false;
    }
    if (at != end) {
      const int own = at / blocks;
      from = at - own * blocks, to = min(end - own * blocks, blocks), work_idx = p.full_waves * blocks + own, at += to - from;
      flags |= (from > 0 ? kWritesPartial : 0u) | (to < blocks ? kJoinsPartial : 0u);
    }
    // Consecutive CTAs share a head, so its K and V stay in L2. Causal: the longest rows first.
    int row0, batch, head;
    {
      const auto [head_in_group, rows] = fast_divmod(work_idx, p.q_tiles, p.rcp_q_tiles);
      const auto [bh, head_of_bh] = fast_divmod(head_in_group, p.heads_per_kv, p.rcp_heads_per_kv);
      const auto [batch_, head_kv] = fast_divmod(p.bh_first + bh, p.heads_kv, p.rcp_heads_kv);
      row0 = (C::kMask == Mask::none ? rows : p.q_tiles - 1 - rows) * C::kBlockM;
      batch = batch_, head = head_kv * p.heads_per_kv + head_of_bh;
      const i64 out = batch * p.out_stride_b + head * p.out_stride_h;
      if (elected()) {
        store_shared16(to_shared + 16, {(u32)bh, (u32)batch, (u32)head, (u32)row0});
        store_shared8(to_shared + 32, (u32)out, (u32)(out >> 32));
      }
    }
    int tiles, masked;  // of the work tile
    if constexpr (C::kMask == Mask::list) {
      const int2 count = TileList(p.lists, batch, head, row0, C::kBlockM, p.len_q).count();
      tiles = count.x + count.y, masked = count.x;
    } else {
      int full = p.len_kv / C::kTile;
      tiles = p.kv_tiles;
      if (C::kMask == Mask::causal) tiles = min(tiles, (row0 + C::kBlockM - 1) / C::kTile + 1), full = min(full, (row0 + 1) / C::kTile);
      masked = tiles - full;
    }
    const int begin = from ? tiles * from / blocks : 0, count = (to == blocks ? tiles : tiles * to / blocks) - begin;
    masked = min(max(masked - begin, 0), count);
    masked += (count - masked) % C::kUnmaskedMultiple;
    if (count - masked < C::kUnmaskedLeast) masked = count;
    if (elected()) {  // without a list the last KV tile comes first
      store_shared16(to_shared, {(u32)masked, (u32)(count - masked), flags, 0u});
      store_shared8(to_shared + 40, (u32)(C::kMask == Mask::list ? begin : tiles - 1 - begin), (u32)(to < blocks ? share + 1 : share));
    }
    return true;
  }
};

// The lane's rows: g and g + 8 of its warp's sixteen.
template <class C>
struct RowCoord {
  int t, g, warp, bh, batch, head, row0;  // row0: the warp's first row

  __device__ __forceinline__ explicit RowCoord(u32 own) {
    const int thread = special_tid_x() - 128;
    const uint4 v = load_shared16(own + work::kBh);
    t = thread % 4, g = thread % 32 / 4, warp = thread / 32;
    bh = v.x, batch = v.y, head = v.z, row0 = (int)v.w + 16 * warp;
  }

  __device__ __forceinline__ int row(int half) const { return row0 + 8 * half + g; }
  __device__ __forceinline__ float* lse(const AttendParams& p, int row) const {
    return p.lse + ((i64)batch * p.heads_kv * p.heads_per_kv + head) * p.len_q + row;
  }
};

// Producer warp 0: K and V of every KV tile of every work tile.
template <class C>
__device__ __forceinline__ void load_kv_tiles(const AttendParams& p, u32 shared) {
  using Layout = typename C::Layout;
  grid_dependency_wait();
  Ring<C::kStages> ring{0, 1};  // all stages are empty at first: waiting for the phase before the first returns at once
  for (int iteration = 0;; ++iteration) {
    mbarrier_wait(shared + C::kWorkBarriers + kWorkPublished, iteration & 1);
    const u32 at = shared + C::work_slot(iteration);
    const KvRange range(at);
    if (!(range.flags & kWorkValid)) break;
    const auto fetch = [&](const u8* tile) {
      const u32 stage = shared + C::kStage0 + ring.stage * Layout::kTileBytes;
      const u32 barrier = shared + C::kBarriers + ring.stage * C::kBarrierPitch;
      mbarrier_wait(barrier + kKEmpty, ring.parity);
      cp_async_bulk(elected(), stage, tile, Layout::kKBytes, barrier + kKFull);
      mbarrier_wait(barrier + kVEmpty, ring.parity);
      cp_async_bulk(elected(), stage + Layout::kV, tile + Layout::kV, Layout::kVBytes, barrier + kVFull);
      ring.advance();
    };
    int left = range.masked + range.unmasked;
    const int first = (int)load_shared(at + work::kFirst);
    const u8* tiles = p.kv + (i64)load_shared(at + work::kBh) * p.kv_tiles * Layout::kTileBytes;
    if constexpr (C::kMask == Mask::list) {
      const auto load = [&](int w) {
        const uint4 v = load_shared16(at + work::kBh);
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

// Whether producer warp 1 copies raw Q ahead: 16-bit, rows 16-byte aligned and a multiple of 16 bytes.
template <class C>
__device__ __forceinline__ bool prefetches_raw_q(const AttendParams& p) {
  return p.dtype != kFloat32 && p.q_vectorized;
}

// Producer warp 1: raw Q of the next work tile, so that no consumer waits for memory between two main loops.
template <class C>
__device__ __forceinline__ void load_raw_q(const AttendParams& p, u32 shared) {
  constexpr int kPieces = C::kHeadDim / kChunk, kRows = 32 / kPieces;  // 16-byte pieces of a row; rows at a time
  const u32 barrier = shared + C::kWorkBarriers, lane = special_tid_x() % 32;
  for (int iteration = 0;; ++iteration) {
    mbarrier_wait(barrier + kWorkPublished, iteration & 1);  // then the previous work tile's Q has been read, too
    const u32 own = shared + C::work_slot(iteration);
    const bool valid = KvRange(own).flags & kWorkValid;
    if (valid && prefetches_raw_q<C>(p)) {
      const uint4 at = load_shared16(own + work::kBh);
      const int channel = lane % kPieces * kChunk, row = lane / kPieces, batch = at.y, head = at.z, row0 = at.w;
      const u8* from = static_cast<const u8*>(p.q.data) + (batch * p.q.stride_b + head * p.q.stride_h + channel) * 2;
      const u32 to = shared + C::kRawQ + row * C::kRawQPitch + 2 * channel;
      // Rows beyond the end are not copied: garbage in their place affects no other row.
      const int rows = channel < p.head_dim ? min(C::kBlockM, p.len_q - row0) - row : 0;
      if (C::kMask == Mask::list && p.order) {
        for (int i = 0; i < rows; i += kRows) cp_async16(to + i * C::kRawQPitch, from + 2 * (i64)p.order[row0 + row + i] * p.q.stride_n);
      } else {
        from += 2 * (row0 + row) * p.q.stride_n;
#pragma unroll 4
        for (int i = 0; i < rows; i += kRows, from += 2 * kRows * p.q.stride_n) cp_async16(to + i * C::kRawQPitch, from);
      }
    }
    cp_async_mbarrier_arrive(barrier + kWorkFull);
    if (!valid) break;
  }
}

// Producer warp 2: the work tile, and V's scale and mean per channel.
template <class C>
__device__ __forceinline__ void publish_work_tile(const AttendParams& p, u32 shared) {
  const u32 barrier = shared + C::kWorkBarriers;
  Scheduler<C> scheduler;
  for (int iteration = 0;; ++iteration) {
    mbarrier_wait(barrier + kWorkEmpty, (iteration & 1) ^ 1);  // the slot's last work tile is done
    const u32 to = shared + C::work_slot(iteration), channels = C::channel_scales(to);
    const bool valid = scheduler.next(p, to);
    mbarrier_arrive(elected(), barrier + kWorkPublished);
    grid_dependency_wait();
    if (valid) {
      __syncwarp();  // the work tile is stored
      const int bh = (int)load_shared(to + work::kBh);
#pragma unroll 1
      for (int c = special_tid_x() % 32; c < C::kHeadDim; c += 32) {
        const float scale = p.v_amax[bh * C::kHeadDim + c];
        store_shared_float(channels + 4 * c, scale);
        if constexpr (C::Layout::kVElementBytes == 1) {
          const float mean = p.v_mean[bh * C::kHeadDim + c];
          const i32 quant_sum = p.v_quant_sum[bh * C::kHeadDim + c];
          store_shared_float(channels + 4 * (C::kHeadDim + c),
                             corrected_v_mean<PvType::fp8>(mean, scale, quant_sum, p.inv_v_max, p.live_keys[bh]));
        }
      }
      // kKScaleFloor keeps the bound finite where the largest K scale is 0 (all keys alike); all scores are 0 then.
      if (elected()) store_shared_float(to + work::kMaxScale, p.score_limit / fmaxf(__int_as_float(p.k_scale_max[bh]), kKScaleFloor));
    }
    __syncwarp();
    mbarrier_arrive(elected(), barrier + kWorkFull);
    if (!valid) break;
  }
}

// load_raw of the lane's two rows, from the copied raw Q.
template <class C, int kDtype>
__device__ __forceinline__ void read_raw_q(u32 shared, const RowCoord<C>& at, int head_dim, Raw8<kDtype> (&raw)[2][C::kHeadDim / 32]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int c = 0; c < C::kHeadDim / 32; ++c) {
      const u32 from = shared + C::kRawQ + (16 * at.warp + 8 * half + at.g) * C::kRawQPitch + 64 * c + 16 * at.t;
      const uint4 v = 32 * c + kChunk * at.t < head_dim ? load_shared16(from) : uint4{};
      raw[half][c].word[0] = v.x, raw[half][c].word[1] = v.y, raw[half][c].word[2] = v.z, raw[half][c].word[3] = v.w;
    }
}

// Rotates and quantises the warp's rows into shared memory. scale: score scales of the lane's two rows.
template <class C>
__device__ __forceinline__ void quantize_q(const AttendParams& p, u32 shared, int iteration, float (&scale)[2]) {
  constexpr int kHeadDim = C::kHeadDim;
  const RowCoord<C> at(shared + C::work_slot(iteration));
  with_dtype(p.dtype, [&](auto type) {
    constexpr int kDtype = decltype(type)::value;
    const u8* head = static_cast<const u8*>(p.q.data) + (at.batch * p.q.stride_b + at.head * p.q.stride_h) * kElementBytes<kDtype>;
    const auto token = [&](int row) { return token_of<C::kMask>(p, row); };
    Raw8<kDtype> raw[2][kHeadDim / 32];
    if (kDtype != kFloat32 && prefetches_raw_q<C>(p))
      read_raw_q<C>(shared, at, p.head_dim, raw);
    else if (p.q_vectorized)
      load_raw<kHeadDim, 2, kDtype, true>(head, token, p.q.stride_n, at.row(0), p.len_q, at.t, p.head_dim, raw);
    else
      load_raw<kHeadDim, 2, kDtype, false>(head, token, p.q.stride_n, at.row(0), p.len_q, at.t, p.head_dim, raw);
    __syncwarp();
    mbarrier_arrive(elected(), shared + C::kWorkBarriers + kWorkEmpty);
    const u32 row0 = shared + C::q_offset(iteration, at.warp / 4) + 16 * (at.warp % 4) * 16;
    const auto wait = [&] {  // this Q stage is no longer read; with two stages, the last work tile's barrier has ensured that
      if (C::kQStages == 1) named_barrier<128>(1 + at.warp / 4);
    };
    if constexpr (kDtype == kFloat32) {
      u32 a[kHeadDim / 32][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[kHeadDim / 4];
        unpack_row<kHeadDim>(raw[half], x);
        scale[half] = quantize_row<kHeadDim>(x, at.t, p.score_scale, p.sign, a, half);
      }
      wait();
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int c2 = 0; c2 < kHeadDim / 64; ++c2)
          store_shared16(row0 + (4 * c2 + at.t) * C::kQPitch + (8 * half + at.g) * 16,
                         {a[2 * c2][half], a[2 * c2][half + 2], a[2 * c2 + 1][half], a[2 * c2 + 1][half + 2]});
    } else {
      const int lane = 4 * at.g + at.t;
      const Rotation<kHeadDim, kDtype> rotation(load_shared16(shared + C::kRotation + 16 * lane));
      u32 quantized[2][2][kHeadDim / 32];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        scale[half] = quantize_rows8(raw[half], rotation, lane, p.score_scale, p.sign, quantized[half]);
      wait();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& own = quantized[i / 2][i % 2];
        const u32 to = row0 + (8 * (i / 2) + 2 * at.t + i % 2) * 16;
        if constexpr (kHeadDim == 64)
          store_shared8(to + at.g % 4 * C::kQPitch + at.g / 4 * 8, own[0], own[1]);
        else
          store_shared16(to + at.g * C::kQPitch, own);
      }
    }
  });
  fence_async_proxy();
  const float max_scale = load_shared_float(shared + C::work_slot(iteration) + work::kMaxScale);
  named_barrier<128>(1 + at.warp / 4);  // the warpgroup's Q is complete in shared memory
#pragma unroll
  for (int half = 0; half < 2; ++half) scale[half] = fminf(scale[half], max_scale);
}

// Stores the rows' LSE, adding back what subtracting k_mean took from it. Rarely requested: optimised for code size, reads Q again.
template <class C>
__device__ __forceinline__ void store_lse(const AttendParams& p, const RowCoord<C>& at, const float (&l_i)[2], const float (&m_i)[2]) {
  grid_dependency_wait();
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int row = token_of<C::kMask>(p, min(at.row(half), p.len_q - 1));
    const i64 offset = at.batch * p.q.stride_b + at.head * p.q.stride_h + row * p.q.stride_n;
    float shift;
    with_dtype(p.dtype, [&](auto type) {
      constexpr int kDtype = decltype(type)::value;
      const u8* q = static_cast<const u8*>(p.q.data) + offset * kElementBytes<kDtype>;
      shift = k_mean_score<kDtype>(q, p.head_dim, p.k_mean + at.bh * C::kHeadDim, at.t, p.sm_scale);
    });
    const float sum = half ? l_i[1] : l_i[0], m = half ? m_i[1] : m_i[0];  // selected without an index: they are registers
    if (at.t == 0 && at.row(half) < p.len_q) *at.lse(p, row) = sum > 0.0f ? shift + (m + log2_approx(sum)) * kLn2 : -kInf;
  }
}

// Stores O / l, scaled and shifted by V's scale and mean per channel, in the output's dtype, and LSE. o: accumulators of 64 rows ×
// kHeadDim columns (the first kHeadDim / 2 registers), l_i and m_i: [half].
template <class C>
__device__ __forceinline__ void store_output(const AttendParams& p, const float (&o)[C::kOutRegisters], const float (&l_i)[2],
                                             const float (&m_i)[2], u32 own) {
  constexpr int kHeadDim = C::kHeadDim;
  const int t = special_tid_x() % 4;
  // Loads V's scale and mean first, to hide their latency.
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
    const u32 channels = C::channel_scales(own) + 4 * (32 * c + kChunk * t);
    take(channels, scale[c]);
    if constexpr (C::Layout::kVElementBytes == 1) take(channels + 4 * kHeadDim, mean[c]);
  }
  const RowCoord<C> at(own);
  const uint2 out = load_shared8(own + work::kOut);
  const i64 head = (i64)((u64)out.y << 32 | out.x);
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    inverse[half] = l_i[half] > 0.0f ? p.inv_v_max * rcp_approx(l_i[half]) : 0.0f;  // 0: every key is masked out
  with_access(p.dtype, p.out_vectorized, [&](auto type, auto vectors) {
    constexpr int kDtype = decltype(type)::value;
    u8* row[2];
    int width[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = static_cast<u8*>(p.out) + (head + (C::kMask == Mask::list ? token_of<C::kMask>(p, min(at.row(half), p.len_q - 1)) : at.row(half)) * p.out_stride_n) * kElementBytes<kDtype>;
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
  if (p.lse) store_lse<C>(p, at, l_i, m_i);
}

// Split-KV merge of two CTAs: the one with the later KV tiles of a work tile writes unnormalised O, l and m; the one with the earlier tiles
// merges and stores. Each thread reads the registers of the same thread of the other CTA.
template <class C>
struct SplitKvPartial {
  static constexpr int kCount = C::kHeadDim / 2, kFours = kCount / 4 + 1, kThreads = 128 * C::kConsumers;
  static constexpr int kCtaBytes = kFours * kThreads * 16;  // of p.split_kv_workspace

  float4* to;
  i32* ready;
  int warpgroup;

  __device__ __forceinline__ SplitKvPartial(const AttendParams& p, int block) {
    const int thread = special_tid_x() - 128;
    warpgroup = thread / 128;
    to = reinterpret_cast<float4*>(p.split_kv_workspace) + (i64)block * kFours * kThreads + thread;
    ready = p.split_kv_ready + block * C::kConsumers + warpgroup;
  }

  __device__ __forceinline__ void write(const float (&o)[C::kOutRegisters], const float (&l_i)[2], const float (&m_i)[2]) const {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) __stcg(to + i * kThreads, make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]));
    __stcg(to + kCount / 4 * kThreads, make_float4(l_i[0], l_i[1], m_i[0], m_i[1]));
    __threadfence();
    named_barrier<128>(1 + warpgroup);  // all have written
    if (special_tid_x() % 128 == 0) store_release(ready, 1);
  }

  // Waits for the other CTA's result and merges it. Resets `ready` to 0 for the next launch.
  __device__ __forceinline__ void join(float (&o)[C::kOutRegisters], float (&l_i)[2], float (&m_i)[2]) const {
    while (!load_acquire(ready)) {
    }
    named_barrier<128>(1 + warpgroup);  // all have seen it
    if (special_tid_x() % 128 == 0) store_release(ready, 0);
    const float4 rest = __ldcg(to + kCount / 4 * kThreads);
    const float other_l[2] = {rest.x, rest.y}, other_m[2] = {rest.z, rest.w};
    float own[2], other[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = fmaxf(m_i[half], other_m[half]), m = most == -kInf ? 0.0f : most;
      own[half] = exp2_approx(m_i[half] - m), other[half] = exp2_approx(other_m[half] - m);
      l_i[half] = fmaf(other[half], other_l[half], own[half] * l_i[half]);
      m_i[half] = most;
    }
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const float4 x = __ldcg(to + i * kThreads);
      o[4 * i] = fmaf(other[0], x.x, own[0] * o[4 * i]), o[4 * i + 1] = fmaf(other[0], x.y, own[0] * o[4 * i + 1]);
      o[4 * i + 2] = fmaf(other[1], x.z, own[1] * o[4 * i + 2]), o[4 * i + 3] = fmaf(other[1], x.w, own[1] * o[4 * i + 3]);
    }
  }
};

// What both main loops of a consumer warpgroup keep in registers beside scores, P and O, and what they share of masks and scales.
template <class C>
struct MainloopSm90 {
  using Layout = typename C::Layout;
  static constexpr int kHeadDim = C::kHeadDim, kStepNTiles = C::kScoreRegisters / 4;  // n-tiles (8 keys) of a softmax step
  using Scores = i32[C::kScoreRegisters];
  using ProbFragments = u32[C::kProbRegisters];

  const AttendParams& p;
  u32 shared, sQ;  // shared addresses: of all, of the warpgroup's Q
  float q_scale[2];  // [half]
  uint2 k_scales;  // of the current tile
  int tile_number;  // of the current tile
  Ring<C::kStages> ring;
  float m_i[2];  // [half]: P = 2^(score − m_i); log2(p_max) below the row maximum at the last rescaling
  bool causal;
  int iteration;  // number of the CTA's work tile

  // The lane's largest integer score of one row half, in part `part` of kParts parts of the keys.
  template <int kParts>
  static __device__ __forceinline__ i32 lane_max(const Scores& s, int part, int half) {
    constexpr int kCount = kStepNTiles / kParts;
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

  // Loads the K scales of the tile in `stage` ahead of their use.
  __device__ __forceinline__ void load_k_scales(u32 stage) {
    const uint4 v = load_shared16(tile(stage) + Layout::kScaleOffset + Layout::kScalePitch * (special_tid_x() % 4u));
    k_scales = {v.x, v.y}, tile_number = v.w;
  }

  __device__ __forceinline__ u32 barrier(u32 stage) const { return shared + C::kBarriers + stage * C::kBarrierPitch; }
  __device__ __forceinline__ u32 tile(u32 stage) const { return shared + C::kStage0 + stage * Layout::kTileBytes; }

  using Keys = KeyBits<8 * kStepNTiles>;

  __device__ __forceinline__ bool has_tail(const KvRange& range) const {
    return C::kMask == Mask::list && p.tail && !(range.flags & kWritesPartial);
  }

  // Loads the initial softmax state of the warpgroup's 64 queries: m_i, l, O. no_score: m_i where the state is empty.
  __device__ __forceinline__ void load_tail(float (&o)[C::kOutRegisters], float (&l)[2], float no_score) {
    const u32 slot = shared + C::work_slot(iteration);
    const uint4 v = load_shared16(slot + work::kBh);  // bh, batch, head, row0
    const int t = special_tid_x() % 4, group = (int)v.w / 64 + special_tid_x() / 128 - 1, groups = (p.len_q + 63) / 64;
    const float* state = p.tail + (((i64)v.y * p.heads_kv * p.heads_per_kv + v.z) * groups + min(group, groups - 1)) * (4 + kHeadDim);
    const float p_max = exp2_approx(p.log2_p_max), sum = state[1];
    l[0] = l[1] = sum * p_max;
    m_i[0] = m_i[1] = sum > 0.0f ? state[0] - p.log2_p_max : no_score;
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c)
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        const u32 channel = C::channel_scales(slot) + 4 * (32 * c + kChunk * t + e);
        const float amax = load_shared_float(channel);
        float x = state[4 + 32 * c + kChunk * t + e];
        if constexpr (Layout::kVElementBytes == 1) x = fmaf(-sum, load_shared_float(channel + 4 * kHeadDim), x);
        x = amax > 0.0f ? x * p_max / (amax * p.inv_v_max) : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) o[16 * c + e / 2 * 4 + 2 * half + e % 2] = x;
      }
  }

  // The warpgroup's last query.
  __device__ __forceinline__ int last_row() const {
    return (int)load_shared(shared + C::work_slot(iteration) + work::kRow0) + (special_tid_x() / 128 - 1) * 64 + 63;
  }

  // The keys from key0 on that the lane's rows see; a bias of −inf removes more.
  __device__ __forceinline__ Keys visible(int key0) const {
    Keys keys;
    if constexpr (C::kMask == Mask::none) {  // does not read the work tile: uniform registers are short
#pragma unroll
      for (int half = 0; half < 2; ++half) keys.below(half, p.len_kv - key0);
    } else {
      const int thread = special_tid_x() - 128, row0 = (int)load_shared(shared + C::work_slot(iteration) + work::kRow0) + thread / 32 * 16;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + 8 * half + thread % 32 / 4;
        keys.below(half, (causal ? min(row + 1, p.len_kv) : p.len_kv) - key0);
        if (C::kMask == Mask::list && p.kept && key0 < p.len_kv) {
          const RowCoord<C> at(shared + C::work_slot(iteration));
          keys.keep(half, p.kept + at.batch * p.kept_stride_b + at.head * p.kept_stride_h + min(row, p.len_q - 1) * p.kept_stride_q + key0 / 32);
        }
      }
    }
    keys.align(special_tid_x() % 4);
    return keys;
  }

  // Integer scores of the keys from key0 on → base-2 scores in fp32, in place, −inf where masked out. top: the lane's maximum of each half.
  // kScaleCount: number of K scales along the keys.
  template <int kScaleCount>
  __device__ __forceinline__ void mask_scores(Scores& s, const float (&scale)[kScaleCount][2], const Keys& keys, int key0, float (&top)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2 * kStepNTiles; ++i) {
        i32& bits = s[i / 2 * 4 + 2 * half + i % 2];
        bits = __float_as_int((float)bits * scale[i / 2 * kScaleCount / kStepNTiles][half]);
      }
    if (C::kMask == Mask::list && p.mask_kind != kMaskBool) {
      const RowCoord<C> at(shared + C::work_slot(iteration));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const i64 offset = at.batch * p.mask_stride_b + at.head * p.mask_stride_h + min(at.row(half), p.len_q - 1) * p.mask_stride_q;
        const BiasRow row{static_cast<const u8*>(p.mask) + offset * mask_element_bytes(p.mask_kind), p.mask_stride_k, p.mask_kind, p.len_kv,
                          p.mask_pairs};
        row.template each<kStepNTiles>(key0 + 2 * at.t, [&](int j, float x, float y) {
          i32* at_keys = s + 4 * j + 2 * half;
          at_keys[0] = __float_as_int(__int_as_float(at_keys[0]) + x), at_keys[1] = __float_as_int(__int_as_float(at_keys[1]) + y);
        });
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = -kInf;
#pragma unroll
      for (int i = 0; i < 2 * kStepNTiles; ++i) {
        i32& bits = s[i / 2 * 4 + 2 * half + i % 2];
        bits = keys.sees(half, i / 2, i % 2) ? bits : __float_as_int(-kInf);
        top[half] = fmaxf(top[half], __int_as_float(bits));
      }
    }
  }
};

// Dynamic shared memory of a launch, in bytes.
template <class C>
constexpr int attend_shared_bytes() {
  return C::kSharedBytes;
}

// The CTA: three producer warps and two consumer warpgroups, one work tile after another; the next one's KV tiles are loaded while the last
// one's output is stored. Mainloop<C> is a MainloopSm90<C> with O in `o` and run(range, l), which computes a work tile.
template <class C, template <class> class Mainloop>
__device__ __forceinline__ void attend_block(const AttendParams& p) {
  static_assert(C::kBarriers % 8 == 0 && C::kStage0 % 128 == 0 && C::Layout::kTileBytes % 128 == 0, "operands lie on 128 bytes");
  extern __shared__ __align__(128) u8 bytes[];
  const u32 shared = shared_address(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      const u32 barrier = shared + C::kBarriers + i * C::kBarrierPitch;
      mbarrier_init(barrier + kKFull, 1), mbarrier_init(barrier + kVFull, 1);
      mbarrier_init(barrier + kKEmpty, C::kConsumerWarps), mbarrier_init(barrier + kVEmpty, C::kConsumerWarps);
    }
    mbarrier_init(shared + C::kWorkBarriers + kWorkFull, 32 + 1);  // the lanes of producer warp 1, and producer warp 2
    mbarrier_init(shared + C::kWorkBarriers + kWorkEmpty, C::kConsumerWarps);
    mbarrier_init(shared + C::kWorkBarriers + kWorkPublished, 1);
    fence_async_proxy();
  }
  if (threadIdx.x / 32 == 1) {  // for all prologues of all consumers
    with_dtype(p.dtype, [&](auto type) {
      if constexpr (decltype(type)::value != kFloat32) {
        const int lane = threadIdx.x % 32;
        store_shared16(shared + C::kRotation + 16 * lane, Rotation<C::kHeadDim, decltype(type)::value>(lane).matrix);
      }
    });
  }
  __syncthreads();  // barriers and matrix are initialised
  if (threadIdx.x < 128) {
    setmaxnreg_dec<C::kProducerRegisters>();
    if (threadIdx.x < 32)
      load_kv_tiles<C>(p, shared);
    else if (threadIdx.x < 64)
      load_raw_q<C>(p, shared);
    else if (threadIdx.x < 96)
      publish_work_tile<C>(p, shared);
  } else {
    setmaxnreg_inc<C::kConsumerRegisters>();
    // The shuffle tells the compiler that sQ is warp-uniform: descriptors are then computed in uniform registers.
    const u32 sQ = __shfl_sync(kAllLanes, shared + C::q_offset(0, special_tid_x() / 128 - 1), 0);
    Mainloop<C> mainloop{p, shared, sQ};
    mainloop.causal = C::kMask == Mask::causal || (C::kMask == Mask::list && p.causal);
    for (mainloop.iteration = 0;; ++mainloop.iteration) {
      mbarrier_wait(shared + C::kWorkBarriers + kWorkFull, mainloop.iteration & 1);
      const KvRange range(shared + C::work_slot(mainloop.iteration));
      if (!(range.flags & kWorkValid)) break;
      if constexpr (C::kQStages > 1) mainloop.sQ = sQ + C::q_offset(mainloop.iteration, 0);
      quantize_q<C>(p, shared, mainloop.iteration, mainloop.q_scale);
      mainloop.m_i[0] = mainloop.m_i[1] = -kInf;
      float l_i[2];
      mainloop.run(range, l_i);
      const u32 to = shared + C::work_slot(mainloop.iteration);
      if (p.split_kv_workspace) {
        const u32 flags = KvRange(to).flags;
        if (flags & kWritesPartial) {
          SplitKvPartial<C>(p, (int)load_shared(to + work::kPartial)).write(mainloop.o, l_i, mainloop.m_i);
          continue;
        }
        if (flags & kJoinsPartial) SplitKvPartial<C>(p, (int)load_shared(to + work::kPartial)).join(mainloop.o, l_i, mainloop.m_i);
      }
      store_output<C>(p, mainloop.o, l_i, mainloop.m_i, to);
    }
  }
}

}  // namespace sage
