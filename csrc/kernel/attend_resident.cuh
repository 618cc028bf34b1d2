// Attention whose K and V stay in shared memory, on Hopper: the only launch of a call with few keys.
//
// A CTA has all keys of one (batch or sequence, kv head) at a time. Its warpgroups quantise K and V together, into the tiles that the
// quantisers would have made (core_matrix.cuh): each is read once, K into registers, V to where it will lie. Then each warpgroup goes over
// its 64 queries of every work tile by itself: nothing is fetched, so they meet at no barrier, and one's prologue or epilogue runs under
// the products of the others.
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
  int dtype;                 // of the tensors: a 16-bit one; rows are aligned to 16 bytes
  int kv_tiles, warpgroups;  // kv_tiles: for which there is room
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
  static constexpr int kDtype = kResidentTile.dtype;
  static_assert(kMask == Mask::none || kMask == Mask::packed, "no key is masked: those beyond the end are zeros (core_matrix.cuh)");
  static constexpr bool kResident = true, kHasRawQ = false;  // beside K and V there is no room for Q as in memory
  static constexpr bool kRouted = false;                     // no tails, no order
  static constexpr int kRawQ = 0, kRawQPitch = 0, kTails = 0, kTailBytes = 0;
  static constexpr int kConsumers = kResidentTile.warpgroups, kFirstConsumer = 0, kThreads = 128 * kConsumers, kBlockM = 64 * kConsumers;
  static constexpr int kScoreRegisters = kTile / 2, kOutRegisters = Layout::kVColumns / 2, kProbRegisters = kTile / 4;

  // Shared memory, byte offsets: quantised Q of each warpgroup, 64 rows, where there is what quantising K and V takes, before; K and V;
  static constexpr int kQStages = 1, kQPitch = 64 * 16, kQBytes = 64 * kHeadDim;
  static constexpr int kStage0 = kConsumers * kQBytes;
  // the rotation's matrix; V's scale of each channel; k_mean; the largest K scale of each warpgroup's keys; two work tiles of each.
  static constexpr int kRotation = kStage0 + kStages * Layout::kTileBytes, kChannels = kRotation + 32 * 16;
  static constexpr int kKMean = kChannels + 4 * kHeadDim, kScaleMax = kKMean + 4 * kHeadDim;
  static constexpr int kDone = kScaleMax + 16;               // a barrier whose phase of parity 1 is complete
  static constexpr int kWork = kDone + 16, kWorkBytes = 48;  // the head's work, and the next one's
  static constexpr int kWorkSlot0 = kWork + 2 * kWorkBytes, kWorkSlotBytes = 64;
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
  static_assert(C::Layout::kScaleKeys == 8 * kWarps, "a warpgroup has the keys of a scale block");
  alignas(16) float k_mean[kHeadDim];  // as in QuantizeKShared, down to `start`
  float4 start[kHeadDim / 16][8];
  alignas(16) float v_scale[kHeadDim];
  alignas(16) float k_sum[C::kThreads / 32][kHeadDim];  // of each warp's rows of the sample
  u32 v_amax[C::kThreads / 32][kHeadDim / 2];           // of each warp's rows: magnitudes of two channels
  float k_amax[C::kConsumers][2][kWarps][4];

  static __device__ __forceinline__ u32 thread() { return threadIdx.x % 128; }
  __device__ __forceinline__ float (&maxima(int scale_block))[kWarps][4] {
    return k_amax[threadIdx.x / 128][scale_block / C::kConsumers % 2];
  }
  static __device__ __forceinline__ void sync() { named_barrier<128>(1 + threadIdx.x / 128); }
};

// Keys and values of one (batch or sequence, kv head).
struct ResidentHead {
  const u8 *k, *v;       // its first token
  u32 k_pitch, v_pitch;  // bytes to the next one
  int len, head_dim;     // keys, channels

  // Of a token < 2^31; a product of 64 bits would take three instructions.
  static __device__ __forceinline__ const u8* row(const u8* first, int token, u32 pitch) { return first + (u64)(u32)token * pitch; }
};

// K of a head in the CTA's registers: of a warpgroup every kConsumers-th scale block, as RotateKByMma wants it. So all of it is under way
// at once.
template <class C>
struct ResidentK {
  using Layout = typename C::Layout;
  using Shared = QuantizeResidentShared<C>;
  static constexpr int kHeadDim = C::kHeadDim, kDtype = C::kDtype, kBlocksPerTile = C::kTile / Layout::kScaleKeys;
  static constexpr int kHeld = (C::kStages * kBlocksPerTile + C::kConsumers - 1) / C::kConsumers;

