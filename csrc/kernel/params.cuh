// The one by-value argument of each kernel. sageattention/params.py declares the same structs; the build asserts that every
// offset agrees. Strides count elements; a (batch, head) pair is numbered batch · heads + head.
#pragma once
#include "../ptx/types.cuh"

namespace sage {

// A tensor of tokens: [B, H, N, D] in any layout whose last stride is 1.
struct Tokens {
  const void* data;
  i64 stride_b, stride_h, stride_n;
};

// Which KV tiles a block of queries visits. Queries come in bands; bit t % 32 of word t / 32 of a band's first plane: some query of the
// band sees some key of tile t; of its second plane: not every query sees every key of it, or one sees it with a bias.
struct TileLists {
  const u32* bits;                      // [batch | 1, head | 1, band | 1, 2, words]
  i64 stride_b, stride_h, stride_band;  // in words, 0 where it broadcasts
  i32 words, band_rows;                 // band_rows: queries of a band
};

// Which keys take part in the statistics of K and V: bit k % 32 of word k / 32, in any of `rows` consecutive rows of `words`.
struct LiveKeys {
  const u32* bits;           // null: all of them
  i64 stride_b, stride_h;    // in words, by (batch, kv head); 0 where it broadcasts
  i32 rows, words;
};

// Reads a dense mask before the other launches.
struct ClassifyParams {
  const void* mask;  // [batches, heads, len_q, len_kv] by strides, 0 where it broadcasts
  i64 stride_b, stride_h, stride_q, stride_k;
  u32* lists;        // [batches, heads, bands, 2, words]
  u32* live;         // [batches, heads, bands, live_words]
  u32* kept;         // [batches, heads, len_q | 1, live_words]: a bool mask in bits; null: not wanted
  i32 heads, bands;  // of the lists: 1 where the mask is the same for all
  i32 len_q, len_kv;
  i32 mask_kind, causal, quads;  // quads: 1 where four neighbouring elements of a row can be loaded at once
  i32 tile;          // keys
  i32 words, live_words;
};

// A launch works on `bh_count` (batch, kv head) pairs, the first being number `bh_first`.
struct QuantizeKParams {
  Tokens k, v;
  u8* kv;                // [pairs, tiles, tile_bytes]
  float* k_mean;         // [pairs, D]
  float* k_scale_partial;  // [pairs, runs]: the largest K scale of each run
  float* v_stats;        // [pairs, splits, 3, D]: of each channel of V the largest, the smallest, the sum of value / len
  i32* v_stats_ready;     // [pairs, splits]: 1 where they are there
  i32* v_quant_sum;          // [pairs, D]: set to 0
  i32* v_stats_live;     // [pairs, splits]: how many of a part's keys are live
  i32* split_kv_ready;    // [dones]: set to 0
  const i32* order;       // [len]: the token at each place of the sequence; null: as they lie. With LiveKeys or without
  LiveKeys live;
  i32 bh_first, bh_count, heads, len, head_dim;
  i32 dtype;                      // Dtype
  i32 vectorized;                    // 1: rows of k and v are 16-byte aligned, head_dim is a multiple of 8
  i32 kv_tiles, tile_bytes, ctas_per_head;    // a block of K takes ⌈units / runs⌉ consecutive units of kScaleKeys keys
  i32 k_mean_given;  // 1: k_mean is there already
  i32 k_mean_samples, k_mean_step;       // the k_mean is the mean of the tokens 0, step, 2·step, …: `k_mean_samples` of them
  i32 split_kv_flags;
  i32 v_chunks, v_chunk_tokens;       // split i of V is the tokens [i·v_chunk_tokens, (i+1)·v_chunk_tokens)
};

struct QuantizeVParams {
  Tokens v;
  const float* k_scale_partial;  // [pairs, k_ctas_per_head]
  const float* v_stats;        // [pairs, splits, 3, D]
  const i32* v_stats_ready;     // [pairs, splits]
  const i32* v_stats_live;     // [pairs, splits]
  u8* kv;                      // [pairs, tiles, tile_bytes]
  i32* k_scale_max;            // [pairs], the bits of a non-negative float
  float* v_amax;               // [pairs, D], of V without its mean
  float* v_mean;               // [pairs, D], 0 where the scheme leaves it in
  i32* v_quant_sum;                // [pairs, D]: the sum of what V was rounded to, in kQuantSumUnits, for kernels that make up for it
  float* live_keys;            // [pairs]: how many keys are live, at least 1
  const i32* order;            // as above
  LiveKeys live;
  i32 bh_first, bh_count, heads, len, head_dim;
  i32 dtype, vectorized;
  i32 k_ctas_per_head, v_chunks;
  i32 kv_tiles, ctas_per_head;     // a block takes ⌈units / runs⌉ consecutive units of as many keys as a warp transposes at once
  i32 subtract_v_mean;         // 1: the scheme takes the mean out of V
  float v_max;         // what the largest |v| of a channel becomes
};

struct AttendParams {
  Tokens q;
  const u8* kv;
  const i32* k_scale_max;
  const float* v_amax;  // [pairs, D]: what V's largest |value| stands for, of V without its mean
  const float* v_mean;  // [pairs, D]: to be added to O where any key counts
  const i32* v_quant_sum;   // [pairs, D], in kQuantSumUnits
  const float* live_keys;  // [pairs]
  const float* k_mean;
  void* split_kv_workspace;       // of the blocks that begin within an item, or null: every block works on whole items
  i32* split_kv_ready;   // 0 before the launch and after it
  i32* next_item;       // 0 before the launch; null: every block works on items gridDim.x apart
  const void* mask;    // [B, H, Nq, Nk] by strides, 0 where it broadcasts
  i64 mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k;
  const u32* kept;     // a bool mask in bits, [B, H, Nq, words] by strides in words, 0 where it broadcasts
  i64 kept_stride_b, kept_stride_h, kept_stride_q;
  TileLists lists;     // with a dense mask, or block-sparse
  const i32* order;    // with lists: of queries and output, as of K and V
  const float* tail;   // [B, H, ⌈Nq / 64⌉, 4 + D]: what the softmax of 64 queries starts with, {m, l, unused, unused, O}; or null
  void* out;           // as q
  i64 out_stride_b, out_stride_h, out_stride_n;
  float* lse;          // [B, H, Nq] or null
  i32 bh_first, bh_count, heads_kv, heads_per_kv;  // ratio: query heads per kv head
  i32 len_q, len_kv, head_dim;
  i32 dtype, q_vectorized, out_vectorized;
  i32 causal;          // 1: key ≤ query index (also with a dense mask)
  i32 mask_kind;       // MaskKind
  i32 mask_pairs;      // 1: two neighbouring elements of a row can be loaded at once
  i32 kv_tiles, q_tiles;  // of the layout's keys; blocks of queries
  i32 full_waves;           // so many of these does a block work on whole, where it goes on with others
  u32 rcp_q_tiles, rcp_heads_per_kv, rcp_heads_kv;  // what `fast_divmod` wants beside these three
  float score_scale;   // |sm_scale|·log2(e)·4D / 127
  float sign;          // of sm_scale
  float sm_scale;
  float score_limit;   // SCORE_LIMIT / (127²·D)
  float inv_v_max;
  float log2_p_max;    // P of the row maximum, as a power of two
  float rescale_threshold; // how far (base 2) a row may exceed the maximum it was scaled to before everything is rescaled
};

// n / d and n % d of whole numbers below 2^31; `rcp` is (2^32 − 1) / d. A division takes forty instructions.
struct DivMod {
  int quotient, remainder;
};

__device__ __forceinline__ DivMod fast_divmod(int n, int d, u32 rcp) {
  const int quotient = __umulhi(n, rcp), remainder = n - quotient * d;  // or one too few
  return remainder < d ? DivMod{quotient, remainder} : DivMod{quotient + 1, remainder - d};
}

}  // namespace sage
