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
  i32 words, bands;                     // bands: of a block of queries
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

// A launch works on `pairs` (batch, kv head) pairs, the first being number `first`.
struct KeysParams {
  Tokens k, v;
  u8* kv;                // [pairs, tiles, tile_bytes]
  float* anchor;         // [pairs, D]
  float* k_scale_parts;  // [pairs, runs]: the largest K scale of each run
  float* v_parts;        // [pairs, splits, 3, D]: of each channel of V the largest, the smallest, the sum of value / len
  i32* v_parts_done;     // [pairs, splits]: 1 where they are there
  i32* v_codes;          // [pairs, D]: set to 0
  i32* v_parts_live;     // [pairs, splits]: how many of a part's keys are live
  i32* partials_done;    // [dones]: set to 0
  LiveKeys live;
  i32 first, pairs, heads, len, head_dim;
  i32 dtype;                      // Dtype
  i32 vectors;                    // 1: rows of k and v are 16-byte aligned, head_dim is a multiple of 8
  i32 tiles, tile_bytes, runs;    // a block of K takes ⌈units / runs⌉ consecutive units of kScaleKeys keys
  i32 samples, sample_step;       // the anchor is the mean of the tokens 0, step, 2·step, …: `samples` of them
  i32 dones;
  i32 splits, split_tokens;       // split i of V is the tokens [i·split_tokens, (i+1)·split_tokens)
};

struct ValuesParams {
  Tokens v;
  const float* k_scale_parts;  // [pairs, k_runs]
  const float* v_parts;        // [pairs, splits, 3, D]
  const i32* v_parts_done;     // [pairs, splits]
  const i32* v_parts_live;     // [pairs, splits]
  u8* kv;                      // [pairs, tiles, tile_bytes]
  i32* k_scale_max;            // [pairs], the bits of a non-negative float
  float* v_amax;               // [pairs, D], of V without its mean
  float* v_mean;               // [pairs, D], 0 where the scheme leaves it in
  i32* v_codes;                // [pairs, D]: the sum of what V was rounded to, in kCodeUnits, for kernels that make up for it
  float* live_keys;            // [pairs]: how many keys are live, at least 1
  LiveKeys live;
  i32 first, pairs, heads, len, head_dim;
  i32 dtype, vectors;
  i32 k_runs, splits;
  i32 tiles, runs;     // a block takes ⌈units / runs⌉ consecutive units of as many keys as a warp transposes at once
  i32 centred;         // 1: the scheme takes the mean out of V
  float v_max;         // what the largest |v| of a channel becomes
};

struct AttendParams {
  Tokens q;
  const u8* kv;
  const i32* k_scale_max;
  const float* v_amax;  // [pairs, D]: what V's largest |value| stands for, of V without its mean
  const float* v_mean;  // [pairs, D]: to be added to O where any key counts
  const i32* v_codes;   // [pairs, D], in kCodeUnits
  const float* live_keys;  // [pairs]
  const float* anchor;
  void* partials;       // of the blocks that begin within an item, or null: every block works on whole items
  i32* partials_done;   // 0 before the launch and after it
  i32* next_item;       // 0 before the launch; null: every block works on items gridDim.x apart
  const void* mask;    // [B, H, Nq, Nk] by strides, 0 where it broadcasts
  i64 mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k;
  const u32* kept;     // a bool mask in bits, [B, H, Nq, words] by strides in words, 0 where it broadcasts
  i64 kept_stride_b, kept_stride_h, kept_stride_q;
  TileLists lists;     // with a dense mask
  void* out;           // as q
  i64 out_stride_b, out_stride_h, out_stride_n;
  float* lse;          // [B, H, Nq] or null
  i32 first, pairs, heads_kv, ratio;  // ratio: query heads per kv head
  i32 len_q, len_kv, head_dim;
  i32 dtype, q_vectors, out_vectors;
  i32 causal;          // 1: key ≤ query index (also with a dense mask)
  i32 mask_kind;       // MaskKind
  i32 mask_pairs;      // 1: two neighbouring elements of a row can be loaded at once
  i32 tiles, blocks_q;  // of the layout's keys; blocks of queries
  i32 rounds;           // so many of these does a block work on whole, where it goes on with others
  u32 per_blocks_q, per_ratio, per_heads_kv;  // what `divide` wants beside these three
  float score_scale;   // |sm_scale|·log2(e)·4D / 127
  float sign;          // of sm_scale
  float sm_scale;
  float score_limit;   // SCORE_LIMIT / (127²·D)
  float inv_v_max;
  float log2_p_max;    // P of the row maximum, as a power of two
  float rescale_slack; // how far (base 2) a row may exceed the maximum it was scaled to before everything is rescaled
};

// n / d and n % d of whole numbers below 2^31; `per` is (2^32 − 1) / d. A division takes forty instructions.
struct Quotient {
  int whole, rest;
};

__device__ __forceinline__ Quotient divide(int n, int d, u32 per) {
  const int whole = __umulhi(n, per), rest = n - whole * d;  // or one too few
  return rest < d ? Quotient{whole, rest} : Quotient{whole + 1, rest - d};
}

}  // namespace sage