  RawRow<kHeadDim, kDtype> raw[kHeld];

  static __device__ __forceinline__ int block(int i) { return threadIdx.x / 128 + i * C::kConsumers; }

  // Keys beyond the end repeat the last, as everywhere here.
  __device__ __forceinline__ void load(const ResidentHead& head) {
    const int row = RotateK<Layout, kDtype, Shared>::row(), t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (block(i) * Layout::kScaleKeys < head.len)
        raw[i].template load<true>(ResidentHead::row(head.k, min(block(i) * Layout::kScaleKeys + row, head.len - 1), head.k_pitch), t,
                                   head.head_dim);
  }

  // Stores the warp's part of k_mean. The sample's rows are read again, from L2, eight channels a lane: only one row in `step` is added up.
  static __device__ __forceinline__ void store_sums(const ResidentHead& head, Shared& shared) {
    constexpr int kLanes = kHeadDim / kChunk, kRows = C::kThreads / kLanes, kUnderWay = (kMaxKMeanTokens + kRows - 1) / kRows;
    const int step = ceil_div(head.len, kMaxKMeanTokens), samples = ceil_div(head.len, step);
    const int channel = threadIdx.x % kLanes * kChunk, first = threadIdx.x / kLanes;
    Raw8<kDtype> rows[kUnderWay];
#pragma unroll
    for (int u = 0; u < kUnderWay; ++u)
      rows[u] =
          load8<kDtype, true>(ResidentHead::row(head.k, min(first + u * kRows, samples - 1) * step, head.k_pitch), channel, head.head_dim);
    const float weight = rcp_approx((float)samples);  // a plain sum could overflow
    float sum[kChunk] = {};
#pragma unroll
    for (int u = 0; u < kUnderWay; ++u) {
      float x[kChunk];
      unpack8<kDtype>(rows[u], x);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sum[e] = fmaf(x[e], first + u * kRows < samples ? weight : 0.0f, sum[e]);
    }
#pragma unroll
    for (int other = kLanes; other < 32; other *= 2)
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sum[e] += __shfl_xor_sync(kAllLanes, sum[e], other);
    if (threadIdx.x % 32 < kLanes) {
      float4* to = reinterpret_cast<float4*>(shared.k_sum[threadIdx.x / 32] + channel);
      to[0] = {sum[0], sum[1], sum[2], sum[3]}, to[1] = {sum[4], sum[5], sum[6], sum[7]};
    }
  }

  // Of all warps' sums: k_mean, and where the rotation's accumulators start. A warp has 32 channels.
  static __device__ __forceinline__ void store_mean(const RotateK<Layout, kDtype, Shared>& rotate, Shared& shared, float* k_mean) {
    static_assert(kHeadDim <= C::kThreads, "a thread has a channel");
    const int c = threadIdx.x;
    if (c >= kHeadDim) return;
    float mean = shared.k_sum[0][c];
#pragma unroll
    for (int w = 1; w < C::kThreads / 32; ++w) mean += shared.k_sum[w][c];
    k_mean[c] = mean, shared.k_mean[c] = mean * (0.5f / kHeadDim);
    __syncwarp();  // the warp's channels are stored
    rotate.store_start(shared);
  }

  // Quantises K into `tiles` tiles. Returns the warpgroup's largest scale.
  __device__ __forceinline__ float quantize(const RotateK<Layout, kDtype, Shared>& rotate, int len, Shared& shared, u8* first_tile,
                                            int tiles) const {
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (block(i) >= kBlocksPerTile * tiles) break;
      const auto counts = [&](int key) { return block(i) * Layout::kScaleKeys + key < len; };
      u8* tile = first_tile + block(i) / kBlocksPerTile * Layout::kTileBytes;
      top = fmaxf(top, rotate.quantize(raw[i], counts, [] {}, block(i), Layout::kTileBytes, shared, tile));
    }
    return row_max(top);
  }
};

