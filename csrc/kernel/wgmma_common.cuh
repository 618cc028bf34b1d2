// What the attention kernels on Hopper share: the block's shared memory, the ring of KV tiles and who fetches them, the rows of Q, the
// scores up to their maxima, and the output. attend_wgmma.cuh says how a block works; a kernel brings the softmax and P·V.
#pragma once
#include "../block/core_matrix.cuh"
#include "../block/epilogue.cuh"
#include "../block/mask.cuh"
#include "../block/query.cuh"
#include "../block/softmax.cuh"
#include "../ptx/copy.cuh"
#include "../ptx/special.cuh"
#include "../ptx/wgmma.cuh"
#include "params.cuh"

namespace sage {

template <class Layout_, Mask kMask_, int kStages_>
struct WgmmaConfig {
  using Layout = Layout_;
  static constexpr int kHeadDim = Layout::kHeadDim, kTile = Layout::kTile, kStages = kStages_;
  static constexpr Mask kMask = kMask_;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kConsumerWarps = 4 * kConsumers, kThreads = 128 * (kConsumers + 1), kBlockM = 64 * kConsumers;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // of 65536: 128 · 24 + 256 · 240
  static constexpr int kScoreRegisters = kTile / 2, kOutRegisters = Layout::kColumns / 2;
  static constexpr int kWeightRegisters = Layout::kVBytes / Layout::kColumns / 8;  // of P, in the type of V

  // Shared memory: Q in core-matrix order (64 rows after another), the tiles, their barriers, the bias of a dense mask
  static constexpr int kQueryPitch = 64 * 16, kQueryBytes = 64 * kHeadDim;
  static constexpr int kStage0 = kConsumers * kQueryBytes;
  static constexpr int kBarriers = kStage0 + kStages * Layout::kTileBytes, kBarrierPitch = 32;
  static constexpr int kBias = kBarriers + kStages * kBarrierPitch;
  static constexpr int kBiasBytes = (kTile + kKvTile - 1) / kKvTile * BiasTile::kBytes;  // a warp's
  static constexpr int kSharedBytes = kBias + (kMask == Mask::dense ? kConsumerWarps * kBiasBytes : 0);

  // Blocks of queries, over all heads. Persistent: the grid is any number of them, and a block goes on with the item gridDim.x further.
  static constexpr bool kPersistent = true;
  static __device__ __forceinline__ int items(const AttendParams& p) { return p.blocks_q * p.pairs * p.ratio; }
};

// A stage's barriers: K has landed, V has landed, K has been read by all consumer warps, V has.
enum StageBarrier : u32 { kKeysFull = 0, kValuesFull = 8, kKeysFree = 16, kValuesFree = 24 };

// A position in the ring of stages.
template <int kStages>
struct Ring {
  u32 stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void retreat() {
    if (stage-- == 0) stage = kStages - 1, parity ^= 1;
  }
};

// The same number, worked out from here on: what follows from it is not kept in registers over the main loop.
__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Which rows of which head the lane has. Read from the special registers each time: prologue and epilogue each work it out for
// themselves, so that none of it occupies registers in between.
template <class C>
struct Rows {
  int t, g, warp, pair, batch, head, block_row0, row0;  // row0: of the warp's sixteen

  __device__ __forceinline__ explicit Rows(const AttendParams& p) : Rows(p, special_tid_x() - 128, special_ctaid_x()) {}

  __device__ __forceinline__ Rows(const AttendParams& p, int thread, int item) {
    t = thread % 4, g = thread % 32 / 4, warp = thread / 32;
    // Consecutive blocks share a head, so that its K and V stay in L2. Causal: the longest rows first.
    const int blocks_q = anew(p.blocks_q), ratio = anew(p.ratio), heads_kv = anew(p.heads_kv);
    const int head_in_group = item / blocks_q, block = item % blocks_q;
    pair = head_in_group / ratio;
    batch = (p.first + pair) / heads_kv, head = (p.first + pair) % heads_kv * ratio + head_in_group % ratio;
    block_row0 = (C::kMask == Mask::none ? block : blocks_q - 1 - block) * C::kBlockM;
    row0 = block_row0 + 16 * warp;
  }

