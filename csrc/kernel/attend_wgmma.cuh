// Third launch on Hopper: softmax(Q·Kᵀ)·V with wgmma – INT8 for the scores, fp16 for P·V, sums in fp32.
//
// A block has 128 queries of one head at a time. Its first warpgroup fetches: KV tiles, queries, channel scales. Each of the
// other two owns 64 queries and walks over the tiles, last tile first. While the softmax of a tile is computed, the tensor cores work
// on the scores of the next one and on P·V of the one before; P goes to them from registers, as the accumulators of the scores are
// already the fragments of P. The denominator is O's columns of ones.
//
// What ptxas makes of it (docs/kernels.md): the shape of `run`'s loop and the places of the waits are what keeps wgmma asynchronous.
#pragma once
#include "wgmma_common.cuh"

namespace sage {

template <class C>
struct WgmmaWalk : ScoreWalk<C> {
  using Walk = ScoreWalk<C>;
  using typename Walk::Layout, typename Walk::Scores, typename Walk::Weights;
  using Walk::barrier, Walk::tile, Walk::mask_scores, Walk::fetch_scales, Walk::tile_number, Walk::reference, Walk::ring, Walk::k_scales,
      Walk::q_scale, Walk::queries, Walk::p;
  static constexpr int kHeadDim = C::kHeadDim, kSteps = kHeadDim / 32;
  // Q's A fragments of so many of the scores' steps are in registers, where there are any left: shared memory has less to feed.
  static constexpr int kHeld = kHeadDim == 64 ? 0 : 2;
  // Whether the exponentials are taken before P·V of the last tile is awaited, and how many of them are tied together: left alone,
  // the compiler gathers all of a tile in front of all conversions. Both by measurement.
  static constexpr bool kEarly = kHeadDim == 64;
  static constexpr int kChain = kHeadDim == 64 ? 8 : 0;

  float o[C::kOutRegisters];
  float limit[2];  // a score above this moves the row's reference
  u32 q[4 * kHeld + 1];  // + 1: no array is empty

  // The A fragments of the last kHeld steps, as wgmma would read them from shared memory.
  __device__ __forceinline__ void hold_queries() {
    const int lane = special_tid_x() % 32, warp = special_tid_x() / 32 % 4;
    const u32 from = queries + 2 * (kSteps - kHeld) * C::kQueryPitch + (16 * warp + lane / 4) * 16 + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4 * kHeld; ++i) q[i] = load_shared(from + i / 2 * C::kQueryPitch + i % 2 * 128);
  }

