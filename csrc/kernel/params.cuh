// The one by-value argument of each kernel. sageattention/kernels/params.py declares the same structs; the build asserts every offset.
// Strides count elements. BH: the (batch, kv head) pairs of a launch, `bh_count` of them from number `bh_first` on, numbered
// batch · heads + head.
#pragma once
#include "../ptx/types.cuh"

namespace sage {

// A tensor of tokens: [B, H, N, D] in any layout whose last stride is 1.
struct Tokens {
  const void* data;
  i64 stride_b, stride_h, stride_n;
};

// The KV tiles that each band of queries visits. Bit t % 32 of word t / 32 of a band's first plane: some query of the band sees some key
// of tile t. Of its second plane: tile t holds a masked or biased pair (query, key) of the band.
struct TileLists {
  const u32* bits;                      // [batch | 1, head | 1, band | 1, 2, words]
  i64 stride_b, stride_h, stride_band;  // in words, 0 where it broadcasts
  i32 words, band_rows;                 // words of a plane; queries of a band
};

// The live keys, which take part in the statistics of K and V: key k is live if bit k % 32 of word k / 32 is set in any of `rows`
// consecutive rows of `words` words.
struct LiveKeys {
  const u32* bits;         // null: all keys are live
  i64 stride_b, stride_h;  // in words, by (batch, kv head); 0 where it broadcasts
  i32 rows, words;
};

// A sequence of a packed call: where its tokens lie in the packed tensors, and its place among the sequences that are computed at once.
struct Sequence {
  i32 q_start, q_len, k_start, k_len;
  i32 q_block;  // number of its first block of queries,
  i32 kv_tile;  // of its first KV tile of a head,
  i32 run;      // of its first run of keys
  i32 number;
};

// The sequences that a packed launch computes at once. Written on the device, so that cu_seqlens may change between replays of a graph.
struct PackedSequences {
  const Sequence* sequences;  // by number; null: the call is not packed
  const i32* q_blocks;        // the sequence of each block of queries
  const i32* runs;            // the sequence of each run of keys
  const i32* counts;          // {blocks of queries, runs of keys}
};

// Launch before the others of a packed call, a CTA for each `sequences_per_group` sequences.
struct PlaceSequencesParams {
  const void* cu_seqlens_q;  // [batch + 1]
  const void* cu_seqlens_k;
  Sequence* sequences;  // [batch]
  i32* q_blocks;        // [groups, max_q_blocks]
  i32* runs;            // [groups, max_runs]
  i32* counts;          // [groups, 2]
  i32 batch, sequences_per_group;
  i32 wide_q, wide_k;                        // 1: offsets of 64 bits
  i32 total_q, total_k;                      // tokens of the packed tensors
  i32 max_len_q, max_len_k;                  // the rest of a longer sequence is left out
  i32 block_m, tile, run_keys;               // queries of a block; keys of a KV tile, of a run
  i32 max_q_blocks, max_kv_tiles, max_runs;  // of a group: sequences that do not fit are left out
};

// Launch before the others, where there is a dense mask: reads it once.
struct ClassifyParams {
  const void* mask;  // [batches, heads, len_q, len_kv] by strides, 0 where it broadcasts
  i64 stride_b, stride_h, stride_q, stride_k;
  u32* lists;        // [batches, heads, bands, 2, words]
  u32* live;         // [batches, heads, bands, live_words]
  u32* kept;         // [batches, heads, len_q | 1, live_words]: a bool mask in bits
  float* bias;       // [batches, heads, bias_len]: an additive mask of one row, in base 2, −inf beyond the end; null: not wanted
  i32 heads, bands;  // of the lists: 1 where the mask broadcasts
  i32 len_q, len_kv;
  i32 mask_kind, causal, vectors;  // vectors: RunLoad
  i32 absent;                      // 1: keys that are not live take no part in attention anyway: they make no tile uneven
  i32 tile;                        // keys of a KV tile
  i32 words, live_words, bias_len;
  i32 parts, part_bytes;  // CTAs of a band; bytes of a plane that each has, the last one all that are left
  i32 row_groups;         // of a bool mask: warps that share the rows of a strip of keys
};

// First launches of a block-sparse call: block means of K, block sums of V.
struct PoolParams {
  Tokens k, v;       // v.data null: no sums of V
  float* k_mean;     // [BH, blocks, D]: mean of each block's live keys, 0 where there is none
  float* v_sum;      // [BH, blocks, D]
  float* k_shift;    // [BH, D]: mean of the block means, empty blocks aside
  float* k_var;      // [BH, D]: mean of (block mean − k_shift)²
  float* counts;     // [batch, pitch]: live keys of each block, 0 beyond the last
  const i32* order;  // as in QuantizeKParams
  LiveKeys live;     // one row a batch
  i32 bh_count, heads, len, head_dim, blocks, pitch;
  i32 dtype, vectorized;
};

// Then the router: which blocks each list computes exactly, and what its rows' softmax begins with.
struct RouteParams {
  Tokens q;
  const float* k_mean;  // as PoolParams has left them
  const float* v_sum;
  const float* k_shift;
  const float* k_var;
  const float* counts;
  const i32* order;
  LiveKeys live;           // the queries that count in their block's mean, one row a batch
  const u32* sinks;        // [words]: KV blocks that are exact for every query; null: none
  const u32* query_sinks;  // a bit a list: it computes every block; null: none
  const u8* block_mask;    // [batch | 1, head | 1, lists, blocks], for kStatic
  i64 mask_stride_b, mask_stride_h;
  const float* thresholds;            // [heads]; null: threshold is everyone's
  double threshold;                   // tau or keep
  float* scratch;                     // [ctas, kRows + kRouteWarps, pitch]
  u32* lists;                         // [batch, heads, lists, 2, words], see TileLists
  float* tail;                        // as in AttendParams; null: what is left out counts nothing
  u64* exact_blocks;                  // the number of bits set in the lists' first planes is added to it
  i32 bh_count, heads, heads_per_kv;  // of query heads
  i32 len_q, len_kv, head_dim;
  i32 dtype, vectorized;
  i32 rows, lists_of_head, blocks, words;  // rows: blocks of 64 queries; words: of a plane
  i32 pitch, strips, ctas;                 // strips: of a head
  i32 selection;                           // Selection
  i32 causal, q_start, neighbours;         // neighbours −1: no such rule
  float scale;                             // sm_scale · log2(e)
};

// First launch: statistics of V, K → tiles.
struct QuantizeKParams {
  Tokens k, v;
  u8* kv;                  // [BH, tiles, tile_bytes]
  float* k_mean;           // [BH, D]
  float* k_scale_partial;  // [BH, ctas_per_head]: the largest K scale of each CTA's keys
  float* v_stats;          // [BH, v_chunks, 3, D]: each channel's maximum, minimum and sum of value / len over a chunk of V
  i32* v_stats_ready;      // [BH, v_chunks]: 1 once a chunk's statistics are stored
  i32* v_quant_sum;        // [BH, D]: set to 0
  i32* v_stats_live;       // [BH, v_chunks]: live keys of each chunk
  i32* split_kv_ready;     // [split_kv_flags]: set to 0
  const i32* order;        // [len]: the token at each position of the sequence; null: in memory order
  PackedSequences packed;
  LiveKeys live;
  i32 bh_first, bh_count, heads, len, head_dim;
  i32 dtype;                                // Dtype
  i32 vectorized;                           // 1: rows of k and v are 16-byte aligned, head_dim is a multiple of 8
  i32 kv_tiles, tile_bytes, ctas_per_head;  // a CTA takes ⌈scale blocks / ctas_per_head⌉ consecutive blocks of kScaleKeys keys
  i32 k_mean_given;                         // 1: the caller has stored k_mean
  i32 k_mean_samples, k_mean_step;          // k_mean is the mean of k_mean_samples tokens 0, step, 2·step, …
  i32 split_kv_flags;
  i32 v_chunks, v_chunk_tokens;  // chunk i of V is tokens [i·v_chunk_tokens, (i+1)·v_chunk_tokens)
};

// Second launch: V → tiles.
struct QuantizeVParams {
  Tokens v;
  const float* k_scale_partial;  // [BH, k_ctas_per_head]
  const float* v_stats;          // [BH, v_chunks, 3, D]
  const i32* v_stats_ready;      // [BH, v_chunks]
  const i32* v_stats_live;       // [BH, v_chunks]
  u8* kv;                        // [BH, tiles, tile_bytes]
  i32* k_scale_max;              // [BH], the bits of a non-negative float
  float* v_amax;                 // [BH, D]: the largest |V − mean|
  float* v_mean;                 // [BH, D]: what was subtracted from V, 0 where the scheme keeps the mean
  i32* v_quant_sum;              // [BH, D]: the sum of quantised V in 1/kQuantSumUnits, to correct the mean by
  float* live_keys;              // [BH]: the number of live keys, at least 1
  const i32* order;              // as in QuantizeKParams
  PackedSequences packed;
  LiveKeys live;
  i32 bh_first, bh_count, heads, len, head_dim;
  i32 dtype, vectorized;
  i32 k_ctas_per_head, v_chunks;
  i32 kv_tiles, ctas_per_head;  // a CTA takes ⌈units / ctas_per_head⌉ consecutive units of the keys that a warp transposes at once
  i32 run_keys;                 // keys of a packed run
  i32 subtract_v_mean;          // 1: subtract V's channel means
  float v_max;                  // quantised value of a channel's largest |V − mean|
};

// Third launch: attention, Q quantised in its prologue.
struct AttendParams {
  Tokens q;
  const u8* kv;
  const i32* k_scale_max;
  const float* v_amax;     // [BH, D]: the value that quantised v_max stands for
  const float* v_mean;     // [BH, D]: added to O of rows that see a key
  const i32* v_quant_sum;  // [BH, D], in kQuantSumUnits
  const float* live_keys;  // [BH]
  const float* k_mean;
  void* split_kv_workspace;  // SplitKvPartial of each share, or null: no work tile is split
  i32* split_kv_ready;       // 0 before the launch and after it: a share's partial result is stored
  i32* next_work_idx;        // counter of requests, 0 before the launch; null: a CTA's work tiles are gridDim.x apart
  const void* mask;          // [B, H, Nq, Nk] by strides, 0 where it broadcasts
  i64 mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k;
  const u32* kept;  // a bool mask in bits, [B, H, Nq, words] by strides in words, 0 where it broadcasts
  i64 kept_stride_b, kept_stride_h, kept_stride_q;
  TileLists lists;         // Mask::list only
  const i32* order;        // Mask::list only: the order of queries and output, as in QuantizeKParams
  const float* tail;       // [B, H, ⌈Nq / 64⌉, 4 + D]: initial softmax state of 64 queries, {m, l, unused, unused, O}; or null
  PackedSequences packed;  // Mask::packed only
  void* out;               // as q
  i64 out_stride_b, out_stride_h, out_stride_n;
  float* lse;                                      // [B, H, Nq], of packed sequences [H, total_q]; or null
  i32 bh_first, bh_count, heads_kv, heads_per_kv;  // heads_per_kv: query heads per kv head
  i32 len_q, len_kv, head_dim;                     // Mask::packed: len_q is total_q
  i32 dtype, q_vectorized, out_vectorized;
  i32 causal;                                       // 1: key ≤ query index (also with a dense mask)
  i32 mask_kind;                                    // MaskKind
  i32 kv_tiles, q_tiles;                            // of the layout's keys; of a CTA's queries (Mask::packed: an upper bound)
  i32 full_waves;                                   // whole work tiles of each CTA before the remainder is split; −1: all are weighed
  u32 rcp_q_tiles, rcp_heads_per_kv, rcp_heads_kv;  // (2^32 − 1) / divisor, for fast_divmod
  float score_scale;                                // |sm_scale|·log2(e)·4D / 127
  float sign;                                       // of sm_scale
  float sm_scale;
  float score_limit;  // SCORE_LIMIT / (127²·D)
  float inv_v_max;
  float log2_p_max;         // log2 of P of the row maximum
  float rescale_threshold;  // base 2: a row maximum may exceed that of the last rescaling by this
  i32 mask_pairs;           // 1: two consecutive elements of a row are one aligned load
};

// K and V of a launch that quantises them itself.
struct ResidentKv {
  Tokens k, v;
  const void* cu_seqlens_q;  // Mask::packed: as in PlaceSequencesParams, those down to max_len_k as well
  const void* cu_seqlens_k;
  i32 sequences, wide_q, wide_k;
  i32 total_q, total_k, max_len_q, max_len_k;
};

// The only launch of a call whose K and V stay in shared memory.
struct ResidentParams {
  ResidentKv kv;
  AttendParams attend;  // what the quantisers would have left is null
};

// ⌈n / d⌉ for n ≥ 0.
__device__ __forceinline__ int ceil_div(int n, int d) { return (n + d - 1) / d; }

// n / d and n % d for 0 ≤ n, d < 2^31; rcp = (2^32 − 1) / d. A division takes forty instructions.
struct DivMod {
  int quotient, remainder;
};

__device__ __forceinline__ DivMod fast_divmod(int n, int d, u32 rcp) {
  const int quotient = __umulhi(n, rcp), remainder = n - quotient * d;  // or quotient − 1
  return remainder < d ? DivMod{quotient, remainder} : DivMod{quotient + 1, remainder - d};
}

}  // namespace sage
