// What torch's own attention lacks where a call has a dense mask: biases in its dtype that stay finite, and zeros in rows that see nothing.
#pragma once
#include "../common/math.cuh"
#include "../common/tensor.cuh"
#include "../common/warp.cuh"

namespace sage {

constexpr int kNarrowThreads = 256, kNarrowUnroll = 8, kNarrowKeys = kNarrowThreads * kNarrowUnroll;  // keys of a row in a CTA
constexpr int kZeroRowsThreads = 128;

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

struct ZeroMaskedRowsParams {
  const void* mask;  // [B, H, Nq, Nk] by strides, 0 where it broadcasts
  i64 mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k;
  void* out;  // [B, H, Nq, D] by strides
  i64 out_stride_b, out_stride_h, out_stride_n;
  i32 heads, len_q, len_kv, rows;  // rows: B · H · Nq
  i32 mask_kind;                   // MaskKind
  i32 causal;                      // 1: key ≤ query index
  i32 row_words, element_words;    // of 16 bits: in a row of the output, in an element
};

// One row of scores: what of the mask and of the output is its own.
struct ScoreRow {
  i64 mask, out;  // elements
  int query, keys;

  __device__ __forceinline__ ScoreRow(const ZeroMaskedRowsParams& p, int row) {
    const int bh = row / p.len_q, head = bh % p.heads, batch = bh / p.heads;
    query = row - bh * p.len_q;
    keys = p.causal ? min(query + 1, p.len_kv) : p.len_kv;
    mask = batch * p.mask_stride_b + head * p.mask_stride_h + query * p.mask_stride_q;
    out = batch * p.out_stride_b + head * p.out_stride_h + query * p.out_stride_n;
  }

  __device__ __forceinline__ bool sees(const ZeroMaskedRowsParams& p, int key) const {
    const i64 at = mask + key * p.mask_stride_k;
    if (p.mask_kind == kMaskBool) return static_cast<const u8*>(p.mask)[at] != 0;
    if (p.mask_kind == kMaskF32) return static_cast<const float*>(p.mask)[at] != -kInf;
    return static_cast<const u16*>(p.mask)[at] != (p.mask_kind == kMaskF16 ? 0xFC00 : 0xFF80);  // −inf
  }
};

// A warp has 32 rows. Each lane looks at two keys of one: the first, and the one of the query's own index; of masks as models make them
// one of the two is visible. Where neither is, the whole warp reads the row, as far as the first key that is.
__device__ __forceinline__ void zero_rows(const ZeroMaskedRowsParams& p) {
  const int lane = threadIdx.x % 32, first = blockIdx.x * kZeroRowsThreads + threadIdx.x - lane;
  bool hidden = false;
  if (first + lane < p.rows) {
    const ScoreRow row(p, first + lane);
    hidden = !row.sees(p, 0) && !row.sees(p, min(row.query, p.len_kv - 1));
  }
  if (!__any_sync(kAllLanes, hidden)) return;
  for (int i = 0; i < 32; ++i) {
    if (!__any_sync(kAllLanes, hidden && lane == i)) continue;
    const ScoreRow row(p, first + i);
    bool seen = false;
    for (int key = lane; !seen && key - lane < row.keys; key += 32) seen = __any_sync(kAllLanes, key < row.keys && row.sees(p, key));
    if (seen) continue;
    u16* const out = static_cast<u16*>(p.out) + row.out * p.element_words;
    for (int word = lane; word < p.row_words; word += 32) out[word] = 0;
  }
}

}  // namespace sage
