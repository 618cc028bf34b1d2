// The producer warps of a Hopper CTA: KV tiles, raw Q, work tiles.
#pragma once
#include "../block/output.cuh"
#include "../block/query.cuh"
#include "../common/pv_type.cuh"
#include "../ptx/async_copy.cuh"
#include "scheduler_sm90.cuh"

namespace sage {

// Producer warp 0: K and V of every KV tile of every work tile.
template <class C>
__device__ __forceinline__ void load_kv_tiles(const AttendParams& p, u32 shared) {
  using Layout = typename C::Layout;
  static_assert(C::kStageTiles == 1 || (C::kStageTiles == 2 && C::kMask == Mask::list), "tiles of lists alone go in twos");
  grid_dependency_wait();
  Ring<C::kStages> ring{0, 1};  // all stages are empty at first: waiting for the phase before the first returns at once
  for (int iteration = 0;; ++iteration) {
    mbarrier_wait(shared + C::kWorkBarriers + kWorkPublished, iteration & 1);
    const u32 at = shared + C::work_slot(iteration);
    const KvRange range(at);
    if (!(range.flags & kWorkValid)) break;
    // Fills a stage. second: of a stage of two, or null.
    const auto fetch = [&](const u8* tile, const u8* second = nullptr) {
      const u32 stage = shared + C::kStage0 + ring.stage * C::kStageBytes;
      const u32 barrier = shared + C::kBarriers + ring.stage * C::kBarrierPitch;
      const auto copy = [&](u32 offset, u32 bytes, u32 empty, u32 full) {
        mbarrier_wait(barrier + empty, ring.parity);
        cp_async_bulk(elected(), stage + offset, tile + offset, bytes, barrier + full);
        if constexpr (C::kStageTiles == 2) {
          if (second)
            cp_async_bulk(elected(), stage + Layout::kTileBytes + offset, second + offset, bytes, barrier + full);
          else
            mbarrier_arrive(elected(), barrier + full);
        }
      };
      copy(0, Layout::kKBytes, kKEmpty, kKFull);
      copy(Layout::kV, Layout::kVBytes, kVEmpty, kVFull);
      ring.advance();
    };
    int left = range.masked + range.unmasked;
    const int first = (int)load_shared(at + work::kFirst);
    const u8* tiles = p.kv + (i64)load_work_tile<C>(p, at).span.kv_tile0 * Layout::kTileBytes;
    if constexpr (C::kMask == Mask::list) {
      const auto load = [&](int w) {
        const WorkTile tile = load_work_tile<C>(p, at);
        return TileList(p.lists, tile.batch, tile.head, tile.row0, C::kBlockM, p.len_q).word(w);
      };
      ListCursor cursor;
      cursor.skip(first, p.lists.words, load);
      const auto next = [&] { return tiles + (i64)cursor.next(p.lists.words, load) * Layout::kTileBytes; };
      for (; left > (C::kStageTiles == 2 ? range.unmasked : 0); --left) fetch(next());
      if constexpr (C::kStageTiles == 2)
        for (; left; left -= 2) {
          const u8* tile = next();
          fetch(tile, next());
        }
    } else {
      for (const u8* tile = tiles + (i64)first * Layout::kTileBytes; left; --left, tile -= Layout::kTileBytes) fetch(tile);
    }
  }
}

// Whether producer warp 1 copies raw Q ahead: 16-bit, rows 16-byte aligned and a multiple of 16 bytes.
template <class C>
__device__ __forceinline__ bool prefetches_raw_q(const AttendParams& p) {
  return C::kHasRawQ && p.dtype != kFloat32 && p.q_vectorized;
}

// Producer warp 1: raw Q of the next work tile, and which tokens its rows are, so that no consumer waits for memory between two main loops:
// behind the KV tiles that fill the ring then, that takes microseconds.
template <class C>
__device__ __forceinline__ void load_raw_q(const AttendParams& p, u32 shared) {
  constexpr int kPieces = C::kHeadDim / kChunk, kRows = 32 / kPieces;  // 16-byte pieces of a row; rows at a time
  const u32 barrier = shared + C::kWorkBarriers, lane = special_tid_x() % 32;
  for (int iteration = 0;; ++iteration) {
    mbarrier_wait(barrier + kWorkPublished, iteration & 1);  // then the previous work tile's Q has been read, too
    const u32 own = shared + C::work_slot(iteration);
    const bool valid = KvRange(own).flags & kWorkValid;
    if (C::kRouted && valid && p.order) {
      const int row0 = (int)load_shared(own + work::kRow0);
#pragma unroll
      for (int i = 0; i < C::kBlockM; i += 32)
        store_shared_float(own + C::kTokens + 4 * (i + lane), __int_as_float(p.order[min(row0 + i + (int)lane, p.len_q - 1)]));
      __syncwarp();  // the tokens are stored
    }
    if (valid && prefetches_raw_q<C>(p)) {
      const auto [bh, batch, head, row0, span] = load_work_tile<C>(p, own);
      const int channel = lane % kPieces * kChunk, row = lane / kPieces;
      const u8* from = static_cast<const u8*>(p.q.data) + (batch * p.q.stride_b + head * p.q.stride_h + channel) * 2;
      const u32 to = shared + C::kRawQ + row * C::kRawQPitch + 2 * channel;
      // Rows beyond the end are not copied: garbage in their place affects no other row.
      const int rows = channel < p.head_dim ? min(C::kBlockM, span.len_q - row0) - row : 0;
      if (C::kRouted && p.order) {
        const u32 tokens = own + C::kTokens + 4 * row;
#pragma unroll 4
        for (int i = 0; i < rows; i += kRows)
          cp_async16(to + i * C::kRawQPitch, from + 2 * (i64)(int)load_shared(tokens + 4 * i) * p.q.stride_n);
      } else {
        from += 2 * (span.token0 + row0 + row) * p.q.stride_n;
#pragma unroll 4
        for (int i = 0; i < rows; i += kRows, from += 2 * kRows * p.q.stride_n) cp_async16(to + i * C::kRawQPitch, from);
      }
    }
    cp_async_mbarrier_arrive(barrier + kWorkFull);
    if (C::kRouted) mbarrier_arrive(elected(), barrier + kWorkFull);  // the copies' arrival says nothing of stores
    if (!valid) break;
  }
}

// V's scale and mean per channel.
template <class C>
__device__ __forceinline__ void load_channels(const AttendParams& p, int bh, u32 channels) {
  constexpr bool kMeans = C::Layout::kVElementBytes == 1;
  const int lane = special_tid_x() % 32;
  const auto at = [&](int c) { return bh * C::kHeadDim + c; };
  if constexpr (C::kRouted && kMeans) {
    // Work tiles may be so short here that their consumers wait for this: two channels a lane are under way together.
    const float keys = p.live_keys[bh];
#pragma unroll 1
    for (int c = lane; c < C::kHeadDim; c += 64) {
      const float scale[2] = {p.v_amax[at(c)], p.v_amax[at(c + 32)]}, mean[2] = {p.v_mean[at(c)], p.v_mean[at(c + 32)]};
      const i32 quant_sum[2] = {p.v_quant_sum[at(c)], p.v_quant_sum[at(c + 32)]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const u32 to = channels + 4 * (c + 32 * i);
        store_shared_float(to, scale[i]);
        store_shared_float(to + 4 * C::kHeadDim, corrected_v_mean<PvType::fp8>(mean[i], scale[i], quant_sum[i], p.inv_v_max, keys));
      }
    }
  } else {
#pragma unroll 1
    for (int c = lane; c < C::kHeadDim; c += 32) {
      const float scale = p.v_amax[at(c)];
      store_shared_float(channels + 4 * c, scale);
      if constexpr (kMeans) {
        const float mean = p.v_mean[at(c)];
        const i32 quant_sum = p.v_quant_sum[at(c)];
        store_shared_float(channels + 4 * (C::kHeadDim + c),
                           corrected_v_mean<PvType::fp8>(mean, scale, quant_sum, p.inv_v_max, p.live_keys[bh]));
      }
    }
  }
}

// Producer warp 2: the work tile, V's scale and mean per channel, and the state in which each warpgroup's rows begin.
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
      if (C::kRouted && p.tail) {
        const WorkTile tile = load_work_tile<C>(p, to);
#pragma unroll 1
        for (u32 at = special_tid_x() % 32 * 16; at < C::kConsumers * C::kTailBytes; at += 32 * 16) {
          const float* state = initial_state<C::kHeadDim>(p, tile, tile.row0 + at / C::kTailBytes * 64);
          cp_async16(to + C::kTails + at, state + at % C::kTailBytes / 4);
        }
        cp_async_commit();
      }
      load_channels<C>(p, bh, channels);
      if (C::kRouted && p.tail) cp_async_wait<0>();
      if (elected()) store_shared_float(to + work::kMaxScale, max_score_scale(p.score_limit, p.k_scale_max[bh]));
    }
    __syncwarp();
    mbarrier_arrive(elected(), barrier + kWorkFull);
    if (!valid) break;
  }
}

}  // namespace sage
