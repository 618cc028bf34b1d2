// Third launch on Hopper: softmax(Q·Kᵀ)·V with wgmma – INT8 for the scores, e4m3 for P·V, sums in fp32.
//
// A block works as attend_wgmma.cuh says; what differs is what FP8 asks for. The tensor cores keep about 14 bits of an FP8
// accumulator, so a coherent sum loses up to 1.1e-5 a key: O lives in fp32 registers of its own, and a fresh accumulator is added to
// it after 256 keys. Two sets of sums fit the registers beside two of scores if a step takes 64 keys at 128 channels
// (128 at 64). And the products are so fast that the exponentials bind: half of the weights do without one.
#pragma once
#include "wgmma_common.cuh"

namespace sage {

template <class Layout_, Mask kMask_, int kStages_, int kQueryPlaces_>
struct WgmmaFp8Config : WgmmaConfig<Layout_, kMask_, kStages_, kQueryPlaces_> {
  using Layout = Layout_;
  static constexpr bool kLoneIsMasked = true;  // the loop wants two
  static constexpr int kStep = Layout::kHeadDim == 64 ? 128 : 64;  // keys of one step of the softmax
  static constexpr int kParts = Layout::kTile / kStep, kScales = kStep / Layout::kScaleKeys;
  static constexpr int kScoreRegisters = kStep / 2, kWeightRegisters = kStep / 8;
  static constexpr int kOutRegisters = Layout::kHeadDim / 2, kSumRegisters = Layout::kColumns / 2;
  static_assert(Layout::kTile == 128 && Layout::kOnes && Layout::kValueBytes == 1, "steps and scales are worked out for this tile");
};

template <class C>
struct WgmmaFp8Walk : ScoreWalk<C> {
  using Walk = ScoreWalk<C>;
  using typename Walk::Layout, typename Walk::Scores, typename Walk::Weights;
  using Walk::barrier, Walk::tile, Walk::mask_scores, Walk::fetch_scales, Walk::tile_number, Walk::reference, Walk::ring, Walk::k_scales,
      Walk::q_scale, Walk::queries, Walk::p;
  using Scales = float[C::kScales][2];  // [part of the step][row half]
  static constexpr int kHeadDim = C::kHeadDim, kParts = C::kParts;
  static constexpr float kLog2Largest = 8.8073549220576f;  // log2(448) = log2_p_max + rescale_slack
  static constexpr float kNone = -3e38f;                   // a reference below all scores, and a number

  // P is 2^(score − near), O and the sums are relative to `reference` as everywhere.
  float o[C::kOutRegisters], sum[2];
  float acc[C::kSumRegisters];  // of the tensor cores: O and, in the columns of ones, the sums, of the current group of steps
  float near[2];
  bool arrives;  // which lane tells that a stage is free: asked once (`anew`), for the special register takes its time

  // S = Q·Kᵀ of one part of the tile that `at` stands on: issued, not awaited.
  template <int kPart>
  __device__ __forceinline__ void issue_scores(Scores& s, const Ring<C::kStages>& at) const {
    const u64 rows = wgmma_descriptor<C::kQueryPitch>(queries);
    const u64 keys = wgmma_descriptor<Layout::kKPitch>(tile(at.stage)) + (kPart * C::kStep * 16 >> 4);
    if (kPart == 0) mbarrier_wait(barrier(at.stage) + kKeysFull, at.parity);
    wgmma_hold(s);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c)
      wgmma_s8(s, rows + (2 * c * C::kQueryPitch >> 4), keys + (2 * c * Layout::kKPitch >> 4), c > 0);
    wgmma_commit();
  }