// V of a head in shared memory, as in memory where it will lie quantised: of a warp every kWarps-th eight keys, whose bytes are 32 channels
// of all of them after another, 16 of each lane. Lane 4g + t has channels 32c + 8t + e of key g, which are columns 2t and 2t + 1 of n-tiles
// 4c + e / 2 (core_matrix.cuh).
template <class C>
struct ResidentV {
  using Layout = typename C::Layout;
  using Shared = QuantizeResidentShared<C>;
  static constexpr int kHeadDim = C::kHeadDim, kDtype = C::kDtype, kChunks = kHeadDim / 32, kWarps = C::kThreads / 32;
  static constexpr int kHeld = (C::kStages * C::kTile / 8 + kWarps - 1) / kWarps;
  static constexpr int kPieces = 32 * 16;  // bytes of eight keys' 32 channels
  static_assert(Layout::kVElementBytes == 2 && Layout::kOnes, "fp16, as large as it was, with columns of ones");
  static_assert(2 * kWarps * 8 % C::kTile == 0, "every other eight keys of a warp lie at the same place of their tiles");

  const ResidentHead& head;
  int warp, last_key;  // of the last tile
  u32 places[2];       // of the warp's first and second eight keys

  __device__ __forceinline__ ResidentV(const ResidentHead& head, u32 first_tile)
      : head(head), warp(__shfl_sync(kAllLanes, (int)threadIdx.x / 32, 0)), last_key(ceil_div(head.len, C::kTile) * C::kTile) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      places[i] = first_tile + key(i) / C::kTile * Layout::kTileBytes + Layout::kV + key(i) % C::kTile / 8 * Layout::kVPitch;
  }

  __device__ __forceinline__ int key(int i) const { return 8 * (warp + i * kWarps); }
  // The place of the warp's keys number i; i is a constant.
  __device__ __forceinline__ u32 place(int i) const { return places[i % 2] + i / 2 * (2 * kWarps * 8 / C::kTile) * Layout::kTileBytes; }
  __device__ __forceinline__ u32 piece(int i, int c) const { return place(i) + kPieces * c + threadIdx.x % 32 * 16; }

  // Channels and keys that there are not become zeros.
  __device__ __forceinline__ void fetch() const {
    const int own = threadIdx.x % 32 / 4, channel = kChunk * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (key(i) >= last_key) break;
      const u8* row = ResidentHead::row(head.v, key(i) + own, head.v_pitch) + 2 * channel;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        cp_async16_or_zeros(piece(i, c), row + 64 * c, key(i) + own < head.len && 32 * c + channel < head.head_dim);
    }
    cp_async_commit();
  }

  // Maxima over the lanes that differ in bits kLaneBit down to 4 of their number: of each two, one keeps the first kHalf words, the other
  // the rest. Returns the number of the first word that is left to the lane.
  template <int kLaneBit, int kHalf>
  static __device__ __forceinline__ int share_maxima(u32 (&most)[kHeadDim / 8], int lane) {
    const bool upper = lane & kLaneBit;
#pragma unroll
    for (int r = 0; r < kHalf; ++r) {
      const u32 keeps = upper ? most[r + kHalf] : most[r], gives = upper ? most[r] : most[r + kHalf];
      most[r] = __vmaxu2(keeps, __shfl_xor_sync(kAllLanes, gives, kLaneBit));
    }
    const int first = upper ? kHalf : 0;
    if constexpr (kLaneBit == 4)
      return first;
    else
      return first + share_maxima<kLaneBit / 2, kHalf / 2>(most, lane);
  }

  // Waits for what fetch() fetches and stores the warp's largest magnitude in each channel. Bits of 16-bit magnitudes compare as their
  // values do, NaN above all.
  __device__ __forceinline__ void store_maxima(Shared& shared) const {
    cp_async_wait<0>();
    u32 most[kHeadDim / 8] = {};  // by chunk and word
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (key(i) >= last_key) break;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const uint4 v = load_shared16(piece(i, c));
        const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int r = 0; r < 4; ++r) most[4 * c + r] = __vmaxu2(most[4 * c + r], word[r] & 0x7FFF7FFFu);
      }
    }
    const int lane = threadIdx.x % 32, first = share_maxima<16, kHeadDim / 16>(most, lane);
