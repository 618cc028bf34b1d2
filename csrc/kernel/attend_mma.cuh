// Third launch: softmax(Q·Kᵀ)·V with mma.sync – INT8 for the scores, fp16, FP8 or INT8 for P·V – on every architecture from Turing on.
//
// A warp owns 16 or 32 queries and goes over the KV tiles: masked ones first, so that the long loop over the others has no masks. The tiles
// come from a list, or are all up to the last, which comes first. 32 rows, where the registers allow it, halve the traffic from shared
// memory: a fragment of K or V that is loaded feeds two row tiles. Q stays in registers.
#pragma once
#include "../layout/fragment.cuh"
#include "../block/mask_scores.cuh"
#include "../block/output.cuh"
#include "../block/pipeline.cuh"
#include "../block/pv.cuh"
#include "../block/query.cuh"
#include "../block/softmax.cuh"
#include "../block/tile_list.cuh"
#include "../common/pv_type.cuh"
#include "../ptx/grid.cuh"
#include "../ptx/special.cuh"
#include "params.cuh"

namespace sage {

// One kernel: a row of sageattention/kernels/mma.py.
struct MmaTile {
  Mask mask;
  PvType pv;
  PvAccum accumulate;
  int warps, row_tiles, stages;       // row_tiles: of 16 queries, a warp's
  bool q_in_smem = false;             // Q's fragments stay in shared memory: 16 or 32 registers less
  bool loop_state_in_smem = false;    // so do the rows' scales and the number of the first tile
  bool recompute_thread_idx = false;  // each tile derives its addresses from %tid again instead of keeping them in registers
  int delay_v_load =
      0;  // keeps ptxas from hoisting V's load above the softmax: 1 = fake address dependency on the row sum, 2 = __syncwarp()
};

template <int kHeadDim_, MmaTile kTile>
struct AttendConfig {
  static constexpr int kHeadDim = kHeadDim_, kWarps = kTile.warps, kRowTiles = kTile.row_tiles, kStages = kTile.stages;
  static constexpr bool kQInSmem = kTile.q_in_smem, kLoopStateInSmem = kTile.loop_state_in_smem;
  static constexpr bool kQScalesInSmem = kQInSmem || kLoopStateInSmem;
  static constexpr bool kRecomputeThreadIdx = kTile.recompute_thread_idx;
  static constexpr int kDelayVLoad = kTile.delay_v_load;
  static constexpr Mask kMask = kTile.mask;
  static constexpr PvType kPvType = kTile.pv;
  static constexpr PvAccum kPvAccum = kTile.accumulate;
  static constexpr bool kTileMax = kPvType != PvType::fp16;  // P is taken against the tile's own row maximum
  static constexpr int kThreads = 32 * kWarps, kBlockM = 16 * kRowTiles * kWarps;
  using Layout = Fragment<kHeadDim, kVElementBytes<kPvType>>;
  static constexpr int kPFragments = kKvTile / Layout::kVBlockKeys;  // A fragments of P for a tile
  using Pipeline = KvPipeline<Layout::kTileBytes, kStages, kWarps, kLoopStateInSmem>;
  using RowSoftmax = typename SoftmaxOf<kTileMax, kRowTiles>::type;
};

// Q's A fragments [row tile][32 channels][register] and score scales [row tile][half], in registers or in shared memory; there each lane
// reads only what it wrote.
template <class C>
struct QFragments {
  static constexpr int kChunks32 = C::kHeadDim / 32, kPitch = 16 * C::kThreads;
  static constexpr int kFragmentBytes = C::kQInSmem ? C::kRowTiles * kChunks32 * kPitch : 0;
  static constexpr int kBytes = kFragmentBytes + (C::kQScalesInSmem ? 8 * C::kRowTiles * C::kThreads : 0);

  u32 fragments[C::kQInSmem ? 1 : C::kRowTiles][kChunks32][4];
  float scales[C::kQScalesInSmem ? 1 : C::kRowTiles][2];
  u32 shared, scales_shared;  // addresses of this thread's first 16 bytes and of its scales

  // smem: address of all threads' fragments; thread16 = 16 · thread.
  __device__ __forceinline__ void bind(u32 smem, u32 thread16) {
    shared = smem + thread16, scales_shared = C::kRowTiles == 2 ? shared + kFragmentBytes : smem + kFragmentBytes + thread16 / 2;
  }