  __device__ __forceinline__ int row(int half) const { return row0 + 8 * half + g; }
  __device__ __forceinline__ float* lse(const AttendParams& p, int row) const {
    return p.lse + ((i64)batch * p.heads_kv * p.ratio + head) * p.len_q + row;
  }
};

// Which tiles a block visits: [0, tiles), last first; those of [0, full) hold no masked key.
struct Span {
  int tiles, full;
};

template <class C>
__device__ __forceinline__ Span span_of(const AttendParams& p, int block_row0) {
  Span span{p.tiles, C::kMask == Mask::dense ? 0 : p.len_kv / C::kTile};
  if (C::kMask == Mask::causal || (C::kMask == Mask::dense && p.causal)) {
    span.tiles = min(span.tiles, (block_row0 + C::kBlockM - 1) / C::kTile + 1);
    span.full = min(span.full, (block_row0 + 1) / C::kTile);
  }
  return span;
}

// The producer, one warp: K and V of every tile of a head, in the order of the walk.
template <class C>
__device__ __forceinline__ void fetch_tiles(const AttendParams& p, u32 shared, int pair, int tiles, Ring<C::kStages>& ring) {
  using Layout = typename C::Layout;
  const u8* tile = static_cast<const u8*>(p.kv) + ((i64)pair * p.tiles + tiles - 1) * Layout::kTileBytes;
  const bool elected = threadIdx.x == 0;
  for (int n = 0; n < tiles; ++n, tile -= Layout::kTileBytes) {
    const u32 stage = shared + C::kStage0 + ring.stage * Layout::kTileBytes;
    const u32 barrier = shared + C::kBarriers + ring.stage * C::kBarrierPitch;
    mbarrier_wait(barrier + kKeysFree, ring.parity);
    copy_bulk(elected, stage, tile, Layout::kKBytes, barrier + kKeysFull);
    mbarrier_wait(barrier + kValuesFree, ring.parity);
    copy_bulk(elected, stage + Layout::kV, tile + Layout::kV, Layout::kVBytes, barrier + kValuesFull);
    ring.advance();
  }
}

// Brings the query rows of an item into L2 before they are wanted. By one warp.
template <class C>
__device__ __forceinline__ void prefetch_queries(const AttendParams& p, int item) {
  if (item >= C::items(p)) return;
  const Rows<C> at(p, 0, item);
  const int element = p.dtype == kFloat32 ? 4 : 2;
  const u8* head = static_cast<const u8*>(p.q.data) + (at.batch * p.q.stride_b + at.head * p.q.stride_h) * element;
  for (int i = threadIdx.x; i < C::kBlockM; i += 32) {
    const u8* row = head + min(at.block_row0 + i, p.len_q - 1) * p.q.stride_n * element;
    for (int byte = 0; byte < p.head_dim * element; byte += 128) prefetch_l2(row + byte);
  }
}

// Loads, rotates and quantises the warp's rows into shared memory; scale: of the lane's two rows. Up to the wait for the
// quantise launch, nothing of its results is needed.
template <class C>
__device__ __forceinline__ void load_queries(const AttendParams& p, u32 shared, int item, float (&scale)[2]) {
  constexpr int kHeadDim = C::kHeadDim;
  const Rows<C> at(p, special_tid_x() - 128, item);
  with_dtype(p.dtype, [&](auto type) {
    constexpr int kDtype = decltype(type)::value;
    const u8* head = static_cast<const u8*>(p.q.data) + (at.batch * p.q.stride_b + at.head * p.q.stride_h) * kElementBytes<kDtype>;
    Raw8<kDtype> raw[2][kHeadDim / 32];
    if (p.q_vectors)
      load_raw<kHeadDim, 2, kDtype, true>(head, p.q.stride_n, at.row(0), p.len_q, at.t, p.head_dim, raw);
    else
      load_raw<kHeadDim, 2, kDtype, false>(head, p.q.stride_n, at.row(0), p.len_q, at.t, p.head_dim, raw);
    if (p.lse) {  // what the shift of K takes out of a row's LSE waits in its place: registers are short in the main loop
      wait_for_previous_launch();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[kHeadDim / 4];
        unpack_row<kHeadDim>(raw[half], x);
        const float score = anchor_score<kHeadDim>(x, p.anchor + at.pair * kHeadDim, at.t, p.sm_scale);
        if (at.row(half) < p.len_q && at.t == 0) *at.lse(p, at.row(half)) = score;
      }
    }
    const u32 row0 = shared + at.warp / 4 * C::kQueryBytes + 16 * (at.warp % 4) * 16;
    const auto wait = [&] { named_barrier<128>(1 + at.warp / 4); };  // the Q before is not read any more
    if constexpr (kDtype == kFloat32) {
      u32 a[kHeadDim / 32][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[kHeadDim / 4];
        unpack_row<kHeadDim>(raw[half], x);
        scale[half] = quantise_row<kHeadDim>(x, at.t, p.score_scale, p.sign, a, half);
      }
      wait();
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int c2 = 0; c2 < kHeadDim / 64; ++c2)
          store_shared16(row0 + (4 * c2 + at.t) * C::kQueryPitch + (8 * half + at.g) * 16,
                         {a[2 * c2][half], a[2 * c2][half + 2], a[2 * c2 + 1][half], a[2 * c2 + 1][half + 2]});
    } else {
      const Rotation<kHeadDim, kDtype> rotation(4 * at.g + at.t);
      u32 codes[2][2][kHeadDim / 32];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        scale[half] = quantise_eight(raw[half], rotation, 4 * at.g + at.t, p.score_scale, p.sign, codes[half]);
      wait();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& own = codes[i / 2][i % 2];
        const u32 to = row0 + (8 * (i / 2) + 2 * at.t + i % 2) * 16;
        if constexpr (kHeadDim == 64)
          store_shared8(to + at.g % 4 * C::kQueryPitch + at.g / 4 * 8, own[0], own[1]);
        else
          store_shared16(to + at.g * C::kQueryPitch, own);
      }
    }
  });
  fence_async_proxy();
  named_barrier<128>(1 + at.warp / 4);  // the warpgroup's Q is complete in shared memory
  wait_for_previous_launch();
  // No score may leave the range in which the softmax works. A largest K scale of 0 (all keys alike) must not make the bound
  // infinite; the scores are 0 then whatever it is.
  const float max_scale = p.score_limit / fmaxf(__int_as_float(p.k_scale_max[at.pair]), 7.5e-37f);
