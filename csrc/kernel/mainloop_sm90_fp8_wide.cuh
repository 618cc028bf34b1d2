// Third launch on Hopper, FP8 at head_dim 256: O takes 128 registers of a thread, which leaves no room for an accumulator of its size.
//
// P·V is computed 64 channels at a time, over a tile of 128 keys, by two accumulators in turns: while the tensor cores fill one, the other
// is promoted to O. Their registers are those of the scores, which are P by then. So a warpgroup's softmax overlaps with none of its own
// products; it overlaps with those of the other warpgroup, which take longer than it: the two take turns.
//
// wgmma stays asynchronous, without spills, only as registers, waits and barriers are put here (docs/compiler.md).
#pragma once
#include "mainloop_sm90_fp8.cuh"

namespace sage {

template <class Layout_, WgmmaTile kWgmmaTile>
struct WgmmaFp8WideConfig : WgmmaConfig<Layout_, kWgmmaTile> {
  using Layout = Layout_;
  static constexpr int kStep = Layout::kTile, kScaleCount = kStep / Layout::kScaleKeys;
  static constexpr int kScoreRegisters = kStep / 2, kProbRegisters = kStep / 8;
  static constexpr int kOutRegisters = Layout::kHeadDim / 2;
  static constexpr int kUnmaskedLeast = 2;
  static_assert(Layout::kTile == 128 && Layout::kHeadDim == 256 && Layout::kOnes && Layout::kVElementBytes == 1,
                "steps, scales and accumulators are worked out for this tile");
};

template <class C>
struct MainloopFp8Wide : SoftmaxFp8<C> {
  using Base = SoftmaxFp8<C>;
  using typename Base::Layout, typename Base::Scores, typename Base::ProbFragments, typename Base::Scales;
  using Base::barrier, Base::tile, Base::mask_scores, Base::load_k_scales, Base::tile_number, Base::m_i, Base::ring, Base::sQ, Base::p;
  using Base::begin_group, Base::begin_masked_group, Base::l_i, Base::m_p, Base::o, Base::release, Base::update_m_i;
  static constexpr int kHeadDim = C::kHeadDim;
  static constexpr int kTurnBarrier = 3, kTurnThreads = 128 * C::kConsumers;  // one for each warpgroup; 1 and 2 are for its own threads
  using Half = i32[C::kScoreRegisters / 2];

  // The registers of the scores; as bits of fp32 those of P·V of 64 channels, twice; and sums of P.
  struct Accumulators {
    Scores s;
    i32 sums[4];

    // Not 0: no wgmma adds to what is there before.
    __device__ __forceinline__ Accumulators() {
#pragma unroll
      for (auto& x : s) x = 0;
#pragma unroll
      for (auto& x : sums) x = 0;
      warpgroup_fence_operand(s);
      warpgroup_fence_operand(sums);
    }
    __device__ __forceinline__ Half& first() { return registers<0, C::kScoreRegisters / 2>(s); }
    __device__ __forceinline__ Half& second() { return registers<C::kScoreRegisters / 2, C::kScoreRegisters / 2>(s); }
  };

  // False, which the compiler does not know: it then takes an accumulator's registers as they are, instead of new ones for each product.
  __device__ __forceinline__ bool never() const { return p.head_dim > kHeadDim; }

  // The warpgroups take turns at the tensor cores, so that one's softmax is under the other's products.
  static __device__ __forceinline__ int warpgroup() { return special_tid_x() / 128 - 1; }
  static __device__ __forceinline__ void await_turn() { named_barrier<kTurnThreads>(kTurnBarrier + warpgroup()); }
  static __device__ __forceinline__ void pass_turn() { named_barrier_arrive<kTurnThreads>(true, kTurnBarrier + 1 - warpgroup()); }

  // Issues S = Q·Kᵀ of keys kFirst … kFirst + 63 of the tile at `at`.
  template <int kFirst>
  __device__ __forceinline__ void issue_scores(Half& s, const Ring<C::kStages>& at) const {
    const u64 rows = wgmma_descriptor<C::kQPitch>(sQ);
    const u64 keys = wgmma_descriptor<Layout::kKPitch>(tile(at.stage)) + (kFirst * 16 >> 4);
    if (kFirst == 0) mbarrier_wait(barrier(at.stage) + kKFull, at.parity);
    warpgroup_fence_operand(s);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c)
      wgmma_s8(s, rows + (2 * c * C::kQPitch >> 4), keys + (2 * c * Layout::kKPitch >> 4), c > 0 || never());
    wgmma_commit();
  }

  // Issues acc = P·V of the current tile's columns kFirst … kFirst + 2·kCount − 1.
  template <int kFirst, int kCount>
  __device__ __forceinline__ void issue_pv(i32 (&acc)[kCount], const ProbFragments& prob) const {
    const u64 v = wgmma_descriptor<Layout::kVPitch>(tile(ring.stage) + Layout::kV) + (kFirst * 16 >> 4);
    warpgroup_fence_operand(acc);
#pragma unroll
    for (int c = 0; c < C::kTile / 32; ++c) wgmma_e4m3(acc, prob + 4 * c, v + (2 * c * Layout::kVPitch >> 4), c > 0 || never());
  }