  __device__ __forceinline__ void put(int r, const u32 (&a)[kChunks32][4]) {
#pragma unroll
    for (int c = 0; c < kChunks32; ++c)
      if constexpr (C::kQInSmem)
        store_shared16(shared + (r * kChunks32 + c) * kPitch, a[c]);
      else
        fragments[r][c][0] = a[c][0], fragments[r][c][1] = a[c][1], fragments[r][c][2] = a[c][2], fragments[r][c][3] = a[c][3];
  }

  __device__ __forceinline__ void get(u32 (&a)[4], int r, int c) const {
    if constexpr (C::kQInSmem) {
      const uint4 v = load_shared16(shared + (r * kChunks32 + c) * kPitch);
      a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
    } else {
      a[0] = fragments[r][c][0], a[1] = fragments[r][c][1], a[2] = fragments[r][c][2], a[3] = fragments[r][c][3];
    }
  }

  __device__ __forceinline__ void put_scales(const float (&x)[C::kRowTiles][2]) {
    u32 bits[4] = {};
#pragma unroll
    for (int i = 0; i < 2 * C::kRowTiles; ++i)
      if constexpr (C::kQScalesInSmem)
        bits[i] = __float_as_uint(x[i / 2][i % 2]);
      else
        scales[i / 2][i % 2] = x[i / 2][i % 2];
    if constexpr (C::kQScalesInSmem && C::kRowTiles == 1)
      store_shared8(scales_shared, bits[0], bits[1]);
    else if constexpr (C::kQScalesInSmem)
      store_shared16(scales_shared, bits);
  }

  // out = the rows' scales · k_scale
  __device__ __forceinline__ void get_scales(float (&out)[C::kRowTiles][2], float k_scale) const {
    if constexpr (C::kQScalesInSmem && C::kRowTiles == 1) {
      const float2 v = load_shared_float2(scales_shared);
      out[0][0] = v.x * k_scale, out[0][1] = v.y * k_scale;
    } else if constexpr (C::kQScalesInSmem) {
      const uint4 v = load_shared16(scales_shared);
      const u32 bits[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 2 * C::kRowTiles; ++i) out[i / 2][i % 2] = __uint_as_float(bits[i]) * k_scale;
    } else {
#pragma unroll
      for (int i = 0; i < 2 * C::kRowTiles; ++i) out[i / 2][i % 2] = scales[i / 2][i % 2] * k_scale;
    }
  }
};

// s[row tile][n-tile][accumulator register] = Q·Kᵀ + kPreset (softmax.cuh), of 16 · kRowTiles rows × 64 keys.
template <class C>
__device__ __forceinline__ void scores(u32 (&s)[C::kRowTiles][kScoreNTiles][4], const QFragments<C>& q_frags, u32 tile) {
  u32 preset[4] = {kPresetBits, kPresetBits, kPresetBits, kPresetBits};
#pragma unroll
  for (int c2 = 0; c2 < C::kHeadDim / 64; ++c2) {
    u32 q[C::kRowTiles][2][4];
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) q_frags.get(q[r][0], r, 2 * c2), q_frags.get(q[r][1], r, 2 * c2 + 1);
#pragma unroll
    for (int j = 0; j < kScoreNTiles; j += 2) {
      const uint4 b0 = load_shared16(tile + C::Layout::k_block(c2, j)), b1 = load_shared16(tile + C::Layout::k_block(c2, j + 1));
#pragma unroll
      for (int r = 0; r < C::kRowTiles; ++r) {
        mma_s8(s[r][j], q[r][0], b0.x, b0.y, c2 ? s[r][j] : preset);
        mma_s8(s[r][j + 1], q[r][0], b1.x, b1.y, c2 ? s[r][j + 1] : preset);
      }
#pragma unroll
      for (int r = 0; r < C::kRowTiles; ++r) {
        mma_s8(s[r][j], q[r][1], b0.z, b0.w, s[r][j]);
        mma_s8(s[r][j + 1], q[r][1], b1.z, b1.w, s[r][j + 1]);
      }
    }
  }
}

// The lane's rows. Computed from the special registers in the prologue and again in the epilogue, so that nothing is kept in registers
// meanwhile.
template <class C>
__device__ __forceinline__ RowCoord warp_rows(const AttendParams& p) {
  return {work_tile<C::kMask, kKvTile>(p, special_ctaid_x(), C::kBlockM), special_tid_x(), 16 * C::kRowTiles};
}

