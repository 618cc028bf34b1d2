// Attention whose K and V stay in shared memory, on Hopper: the only launch of a call with few keys.
//
// A CTA has all keys of one (batch or sequence, kv head) at a time. Its three warpgroups quantise K and V together, into the tiles that the
// quantisers would have made (core_matrix.cuh). Then each goes over blocks of queries, 64 of 192, by itself: nothing is fetched, so they
// meet at no barrier, and one's prologue or epilogue runs under the products of the others.
//
// A CTA's work is a stretch of the launch's work tiles, or, of packed sequences, every gridDim.x-th (sequence, kv head).
#pragma once
#include "mainloop_sm90_fp16.cuh"
#include "place_sequences.cuh"
#include "quantize_k.cuh"

namespace sage {

// One kernel: a row of sageattention/kernels/resident.py.
struct ResidentTile {
  Mask mask;
  int kv_tiles;  // for which there is room
};

__device__ __forceinline__ u8* dynamic_shared_memory() {
  extern __shared__ __align__(128) u8 bytes[];
  return bytes;
}

template <class Layout_, ResidentTile kResidentTile>
struct ResidentConfig {
  using Layout = Layout_;
  static constexpr int kHeadDim = Layout::kHeadDim, kTile = Layout::kTile, kStages = kResidentTile.kv_tiles;  // a stage: a tile's place
  static constexpr int kStageBytes = Layout::kTileBytes;
  static constexpr Mask kMask = kResidentTile.mask;
  static_assert(kMask == Mask::none || kMask == Mask::packed, "no key is masked: those beyond the end are zeros (core_matrix.cuh)");
  static constexpr bool kResident = true, kHasRawQ = false;  // beside K and V there is no room for Q as in memory
  static constexpr bool kRouted = false;                     // no tails, no order
  static constexpr int kRawQ = 0, kRawQPitch = 0, kTails = 0, kTailBytes = 0;
  static constexpr int kConsumers = 3, kFirstConsumer = 0, kThreads = 128 * kConsumers, kBlockM = 64 * kConsumers;
  static constexpr int kScoreRegisters = kTile / 2, kOutRegisters = Layout::kVColumns / 2, kProbRegisters = kTile / 4;

  // Shared memory, byte offsets: quantised Q of each warpgroup, 64 rows, where there is what quantising K and V takes, before; K and V;
  static constexpr int kQStages = 1, kQPitch = 64 * 16, kQBytes = 64 * kHeadDim;
  static constexpr int kStage0 = kConsumers * kQBytes;
  // the rotation's matrix; V's scale of each channel; k_mean; the largest K scale of each warpgroup's keys; two work tiles of each.
  static constexpr int kRotation = kStage0 + kStages * Layout::kTileBytes, kChannels = kRotation + 32 * 16;
  static constexpr int kKMean = kChannels + 4 * kHeadDim, kScaleMax = kKMean + 4 * kHeadDim;
  static constexpr int kDone = kScaleMax + 16;  // a barrier whose phase of parity 1 is complete
  static constexpr int kWorkSlot0 = kDone + 16, kWorkSlotBytes = 64;
  static constexpr int kSharedBytes = kWorkSlot0 + 2 * kConsumers * kWorkSlotBytes;

  static __device__ __forceinline__ u32 q_offset(int, int warpgroup) { return warpgroup * kQBytes; }
  static __device__ __forceinline__ u32 work_slot(int iteration) {
    return kWorkSlot0 + (special_tid_x() / 128 * 2 + iteration % 2u) * kWorkSlotBytes;
  }
  static __device__ __forceinline__ u32 channel_scales(u32) { return shared_address(dynamic_shared_memory()) + kChannels; }
  static __device__ __forceinline__ const float* k_mean(const AttendParams&, int) {
    return reinterpret_cast<const float*>(dynamic_shared_memory() + kKMean);
  }
};

// What the CTA's threads exchange while they quantise. Those of a warpgroup share the scales of a scale block.
template <class C>
struct QuantizeResidentShared {
  static constexpr int kHeadDim = C::kHeadDim, kThreads = C::kThreads, kWarps = 4;
  static constexpr int kLanes = kHeadDim / kChunk, kRows = kThreads / kLanes;  // as in QuantizeKShared
  static_assert(C::Layout::kScaleKeys == 8 * kWarps, "a warpgroup has the keys of a scale block");
  union {
    alignas(16) float partial[kThreads][kChunk];
    struct {
      alignas(16) float k_mean[kHeadDim];
      alignas(16) float v_scale[kHeadDim];
      float4 start[kHeadDim / 16][8];
      float k_amax[C::kConsumers][2][kWarps][4];
    };
  };

