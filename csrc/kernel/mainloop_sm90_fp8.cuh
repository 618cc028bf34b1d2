// Third launch on Hopper: softmax(Q·Kᵀ)·V with wgmma – INT8 for the scores, e4m3 for P·V, sums in fp32.
//
// A CTA works as in mainloop_sm90_fp16.cuh, with two differences. The tensor cores keep about 14 bits of an FP8 accumulator, so a coherent
// sum loses up to 1.1e-5 a key: the accumulator is promoted to O in fp32 registers every 256 keys. Both fit the registers beside two score
// arrays if a softmax step takes 64 keys at head_dim 128 (128 at 64). And exponentials are the bottleneck: half of P does without one.
#pragma once
#include "attend_sm90.cuh"

namespace sage {

template <class Layout_, WgmmaTile kWgmmaTile>
struct WgmmaFp8Config : WgmmaConfig<Layout_, kWgmmaTile> {
  using Layout = Layout_;
  using Base = WgmmaConfig<Layout_, kWgmmaTile>;
  static constexpr int kStep = Layout::kHeadDim == 64 && Layout::kTile == 128 ? 128 : 64;  // keys of a softmax step
  static constexpr int kStepsPerTile = Layout::kTile / kStep, kStepsPerStage = kStepsPerTile * Base::kStageTiles;
  static constexpr int kScaleCount = kStep / Layout::kScaleKeys;
  static constexpr int kScoreRegisters = kStep / 2, kProbRegisters = kStep / 8;
  static constexpr int kOutRegisters = Layout::kHeadDim / 2, kAccRegisters = Layout::kVColumns / 2;
  // Unmasked tiles of a run: at least two, and whole stages, so that four steps make a group.
  static constexpr int kGroupSteps = 256 / kStep, kUnmaskedLeast = 2, kUnmaskedMultiple = Base::kStageTiles;
  static_assert(kStepsPerStage == 2 || kGroupSteps == 2, "a group of four steps is two stages");
  static_assert((Layout::kTile == 128 || Layout::kTile == 64) && Layout::kOnes && Layout::kVElementBytes == 1,
                "steps and scales are worked out for this tile");
};

// What FP8 main loops share: the softmax, and the state of O.
template <class C>
struct SoftmaxFp8 : MainloopSm90<C> {
  using Base = MainloopSm90<C>;
  using typename Base::Layout, typename Base::Scores, typename Base::ProbFragments;
  using Base::barrier, Base::k_scales, Base::m_i, Base::p, Base::q_scale;
  using Scales = float[C::kScaleCount][2];  // [part of the step's keys][row half]

  // P = 2^(score − m_p); O and l_i are relative to m_i. o: [4 · n-tile + 2 · half + e]; l_i, m_p: [half].
  float o[C::kOutRegisters], l_i[2], m_p[2];
  bool arrives;  // lane 0; computed once, because %tid is slow to read

  // Begins a work tile.
  __device__ __forceinline__ void begin(const KvRange& range) {
#pragma unroll
    for (int i = 0; i < C::kOutRegisters; ++i) o[i] = 0.0f;
    l_i[0] = l_i[1] = 0.0f;
    arrives = opaque(elected());
    m_i[0] = m_i[1] = WgmmaFp8Reference::kEmpty;
    if (Base::has_tail(range)) Base::template load_tail<WgmmaFp8Reference>(o, l_i);
    m_p[0] = m_i[0], m_p[1] = m_i[1];
  }

  // Releases a stage's K or V. A branch instead of a predicate: ptxas treats accumulators as complete only after the basic block that waits
  // for them.
  __device__ __forceinline__ void release(u32 which, u32 stage) const {
    __syncwarp();
    if (arrives) mbarrier_arrive(true, barrier(stage) + which);
  }

