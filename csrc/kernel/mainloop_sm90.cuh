// What the two main loops on Hopper share: registers, masks, the initial state. mainloop_sm90_fp16.cuh and mainloop_sm90_fp8.cuh bring the
// softmax and P·V.
#pragma once
#include "../block/mask_scores.cuh"
#include "../block/output.cuh"
#include "../block/rescale.cuh"
#include "../ptx/async_copy.cuh"
#include "../ptx/wgmma.cuh"
#include "scheduler_sm90.cuh"

namespace sage {

// What both main loops of a consumer warpgroup keep in registers beside scores, P and O, and what they share of masks and scales.
template <class C>
struct MainloopSm90 {
  using Layout = typename C::Layout;
  static constexpr int kHeadDim = C::kHeadDim, kStepNTiles = C::kScoreRegisters / 4;  // n-tiles (8 keys) of a softmax step
  using Scores = i32[C::kScoreRegisters];        // [4 · n-tile + 2 · half + e]: row g + 8 · half, key 8 · n-tile + 2t + e
  using ProbFragments = u32[C::kProbRegisters];  // [4 · k-step + register]: A fragments of 16 keys in fp16, of 32 in e4m3

  const AttendParams& p;
  u32 shared, sQ;    // shared addresses: of all, of the warpgroup's Q
  float q_scale[2];  // [half]
  uint2 k_scales;    // of the current tile
  int tile_number;   // of the current tile
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

  // Loads the K scales of tile number `place` of a stage ahead of their use.
  __device__ __forceinline__ void load_k_scales(u32 stage, int place = 0) {
    const u32 scales = tile(stage) + place * Layout::kTileBytes + Layout::kScaleOffset;
    const uint4 v = load_shared16(scales + Layout::kScalePitch * (special_tid_x() % 4u));
    k_scales = {v.x, v.y}, tile_number = v.w;
  }

  // Waits for a stage's K or V; releases them. K and V that stay where they are need neither, but the compiler has to see a wait for V: it
  // is a loop, before which no later wait is moved.
  __device__ __forceinline__ void await(StageBarrier which, const Ring<C::kStages>& at) const {
    if constexpr (!C::kResident)
      mbarrier_wait(barrier(at.stage) + which, at.parity);
    else if (which == kVFull)
      mbarrier_wait(shared + C::kDone, 1);
  }
  __device__ __forceinline__ void arrive(StageBarrier which, u32 stage, bool really = true) const {
    if constexpr (!C::kResident) mbarrier_arrive(elected() && really, barrier(stage) + which);
  }

  __device__ __forceinline__ u32 barrier(u32 stage) const { return shared + C::kBarriers + stage * C::kBarrierPitch; }
  // The stage's first tile.
  __device__ __forceinline__ u32 tile(u32 stage) const { return shared + C::kStage0 + stage * C::kStageBytes; }

  using Keys = KeyBits<8 * kStepNTiles>;

  __device__ __forceinline__ bool has_tail(const KvRange& range) const { return C::kRouted && p.tail && !(range.flags & kWritesPartial); }

  // Loads the initial softmax state of the warpgroup's 64 queries: m_i, l, O.
  template <class Reference>
  __device__ __forceinline__ void load_tail(float (&o)[C::kOutRegisters], float (&l)[2]) {
    const u32 slot = shared + C::work_slot(iteration), state = slot + C::kTails + (special_tid_x() / 128 - 1) * C::kTailBytes;
    const int t = special_tid_x() % 4;
    const float p_max = exp2_approx(p.log2_p_max), sum = load_shared_float(state + 4);
    l[0] = l[1] = sum * p_max;
    m_i[0] = m_i[1] = initial_reference<Reference>([&] { return load_shared_float(state); }, sum, p.log2_p_max);
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
      const u32 channel = 4 * (32 * c + kChunk * t), scales = C::channel_scales(slot) + channel;
      float x[kChunk], amax[kChunk], mean[kChunk] = {};
      load_shared8_floats(state + 16 + channel, x), load_shared8_floats(scales, amax);
      if constexpr (Layout::kVElementBytes == 1) load_shared8_floats(scales + 4 * kHeadDim, mean);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        const float unit = amax[e] > 0.0f ? p_max * rcp_approx(amax[e] * p.inv_v_max) : 0.0f;  // as quantize_o(), by a reciprocal
#pragma unroll
        for (int half = 0; half < 2; ++half) o[16 * c + e / 2 * 4 + 2 * half + e % 2] = fmaf(-sum, mean[e], x[e]) * unit;
      }
    }
  }

  // The warpgroup's last query.
  __device__ __forceinline__ int last_row() const {
    return (int)load_shared(shared + C::work_slot(iteration) + work::kRow0) + (special_tid_x() / 128 - 1) * 64 + 63;
  }

  // The lane's rows.
  __device__ __forceinline__ void rows(int (&row)[2]) const {
    const int thread = special_tid_x() - 128, row0 = (int)load_shared(shared + C::work_slot(iteration) + work::kRow0) + thread / 32 * 16;
    row[0] = row0 + thread % 32 / 4, row[1] = row[0] + 8;
  }

  __device__ __forceinline__ WorkTile work_tile() const { return load_work_tile<C>(p, shared + C::work_slot(iteration)); }

  // The keys from key0 on that the lane's rows see.
  __device__ __forceinline__ Keys visible(int key0) const {
    int row[2] = {};
    if constexpr (C::kMask != Mask::none) rows(row);  // otherwise it does not read the work tile: uniform registers are short
    return visible_keys<C::kMask, 8 * kStepNTiles>(p, [&] { return work_tile(); }, row, key0, causal, special_tid_x() % 4);
  }

  // Integer scores of the keys from key0 on → base-2 scores in fp32, in place, −inf where masked out. top: the lane's maximum of each half.
  // kScaleCount: number of K scales along the keys.
  template <int kScaleCount>
  __device__ __forceinline__ void mask_scores(Scores& s, const float (&scale)[kScaleCount][2], const Keys& keys, int key0,
                                              float (&top)[2]) const {
    const auto score = [&](int half, int j, int e) -> i32& { return s[4 * j + 2 * half + e]; };
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2 * kStepNTiles; ++i) {
        i32& bits = score(half, i / 2, i % 2);
        bits = __float_as_int((float)bits * scale[i / 2 * kScaleCount / kStepNTiles][half]);
      }
    if constexpr (C::kMask == Mask::list) {
      if (p.mask_kind == kMaskBiasRow) {
        float2 bias[kStepNTiles];
        load_bias_row(p, work_tile(), key0, special_tid_x() % 4, bias);
        add_bias_row(bias, score);
      } else if (p.mask_kind != kMaskBool) {
        int row[2];
        rows(row);
        add_bias<kStepNTiles>(p, work_tile(), row, key0, special_tid_x() % 4, score);
      }
    }
    hide_keys<kStepNTiles>(score, [&](int half, int j, int e) { return keys.sees(half, j, e); }, top);
  }
};

}  // namespace sage
