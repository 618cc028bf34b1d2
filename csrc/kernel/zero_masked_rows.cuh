// Zeroes the output rows of queries from which a dense mask hides every key: not every backend of torch's attention does.
//
// A warp has 32 rows. Each lane looks at two keys of one: the first, and the one of the query's own index; of masks as models make them
// one of the two is visible. Where neither is, the whole warp reads the row, as far as the first key that is.
#pragma once
#include "../common/math.cuh"
#include "../common/warp.cuh"

namespace sage {

constexpr int kZeroRowsThreads = 128;

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
