// Third launch on Hopper: softmax(Q·Kᵀ)·V with wgmma – INT8 for the scores, fp16 for P·V, sums in fp32.
//
// A block has 128 queries of one head. Its first warpgroup fetches: one thread keeps bulk copies of KV tiles under way. Each of the
// other two owns 64 queries and walks over the tiles, last tile first: tiles with masked keys, then the long run without. In that
// run the scores of the next tile are computed while the softmax of this one is; P goes to the tensor cores from registers, as
// the accumulators of the scores are already the fragments of P.
#pragma once
#include "wgmma_common.cuh"

namespace sage {

// The walk with P·V in fp16. The denominator is O's columns of ones.
template <class C>
struct WgmmaWalk : ScoreWalk<C> {
  using Walk = ScoreWalk<C>;
  using typename Walk::Layout, typename Walk::Scores, typename Walk::Weights;
  using Walk::barrier, Walk::tile, Walk::elected, Walk::issue_scores, Walk::take_scales, Walk::largest, Walk::mask_scores,
      Walk::move_references, Walk::reference, Walk::ring;
  static constexpr int kColumns8 = Walk::kColumns8;

  float o[C::kOutRegisters];

  // O += P·V of the stage that `at` stands on: issued, not awaited.
  __device__ __forceinline__ void issue_values(const Weights& prob, const Ring<C::kStages>& at) {
    const u64 v = wgmma_descriptor<Layout::kVPitch>(tile(at.stage) + Layout::kV);
    mbarrier_wait(barrier(at.stage) + kValuesFull, at.parity);
    wgmma_hold(o);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < C::kTile / 16; ++c) wgmma_f16<true>(o, prob + 4 * c, v + (2 * c * Layout::kVPitch >> 4));
    wgmma_commit();
  }

  // Waits for every product under way; `at`'s V has been read then.
  __device__ __forceinline__ void finish_values(const Ring<C::kStages>& at) {
    wgmma_wait<0>();
    wgmma_hold(o);
    mbarrier_arrive(elected(), barrier(at.stage) + kValuesFree);
  }

  // O, which no product may be writing, times the factors: one for the most part.
  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
    if (__any_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < C::kOutRegisters; ++i) o[i] *= factor[i % 4 / 2];
    }
  }

  // S → P, fp16 pairs in the order of the products' A fragments.
  template <bool kMasked>
  __device__ __forceinline__ void weigh(const Scores& s, const float (&scale)[2][2], Weights& prob) const {
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      shift[half] = kMasked && reference[half] == -kInf ? 0.0f : -reference[half];
#pragma unroll
    for (int j = 0; j < kColumns8; ++j) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2;
        x[i] = exp2_approx(kMasked ? __int_as_float(s[4 * j + i]) + shift[half]
                                   : fmaf((float)s[4 * j + i], scale[j >= kColumns8 / 2][half], shift[half]));
      }
      prob[2 * j] = pack_f16(x[0], x[1]), prob[2 * j + 1] = pack_f16(x[2], x[3]);
      // Ties each sixteen keys to the ones before: left alone, the compiler gathers all exponentials in front of all
      // conversions, and the units take turns idling.
      if (!kMasked && j % 2) shift[0] = fmaf(x[0], 0.0f, shift[0]), shift[1] = fmaf(x[2], 0.0f, shift[1]);
    }
  }

  // A tile with masked keys (or any other), start to end.
  __device__ __forceinline__ void masked_tile(int n) {
    Scores s;
    Weights prob;
    float scale[2][2], top[2], factor[2];
    issue_scores(s, ring);
    wgmma_wait<0>();
    wgmma_hold(s);
    take_scales(scale);
    mask_scores(s, scale, n * C::kTile, top);
    move_references(top, factor);
    rescale(factor);
    weigh<true>(s, scale, prob);
    issue_values(prob, ring);
    finish_values(ring);
    ring.advance();
  }

  // Softmax of the current tile, whose scores `s` are there already, to `prob`; meanwhile the tensor cores work on the scores of
  // the tile after it (if kNext) and on the weights `last` of the one before it (if kLast).
  template <bool kNext, bool kLast>
  __device__ __forceinline__ void step(Scores& s, Scores& next, Weights& prob, const Weights& last) {
    float scale[2][2], top[2], factor[2];
    Ring<C::kStages> after = ring, before = ring;
    after.advance(), before.retreat();
    if constexpr (kLast) issue_values(last, before);
    if constexpr (kNext) issue_scores(next, after);
    const i32 least = take_scales(scale);
    wgmma_hold(s);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      top[half] = fmaxf((float)largest(s, 0, half, least) * scale[0][half], (float)largest(s, 1, half, least) * scale[1][half]);
    move_references(top, factor);
    weigh<false>(s, scale, prob);
    if constexpr (kLast)
      finish_values(before);
    else
      wgmma_wait<0>();
    if constexpr (kNext) wgmma_hold(next);
    rescale(factor);
    ring = after;
  }

  // `count` tiles without masked keys, an even number.
  __device__ __forceinline__ void run(int count) {
    Scores even, odd;
    Weights even_prob, odd_prob;
    issue_scores(even, ring);
    wgmma_wait<0>();
    wgmma_hold(even);
    step<true, false>(even, odd, even_prob, odd_prob);
    for (int n = 2; n < count; n += 2) {
      step<true, true>(odd, even, odd_prob, even_prob);
      step<true, true>(even, odd, even_prob, odd_prob);
    }
    step<false, true>(odd, even, odd_prob, even_prob);
    Ring<C::kStages> last = ring;
    last.retreat();
    issue_values(odd_prob, last);
    finish_values(last);
  }

  __device__ __forceinline__ void all(Span span, float (&sums)[2]) {
#pragma unroll
    for (int i = 0; i < C::kOutRegisters; ++i) o[i] = 0.0f;
    wgmma_hold(o);
    tiles(span);
    sums[0] = o[C::kHeadDim / 2], sums[1] = o[C::kHeadDim / 2 + 2];  // the columns of ones
  }

  __device__ __forceinline__ void tiles(Span span) {
    int n = span.tiles - 1;
    for (; n >= span.full; --n) masked_tile(n);
    if constexpr (C::kMask == Mask::dense) return;
    if (n % 2 == 0) masked_tile(n), --n;  // leaves an even number
    if (n >= 0) run(n + 1);
  }
};

template <class C, int kSharedBytes>
__device__ void attend_wgmma(const AttendParams& p) {
  attend_block<C, WgmmaWalk, kSharedBytes>(p);
}

}  // namespace sage
