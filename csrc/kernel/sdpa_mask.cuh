// What torch's own attention lacks where a call has a dense mask: biases in its dtype that stay finite, zeros in rows that see nothing, and
// rows whose biases are beyond what its backends can take.
#pragma once
#include "../common/math.cuh"
#include "../common/tensor.cuh"
#include "../common/warp.cuh"

namespace sage {

constexpr int kNarrowThreads = 256, kNarrowUnroll = 8, kNarrowKeys = kNarrowThreads * kNarrowUnroll;  // keys of a row in a CTA
constexpr int kRepairThreads = 128;

struct NarrowMaskParams {
  const void* mask;  // [B, H, Nq, Nk] by strides; sizes are the mask's own
  i64 mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k;
  void* out;  // the same, contiguous
  i32 heads, len_q, len_kv, ctas_per_row;
  i32 mask_dtype, out_dtype;
  float limit;  // no finite bias is larger
};

template <int kDtype>
__device__ __forceinline__ float load_bias(const void* from, i64 at) {
  if constexpr (kDtype == kFloat32) return static_cast<const float*>(from)[at];
  const u32 x = static_cast<const u16*>(from)[at];
  return kDtype == kFloat16 ? f16_to_f32(x) : __uint_as_float(x << 16);
}

// −inf and NaN stay what they are.
template <int kDtype>
__device__ __forceinline__ void store_bias(void* to, i64 at, float x, float limit) {
  if (x != -kInf && x == x) x = fminf(fmaxf(x, -limit), limit);
  if constexpr (kDtype == kFloat32) {
    static_cast<float*>(to)[at] = x;
  } else if constexpr (kDtype == kFloat16) {
    static_cast<u16*>(to)[at] = (u16)pack_f16(x, x);
  } else {
    const u32 bits = __float_as_uint(x);  // to nearest even
    static_cast<u16*>(to)[at] = x == x ? (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) : 0x7FC0;
  }
}

// Additive biases in another dtype. A finite one stays finite, also times log2(e) in fp32, which some backends of torch's take.
__device__ __forceinline__ void narrow_rows(const NarrowMaskParams& p) {
  const int row = blockIdx.x / p.ctas_per_row, part = blockIdx.x % p.ctas_per_row;
  const int bh = row / p.len_q, head = bh % p.heads, batch = bh / p.heads, query = row - bh * p.len_q;
  const i64 from = batch * p.mask_stride_b + head * p.mask_stride_h + query * p.mask_stride_q, to = (i64)row * p.len_kv;
  const int first = part * kNarrowKeys + threadIdx.x;
  with_dtype(p.mask_dtype, [&](auto source) {
    constexpr int kSource = decltype(source)::value;
    float x[kNarrowUnroll];
#pragma unroll
    for (int i = 0; i < kNarrowUnroll; ++i) {
      const int key = first + i * kNarrowThreads;
      x[i] = key < p.len_kv ? load_bias<kSource>(p.mask, from + key * p.mask_stride_k) : 0.0f;
    }
    with_dtype(p.out_dtype, [&](auto target) {
      constexpr int kTarget = decltype(target)::value;
#pragma unroll
      for (int i = 0; i < kNarrowUnroll; ++i) {
        const int key = first + i * kNarrowThreads;
        if (key < p.len_kv) store_bias<kTarget>(p.out, to + key, x[i], p.limit);
      }
    });
  });
}

struct RepairRowsParams {
  const void* mask;  // [B, H, Nq, Nk] by strides, 0 where it broadcasts
  i64 mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k;
  void* out;  // [B, H, Nq, D] by strides
  i64 out_stride_b, out_stride_h, out_stride_n;
  const void* v;  // [B, Hkv, Nk, D] by strides, of the output's dtype
  i64 v_stride_b, v_stride_h, v_stride_n;
  i32 heads, heads_per_kv, len_q, len_kv, head_dim, rows;  // rows: B * H * Nq
  i32 mask_kind;                                           // MaskKind
  i32 dtype;                                               // the output's
  i32 causal;                                              // 1: key <= query index
  float limit;                                             // torch takes biases up to here in either sign; infinite where none is larger
};

// How torch's attention takes a pair.
enum PairKind : int { kPairHidden, kPairLow, kPairPlain, kPairHigh };

// One row of scores: what of the mask, of V and of the output is its own. Offsets are in elements.
struct ScoreRow {
  i64 mask, out, v;
  int query, keys;

  __device__ __forceinline__ ScoreRow(const RepairRowsParams& p, int row) {
    const int bh = row / p.len_q, head = bh % p.heads, batch = bh / p.heads;
    query = row - bh * p.len_q;
    keys = p.causal ? min(query + 1, p.len_kv) : p.len_kv;
    mask = batch * p.mask_stride_b + head * p.mask_stride_h + query * p.mask_stride_q;
    out = batch * p.out_stride_b + head * p.out_stride_h + query * p.out_stride_n;
    v = batch * p.v_stride_b + head / p.heads_per_kv * p.v_stride_h;
  }