  // scale = K scale · row scale, for one step of the current tile.
  template <int kStepInTile>
  __device__ __forceinline__ void read_scales(Scales& scale) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < C::kScaleCount; ++i) scale[i][half] = q_scale[half] * __uint_as_float(kStepInTile + i ? k_scales.y : k_scales.x);
  }

  // The lane's largest base-2 score of one row half.
  static __device__ __forceinline__ float lane_max(const Scores& s, const Scales& scale, int half) {
    float top = 0.0f;
#pragma unroll
    for (int part = 0; part < C::kScaleCount; ++part) {
      const float x = (float)Base::template lane_max<C::kScaleCount>(s, part, half) * scale[part][half];
      top = part ? fmaxf(top, x) : x;
    }
    return top;
  }

  // Raises m_i to m_p and to the scores of a step that begins a promotion group; rescales O and l_i.
  __device__ __forceinline__ void update_m_i(const float (&top)[2]) {
    const float old[2] = {m_i[0], m_i[1]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = row_max(top[half]);
      m_i[half] = fmaxf(old[half], m_p[half]);
      const float raised = WgmmaFp8Reference::of(most, p.log2_p_max);
      m_i[half] = most > rescale_limit(m_i[half], kLog2E4m3Max) ? raised : m_i[half];
    }
    if (!__any_sync(kAllLanes, l_i[0] + l_i[1] > 0.0f)) return;  // O is 0
    float alpha[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) alpha[half] = WgmmaFp8Reference::alpha(old[half], m_i[half]), l_i[half] *= alpha[half];
    rescale_rows(o, alpha);
  }

  // Sets m_p at the start of a promotion group. If all scores of a row are more than kTailThreshold below m_i, its P is boosted by
  // 2^kTailBoostLog2 for the group: a flat tail would underflow e4m3 on the linear segments of softmax_step.
  __device__ __forceinline__ void begin_group(const float (&top)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 far = __ballot_sync(kAllLanes, top[half] < m_i[half] - kTailThreshold) >> (special_tid_x() & 28);
      m_p[half] = (far & 15) == 15 ? m_i[half] - kTailBoostLog2 : m_i[half];  // the row's four lanes
    }
  }

  // A promotion group of masked scores, without overlap and without a boost: its P takes exponentials only.
  __device__ __forceinline__ void begin_masked_group(const float (&top)[2]) {
    if (__any_sync(kAllLanes, top[0] > rescale_limit(m_i[0], kLog2E4m3Max) || top[1] > rescale_limit(m_i[1], kLog2E4m3Max)))
      update_m_i(top);
    m_p[0] = m_i[0], m_p[1] = m_i[1];
  }

  // Scores → P in e4m3, as A fragments: word w holds the lane's four keys of 16·(w/2) … + 15 in row half w % 2. Two of them get an
  // exponential. For the other two exp2 is piecewise linear, one segment an octave, so e4m3's bits are a linear function of the score, down
  // to 2^-6, where e4m3 becomes subnormal. Masked tiles use exponentials only: scores and m_p may be far from 0.
  template <bool kMasked>
  __device__ __forceinline__ void softmax_step(const Scores& s, const Scales& scale, ProbFragments& prob) const {
    constexpr int kExpChain = 4;
    float shift[2], line[2], x[C::kProbRegisters][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) shift[half] = -m_p[half], line[half] = fmaf(shift[half], 8.0f, 8 * (7 - kLineExcess));
#pragma unroll
    for (int w = 0; w < C::kProbRegisters; ++w) {
      // A false dependency of the linear ones on earlier exponentials makes the compiler spread the exponentials, which issue every eighth
      // cycle, over all conversions; otherwise it schedules them after the rest.
      if (!kMasked && w >= kExpChain && w % kExpChain < 2) line[w % 2] = fmaf(x[w - kExpChain][2], 0.0f, line[w % 2]);
      const float unit = kMasked ? 1.0f : scale[w * C::kScaleCount / C::kProbRegisters][w % 2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = (i + 2) % 4;
        const i32 score = s[w / 2 * 8 + w % 2 * 2 + e % 2 + e / 2 * 4];
        const float y = kMasked ? __int_as_float(score) : (float)score;
        x[w][e] = !kMasked && e < 2 ? fmaf(y, 8 * unit, line[w % 2]) : exp2_approx(fmaf(y, unit, shift[w % 2]));
      }
      prob[w] = kMasked ? pack_e4m3(x[w][0], x[w][1], x[w][2], x[w][3]) : pack_e4m3_bits(x[w][0], x[w][1], x[w][2], x[w][3]);
    }
  }
};