  static __device__ __forceinline__ u32 thread() { return threadIdx.x % 128; }
  // A warpgroup's blocks are kConsumers apart, an odd number.
  __device__ __forceinline__ float (&maxima(int scale_block))[kWarps][4] { return k_amax[threadIdx.x / 128][scale_block % 2]; }
  static __device__ __forceinline__ void sync() { named_barrier<128>(1 + threadIdx.x / 128); }
};

// The largest magnitude of a thread's rows in each of its eight channels, as in ChannelSum.
struct ChannelAmax {
  static constexpr int kResults = 1;
  float amax[kChunk] = {};

  __device__ __forceinline__ void add(int i, float x, float) { amax[i] = fmaxf(amax[i], fabsf(x)); }
  __device__ __forceinline__ float get(int, int i) const { return amax[i]; }
  static __device__ __forceinline__ float combine(int, float a, float b) { return fmaxf(a, b); }
};

// Keys and values of one (batch or sequence, kv head), and the queries that attend to them.
struct ResidentHead {
  const u8 *k, *v;  // its first token
  int len;          // keys
};

// Of fp16, rounds eight keys' V and stores it, transposed, as 16 bytes of each column. Lane 4g + t has channels 32c + 8t + e of key g, which
// are columns 2t and 2t + 1 of n-tiles 4c + e / 2 (core_matrix.cuh). count: how many of the eight keys there are.
template <class Layout, int kDtype>
__device__ __forceinline__ void store_v8(const RawRow<Layout::kHeadDim, kDtype>& raw, const float (&scale)[Layout::kHeadDim / 32][kChunk],
                                         int count, u8* to) {
  static_assert(Layout::kVElementBytes == 2 && Layout::kOnes, "fp16, with columns of ones");
  constexpr u32 kOne = 0x3C00;
  const int lane = threadIdx.x % 32, key = lane % 4 * 2;
  const bool there = lane / 4 < count;
  u32* word = reinterpret_cast<u32*>(to) + lane;
#pragma unroll
  for (int c = 0; c < Layout::kHeadDim / 32; ++c) {
    float x[kChunk];
    unpack8<kDtype>(raw.chunk[c], x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 pair = pack_f16(x[2 * i] * scale[c][2 * i], x[2 * i + 1] * scale[c][2 * i + 1]);
      word[32 * (4 * c + i)] = movmatrix_trans(there ? pair : 0u);
    }
  }
  word[4 * Layout::kHeadDim] = (key < count ? kOne : 0u) | (key + 1 < count ? kOne << 16 : 0u);
}

// K and V of a head → the CTA's tiles; k_mean, V's scales and the largest K scale. A collective of the CTA.
template <class C, int kDtype, bool kVectors>
__device__ __forceinline__ void quantize_resident(const ResidentParams& r, const ResidentHead& head, u8* bytes) {
  using Layout = typename C::Layout;
  using Shared = QuantizeResidentShared<C>;
  constexpr int kHeadDim = C::kHeadDim, kBlocksPerTile = C::kTile / Layout::kScaleKeys, kWarps = C::kThreads / 32;
  static_assert(sizeof(Shared) <= C::kStage0, "it lies where Q comes");
  const AttendParams& p = r.attend;
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  float* channels = reinterpret_cast<float*>(bytes + C::kChannels);
  float* k_mean = reinterpret_cast<float*>(bytes + C::kKMean);
  const i64 k_row = r.kv.k.stride_n * kElementBytes<kDtype>, v_row = r.kv.v.stride_n * kElementBytes<kDtype>;
  const int step = ceil_div(head.len, kMaxKMeanTokens), samples = ceil_div(head.len, step), tiles = ceil_div(head.len, C::kTile);
  const int t = threadIdx.x % 4;
  reduce_rows<ChannelSum, kDtype, kVectors, false>(
      head.k, k_row, samples, p.head_dim, 1.0f / samples, shared, [&](int i) -> Row { return {i * step, true}; },
      [&](int, int c, float mean) { k_mean[c] = mean; });
  __syncthreads();  // the sums have been read
  reduce_rows<ChannelAmax, kDtype, kVectors, false>(
      head.v, v_row, head.len, p.head_dim, 1.0f, shared, [&](int i) -> Row { return {i, true}; },
      [&](int, int c, float amax) { channels[c] = amax < kAmaxMin ? 0.0f : amax; });
  __syncthreads();  // the maxima have been read, k_mean and `channels` are complete
  for (int c = threadIdx.x; c < kHeadDim; c += C::kThreads) {
    shared.k_mean[c] = k_mean[c] * (0.5f / kHeadDim);
    shared.v_scale[c] = channels[c] == 0.0f ? 0.0f : rcp_approx(channels[c] * p.inv_v_max);
  }
  __syncthreads();  // these are complete
  RotateK<Layout, kDtype, Shared> rotate_k;
  rotate_k.prepare(shared);

  const int warpgroup = threadIdx.x / 128;
  const auto row_of = [&](const u8* rows, i64 row_bytes, int key) { return rows + min(key, head.len - 1) * row_bytes; };
  RawRow<kHeadDim, kDtype> raw;
  const auto load_k = [&](int scale_block) {
    raw.template load<kVectors>(row_of(head.k, k_row, scale_block * Layout::kScaleKeys + rotate_k.row()), t, p.head_dim);
  };
  float top = 0.0f;
  load_k(warpgroup);
  for (int scale_block = warpgroup; scale_block < kBlocksPerTile * tiles; scale_block += C::kConsumers) {
    const int first_key = scale_block * Layout::kScaleKeys;
    const auto counts = [&](int i) { return first_key + i < head.len; };
    u8* tile = bytes + C::kStage0 + scale_block / kBlocksPerTile * Layout::kTileBytes;
    const auto load_next = [&] { load_k(scale_block + C::kConsumers); };
    top = fmaxf(top, rotate_k.quantize(raw, counts, load_next, scale_block, Layout::kTileBytes, shared, tile));
  }
  // All threads of the warpgroup have the same, and all store it: a branch for one of them would cost the main loop its uniform registers
  // (docs/compiler.md).
  reinterpret_cast<float*>(bytes + C::kScaleMax)[warpgroup] = row_max(top);

  const auto load_v = [&](int eight) {
    raw.template load<kVectors>(row_of(head.v, v_row, 8 * eight + threadIdx.x % 32 / 4), t, p.head_dim);
  };
  const int warp = threadIdx.x / 32;
  load_v(warp);
  float scale[kHeadDim / 32][kChunk];
#pragma unroll
  for (int c = 0; c < kHeadDim / 32; ++c)
#pragma unroll
    for (int e = 0; e < kChunk; ++e) scale[c][e] = shared.v_scale[32 * c + kChunk * t + e];
  for (int eight = warp; eight < C::kTile / 8 * tiles; eight += kWarps) {
    const RawRow<kHeadDim, kDtype> own = raw;
    load_v(eight + kWarps);
    u8* to = bytes + C::kStage0 + eight / (C::kTile / 8) * Layout::kTileBytes + Layout::kV + eight % (C::kTile / 8) * Layout::kVPitch;
    store_v8<Layout, kDtype>(own, scale, head.len - 8 * eight, to);
  }
}

// The work tiles that the CTA takes with the same K and V, numbers `first` to `last`, and what comes after them.
template <class C>
struct ResidentWork {
  const ResidentParams& r;
  int first, last;  // of one kv head
  int at, end;      // next work tile, or next (sequence, kv head)
  int bh;
  Extent q, k;  // Mask::packed: of the sequence
  int q_tiles;  // of a query head

