// Third launch on Hopper: softmax(Q·Kᵀ)·V with wgmma – INT8 for the scores, fp16 for P·V, sums in fp32.
//
// A CTA has 128 queries of one head at a time. Its first warpgroup produces: KV tiles, Q, V's scales. Each of the other two owns 64 queries
// and goes over the KV tiles, masked ones first. During the softmax of a tile the tensor cores work on the scores of the next tile and on
// P·V of the previous one. P stays in registers: the score accumulators, converted, are its A fragments. l is O's columns of ones. At
// head_dim 256, where O takes 132 registers, the softmax is one tile ahead of P·V instead, with two arrays of P for two of scores.
//
// wgmma stays asynchronous only with the present shape of unmasked_tiles' loop and order of waits (docs/compiler.md).
#pragma once
#include "attend_sm90.cuh"

namespace sage {

template <class C>
struct MainloopFp16 : MainloopSm90<C> {
  using Base = MainloopSm90<C>;
  using typename Base::Layout, typename Base::Scores, typename Base::ProbFragments;
  using Base::await, Base::arrive, Base::tile, Base::mask_scores, Base::load_k_scales, Base::tile_number, Base::m_i, Base::ring,
      Base::k_scales, Base::q_scale, Base::sQ, Base::p;
  static constexpr int kHeadDim = C::kHeadDim, kSteps = kHeadDim / 32;
  // Steps of Q·Kᵀ whose A fragments are in registers, as far as there are any left: shared memory then serves fewer reads.
  static constexpr int kQStepsInRegs = kHeadDim == 64 || C::kResident ? 0 : kHeadDim == 128 ? 2 : 4;
  // Whether the softmax is one tile ahead of P·V, with two arrays of P for one of scores.
  static constexpr bool kAhead = kHeadDim == 256 || C::kResident;
  // Whether the exponentials come before the wait for P·V of the previous tile: with the softmax ahead that is all there is beside it. And
  // how many are chained by a false dependency: otherwise the compiler schedules all exponentials before all conversions. Chosen by
  // measurement.
  static constexpr bool kExpBeforeWait = kHeadDim != 128 || kAhead;
  static constexpr int kExpChain = kHeadDim == 64 ? 8 : 0;

  float o[C::kOutRegisters];     // [4 · n-tile + 2 · half + e]; the last n-tile has the columns of ones
  float m_limit[2];              // [half]: a score above this rescales the row
  u32 q[4 * kQStepsInRegs + 1];  // [step][A fragment register]; + 1: never empty

  // Loads the A fragments of the last kQStepsInRegs steps.
  __device__ __forceinline__ void load_q_fragments() {
    const int lane = special_tid_x() % 32, warp = special_tid_x() / 32 % 4;
    const u32 from = sQ + 2 * (kSteps - kQStepsInRegs) * C::kQPitch + (16 * warp + lane / 4) * 16 + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4 * kQStepsInRegs; ++i) q[i] = load_shared(from + i / 2 * C::kQPitch + i % 2 * 128);
  }