  __device__ __forceinline__ int kind(const RepairRowsParams& p, int key) const {
    const i64 at = mask + key * p.mask_stride_k;
    if (p.mask_kind == kMaskBool) return static_cast<const u8*>(p.mask)[at] ? kPairPlain : kPairHidden;
    const float x = p.mask_kind == kMaskF32   ? load_bias<kFloat32>(p.mask, at)
                    : p.mask_kind == kMaskF16 ? load_bias<kFloat16>(p.mask, at)
                                              : load_bias<kBfloat16>(p.mask, at);
    if (x == -kInf) return kPairHidden;
    return x < -p.limit ? kPairLow : x > p.limit ? kPairHigh : kPairPlain;
  }
};

__device__ __forceinline__ float load_value(const RepairRowsParams& p, const void* from, i64 at) {
  float x = 0.0f;
  with_dtype(p.dtype, [&](auto type) { x = load_bias<decltype(type)::value>(from, at); });
  return x;
}

__device__ __forceinline__ void store_value(const RepairRowsParams& p, i64 at, float x) {
  with_dtype(p.dtype, [&](auto type) { store_bias<decltype(type)::value>(p.out, at, x, kInf); });
}

// The row becomes the mean of V over the keys of one kind, of which there are `count`; 0 where there are none. Scores are lost beside
// such biases, so that these keys weigh the same. The values are divided before they are added: their sum may overflow.
__device__ __forceinline__ void write_mean(const RepairRowsParams& p, const ScoreRow& row, int kind, int count, int lane) {
  const float share = count ? 1.0f / count : 0.0f;
  for (int channel = lane; channel - lane < p.head_dim; channel += 32) {
    const bool mine = channel < p.head_dim;
    float mean = 0.0f;
    for (int first = 0; count && first < row.keys; first += 32) {
      const u32 taken = __ballot_sync(kAllLanes, first + lane < row.keys && row.kind(p, first + lane) == kind);
#pragma unroll 8
      for (int i = 0; i < 32; ++i)
        if (mine && taken >> i & 1) mean += load_value(p, p.v, row.v + (first + i) * p.v_stride_n + channel) * share;
    }
    if (mine) store_value(p, row.out + channel, mean);
  }
}

// Whether a row plainly sees one of a few keys: of masks as models make them, the first or the one of the query's own index.
__device__ __forceinline__ bool sees_a_key(const RepairRowsParams& p, const ScoreRow& row) {
  const int last = row.keys - 1, keys[4] = {0, min(row.query, last), last / 2, last / 4};
  bool plain = false;
#pragma unroll
  for (int key : keys) plain |= row.kind(p, key) >= kPairPlain;
  return plain;
}

// A warp has 32 rows, each lane looks at one. A row that is not seen to see a key, or whose output is NaN as a bias beyond the limit makes
// it, the whole warp reads: to its first plain key, or to its end if it may have biases beyond the limit.
__device__ __forceinline__ void repair(const RepairRowsParams& p) {
  const int lane = threadIdx.x % 32, first = blockIdx.x * kRepairThreads + threadIdx.x - lane;
  bool unseen = false, broken = false;
  if (first + lane < p.rows) {
    const ScoreRow row(p, first + lane);
    if (p.limit < kInf) {
      const float x = load_value(p, p.out, row.out);
      broken = x != x;
    }
    unseen = !sees_a_key(p, row);
  }
  const u32 broken_rows = __ballot_sync(kAllLanes, broken);
  for (u32 rows = __ballot_sync(kAllLanes, unseen) | broken_rows; rows; rows &= rows - 1) {
    const int own = __ffs(rows) - 1;
    const bool plain_is_right = !(broken_rows >> own & 1);
    const ScoreRow row(p, first + own);
    int low = 0, high = 0;
    bool plain = false;
    for (int key = lane; key - lane < row.keys; key += 32) {
      const int kind = key < row.keys ? row.kind(p, key) : kPairHidden;
      low += __popc(__ballot_sync(kAllLanes, kind == kPairLow)), high += __popc(__ballot_sync(kAllLanes, kind == kPairHigh));
      plain = plain || __any_sync(kAllLanes, kind == kPairPlain);
      if (plain && plain_is_right) break;
    }
    if (plain && plain_is_right) continue;
    if (high)
      write_mean(p, row, kPairHigh, high, lane);
    else if (!plain)
      write_mean(p, row, kPairLow, low, lane);
  }
}

}  // namespace sage