// Loads, rotates and quantises the warp's rows of Q. Needs nothing of the previous launches before grid_dependency_wait().
template <class C>
__device__ __forceinline__ void quantize_q(const AttendParams& p, QFragments<C>& q_frags) {
  constexpr int kHeadDim = C::kHeadDim;
  const RowCoord at = warp_rows<C>(p);
  const auto token = [&](int row) { return token_of<C::kMask>(p, at.tile.span, row); };
  float x[C::kRowTiles][2][kHeadDim / 4], scale[C::kRowTiles][2];
  with_access(p.dtype, p.q_vectorized, [&](auto type, auto vectors) {
    constexpr int kDtype = decltype(type)::value;
    const u8* head =
        static_cast<const u8*>(p.q.data) + (at.tile.batch * p.q.stride_b + at.tile.head * p.q.stride_h) * kElementBytes<kDtype>;
    load_rows<kHeadDim, C::kRowTiles, kDtype, decltype(vectors)::value>(head, token, p.q.stride_n, at.row(0, 0), at.tile.span.len_q, at.t,
                                                                        p.head_dim, x);
  });
  if (p.lse) {  // stores what LSE loses by k_mean in LSE's place, to free registers for the main loop
    grid_dependency_wait();
#pragma unroll
    for (int i = 0; i < 2 * C::kRowTiles; ++i) {
      const int row = at.row(i / 2, i % 2);
      const float score = k_mean_score<kHeadDim>(x[i / 2][i % 2], p.k_mean + at.tile.bh * kHeadDim, at.t, p.sm_scale);
      if (at.has(row) && at.t == 0) *at.lse(p, token(row)) = score;
    }
  }
#pragma unroll
  for (int r = 0; r < C::kRowTiles; ++r) {
    u32 a[kHeadDim / 32][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) scale[r][half] = quantize_row<kHeadDim>(x[r][half], at.t, p.score_scale, p.sign, a, half);
    q_frags.put(r, a);
  }
  grid_dependency_wait();
  const float max_scale = max_score_scale(p.score_limit, p.k_scale_max[at.tile.bh]);
#pragma unroll
  for (int i = 0; i < 2 * C::kRowTiles; ++i) scale[i / 2][i % 2] = fminf(scale[i / 2][i % 2], max_scale);
  q_frags.put_scales(scale);
}

// Stores O / l, scaled and shifted by V's scale and mean per channel, in the output's dtype, and LSE. o: [row tile][n-tile][register].
template <class C>
__device__ __forceinline__ void store_output(const AttendParams& p, float (&o)[C::kRowTiles][C::kHeadDim / 8][4],
                                             const typename C::RowSoftmax& softmax) {
  const RowCoord at = warp_rows<C>(p);
  float m_i[C::kRowTiles][2];
  softmax.get_m(m_i);
  float inverse[C::kRowTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * C::kRowTiles; ++i) {
    const int r = i / 2, half = i % 2, row = at.row(r, half);
    const float sum = row_sum(softmax.l_i[r][half]);
    inverse[r][half] = inverse_sum(sum, p.inv_v_max);
    if (p.lse && at.t == 0 && at.has(row)) {
      float* lse = at.lse(p, token_of<C::kMask>(p, at.tile.span, row));
      *lse = log_sum_exp(sum, m_i[r][half], *lse);
    }
  }
#pragma unroll
  for (int c = 0; c < C::kHeadDim / 32; ++c) {
    const float4* amax = reinterpret_cast<const float4*>(p.v_amax + at.tile.bh * C::kHeadDim + 32 * c + kChunk * at.t);
    const float4 a = amax[0], b = amax[1];
    const float channel_scale[kChunk] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    float mean[kChunk] = {};
    if constexpr (C::kPvType != PvType::fp16) {
      if (C::kHeadDim == 256) __syncwarp();  // keeps the compiler from loading more of them at once than there are registers
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        const int channel = at.tile.bh * C::kHeadDim + 32 * c + kChunk * at.t + e;
        mean[e] =
            corrected_v_mean<C::kPvType>(p.v_mean[channel], channel_scale[e], p.v_quant_sum[channel], p.inv_v_max, p.live_keys[at.tile.bh]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * C::kRowTiles; ++i)
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        float& value = o[i / 2][4 * c + e / 2][2 * (i % 2) + e % 2];
        value = dequantize_o<C::kMask>(value, inverse[i / 2][i % 2], channel_scale[e], mean[e]);
      }
  }
  with_access(p.dtype, p.out_vectorized, [&](auto type, auto vectors) {
    constexpr int kDtype = decltype(type)::value;
    const RowCoord at = warp_rows<C>(p);
#pragma unroll
    for (int i = 0; i < 2 * C::kRowTiles; ++i) {
      const int r = i / 2, half = i % 2, row = at.row(r, half);
      if (!at.has(row)) continue;
      u8* to = static_cast<u8*>(p.out) + (at.tile.batch * p.out_stride_b + at.tile.head * p.out_stride_h +
                                          token_of<C::kMask>(p, at.tile.span, row) * p.out_stride_n) *
                                             kElementBytes<kDtype>;
#pragma unroll
      for (int c = 0; c < C::kHeadDim / 32; ++c) {
        float y[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e) y[e] = o[r][4 * c + e / 2][2 * half + e % 2];
        store8<kDtype, decltype(vectors)::value>(to, 32 * c + kChunk * at.t, p.head_dim, y);
      }
    }
  });
}