#pragma unroll
  for (int half = 0; half < 2; ++half) scale[half] = fminf(scale[half], max_scale);
}

// O / sum, times V's channel scales, in the output's dtype; LSE. Of o, the first kHeadDim / 2 registers.
template <class C>
__device__ __forceinline__ void store_output(const AttendParams& p, const float (&o)[C::kOutRegisters], const float (&sums)[2],
                                             const float (&reference)[2], int item) {
  constexpr int kHeadDim = C::kHeadDim;
  const Rows<C> at(p, special_tid_x() - 128, item);
  // Loaded before anything is stored: they wait for memory once. Of wgmma's schemes, those with a byte for V take its mean out.
  float channel_scale[kHeadDim / 4], mean[kHeadDim / 4] = {};
  const auto load_channels = [&](const float* all, float (&x)[kHeadDim / 4]) {
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
      const float4* from = reinterpret_cast<const float4*>(all + at.pair * kHeadDim + 32 * c + kChunk * at.t);
      const float4 a = from[0], b = from[1];
      const float eight[kChunk] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int e = 0; e < kChunk; ++e) x[kChunk * c + e] = eight[e];
    }
  };
  load_channels(p.v_amax, channel_scale);
  if constexpr (C::Layout::kValueBytes == 1) {
    // V as it was rounded has V's mean: that of the codes, which rounding moved off zero, is taken out.
    float codes[kHeadDim / 4];
    load_channels(p.v_mean, mean);
    load_channels(reinterpret_cast<const float*>(p.v_codes), codes);
    const float unit = p.inv_v_max / (64.0f * p.len_kv);
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) mean[i] = fmaf(-channel_scale[i] * unit, (float)__float_as_int(codes[i]), mean[i]);
  }
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = at.row(half);
    const float sum = sums[half];
    inverse[half] = sum > 0.0f ? p.inv_v_max / sum : 0.0f;  // 0: every key masked out
    if (p.lse && at.t == 0 && row < p.len_q) {
      float* lse = at.lse(p, row);
      *lse = sum > 0.0f ? *lse + (reference[half] + log2_approx(sum)) * kLn2 : -kInf;
    }
  }
  with_access(p.dtype, p.out_vectors, [&](auto type, auto vectors) {
    constexpr int kDtype = decltype(type)::value;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.row(half);
      if (row >= p.len_q) continue;
      u8* to = static_cast<u8*>(p.out) +
               (at.batch * p.out_stride_b + at.head * p.out_stride_h + row * p.out_stride_n) * kElementBytes<kDtype>;
#pragma unroll
      for (int c = 0; c < kHeadDim / 32; ++c) {
        float y[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          const float value = o[16 * c + e / 2 * 4 + 2 * half + e % 2] * inverse[half];
          y[e] = fmaf(value, channel_scale[kChunk * c + e], inverse[half] > 0.0f ? mean[kChunk * c + e] : 0.0f);
        }
        store8<kDtype, decltype(vectors)::value>(to, 32 * c + kChunk * at.t, p.head_dim, y);
      }
    }
  });
}