  // acc = P·V (+ acc unless fresh) of one part of the current tile: issued, not awaited.
  template <int kPart>
  __device__ __forceinline__ void issue_values(const Weights& prob, bool fresh) {
    const u64 v = wgmma_descriptor<Layout::kVPitch>(tile(ring.stage) + Layout::kV) + (kPart * C::kStep / 16 * Layout::kVPitch >> 4);
    if (kPart == 0) mbarrier_wait(barrier(ring.stage) + kValuesFull, ring.parity);
    wgmma_hold(acc);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < C::kStep / 32; ++c) wgmma_e4m3(acc, prob + 4 * c, v + (2 * c * Layout::kVPitch >> 4), c > 0 || !fresh);
    wgmma_commit();
  }

  // A stage's keys or values have been read. A branch, not a predicate: ptxas takes accumulators for complete from the end of the
  // basic block that waits for them.
  __device__ __forceinline__ void release(u32 which, u32 stage) const {
    __syncwarp();
    if (arrives) mbarrier_arrive(true, barrier(stage) + which);
  }

  // K scales of one part of the current tile, times the rows'.
  template <int kPart>
  __device__ __forceinline__ void take_scales(Scales& scale) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < C::kScales; ++i) scale[i][half] = q_scale[half] * __uint_as_float(kPart + i ? k_scales.y : k_scales.x);
  }

  // The largest of the lane's scores in one row half, in base 2.
  static __device__ __forceinline__ float largest(const Scores& s, const Scales& scale, int half) {
    float top = 0.0f;
#pragma unroll
    for (int part = 0; part < C::kScales; ++part) {
      const float x = (float)Walk::template largest<C::kScales>(s, part, half) * scale[part][half];
      top = part ? fmaxf(top, x) : x;
    }
    return top;
  }

  // Moves what P is relative to in rows with a weight beyond e4m3's range, within a group of steps. Seldom: what a row has in common
  // with its other three lanes is only asked here.
  __device__ __forceinline__ void move_near(const float (&top)[2], float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = row_max(top[half]), old = near[half];
      if (most > old + kLog2Largest) near[half] = most > reference[half] + kLog2Largest ? most - p.log2_p_max : reference[half];
      factor[half] = exp2_approx(old - near[half]);
    }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < C::kSumRegisters; ++i) acc[i] *= factor[i % 4 / 2];
  }

  // O's reference follows P's, and the scores of a step that begins a group.
  __device__ __forceinline__ void move_reference(const float (&top)[2]) {
    const float old[2] = {reference[0], reference[1]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = row_max(top[half]);
      reference[half] = fmaxf(old[half], near[half]);
      if (most > reference[half] + kLog2Largest) reference[half] = most - p.log2_p_max;
    }
    if (!__any_sync(kAllLanes, sum[0] + sum[1] > 0.0f)) return;  // O is 0
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) factor[half] = exp2_approx(old[half] - reference[half]), sum[half] *= factor[half];
#pragma unroll
    for (int i = 0; i < C::kOutRegisters; ++i) o[i] *= factor[i % 4 / 2];
  }

  // A group of steps is complete: acc into O.
  __device__ __forceinline__ void promote() {
    float worth[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      worth[half] = exp2_approx(near[half] - reference[half]);
      sum[half] = fmaf(acc[kHeadDim / 2 + 2 * half], worth[half], sum[half]);
    }
#pragma unroll
    for (int i = 0; i < C::kOutRegisters; ++i) o[i] = fmaf(acc[i], worth[i % 4 / 2], o[i]);
  }

  // What P of a group that begins is relative to. A flat tail far below a row's reference must not be lost on the lines of `weigh`:
  // where all of a row's scores are, its weights are raised.
  __device__ __forceinline__ void begin_group(const float (&top)[2]) {
    constexpr float kFar = 3.0f, kRaise = 4.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 far = __ballot_sync(kAllLanes, top[half] < reference[half] - kFar) >> (special_tid_x() & 28);
      near[half] = (far & 15) == 15 ? reference[half] - kRaise : reference[half];  // the row's four lanes
    }
  }

  // Scores → P in e4m3, in the order of the products' A fragments: word w has of keys 16·(w/2) … + 15 the lane's four of row half w%2.
  // The last two of them get an exponential. The others are on a straight line for each octave, which is to say that their codes are a
  // linear function of the score: down to 2^-6, below which e4m3 has no exponents. Not where a mask may have taken scores and
  // reference far from 0.
  template <bool kMasked>
  __device__ __forceinline__ void weigh(const Scores& s, const Scales& scale, Weights& prob) const {
    constexpr float kExcess = 15.0f / 256;  // the line is too high by this, in base 2, on average
    constexpr int kLink = 4;
    float shift[2], line[2], x[C::kWeightRegisters][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) shift[half] = -near[half], line[half] = fmaf(shift[half], 8.0f, 8 * (7 - kExcess));
#pragma unroll
    for (int w = 0; w < C::kWeightRegisters; ++w) {
      // The codes wait for exponentials of some words before: so the compiler spreads exponentials, of which a scheduler starts one
      // in eight cycles, over all of the conversions. It gathers them behind the rest otherwise.
      if (!kMasked && w >= kLink && w % kLink < 2) line[w % 2] = fmaf(x[w - kLink][2], 0.0f, line[w % 2]);
      const float unit = kMasked ? 1.0f : scale[w * C::kScales / C::kWeightRegisters][w % 2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = (i + 2) % 4;
        const i32 score = s[w / 2 * 8 + w % 2 * 2 + e % 2 + e / 2 * 4];
        const float y = kMasked ? __int_as_float(score) : (float)score;
        x[w][e] = !kMasked && e < 2 ? fmaf(y, 8 * unit, line[w % 2]) : exp2_approx(fmaf(y, unit, shift[w % 2]));
      }
      prob[w] = kMasked ? pack_e4m3(x[w][0], x[w][1], x[w][2], x[w][3]) : pack_e4m3_codes(x[w][0], x[w][1], x[w][2], x[w][3]);
    }
  }

  // One step, whose scores are in `s`. Meanwhile the tensor cores have the scores of the next step and P·V of the one before, and
  // afterwards P·V of this one. fresh: a group of steps begins. last: there is no next tile, and this one's scores are taken again, for
  // nothing: one loop without other ends is worth more, its instructions stay in the multiprocessor's cache.
  template <int kPart>
  __device__ __forceinline__ void step(Scores& s, Scores& next, Weights& prob, bool fresh, bool first, bool last) {
    constexpr bool kTileEnds = kPart == kParts - 1;
    Scales scale;
    float top[2], factor[2];
    Ring<C::kStages> after = ring, before = ring;
    if (kTileEnds && !last) after.advance();
    before.retreat();
    take_scales<kPart>(scale);
    wgmma_hold(s);
    bool moves = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = largest(s, scale, half);
      moves |= top[half] > near[half] + kLog2Largest || (fresh && near[half] > reference[half]);
    }
    moves = __any_sync(kAllLanes, moves);
    issue_scores<kTileEnds ? 0 : kPart + 1>(next, after);
    if (kTileEnds) release(kKeysFree, ring.stage);  // not before: the last step waits for the same keys again
    if (moves) {
      if (fresh)
        move_reference(top);
      else
        move_near(top, factor);
    }
    if (kTileEnds) fetch_scales(after.stage);
    wgmma_wait<1>();
    wgmma_hold(acc);
    if (kPart == 0 && !first) release(kValuesFree, before.stage);
    if (fresh) {
      if (!first) promote();
      begin_group(top);
    } else if (moves) {
      rescale(factor);
    }
    weigh<false>(s, scale, prob);
    issue_values<kPart>(prob, fresh);
    wgmma_wait<1>();
    wgmma_hold(next);
    ring = after;
  }

  // One part of a tile on its own, masked.
  template <int kPart>
  __device__ __forceinline__ void masked_step(Scores& s) {
    Scales scale;
    Weights prob;
    float top[2];
    issue_scores<kPart>(s, ring);
    if (kPart == 0) fetch_scales(ring.stage);
    const int key0 = tile_number * C::kTile + kPart * C::kStep;
    const auto keys = Walk::visible(key0);
    wgmma_wait<0>();
    take_scales<kPart>(scale);
    wgmma_hold(s);
    if (kPart == kParts - 1) release(kKeysFree, ring.stage);
    mask_scores(s, scale, keys, key0, top);
    if (__any_sync(kAllLanes, top[0] > reference[0] + kLog2Largest || top[1] > reference[1] + kLog2Largest)) move_reference(top);
    near[0] = reference[0], near[1] = reference[1];
    weigh<true>(s, scale, prob);
    issue_values<kPart>(prob, true);
    wgmma_wait<0>();
    wgmma_hold(acc);
    promote();
  }

  __device__ __forceinline__ void single() {
    Scores s;
    masked_step<0>(s);
    if constexpr (kParts == 2) masked_step<1>(s);
    release(kValuesFree, ring.stage);
    ring.advance();
  }

  // The end of a run: P·V of its last step.
  __device__ __forceinline__ void finish() {
    wgmma_wait<0>();
    wgmma_hold(acc);
    release(kValuesFree, ring.stage);
    if (__any_sync(kAllLanes, near[0] > reference[0] || near[1] > reference[1])) move_reference({kNone, kNone});
    promote();
    ring.advance();
  }

  // `tiles` of them without masked keys. ptxas wants two ends (docs/kernels.md).
  __device__ __forceinline__ void run(int tiles) {
    Scores even, odd;
    Weights prob;
    if constexpr (kParts == 1)  // the shuffles tell the compiler that all lanes have the same: it keeps them in uniform registers
      tiles = __shfl_sync(kAllLanes, tiles, 0), ring.stage = __shfl_sync(kAllLanes, ring.stage, 0), ring.parity = __shfl_sync(kAllLanes, ring.parity, 0);
    issue_scores<0>(even, ring);
    fetch_scales(ring.stage);
#pragma unroll
    for (int i = 0; i < C::kWeightRegisters; ++i) prob[i] = 0;
    wgmma_wait<0>();
    wgmma_hold(even);
    issue_values<0>(prob, true);  // sums of 0: so the loop is entered as it is repeated
    if constexpr (kParts == 2) {
      for (bool first = true;; first = false, tiles -= 2) {
        step<0>(even, odd, prob, true, first, false);
        step<1>(odd, even, prob, false, false, tiles == 1);
        if (tiles == 1) {
          finish();
          return;
        }
        step<0>(even, odd, prob, false, false, false);
        step<1>(odd, even, prob, false, false, tiles == 2);
        if (tiles == 2) {
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

  __device__ __forceinline__ void all(Span span, float (&sums)[2]) {
#pragma unroll
    for (int i = 0; i < C::kOutRegisters; ++i) o[i] = 0.0f;
    sum[0] = sum[1] = 0.0f;
    arrives = anew(elected());
    reference[0] = reference[1] = near[0] = near[1] = kNone;
    for (int left = span.masked; left; --left) single();
    if (span.unmasked) run(span.unmasked);
    sums[0] = sum[0], sums[1] = sum[1];
  }
};

template <class C, int kSharedBytes>
__device__ __forceinline__ void attend_wgmma_fp8(const AttendParams& p) {
  attend_block<C, WgmmaFp8Walk, kSharedBytes>(p);
}

}  // namespace sage