// One warp's main loop over the KV tiles.
template <class C>
struct Mainloop {
  static constexpr int kHeadDim = C::kHeadDim, kRowTiles = C::kRowTiles;
  using Scores = u32[kRowTiles][kScoreNTiles][4];           // [row tile][n-tile][2 · half + e]
  using ProbFragments = u32[kRowTiles][C::kPFragments][4];  // [row tile][fragment of 16 or 32 keys][register]

  const AttendParams& p;
  typename C::Pipeline pipeline;
  QFragments<C> q_frags;
  typename C::RowSoftmax softmax;
  float o[kRowTiles][kHeadDim / 8][4];  // [row tile][n-tile][2 · half + e]
  u32 thread16;                         // 16 · thread; its low bits are the lane's offset in a 512-byte block
  bool causal;

  // Preset scores of a row tile → base-2 scores, in place, −inf where masked out. top: the lane's maximum of each half.
  __device__ __forceinline__ void mask_scores(u32 (&s)[kScoreNTiles][4], int r, const float (&scale)[2], int key0, float (&top)[2]) const {
    const RowCoord at = warp_rows<C>(p);
    const int row[2] = {at.row(r, 0), at.row(r, 1)};
    const auto score = [&](int half, int j, int e) -> u32& { return s[j][2 * half + e]; };
    KeyBits<kKvTile> keys;
    if constexpr (C::kMask == Mask::list) keys = visible_keys<C::kMask, kKvTile>(p, [&] { return at.tile; }, row, key0, causal, at.t);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2 * kScoreNTiles; ++i) {
        u32& bits = score(half, i / 2, i % 2);
        bits = __float_as_uint(fmaf(__uint_as_float(bits), scale[half], -kPreset * scale[half]));
      }
    if (C::kMask == Mask::list && p.mask_kind == kMaskBiasRow) {
      float2 bias[kScoreNTiles];
      load_bias_row(p, at.tile, key0, at.t, bias);
      add_bias_row(bias, score);
    } else if (C::kMask == Mask::list && p.mask_kind != kMaskBool) {
      add_bias<kScoreNTiles>(p, at.tile, row, key0, at.t, score);
    }
    const int len_kv = at.tile.span.len_kv;
    int limit[2];  // without a list keys are compared with a limit, which takes fewer registers
#pragma unroll
    for (int half = 0; half < 2; ++half) limit[half] = (causal ? min(row[half] + 1, len_kv) : len_kv) - key0 - 2 * at.t;
    hide_keys<kScoreNTiles>(
        score, [&](int half, int j, int e) { return C::kMask == Mask::list ? keys.sees(half, j, e) : 8 * j + e < limit[half]; }, top);
  }

  __device__ __forceinline__ void rescale(const float (&alpha)[kRowTiles][2]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) rescale_rows(o[r][n], alpha[r]);
  }

  // S → P of the current tile, whose first key is key0, and tile_scale of its rows; rescales O, l and m where needed.
  template <bool kMasked>
  __device__ __forceinline__ void softmax_step(Scores& s, ProbFragments& prob, float (&tile_scale)[kRowTiles][2], int key0) {
    const float k_scale = load_shared_float(pipeline.tile() + C::Layout::kScaleOffset + (thread16 / 4 & 12));
    float top[kRowTiles][2], scale[kRowTiles][2];
    q_frags.get_scales(scale, k_scale);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if constexpr (kMasked) mask_scores(s[r], r, scale[r], key0, top[r]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if constexpr (!kMasked) top[r][half] = score_above(score_max(s[r], half), scale[r][half]);
    }

    float alpha[kRowTiles][2], m_p[kRowTiles][2];  // P = 2^(score − m_p)
    if constexpr (C::kTileMax) {
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i)  // rounded up, so that P never exceeds p_max
        m_p[i / 2][i % 2] = __fsub_ru(row_max(top[i / 2][i % 2]), p.log2_p_max);
      if (softmax.update(m_p, p.rescale_threshold, thread16 / 16 % 4, alpha)) rescale(alpha);
      softmax.tile_scales(m_p, thread16 / 16 % 4, tile_scale);
    } else {
      if (softmax.update(top, p.log2_p_max, p.rescale_threshold, alpha)) rescale(alpha);
      softmax.get_m(m_p);
    }

    // The accumulators of two n-tiles are laid out as one k16 A fragment, those of four as one k32 fragment.