  __device__ __forceinline__ explicit ResidentWork(const ResidentParams& r) : r(r), first(0), last(0), bh(0), q{}, k{} {
    const AttendParams& p = r.attend;
    q_tiles = p.q_tiles;
    if constexpr (C::kMask == Mask::packed) {
      at = blockIdx.x, end = r.kv.sequences * p.heads_kv;
    } else {
      const i64 count = (i64)p.bh_count * p.heads_per_kv * p.q_tiles;
      at = (int)(count * blockIdx.x / gridDim.x), end = (int)(count * (blockIdx.x + 1) / gridDim.x);
    }
  }

  // Goes on to the next head. Returns false if there is none.
  __device__ __forceinline__ bool next() {
    const AttendParams& p = r.attend;
    if (at >= end) return false;
    if constexpr (C::kMask == Mask::packed) {
      const ResidentKv& kv = r.kv;
      for (;; at += gridDim.x) {
        if (at >= end) return false;
        const auto [sequence, head] = fast_divmod(at, p.heads_kv, p.rcp_heads_kv);
        bh = head;
        q = extent_of(kv.cu_seqlens_q, kv.wide_q, sequence, kv.total_q, kv.max_len_q);
        k = extent_of(kv.cu_seqlens_k, kv.wide_k, sequence, kv.total_k, kv.max_len_k);
        if (q.length) break;
      }
      at += gridDim.x;
      q_tiles = ceil_div(q.length, C::kBlockM);
      first = 0, last = p.heads_per_kv * q_tiles;
    } else {
      const int of_head = p.heads_per_kv * p.q_tiles;
      bh = at / of_head;
      first = at, last = min(end, (bh + 1) * of_head);
      at = last;
    }
    return true;
  }