  // Issues S = Q·Kᵀ of the stage at `at`.
  __device__ __forceinline__ void issue_scores(Scores& s, const Ring<C::kStages>& at) const {
    const u64 rows = wgmma_descriptor<C::kQPitch>(sQ), keys = wgmma_descriptor<Layout::kKPitch>(tile(at.stage));
    await(kKFull, at);
    warpgroup_fence_operand(s);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
      const u64 b = keys + (2 * c * Layout::kKPitch >> 4);
      if (c >= kSteps - kQStepsInRegs)
        wgmma_s8(s, q + 4 * (c - kSteps + kQStepsInRegs), b, c > 0);
      else
        wgmma_s8(s, rows + (2 * c * C::kQPitch >> 4), b, c > 0);
    }
    wgmma_commit();
  }

  // Issues O += P·V of the first 16 · kChunks keys of the tile in `stage`.
  template <int kChunks = C::kTile / 16>
  __device__ __forceinline__ void issue_pv(const ProbFragments& prob, u32 stage) {
    const u64 v = wgmma_descriptor<Layout::kVPitch>(tile(stage) + Layout::kV);
    warpgroup_fence_operand(o);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const u64 keys = v + (2 * c * Layout::kVPitch >> 4);
      if constexpr (kHeadDim == 256) {  // a wgmma has at most 256 columns: no room for the ones
        wgmma_f16(registers<0, 64>(o), prob + 4 * c, keys, true);
        wgmma_f16(registers<64, 68>(o), prob + 4 * c, keys + (128 * 16 >> 4), true);
      } else {
        wgmma_f16(o, prob + 4 * c, keys, true);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void release_v(u32 stage, bool really = true) const { arrive(kVEmpty, stage, really); }

  // scale[half of the tile][row half] = K scale · row scale of the current tile; releases the tile's K.
  __device__ __forceinline__ void read_scales(float (&scale)[2][2]) const {
    __syncwarp();
    arrive(kKEmpty, ring.stage);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[0][half] = q_scale[half] * __uint_as_float(k_scales.x);
      scale[1][half] = q_scale[half] * __uint_as_float(k_scales.y);
    }
  }

  // Raises m_i of rows whose maximum exceeds it by more than rescale_threshold; O has to be multiplied by alpha. Rare: only here do the
  // row's four lanes agree on its maximum.
  __device__ __forceinline__ void update_m_i(const float (&top)[2], float (&alpha)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = row_max(top[half]), old = m_i[half];
      if (most > m_limit[half])
        m_i[half] = WgmmaFp16Reference::of(most, p.log2_p_max), m_limit[half] = rescale_limit(most, p.rescale_threshold);
      alpha[half] = WgmmaFp16Reference::alpha(old, m_i[half]);
    }
  }

  // Scores → P in fp32, in place. Masked scores are fp32 already (mask_scores).
  template <bool kMasked>
  __device__ __forceinline__ void exponentials(Scores& s, const float (&scale)[2][2]) const {
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) shift[half] = kMasked ? score_shift(m_i[half]) : -m_i[half];
#pragma unroll
    for (int i = 0; i < C::kScoreRegisters; ++i) {
      const int half = i / 2 % 2;
      if (!kMasked && kExpChain && i && i % kExpChain == 0)
#pragma unroll
        for (int h = 0; h < 2; ++h) shift[h] = fmaf(__int_as_float(s[i - kExpChain / 2 + 2 * h]), 0.0f, shift[h]);
      const float x =
          kMasked ? __int_as_float(s[i]) + shift[half] : fmaf((float)s[i], scale[i >= C::kScoreRegisters / 2][half], shift[half]);
      s[i] = __float_as_int(exp2_approx(x));
    }
  }

  // Row maxima, rescaling where needed, P in fp16. await_o() waits for O. keys, key0: of a masked tile.
  template <bool kMasked, class AwaitO>
  __device__ __forceinline__ void softmax_step(Scores& s, ProbFragments& prob, const typename Base::Keys& keys, int key0, AwaitO await_o) {
    float scale[2][2], top[2], alpha[2];
    read_scales(scale);
    if constexpr (kMasked) {
      mask_scores(s, scale, keys, key0, top);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        top[half] = fmaxf((float)Base::template lane_max<2>(s, 0, half) * scale[0][half],
                          (float)Base::template lane_max<2>(s, 1, half) * scale[1][half]);
    }
    const bool outgrown = __any_sync(kAllLanes, top[0] > m_limit[0] || top[1] > m_limit[1]);
    if constexpr (kExpBeforeWait) {
      if (outgrown) update_m_i(top, alpha);
      exponentials<kMasked>(s, scale);
    }
    await(kVFull, ring);  // it is a loop, so the compiler does not move the next wait before it
    await_o();
    if (outgrown) {
      if constexpr (!kExpBeforeWait) update_m_i(top, alpha);
      rescale_rows(o, alpha);
    }
    if constexpr (!kExpBeforeWait) exponentials<kMasked>(s, scale);
#pragma unroll
    for (int i = 0; i < C::kProbRegisters; ++i) prob[i] = pack_f16(__int_as_float(s[2 * i]), __int_as_float(s[2 * i + 1]));
  }

  // One tile, whose scores `s` are pending. Meanwhile the tensor cores compute the next tile's scores and the previous one's P·V. last:
  // there is no next tile; the last iteration recomputes its own scores and drops them, which is cheaper than a second copy of the loop
  // body in the instruction cache.
  __device__ __forceinline__ void step(Scores& s, Scores& next, ProbFragments& prob, bool first, bool last) {
    Ring<C::kStages> after = ring, before = ring;
    if (!last) after.advance();
    before.retreat();
    issue_scores(next, after);
    wgmma_wait<2>();  // waits for `s` after the issue above, which then can't sink into the softmax
    warpgroup_fence_operand(s);
    softmax_step<false>(s, prob, {}, 0, [&] {
      wgmma_wait<1>();
      warpgroup_fence_operand(o);
      release_v(before.stage, !first);
    });
    issue_pv(prob, ring.stage);
    load_k_scales(after.stage);
    ring = after;
  }

  // Waits for P·V of the last tile.
  __device__ __forceinline__ void finish() {
    wgmma_wait<0>();
    warpgroup_fence_operand(o);
    release_v(ring.stage);
    ring.advance();
  }

  // One masked tile, without overlap.
  __device__ __forceinline__ void masked_tile() {
    Scores s;
    ProbFragments prob;
    issue_scores(s, ring);
    load_k_scales(ring.stage);
    const int key0 = tile_number * C::kTile;
    const auto keys = Base::visible(key0);
    wgmma_wait<0>();
    warpgroup_fence_operand(s);
    softmax_step<true>(s, prob, keys, key0, [] {});
    issue_pv(prob, ring.stage);
    finish();
  }

  // The next `tiles` tiles, which have no masked key. Two exits, because ptxas serialises wgmma with one (docs/compiler.md).
  __device__ __forceinline__ void unmasked_tiles(int tiles) {
    Scores even, odd;
    ProbFragments prob;
    issue_scores(even, ring);
    load_k_scales(ring.stage);
#pragma unroll
    for (int i = 0; i < C::kProbRegisters; ++i) prob[i] = 0;
    await(kVFull, ring);
    issue_pv<1>(prob, ring.stage);  // dummy P·V with P = 0: the first iteration has as many pending groups as every other
    for (bool first = true;; first = false, tiles -= 2) {
      step(even, odd, prob, first, tiles == 1);
      if (tiles == 1) {
        finish();
        return;
      }
      step(odd, even, prob, false, tiles == 2);
      if (tiles == 2) {
        finish();
        return;
      }
    }
  }

  // P·V of the current tile, whose P is `prob`, and meanwhile the next tile's scores and its P, `next`.
  __device__ __forceinline__ void step_ahead(Scores& s, const ProbFragments& prob, ProbFragments& next) {
    const Ring<C::kStages> before = ring;
    ring.advance();
    issue_scores(s, ring);
    issue_pv(prob, before.stage);
    load_k_scales(ring.stage);
    wgmma_wait<1>();
    warpgroup_fence_operand(s);
    softmax_step<false>(s, next, {}, 0, [&] {
      wgmma_wait<0>();
      warpgroup_fence_operand(o);
      release_v(before.stage);
    });
  }

  // unmasked_tiles() by step_ahead().
  __device__ __forceinline__ void unmasked_tiles_ahead(int tiles) {
    Scores s;
    ProbFragments even, odd;
    issue_scores(s, ring);
    load_k_scales(ring.stage);
    wgmma_wait<0>();
    warpgroup_fence_operand(s);
    softmax_step<false>(s, even, {}, 0, [] {});
    for (;; tiles -= 2) {
      if (tiles == 1) {
        issue_pv(even, ring.stage);
        finish();
        return;
      }
      step_ahead(s, even, odd);
      if (tiles == 2) {
        issue_pv(odd, ring.stage);
        finish();
        return;
      }
      step_ahead(s, odd, even);
    }
  }

  __device__ __forceinline__ void run(KvRange range, float (&l_i)[2]) {
    load_q_fragments();
    m_i[0] = m_i[1] = m_limit[0] = m_limit[1] = WgmmaFp16Reference::kEmpty;
#pragma unroll
    for (int i = 0; i < C::kOutRegisters; ++i) o[i] = 0.0f;
    if (Base::has_tail(range)) {
      float l[2];
      Base::template load_tail<WgmmaFp16Reference>(o, l);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        o[kHeadDim / 2 + 2 * half] = o[kHeadDim / 2 + 2 * half + 1] = l[half];
        m_limit[half] = rescale_limit(m_i[half] + p.log2_p_max, p.rescale_threshold);
      }
    }
    warpgroup_fence_operand(o);
    if constexpr (!C::kResident)
      for (int left = range.masked; left; --left) masked_tile();
    if (range.unmasked) {
      if constexpr (kAhead)
        unmasked_tiles_ahead(range.unmasked);
      else
        unmasked_tiles(range.unmasked);
    }
    l_i[0] = o[kHeadDim / 2], l_i[1] = o[kHeadDim / 2 + 2];  // the columns of ones
  }
};

template <class C>
__device__ __forceinline__ void attend_wgmma(const AttendParams& p) {
  attend_block<C, MainloopFp16>(p);
}

}  // namespace sage