#pragma unroll
    for (int n = 0; n < 2 * kRowTiles; ++n) {
      const int r = n / 2, half = n % 2;
      const float shift = kMasked ? score_shift(m_p[r][half]) : __fadd_rd(-kPreset * scale[r][half], -m_p[r][half]);
      constexpr int kPack = 4 / kVElementBytes<C::kPvType>;  // elements in a register of P
      u32 quantized_sum = 0;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 2 * kScoreNTiles / kPack; ++i) {
        float x[kPack];
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const float score = __uint_as_float(s[r][(kPack * i + e) / 2][2 * half + e % 2]);
          x[e] = exp2_approx(kMasked ? score + shift : fmaf(score, scale[r][half], shift));
        }
        u32& packed = prob[r][i / 2][half + i % 2 * 2];
        packed = pack_p<C::kPvType>(x);
        if constexpr (C::kPvType == PvType::int8)
          quantized_sum = __dp4a(packed, 0x01010101u, quantized_sum);
        else
#pragma unroll
          for (int e = 0; e < kPack; e += 2) sum += x[e] + x[e + 1];
      }
      if constexpr (C::kPvType == PvType::int8) sum = (float)quantized_sum;
      softmax.l_i[r][half] = C::kTileMax ? fmaf(sum, tile_scale[r][half], softmax.l_i[r][half]) : softmax.l_i[r][half] + sum;
    }
  }

  // One tile, number n; kBack, ahead: as in KvPipeline::acquire.
  template <bool kMasked, int kBack>
  __device__ __forceinline__ void step(int n, int ahead) {
    if constexpr (C::kRecomputeThreadIdx) thread16 = 16 * special_tid_x(), q_frags.bind(pipeline.shared + C::Pipeline::kBytes, thread16);
    Scores s;
    ProbFragments prob;
    float tile_scale[kRowTiles][2];
    pipeline.template acquire<kBack>(ahead);
    const u32 tile = pipeline.tile() + (thread16 & 0x1F0);
    scores<C>(s, q_frags, tile);
    if constexpr (C::kStages == 2) pipeline.template refill<kBack>(ahead);
    softmax_step<kMasked>(s, prob, tile_scale, n * kKvTile);
    // 0, because P is never negative; the compiler does not know that and loads V after the row sum.
    const u32 late = C::kDelayVLoad == 1 ? __float_as_uint(softmax.l_i[kRowTiles - 1][1]) >> 31 : 0;
    if constexpr (C::kDelayVLoad == 2) __syncwarp();
    accumulate_pv<C>(o, prob, tile_scale, tile + late);
    if constexpr (C::kStages > 2) pipeline.template refill<kBack>(ahead);
    pipeline.release();
  }

  // After the first copies of K and V: fewer registers are in use while Q is quantised.
  __device__ __forceinline__ void clear_output() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) o[r][n][0] = o[r][n][1] = o[r][n][2] = o[r][n][3] = 0.0f;
  }

  // Loads the initial softmax state of the rows: m, l, O.
  __device__ __forceinline__ void load_tail() {
    const RowCoord at = warp_rows<C>(p);
    const float p_max = exp2_approx(p.log2_p_max);
    float m[kRowTiles], l[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const float* state = initial_state<kHeadDim>(p, at.tile, at.row0 + 16 * r);
      l[r] = state[1] * p_max, m[r] = initial_reference<MmaReference>([&] { return state[0]; }, state[1], p.log2_p_max);
#pragma unroll 1
      for (int c = 0; c < kHeadDim / 32; ++c) {
        float y[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          const int channel = 32 * c + kChunk * at.t + e, of_head = at.tile.bh * kHeadDim + channel;
          const float amax = p.v_amax[of_head];
          float mean = 0.0f;
          if constexpr (C::kPvType != PvType::fp16)
            mean = corrected_v_mean<C::kPvType>(p.v_mean[of_head], amax, p.v_quant_sum[of_head], p.inv_v_max, p.live_keys[at.tile.bh]);
          y[e] = quantize_o(p, state[4 + channel], state[1], amax, mean, p_max);
        }
        // o has no run-time index: each iteration stores those registers whose c is its own.
#pragma unroll
        for (int own = 0; own < kHeadDim / 32; ++own)
          if (own == c)
#pragma unroll
            for (int i = 0; i < 2 * kChunk; ++i) o[r][4 * own + i % kChunk / 2][i / kChunk * 2 + i % 2] = y[i % kChunk];
      }
    }
    softmax.begin(m, l, at.t);
  }

  // Tiles [0, tiles), last one first; those in [0, full) hold no masked key.
  __device__ __forceinline__ void run(int tiles, int full) {
    constexpr int kPrefetch = C::kStages - 1;
    int n = tiles - 1;
    for (; n >= full; --n) step<true, kPrefetch>(n, n);
    for (; n >= 0; --n) step<false, kPrefetch>(n, n);
  }

  // The tiles of a list: {mixed, full} of them; ahead: the position after the tiles that the pipeline has started with.
  template <class Load>
  __device__ __forceinline__ void run_list(int2 tiles, ListCursor& ahead, Load load) {
    ListCursor current;
    for (int i = 0; i < tiles.x; ++i) step<true, 0>(current.next(p.lists.words, load), ahead.next(p.lists.words, load));
    for (int i = 0; i < tiles.y; ++i) step<false, 0>(0, ahead.next(p.lists.words, load));
  }
};