  // O += alpha · acc, of columns kFirst ….
  template <int kFirst, int kCount>
  __device__ __forceinline__ void promote(i32 (&acc)[kCount], const float (&alpha)[2]) {
    warpgroup_fence_operand(acc);
#pragma unroll
    for (int i = 0; i < kCount; ++i) o[kFirst / 2 + i] = fmaf(__int_as_float(acc[i]), alpha[i % 4 / 2], o[kFirst / 2 + i]);
  }

  // Adds P·V of the current tile to O. kNext: and computes the scores of the next one, as soon as registers are free.
  template <bool kNext>
  __device__ __forceinline__ void add_pv(const ProbFragments& prob, Accumulators& w) {
    float alpha[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) alpha[half] = WgmmaFp8Reference::alpha(m_p[half], m_i[half]), m_p[half] = m_i[half];
    Ring<C::kStages> after = ring;
    after.advance();
    // The wait is a loop, and the compiler moves nothing across: an accumulator is promoted before the next product is issued into it.
    const auto begin_part = [&] {
      mbarrier_wait(barrier(ring.stage) + kVFull, ring.parity);
      wgmma_fence();
    };
    await_turn();
    begin_part();
    issue_pv<0>(w.first(), prob);
    wgmma_commit();
    wgmma_fence();
    issue_pv<64>(w.second(), prob);
    wgmma_commit();
    wgmma_wait<1>();
    promote<0>(w.first(), alpha);
    begin_part();
    issue_pv<128>(w.first(), prob);
    wgmma_commit();
    wgmma_wait<1>();
    promote<64>(w.second(), alpha);
    begin_part();
    issue_pv<192>(w.second(), prob);
    issue_pv<kHeadDim>(w.sums, prob);  // columns of ones
    wgmma_commit();
    wgmma_wait<1>();
    promote<128>(w.first(), alpha);
    if constexpr (kNext) issue_scores<0>(w.first(), after);
    pass_turn();  // not later: the other's products fill the gap between the two halves of the scores
    wgmma_wait<kNext>();
    promote<192>(w.second(), alpha);
    warpgroup_fence_operand(w.sums);
#pragma unroll
    for (int half = 0; half < 2; ++half) l_i[half] = fmaf(__int_as_float(w.sums[2 * half]), alpha[half], l_i[half]);
    release(kVEmpty, ring.stage);
    ring = after;
    if constexpr (kNext) {
      issue_scores<64>(w.second(), ring);
      load_k_scales(ring.stage);
    }
  }

  // Waits for the scores of the current tile. scale: of them.
  __device__ __forceinline__ void await_scores(Scores& s, Scales& scale) const {
    wgmma_wait<0>();
    warpgroup_fence_operand(s);
    Base::template read_scales<0>(scale);
    release(kKEmpty, ring.stage);
  }

  // Scores of the current tile → P. A tile is a promotion group of its own.
  __device__ __forceinline__ void softmax(Scores& s, ProbFragments& prob) {
    Scales scale;
    float top[2];
    await_scores(s, scale);
    bool moves = false;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      top[half] = Base::lane_max(s, scale, half), moves |= top[half] > rescale_limit(m_i[half], kLog2E4m3Max);
    if (__any_sync(kAllLanes, moves)) update_m_i(top);
    begin_group(top);
    Base::template softmax_step<false>(s, scale, prob);
  }

  // Issues all scores of the current tile.
  __device__ __forceinline__ void issue_all_scores(Accumulators& w) {
    issue_scores<0>(w.first(), ring);
    issue_scores<64>(w.second(), ring);
    load_k_scales(ring.stage);
  }

  __device__ __forceinline__ void masked_tile() {
    Accumulators w;
    Scales scale;
    ProbFragments prob;
    float top[2];
    issue_all_scores(w);
    const int key0 = tile_number * C::kTile;
    const auto keys = Base::visible(key0);
    await_scores(w.s, scale);
    mask_scores(w.s, scale, keys, key0, top);
    begin_masked_group(top);
    Base::template softmax_step<true>(w.s, scale, prob);
    add_pv<false>(prob, w);
  }

  // The next `tiles` tiles, which have no masked key.
  __device__ __forceinline__ void unmasked_tiles(int tiles) {
    Accumulators w;
    ProbFragments prob;
    // The shuffles tell the compiler that all lanes have the same: it keeps them in uniform registers.
    tiles = __shfl_sync(kAllLanes, tiles, 0), ring.stage = __shfl_sync(kAllLanes, ring.stage, 0),
    ring.parity = __shfl_sync(kAllLanes, ring.parity, 0);
    issue_all_scores(w);
    softmax(w.s, prob);
    for (; tiles > 1; --tiles) {
      add_pv<true>(prob, w);
      softmax(w.s, prob);
    }
    add_pv<false>(prob, w);
  }

  __device__ __forceinline__ void run(KvRange range, float (&l_out)[2]) {
    Base::begin(range);
    // The first warpgroup has the first turn. The number is a constant: with warpgroup() in it descriptors leave the uniform registers.
    named_barrier_arrive<kTurnThreads>(Base::iteration == 0 && warpgroup() == 1, kTurnBarrier);
    for (int left = range.masked; left; --left) masked_tile();
    if (range.unmasked) unmasked_tiles(range.unmasked);
    l_out[0] = l_i[0], l_out[1] = l_i[1];
  }
};

template <class C>
__device__ __forceinline__ void attend_wgmma_fp8_wide(const AttendParams& p) {
  attend_block<C, MainloopFp8Wide>(p);
}

}  // namespace sage
