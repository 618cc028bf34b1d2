// What every main loop does about m_i, the reference of a row's P = 2^(score − m_i): where it lies, when it moves, and what O and l are
// multiplied by then. It lies log2(p_max) below the row's maximum at its last move, and stays until a score is above its limit (lazy
// rescaling): a product of a whole row of O with alpha is rare.
//
// How lanes agree on a row's maximum, and which rows of a warp move with one that has to, the main loops say themselves.
#pragma once
#include "../common/math.cuh"
#include "../ptx/convert.cuh"
#include "../ptx/special.cuh"

namespace sage {

// References by main loop and type of P: kEmpty is m_i of a row without a score, of() the reference of a row whose maximum is `most`,
// alpha() what O and l are multiplied by when it moves from `old` to `now`. Where kEmpty is −inf it may move from −inf to −inf, whose
// difference is NaN; what is selected instead, and where, is what costs each main loop fewest instructions.
struct MmaReference {
  static constexpr float kEmpty = -kInf;
  static __device__ __forceinline__ float of(float most, float log2_p_max) { return most - log2_p_max; }
  static __device__ __forceinline__ float alpha(float old, float now) { return now == old ? 1.0f : exp2_approx(old - now); }
};

struct WgmmaFp16Reference {
  static constexpr float kEmpty = -kInf;
  static __device__ __forceinline__ float of(float most, float log2_p_max) { return most - log2_p_max; }
  static __device__ __forceinline__ float alpha(float old, float now) { return exp2_approx(old - (now == -kInf ? 0.0f : now)); }
};

// A whole number, so that other references scale P by powers of two and round it alike: a block whose keys are shared out to two CTAs then
// has the result of one that is not. Opaque, so that the compiler selects it instead of branching around the rounding: behind such branches
// it takes the exponentials apart from the conversions.
struct WgmmaFp8Reference {
  static constexpr float kEmpty = kNoScore;
  static __device__ __forceinline__ float of(float most, float log2_p_max) { return opaque(ceilf(most - log2_p_max)); }
  static __device__ __forceinline__ float alpha(float old, float now) { return exp2_approx(old - now); }
};

// A row's limit, `headroom` above x: its reference moves for what exceeds that. Compared are, with mma.sync, of() of a score with m_i; for
// P in fp16 with wgmma, a score with the row's maximum at the last move; for P in e4m3, a score with m_i, so that P stays within e4m3's
// range.
__device__ __forceinline__ float rescale_limit(float x, float headroom) { return x + headroom; }

// What is added to a score before its exponential: −m_i, but 0 for a row without a score, whose scores are all −inf.
__device__ __forceinline__ float score_shift(float m_i) { return m_i == -kInf ? 0.0f : -m_i; }

// m_i of an initial state (m, l), which is relative to the row's maximum m; `m` loads that, and only of a state that is not empty.
template <class Reference, class Load>
__device__ __forceinline__ float initial_reference(Load m, float l, float log2_p_max) {
  return l > 0.0f ? m() - log2_p_max : Reference::kEmpty;
}

// Multiplies accumulators of rows g and g + 8 by alpha[half] of their row. Register 4j + 2·half + e: column 2t + e of n-tile j.
template <int kRegisters>
__device__ __forceinline__ void rescale_rows(float (&accumulator)[kRegisters], const float (&alpha)[2]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) accumulator[i] *= alpha[i % 4 / 2];
}

}  // namespace sage