#pragma unroll
    for (int r = 0; r < kHeadDim / 64; ++r) shared.v_amax[warp][(first + r) / 4 * 16 + lane % 4 * 4 + (first + r) % 4] = most[r];
  }

  // Of all warps' maxima: V's largest magnitude in each channel, as attention wants it, and the factor that V is rounded by.
  static __device__ __forceinline__ void store_scales(float inv_v_max, Shared& shared, float* channels) {
    const int word = C::kThreads - 1 - threadIdx.x;  // the last warps: the first have k_mean
    if (word >= kHeadDim / 2) return;
    u32 most = shared.v_amax[0][word];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) most = __vmaxu2(most, shared.v_amax[w][word]);
    const float2 both = kDtype == kFloat16 ? unpack_f16(most) : float2{__uint_as_float(most << 16), __uint_as_float(most & 0xFFFF0000u)};
    const auto keep = [&](int c, float amax) {
      if (amax < kAmaxMin) amax = 0.0f;
      channels[c] = amax, shared.v_scale[c] = amax == 0.0f ? 0.0f : rcp_approx(amax * inv_v_max);
    };
    keep(2 * word, both.x), keep(2 * word + 1, both.y);
  }

  // Rounds V to fp16 and stores it, transposed.
  __device__ __forceinline__ void quantize(const Shared& shared) const {
    constexpr u32 kOne = 0x3C00;
    const int lane = threadIdx.x % 32;
    const u32 scales = shared_address(shared.v_scale) + 4 * kChunk * (lane % 4);
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      float scale[kChunk];
      load_shared8_floats(scales + 4 * 32 * c, scale);
      Raw8<kDtype> raw[kHeld]{};
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (key(i) < last_key) {
          const uint4 v = load_shared16(piece(i, c));
          raw[i].word[0] = v.x, raw[i].word[1] = v.y, raw[i].word[2] = v.z, raw[i].word[3] = v.w;
        }
      __syncwarp();  // these pieces have been read: the words that follow lie there
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (key(i) >= last_key) break;
        float x[kChunk];
        unpack8<kDtype>(raw[i], x);
        const u32 to = place(i) + kPieces * c + 4 * lane;
#pragma unroll
        for (int e = 0; e < kChunk; e += 2) store_shared(to + 64 * e, movmatrix_trans(pack_f16(x[e] * scale[e], x[e + 1] * scale[e + 1])));
      }
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (key(i) >= last_key) break;
      const int left = head.len - key(i) - lane % 4 * 2;
      store_shared(place(i) + kPieces * kChunks + 4 * lane, (left > 0 ? kOne : 0u) | (left > 1 ? kOne << 16 : 0u));
    }
  }
};

// The work tiles that a CTA takes with the same K and V, and what comes after them. In shared memory, as registers are short.
struct ResidentWork {
  i32 at, end;      // next work tile, or next (sequence, kv head)
  i32 first, last;  // work tiles of the head; none: there is no head any more
  i32 bh;
  i32 q_tiles;  // of a query head
  Extent q, k;  // of the sequence, or of the call

  // Before the first head.
  template <class C>
  __device__ __forceinline__ void begin(const ResidentParams& r) {
    const AttendParams& p = r.attend;
    const i64 count = (i64)p.bh_count * p.heads_per_kv * p.q_tiles;
    q_tiles = p.q_tiles, q = {0, p.len_q}, k = {0, p.len_kv};
    if constexpr (C::kMask == Mask::packed)
      at = blockIdx.x, end = r.kv.sequences * p.heads_kv;
    else
      at = (int)(count * blockIdx.x / gridDim.x), end = (int)(count * (blockIdx.x + 1) / gridDim.x);
  }

  // Goes on to the next head.
  template <class C>
  __device__ __forceinline__ void next(const ResidentParams& r) {
    const AttendParams& p = r.attend;
    first = last = 0;
    if constexpr (C::kMask == Mask::packed) {
      const ResidentKv& kv = r.kv;
      for (; at < end && !last; at += gridDim.x) {
        const auto [sequence, head] = fast_divmod(at, p.heads_kv, p.rcp_heads_kv);
        q = extent_of(kv.cu_seqlens_q, kv.wide_q, sequence, kv.total_q, kv.max_len_q);
        k = extent_of(kv.cu_seqlens_k, kv.wide_k, sequence, kv.total_k, kv.max_len_k);
        bh = head, q_tiles = ceil_div(q.length, C::kBlockM), last = p.heads_per_kv * q_tiles;
      }
    } else if (at < end) {
      const int of_head = p.heads_per_kv * p.q_tiles;
      bh = at / of_head, first = at, last = at = min(end, (bh + 1) * of_head);
    }
  }