  __device__ __forceinline__ ResidentHead head() const {
    const AttendParams& p = r.attend;
    const int bytes = p.dtype == kFloat32 ? 4 : 2;
    const auto [batch, head] = fast_divmod(bh, p.heads_kv, p.rcp_heads_kv);
    const i64 token = C::kMask == Mask::packed ? k.start : 0;
    const auto rows = [&](const Tokens& x) {
      return static_cast<const u8*>(x.data) + (batch * x.stride_b + head * x.stride_h + token * x.stride_n) * bytes;
    };
    return {rows(r.kv.k), rows(r.kv.v), C::kMask == Mask::packed ? k.length : p.len_kv};
  }

  __device__ __forceinline__ WorkTile tile(int index) const {
    if constexpr (C::kMask == Mask::packed) {
      const int head = index / q_tiles;
      return {bh, 0, bh * r.attend.heads_per_kv + head, (index - head * q_tiles) * C::kBlockM, {q.start, q.length, k.length, 0, 0}};
    } else {
      return work_tile<C::kMask, C::kTile>(r.attend, index, C::kBlockM);
    }
  }
};

template <class C>
__device__ __forceinline__ void attend_resident(const ResidentParams& r) {
  static_assert(C::kStage0 % 128 == 0 && C::Layout::kTileBytes % 128 == 0, "operands lie on 128 bytes");
  const AttendParams& p = r.attend;
  u8* bytes = dynamic_shared_memory();
  const u32 shared = shared_address(bytes);
  // The shuffle tells the compiler that it is warp-uniform: descriptors are then computed in uniform registers.
  const u32 warpgroup = __shfl_sync(kAllLanes, special_tid_x() / 128, 0);
  const bool stores = __shfl_sync(kAllLanes, special_tid_x() / 32 % 4, 0) == 0;
  if (threadIdx.x == 0) mbarrier_init(shared + C::kDone, 1);
  if (threadIdx.x < 32) {  // for all prologues
    with_dtype(p.dtype, [&](auto type) {
      if constexpr (decltype(type)::value != kFloat32)
        store_shared16(shared + C::kRotation + 16 * threadIdx.x, Rotation<C::kHeadDim, decltype(type)::value>(threadIdx.x).matrix);
    });
  }
  const u32 sQ = shared + C::q_offset(0, warpgroup);
  MainloopFp16<C> mainloop{p, shared, sQ};
  mainloop.causal = false, mainloop.iteration = 0;
  ResidentWork<C> work(r);
  // Shuffles tell as well that no branch diverges; where one may there are no uniform registers.
  const auto uniform = [](int x) { return __shfl_sync(kAllLanes, x, 0); };
  while (uniform(work.next())) {
    const ResidentHead head = work.head();
    const int tiles = ceil_div(head.len, C::kTile);
    __syncthreads();  // the last head's K and V have been read, and all Q
    if (uniform(head.len)) {
      with_access(p.dtype, r.kv.vectorized,
                  [&](auto type, auto vectors) { quantize_resident<C, decltype(type)::value, decltype(vectors)::value>(r, head, bytes); });
    }
    fence_async_proxy();
    __syncthreads();  // K and V are complete
    for (int index = uniform(work.first), last = uniform(work.last); index < last; ++index) {
      const WorkTile tile = work.tile(index);
      if (uniform(tile.row0 + 64 * (int)warpgroup >= tile.span.len_q)) continue;
      const u32 slot = shared + C::work_slot(mainloop.iteration);
      if (stores) {  // all lanes of a warp
        const float* largest = reinterpret_cast<const float*>(bytes + C::kScaleMax);
        const i32 scale_max = __float_as_int(fmaxf(largest[0], fmaxf(largest[1], largest[2])));
        store_work_tile<C>(tile, output_offset(p, tile), slot);
        store_shared16(slot, {0u, (u32)tiles, (u32)kWorkValid, __float_as_uint(max_score_scale(p.score_limit, scale_max))});
      }
      named_barrier<128>(1 + warpgroup);  // the work tile is stored, and all have read the last one's Q
      quantize_q<C>(p, shared, mainloop.iteration, mainloop.q_scale);
      mainloop.ring = {};
      mainloop.m_i[0] = mainloop.m_i[1] = -kInf;
      float l_i[2];
      mainloop.run(KvRange(slot), l_i);
      store_output<C>(p, mainloop.o, l_i, mainloop.m_i, slot);
      ++mainloop.iteration;
    }
  }
}

}  // namespace sage