// What lives in registers during the walk of one consumer warpgroup over the KV tiles, but for scores, weights and O.
template <class C>
struct ScoreWalk {
  using Layout = typename C::Layout;
  static constexpr int kHeadDim = C::kHeadDim, kColumns8 = C::kScoreRegisters / 4;  // groups of eight keys in one step of the softmax
  using Scores = i32[C::kScoreRegisters];
  using Weights = u32[C::kWeightRegisters];

  const AttendParams& p;
  u32 shared;
  float q_scale[2];
  Ring<C::kStages> ring;
  float reference[2];  // P = 2^(score − reference); log2(p_max) below the maximum that the row was last scaled to
  bool causal;
  int item;

  static __device__ __forceinline__ bool elected() { return special_tid_x() % 32 == 0; }
  __device__ __forceinline__ u32 barrier(u32 stage) const { return shared + C::kBarriers + stage * C::kBarrierPitch; }
  __device__ __forceinline__ u32 tile(u32 stage) const { return shared + C::kStage0 + stage * Layout::kTileBytes; }

  // The scores themselves of the keys from key0 on, −inf where masked out, in place; top: the lane's largest of each half. kScales:
  // how many K scales follow one another along the keys.
  template <int kScales>
  __device__ __forceinline__ void mask_scores(Scores& s, const float (&scale)[kScales][2], int key0, float (&top)[2]) const {
    const Rows<C> at(p, special_tid_x() - 128, item);
    constexpr int kBiasTiles = (kColumns8 + kColumns - 1) / kColumns;
    MaskView mask;
    BiasTile bias[kBiasTiles];
    if constexpr (C::kMask == Mask::dense) {
      const i64 offset = at.batch * p.mask_stride_b + at.head * p.mask_stride_h;
      mask = {static_cast<const u8*>(p.mask) + offset * (p.mask_kind == kMaskBool ? 1 : p.mask_kind == kMaskF32 ? 4 : 2),
              p.mask_stride_q, p.mask_stride_k, p.mask_kind, p.len_q, p.len_kv};
#pragma unroll
      for (int i = 0; i < kBiasTiles; ++i) {
        bias[i].shared = shared + C::kBias + at.warp * C::kBiasBytes + i * BiasTile::kBytes;
        bias[i].stage(mask, at.row0, key0 + i * kKvTile);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.row(half), limit = (causal ? min(row + 1, p.len_kv) : p.len_kv) - key0 - 2 * at.t;
      top[half] = -kInf;
#pragma unroll
      for (int j = 0; j < kColumns8; ++j) {
        float2 add = {0.0f, 0.0f};
        if constexpr (C::kMask == Mask::dense) add = bias[j / kColumns].get(mask, 8 * half + at.g, 8 * (j % kColumns) + 2 * at.t);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          i32& bits = s[4 * j + 2 * half + e];
          float score = (float)bits * scale[j * kScales / kColumns8][half];
          if constexpr (C::kMask == Mask::dense) score += e ? add.y : add.x;
          score = 8 * j + e < limit ? score : -kInf;
          top[half] = fmaxf(top[half], score);
          bits = __float_as_int(score);
        }
      }
    }
  }
};