template <class C>
struct MainloopFp8 : SoftmaxFp8<C> {
  using Base = SoftmaxFp8<C>;
  using typename Base::Layout, typename Base::Scores, typename Base::ProbFragments, typename Base::Scales;
  using Base::barrier, Base::tile, Base::mask_scores, Base::load_k_scales, Base::tile_number, Base::m_i, Base::ring, Base::sQ, Base::p;
  using Base::begin_group, Base::begin_masked_group, Base::l_i, Base::m_p, Base::o, Base::release, Base::update_m_i;
  static constexpr int kHeadDim = C::kHeadDim, kStepsPerTile = C::kStepsPerTile, kStepsPerStage = C::kStepsPerStage;

  float acc[C::kAccRegisters];  // P·V of the current promotion group, as o; its last n-tile, of columns of ones, sums P

  // Where the tile of a stage's step lies, from the stage's beginning.
  static constexpr u32 tile_of_step(int step) { return step / kStepsPerTile * Layout::kTileBytes; }

  // Issues S = Q·Kᵀ of one step of the stage at `at`.
  template <int kStepInStage>
  __device__ __forceinline__ void issue_scores(Scores& s, const Ring<C::kStages>& at) const {
    const u64 rows = wgmma_descriptor<C::kQPitch>(sQ);
    const u64 keys = wgmma_descriptor<Layout::kKPitch>(tile(at.stage)) +
                     (tile_of_step(kStepInStage) + kStepInStage % kStepsPerTile * C::kStep * 16 >> 4);
    if (kStepInStage == 0) mbarrier_wait(barrier(at.stage) + kKFull, at.parity);
    warpgroup_fence_operand(s);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) wgmma_s8(s, rows + (2 * c * C::kQPitch >> 4), keys + (2 * c * Layout::kKPitch >> 4), c > 0);
    wgmma_commit();
  }

  // Issues acc = P·V (+ acc unless fresh) of one step of the current stage.
  template <int kStepInStage>
  __device__ __forceinline__ void issue_pv(const ProbFragments& prob, bool fresh) {
    const u64 v = wgmma_descriptor<Layout::kVPitch>(tile(ring.stage) + Layout::kV) +
                  (tile_of_step(kStepInStage) + kStepInStage % kStepsPerTile * C::kStep / 16 * Layout::kVPitch >> 4);
    if (kStepInStage == 0) mbarrier_wait(barrier(ring.stage) + kVFull, ring.parity);
    warpgroup_fence_operand(acc);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < C::kStep / 32; ++c) wgmma_e4m3(acc, prob + 4 * c, v + (2 * c * Layout::kVPitch >> 4), c > 0 || !fresh);
    wgmma_commit();
  }

  // Raises m_p within a promotion group, in rows where P would exceed e4m3's range; acc has to be multiplied by alpha. Rare: only here do
  // the row's four lanes agree on its maximum.
  __device__ __forceinline__ void update_m_p(const float (&top)[2], float (&alpha)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = row_max(top[half]), old = m_p[half];
      const float raised = WgmmaFp8Reference::of(most, p.log2_p_max),
                  next = most > rescale_limit(m_i[half], kLog2E4m3Max) ? raised : m_i[half];
      m_p[half] = most > rescale_limit(old, kLog2E4m3Max) ? next : old;
      alpha[half] = WgmmaFp8Reference::alpha(old, m_p[half]);
    }
  }

  // Ends a promotion group: adds acc to O, and its row sums to l_i.
  __device__ __forceinline__ void promote() {
    float alpha[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      alpha[half] = WgmmaFp8Reference::alpha(m_p[half], m_i[half]);
      l_i[half] = fmaf(acc[kHeadDim / 2 + 2 * half], alpha[half], l_i[half]);
    }
#pragma unroll
    for (int i = 0; i < C::kOutRegisters; ++i) o[i] = fmaf(acc[i], alpha[i % 4 / 2], o[i]);
  }

  // One step, whose scores are in `s`. Meanwhile the tensor cores compute the next step's scores and the previous one's P·V. fresh: a
  // promotion group begins. last: there is no next stage; the step recomputes its own stage's scores and drops them, as in MainloopFp16.
  template <int kStepInStage>
  __device__ __forceinline__ void step(Scores& s, Scores& next, ProbFragments& prob, bool fresh, bool first, bool last) {
    constexpr int kNext = (kStepInStage + 1) % kStepsPerStage;
    constexpr bool kStageEnds = kNext == 0, kTileEnds = kNext % kStepsPerTile == 0;
    Scales scale;
    float top[2], alpha[2];
    Ring<C::kStages> after = ring, before = ring;
    if (kStageEnds && !last) after.advance();
    before.retreat();
    Base::template read_scales<kStepInStage % kStepsPerTile>(scale);
    warpgroup_fence_operand(s);
    bool moves = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = Base::lane_max(s, scale, half);
      moves |= top[half] > rescale_limit(m_p[half], kLog2E4m3Max) || (fresh && m_p[half] > m_i[half]);
    }
    moves = __any_sync(kAllLanes, moves);
    issue_scores<kNext>(next, after);
    if (kStageEnds) release(kKEmpty, ring.stage);  // after the issue: the last step reads the same K again
    if (moves) {
      if (fresh)
        update_m_i(top);
      else
        update_m_p(top, alpha);
    }
    if (kTileEnds) load_k_scales(after.stage, kNext / kStepsPerTile);
    wgmma_wait<1>();
    warpgroup_fence_operand(acc);
    if (kStepInStage == 0 && !first) release(kVEmpty, before.stage);
    if (fresh) {
      if (!first) promote();
      begin_group(top);
    } else if (moves) {
      rescale_rows(acc, alpha);
    }
    Base::template softmax_step<false>(s, scale, prob);
    issue_pv<kStepInStage>(prob, fresh);
    wgmma_wait<1>();
    warpgroup_fence_operand(next);
    ring = after;
  }

  // One masked step, without overlap. The stage has one tile, whatever others have.
  template <int kStepInTile>
  __device__ __forceinline__ void masked_step(Scores& s) {
    Scales scale;
    ProbFragments prob;
    float top[2];
    issue_scores<kStepInTile>(s, ring);
    if (kStepInTile == 0) load_k_scales(ring.stage);
    const int key0 = tile_number * C::kTile + kStepInTile * C::kStep;
    const auto keys = Base::visible(key0);
    wgmma_wait<0>();
    Base::template read_scales<kStepInTile>(scale);
    warpgroup_fence_operand(s);
    if (kStepInTile == kStepsPerTile - 1) release(kKEmpty, ring.stage);
    mask_scores(s, scale, keys, key0, top);
    begin_masked_group(top);
    Base::template softmax_step<true>(s, scale, prob);
    issue_pv<kStepInTile>(prob, true);
    wgmma_wait<0>();
    warpgroup_fence_operand(acc);
    promote();
  }

  // Both steps of a mixed tile of a list. Their products and their loads of the mask's bits are under way together, and they share a
  // promotion.
  __device__ __forceinline__ void mixed_tile(Scores& first, Scores& second) {
    Scales scale;
    float top[2], more[2];
    ProbFragments prob[2];
    issue_scores<0>(first, ring);
    load_k_scales(ring.stage);
    issue_scores<kStepsPerTile - 1>(second, ring);
    const int key0 = tile_number * C::kTile;
    const auto keys = Base::visible(key0), more_keys = Base::visible(key0 + C::kStep);
    wgmma_wait<0>();
    warpgroup_fence_operand(first);
    warpgroup_fence_operand(second);
    release(kKEmpty, ring.stage);
    Base::template read_scales<0>(scale);
    mask_scores(first, scale, keys, key0, top);
    Base::template read_scales<kStepsPerTile - 1>(scale);
    mask_scores(second, scale, more_keys, key0 + C::kStep, more);
    top[0] = fmaxf(top[0], more[0]), top[1] = fmaxf(top[1], more[1]);
    begin_masked_group(top);
    Base::template softmax_step<true>(first, scale, prob[0]);
    issue_pv<0>(prob[0], true);
    Base::template softmax_step<true>(second, scale, prob[1]);
    issue_pv<kStepsPerTile - 1>(prob[1], false);
    wgmma_wait<0>();
    warpgroup_fence_operand(prob[0]);  // until here the tensor cores read them
    warpgroup_fence_operand(prob[1]);
    warpgroup_fence_operand(acc);
    promote();
    release(kVEmpty, ring.stage);
    ring.advance();
  }

  __device__ __forceinline__ void masked_tile() {
    Scores s;
    masked_step<0>(s);
    if constexpr (kStepsPerTile == 2) {
      bool reached = true;
      // Whether any query of the warpgroup sees a key of the second half.
      if constexpr (C::kMask == Mask::causal || C::kMask == Mask::packed) {
        const int key0 = tile_number * C::kTile + C::kStep;
        reached = C::kMask == Mask::causal || key0 < Base::work_tile().span.len_kv;
        if (Base::causal) reached = reached && key0 <= Base::last_row();
        reached = __any_sync(kAllLanes, reached);
      }
      if (reached)
        masked_step<1>(s);
      else
        release(kKEmpty, ring.stage);
    }
    release(kVEmpty, ring.stage);
    ring.advance();
  }

  // Waits for P·V of the last step and promotes it.
  __device__ __forceinline__ void finish() {
    wgmma_wait<0>();
    warpgroup_fence_operand(acc);
    release(kVEmpty, ring.stage);
    if (__any_sync(kAllLanes, m_p[0] > m_i[0] || m_p[1] > m_i[1])) update_m_i({WgmmaFp8Reference::kEmpty, WgmmaFp8Reference::kEmpty});
    promote();
    ring.advance();
  }

  // Begins a run of tiles: the scores of its first step in `s`, P·V with P = 0 under way, so that the first iteration has as many pending
  // groups as every other.
  __device__ __forceinline__ void enter(Scores& s, ProbFragments& prob) {
    issue_scores<0>(s, ring);
    load_k_scales(ring.stage);
#pragma unroll
    for (int i = 0; i < C::kProbRegisters; ++i) prob[i] = 0;
    wgmma_wait<0>();
    warpgroup_fence_operand(s);
    issue_pv<0>(prob, true);
  }

  // The next `tiles` tiles, which have no masked key. Two exits, because ptxas serialises wgmma with one (docs/compiler.md).
  __device__ __forceinline__ void unmasked_tiles(Scores& even, Scores& odd, ProbFragments& prob, int tiles) {
    if constexpr (C::kGroupSteps == 4) {
      for (int stages = tiles / C::kStageTiles, first = 1;; first = 0, stages -= 2) {
        step<0>(even, odd, prob, true, first, false);
        step<1>(odd, even, prob, false, false, stages == 1);
        if (stages == 1) {
          finish();
          return;
        }
        step<0>(even, odd, prob, false, false, false);
        step<1>(odd, even, prob, false, false, stages == 2);
        if (stages == 2) {
          finish();
          return;
        }
      }
    } else {
      step<0>(even, odd, prob, true, true, false);
      for (; tiles > 3; tiles -= 2) {
        step<0>(odd, even, prob, false, false, false);
        step<0>(even, odd, prob, true, false, false);
      }
      if (tiles == 3) {
        step<0>(odd, even, prob, false, false, false);
        step<0>(even, odd, prob, true, false, true);
        finish();
      } else {
        step<0>(odd, even, prob, false, false, true);
        finish();
      }
    }
  }

  __device__ __forceinline__ void run(KvRange range, float (&l_out)[2]) {
    Scores even, odd;
    ProbFragments prob;
    Base::begin(range);
    for (int left = range.masked; left; --left)
      if constexpr (C::kMask == Mask::list && kStepsPerTile == 2)
        mixed_tile(even, odd);
      else
        masked_tile();
    if (range.unmasked) {
      if constexpr (C::kGroupSteps == 2)  // the shuffles tell the compiler that all lanes have the same: it keeps them in uniform registers
        range.unmasked = __shfl_sync(kAllLanes, range.unmasked, 0), ring.stage = __shfl_sync(kAllLanes, ring.stage, 0),
        ring.parity = __shfl_sync(kAllLanes, ring.parity, 0);
      enter(even, prob);
      unmasked_tiles(even, odd, prob, range.unmasked);
    }
    l_out[0] = l_i[0], l_out[1] = l_i[1];
  }
};

template <class C>
__device__ __forceinline__ void attend_wgmma_fp8(const AttendParams& p) {
  attend_block<C, MainloopFp8>(p);
}

}  // namespace sage