// Dynamic shared memory of a launch, in bytes: the pipeline, and Q if it is kept there.
template <class C>
constexpr int attend_shared_bytes() {
  return C::Pipeline::kBytes + QFragments<C>::kBytes;
}

template <class C>
__device__ void attend_mma(const AttendParams& p) {
  extern __shared__ __align__(128) u8 stages[];
  if (C::kMask == Mask::packed && (int)blockIdx.x >= count_work_tiles<C::kMask>(p)) return;
  Mainloop<C> mainloop{p};
  mainloop.thread16 = 16 * threadIdx.x;
  mainloop.causal = C::kMask == Mask::causal || (kCausalAtRunTime<C::kMask> && p.causal);

  const RowCoord at = warp_rows<C>(p);
  mainloop.q_frags.bind(shared_address(stages) + C::Pipeline::kBytes, mainloop.thread16);
  const auto start = [&](auto next) { mainloop.pipeline.start(shared_address(stages), p.kv, at.tile.span.kv_tile0, next); };
  if constexpr (C::kMask == Mask::list) {
    const auto list = [&] {
      const WorkTile tile = warp_rows<C>(p).tile;
      return TileList(p.lists, tile.batch, tile.head, tile.row0, C::kBlockM, p.len_q);
    };
    const auto load = [&](int w) { return list().word(w); };
    quantize_q<C>(p, mainloop.q_frags);
    ListCursor ahead;
    start([&] { return ahead.next(p.lists.words, load); });
    mainloop.clear_output();
    if (p.tail) mainloop.load_tail();
    mainloop.run_list(list().count(), ahead, load);
  } else {
    auto [seen, full] = count_kv_tiles<kKvTile>(at.tile, C::kBlockM, mainloop.causal);
    full = opaque(full);
    quantize_q<C>(p, mainloop.q_frags);
    int next = seen;
    start([&] { return --next; });
    mainloop.clear_output();
    mainloop.run(seen, full);
  }
  store_output<C>(p, mainloop.o, mainloop.softmax);
}

}  // namespace sage