// A block: one item after another, the tiles of the next already on their way while the last is stored. Walk<C> is a ScoreWalk<C>
// with O in `o` and `all(span, sums)`, which goes over the tiles from the last to the first.
// kSharedBytes: the dynamic shared memory that the launch has (sageattention/variants.py).
template <class C, template <class> class Walk, int kSharedBytes>
__device__ __forceinline__ void attend_block(const AttendParams& p) {
  static_assert(kSharedBytes == C::kSharedBytes, "the table of variants and the kernel disagree about shared memory");
  static_assert(C::kBarriers % 8 == 0 && C::kStage0 % 128 == 0 && C::Layout::kTileBytes % 128 == 0, "operands lie on 128 bytes");
  extern __shared__ __align__(128) u8 bytes[];
  const u32 shared = shared_address(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      const u32 barrier = shared + C::kBarriers + i * C::kBarrierPitch;
      mbarrier_init(barrier + kKeysFull, 1), mbarrier_init(barrier + kValuesFull, 1);
      mbarrier_init(barrier + kKeysFree, C::kConsumerWarps), mbarrier_init(barrier + kValuesFree, C::kConsumerWarps);
    }
    fence_async_proxy();
  }
  __syncthreads();  // the barriers are initialised
  if (threadIdx.x < 128) {
    registers_shrink<C::kProducerRegisters>();
    if (threadIdx.x < 32) {
      wait_for_previous_launch();
      Ring<C::kStages> ring{0, 1};  // every stage is free at first: a wait for the phase before the first returns at once
      for (int item = blockIdx.x; item < C::items(p); item += gridDim.x) {
        if constexpr (C::kPersistent) prefetch_queries<C>(p, item + gridDim.x);
        const Rows<C> at(p, 0, item);
        fetch_tiles<C>(p, shared, at.pair, span_of<C>(p, at.block_row0).tiles, ring);
        if constexpr (!C::kPersistent) break;
      }
    }
  } else {
    registers_grow<C::kConsumerRegisters>();
    Walk<C> walk{p, shared};
    walk.causal = C::kMask == Mask::causal || (C::kMask == Mask::dense && p.causal);
    for (walk.item = blockIdx.x; walk.item < C::items(p); walk.item += gridDim.x) {
      load_queries<C>(p, shared, walk.item, walk.q_scale);
      walk.reference[0] = walk.reference[1] = -kInf;
      float sums[2];
      walk.all(span_of<C>(p, Rows<C>(p, 0, walk.item).block_row0), sums);
      store_output<C>(p, walk.o, sums, walk.reference, walk.item);
      if constexpr (!C::kPersistent) break;
    }
  }
}

}  // namespace sage