  // S = Q·Kᵀ of the stage that `at` stands on: issued, not awaited.
  __device__ __forceinline__ void issue_scores(Scores& s, const Ring<C::kStages>& at) const {
    const u64 rows = wgmma_descriptor<C::kQueryPitch>(queries), keys = wgmma_descriptor<Layout::kKPitch>(tile(at.stage));
    mbarrier_wait(barrier(at.stage) + kKeysFull, at.parity);
    wgmma_hold(s);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
      const u64 b = keys + (2 * c * Layout::kKPitch >> 4);
      if (c >= kSteps - kHeld)
        wgmma_s8(s, q + 4 * (c - kSteps + kHeld), b, c > 0);
      else
        wgmma_s8(s, rows + (2 * c * C::kQueryPitch >> 4), b, c > 0);
    }
    wgmma_commit();
  }

  // O += P·V of the current tile, of its first kChunks times sixteen keys: issued, not awaited.
  template <int kChunks = C::kTile / 16>
  __device__ __forceinline__ void issue_values(const Weights& prob) {
    const u64 v = wgmma_descriptor<Layout::kVPitch>(tile(ring.stage) + Layout::kV);
    wgmma_hold(o);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) wgmma_f16(o, prob + 4 * c, v + (2 * c * Layout::kVPitch >> 4), true);
    wgmma_commit();
  }

  __device__ __forceinline__ void release_values(u32 stage, bool really = true) const {
    mbarrier_arrive(elected() && really, barrier(stage) + kValuesFree);
  }

  // Takes the current tile's K scales, times the rows': scale[half of the tile][row half]. Then K is not needed any more.
  __device__ __forceinline__ void take_scales(float (&scale)[2][2]) const {
    __syncwarp();
    mbarrier_arrive(elected(), barrier(ring.stage) + kKeysFree);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[0][half] = q_scale[half] * __uint_as_float(k_scales.x);
      scale[1][half] = q_scale[half] * __uint_as_float(k_scales.y);
    }
  }

  // Moves the references of rows that outgrew theirs by more than the slack; factor: what O is worth then. Seldom: what a row has
  // in common with its other three lanes is only asked here.
  __device__ __forceinline__ void move_references(const float (&top)[2], float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = row_max(top[half]), old = reference[half];
      if (most > limit[half]) reference[half] = most - p.log2_p_max, limit[half] = most + p.rescale_slack;
      factor[half] = exp2_approx(old - (reference[half] == -kInf ? 0.0f : reference[half]));
    }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < C::kOutRegisters; ++i) o[i] *= factor[i % 4 / 2];
  }

  // Scores → weights, both in `s`: masked ones are floats already (mask_scores).
  template <bool kMasked>
  __device__ __forceinline__ void exponentials(Scores& s, const float (&scale)[2][2]) const {
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) shift[half] = kMasked && reference[half] == -kInf ? 0.0f : -reference[half];
#pragma unroll
    for (int i = 0; i < C::kScoreRegisters; ++i) {
      const int half = i / 2 % 2;
      if (!kMasked && kChain && i && i % kChain == 0)
#pragma unroll
        for (int h = 0; h < 2; ++h) shift[h] = fmaf(__int_as_float(s[i - kChain / 2 + 2 * h]), 0.0f, shift[h]);
      const float x = kMasked ? __int_as_float(s[i]) + shift[half] : fmaf((float)s[i], scale[i >= C::kScoreRegisters / 2][half], shift[half]);
      s[i] = __float_as_int(exp2_approx(x));
    }
  }

  // The scores' maxima, then the weights for P·V; rows whose maximum asks for it are rescaled. await(): until O is complete.
  // keys: of a masked tile, which begins with key0.
  template <bool kMasked, class Await>
  __device__ __forceinline__ void weigh(Scores& s, Weights& prob, const typename Walk::Keys& keys, int key0, Await await) {
    float scale[2][2], top[2], factor[2];
    take_scales(scale);
    if constexpr (kMasked) {
      mask_scores(s, scale, keys, key0, top);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        top[half] = fmaxf((float)Walk::template largest<2>(s, 0, half) * scale[0][half],
                          (float)Walk::template largest<2>(s, 1, half) * scale[1][half]);
    }
    const bool outgrown = __any_sync(kAllLanes, top[0] > limit[0] || top[1] > limit[1]);
    if constexpr (kEarly) {
      if (outgrown) move_references(top, factor);
      exponentials<kMasked>(s, scale);
    }
    mbarrier_wait(barrier(ring.stage) + kValuesFull, ring.parity);  // a loop: the compiler keeps the next wait behind it
    await();
    if (outgrown) {
      if constexpr (!kEarly) move_references(top, factor);
      rescale(factor);
    }
    if constexpr (!kEarly) exponentials<kMasked>(s, scale);
#pragma unroll
    for (int i = 0; i < C::kWeightRegisters; ++i) prob[i] = pack_f16(__int_as_float(s[2 * i]), __int_as_float(s[2 * i + 1]));
  }

  // One tile, whose scores are under way to `s`. Meanwhile the tensor cores have the scores of the next tile and P·V of the one
  // before, and afterwards P·V of this one. last: there is no next tile, and this one's scores are taken again, for nothing: one loop
  // without other ends is worth more, its instructions stay in the multiprocessor's cache.
  __device__ __forceinline__ void step(Scores& s, Scores& next, Weights& prob, bool first, bool last) {
    Ring<C::kStages> after = ring, before = ring;
    if (!last) after.advance();
    before.retreat();
    issue_scores(next, after);
    wgmma_wait<2>();  // `s`, awaited only here: so the issue above can't sink into the softmax
    wgmma_hold(s);
    weigh<false>(s, prob, {}, 0, [&] {
      wgmma_wait<1>();
      wgmma_hold(o);
      release_values(before.stage, !first);
    });
    issue_values(prob);
    fetch_scales(after.stage);
    ring = after;
  }

  // The end of a run: P·V of its last tile.
  __device__ __forceinline__ void finish() {
    wgmma_wait<0>();
    wgmma_hold(o);
    release_values(ring.stage);
    ring.advance();
  }

  // One tile on its own, masked.
  __device__ __forceinline__ void single() {
    Scores s;
    Weights prob;
    issue_scores(s, ring);
    fetch_scales(ring.stage);
    const int key0 = tile_number * C::kTile;
    const auto keys = Walk::visible(key0);
    wgmma_wait<0>();
    wgmma_hold(s);
    weigh<true>(s, prob, keys, key0, [] {});
    issue_values(prob);
    finish();
  }

  // `tiles` of them without masked keys. ptxas wants two ends (docs/kernels.md).
  __device__ __forceinline__ void run(int tiles) {
    Scores even, odd;
    Weights prob;
    issue_scores(even, ring);
    fetch_scales(ring.stage);
#pragma unroll
    for (int i = 0; i < C::kWeightRegisters; ++i) prob[i] = 0;
    mbarrier_wait(barrier(ring.stage) + kValuesFull, ring.parity);
    issue_values<1>(prob);  // nothing: so the loop is entered as it is repeated
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

  __device__ __forceinline__ void all(Span span, float (&sums)[2]) {
    hold_queries();
    limit[0] = limit[1] = -kInf;
#pragma unroll
    for (int i = 0; i < C::kOutRegisters; ++i) o[i] = 0.0f;
    wgmma_hold(o);
    for (int left = span.masked; left; --left) single();
    if (span.unmasked) run(span.unmasked);
    sums[0] = o[kHeadDim / 2], sums[1] = o[kHeadDim / 2 + 2];  // the columns of ones
  }
};

template <class C, int kSharedBytes>
__device__ __forceinline__ void attend_wgmma(const AttendParams& p) {
  attend_block<C, WgmmaWalk, kSharedBytes>(p);
}

}  // namespace sage