  __device__ __forceinline__ ResidentHead head(const ResidentParams& r) const {
    const AttendParams& p = r.attend;
    const auto [batch, head] = fast_divmod(bh, p.heads_kv, p.rcp_heads_kv);
    const auto rows = [&](const Tokens& x) {
      return static_cast<const u8*>(x.data) + 2 * (batch * x.stride_b + head * x.stride_h + k.start * x.stride_n);
    };
    return {rows(r.kv.k), rows(r.kv.v), 2 * (u32)r.kv.k.stride_n, 2 * (u32)r.kv.v.stride_n, k.length, p.head_dim};
  }

  template <class C>
  __device__ __forceinline__ WorkTile tile(const AttendParams& p, int index) const {
    if constexpr (C::kMask != Mask::packed) return work_tile<C::kMask, C::kTile>(p, index, C::kBlockM);
    const int head = index / q_tiles;
    return {bh, 0, bh * p.heads_per_kv + head, (index - head * q_tiles) * C::kBlockM, {q.start, q.length, k.length, 0, 0}};
  }

  // Stores work tile number `index`, but for max_scale, for the calling warp's warpgroup.
  template <class C>
  __device__ __forceinline__ void store_tile(const AttendParams& p, int index, int warpgroup, u32 to_shared) const {
    const WorkTile own = tile<C>(p, index);
    store_work_tile<C>(own, output_offset(p, own), to_shared);
    store_flags<C>(own.row0, warpgroup, 0.0f, to_shared);
  }

  // Stores at `to_shared` the work tile that follows, with the same K and V, the one at `from_shared`. Without a division: the warpgroup
  // waits for it.
  template <class C>
  __device__ __forceinline__ void store_next_tile(const AttendParams& p, int warpgroup, u32 from_shared, u32 to_shared) const {
    uint4 own = load_shared16(from_shared + work::kBh);
    uint2 out = load_shared8(from_shared + work::kOut);
    own.w += C::kBlockM;
    if ((int)own.w >= q.length) {
      const i64 next = (i64)((u64)out.y << 32 | out.x) + p.out_stride_h;
      own.z += 1, own.w = 0, out = {(u32)next, (u32)(next >> 32)};
    }
    store_shared16(to_shared + work::kBh, {own.x, own.y, own.z, own.w});
    store_shared8(to_shared + work::kOut, out.x, out.y);
    if constexpr (C::kMask == Mask::packed) {
      const uint4 span = load_shared16(from_shared + work::kSpan);
      store_shared16(to_shared + work::kSpan, {span.x, span.y, span.z, span.w});
    }
    store_flags<C>(own.w, warpgroup, load_shared_float(from_shared + work::kMaxScale), to_shared);
  }

  template <class C>
  __device__ __forceinline__ void store_flags(int row0, int warpgroup, float max_scale, u32 to_shared) const {
    const u32 flags = row0 + 64 * warpgroup < q.length ? kWorkValid : 0;
    store_shared16(to_shared, {0u, (u32)ceil_div(k.length, C::kTile), flags, __float_as_uint(max_scale)});
  }
};

// Fetches the warpgroup's rows of Q into L2: memory takes longer than what is left to do until they are read.
template <class C>
__device__ __forceinline__ void prefetch_q(const AttendParams& p, int warpgroup, u32 work) {
  constexpr int kLines = C::kHeadDim / 64;  // of a row, of 128 bytes
  const WorkTile tile = load_work_tile<C>(p, work);
  const int thread = special_tid_x() % 128, row = tile.row0 + 64 * warpgroup + thread / kLines;
  const i64 offset = tile.batch * p.q.stride_b + tile.head * p.q.stride_h + (tile.span.token0 + row) * p.q.stride_n;
  const int channel = thread % kLines * 64;
  if (row < tile.span.len_q && thread < 64 * kLines && channel < p.head_dim)
    prefetch_l2(static_cast<const u8*>(p.q.data) + 2 * (offset + channel));
}

template <class C>
__device__ __forceinline__ void attend_resident(const ResidentParams& r) {
  using Shared = QuantizeResidentShared<C>;
  static_assert(C::kStage0 % 128 == 0 && C::Layout::kTileBytes % 128 == 0, "operands lie on 128 bytes");
  static_assert(sizeof(ResidentWork) <= C::kWorkBytes && sizeof(Shared) <= C::kStage0, "there is room for them");
  constexpr int kDtype = C::kDtype;
  const AttendParams& p = r.attend;
  u8* bytes = dynamic_shared_memory();
  u8* first_tile = bytes + C::kStage0;
  Shared& exchange = *reinterpret_cast<Shared*>(bytes);  // where Q comes
  ResidentWork* works = reinterpret_cast<ResidentWork*>(bytes + C::kWork);
  float* scale_max = reinterpret_cast<float*>(bytes + C::kScaleMax);
  float* k_mean = reinterpret_cast<float*>(bytes + C::kKMean);
  float* channels = reinterpret_cast<float*>(bytes + C::kChannels);
  const u32 shared = shared_address(bytes);
  if (threadIdx.x == 0) mbarrier_init(shared + C::kDone, 1);
  if (threadIdx.x < 32) {
    store_shared16(shared + C::kRotation + 16 * threadIdx.x, Rotation<C::kHeadDim, kDtype>(threadIdx.x).matrix);  // for all prologues
    ResidentWork own{};
    own.begin<C>(r), own.next<C>(r);
    works[0] = own;
  }
  // The shuffles tell the compiler that these are warp-uniform and no branch on them diverges: it then keeps descriptors in uniform
  // registers.
  const auto uniform = [](int x) { return __shfl_sync(kAllLanes, x, 0); };
  const int warp = uniform(special_tid_x() / 32), warpgroup = warp / 4;
  MainloopFp16<C> mainloop{p, shared, shared + C::q_offset(0, warpgroup)};
  mainloop.causal = false, mainloop.iteration = 0;
  __syncthreads();  // the first head's work is stored
  for (int number = 0;; ++number) {
    ResidentWork &work = works[number % 2u], &next_work = works[(number + 1) % 2u];
    int index = uniform(work.first);
    const int last = uniform(work.last);
    if (index == last) break;
    const ResidentHead head = work.head(r);
    const int tiles = ceil_div(head.len, C::kTile);
    const bool any = uniform(head.len);
    ResidentK<C> k;
    k.load(head);     // it arrives while other warpgroups still attend to the last head
    __syncthreads();  // the last head's K and V have been read, all Q, and what was its work
    const ResidentV<C> v(head, shared + C::kStage0);
    v.fetch();
    if (warp == 0) {
      ResidentWork own = work;
      own.next<C>(r);
      next_work = own;
    }
    if (warp % 4 == 0) work.store_tile<C>(p, index, warpgroup, shared + C::work_slot(mainloop.iteration));
    const RotateK<typename C::Layout, kDtype, Shared> rotate_k;
    if (any) {
      k.store_sums(head, exchange);
      v.store_maxima(exchange);
    }
    __syncthreads();  // these are stored, and the work tiles
    prefetch_q<C>(p, warpgroup, shared + C::work_slot(mainloop.iteration));
    if (any) {
      k.store_mean(rotate_k, exchange, k_mean);
      v.store_scales(p.inv_v_max, exchange, channels);
    }
    __syncthreads();  // these are stored
    if (any) {
      // All threads of the warpgroup have the same scale, and all store it: a branch for one of them would cost the main loop its uniform
      // registers.
      scale_max[warpgroup] = k.quantize(rotate_k, head.len, exchange, first_tile, tiles);
      v.quantize(exchange);
    }
    fence_async_proxy();
    __syncthreads();  // K and V are complete
    if (warp % 4 == 0) {
      float largest = scale_max[0];
#pragma unroll
      for (int w = 1; w < C::kConsumers; ++w) largest = fmaxf(largest, scale_max[w]);
      store_shared_float(shared + C::work_slot(mainloop.iteration) + work::kMaxScale,
                         max_score_scale(p.score_limit, __float_as_int(largest)));
    }
    for (; index < last; ++index, ++mainloop.iteration) {
      const u32 slot = shared + C::work_slot(mainloop.iteration), next_slot = shared + C::work_slot(mainloop.iteration + 1);
      const bool more = index + 1 < last;
      named_barrier<128>(1 + warpgroup);  // the work tile is stored; all have read the last one, and its Q
      if (warp % 4 == 0 && more) work.store_next_tile<C>(p, warpgroup, slot, next_slot);
      const KvRange range(slot);
      if (!(range.flags & kWorkValid)) continue;
      quantize_q<C>(p, shared, mainloop.iteration, mainloop.q_scale);  // has a barrier: the next work tile is stored
      if (more) prefetch_q<C>(p, warpgroup, next_slot);
      mainloop.ring = {};
      float l_i[2];
      mainloop.run(range, l_i);
      store_output<C>(p, mainloop.o, l_i, mainloop.m_i, slot);
    }
  }
}

}  // namespace sage
