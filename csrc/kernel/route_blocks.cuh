// The router of block-sparse attention: scores of pooled blocks, the exact blocks of each list as bits, and the blocks that are left out
// summed up as the state in which each row's softmax begins (numerics/sparse.py defines all three).
//
// A CTA takes a strip of row blocks of one head at a time: it pools their queries, multiplies them with the means of all KV blocks into
// memory of its own, and a warp a list draws the line there; then the weights of what is left out are multiplied with the sums of V. No
// scores but those of the strips at work are ever held. Products are as good as in fp32: scores in bf16 or tf32 make ties, and ties pick
// blocks that do not matter.
#pragma once
#include "../block/product.cuh"
#include "pool_blocks.cuh"

namespace sage {

constexpr int kRouteThreads = 256, kRouteWarps = kRouteThreads / 32;
constexpr int kListRows = 2;                        // row blocks of a list
constexpr int kPitchWords = 4;                      // a row of scores is padded to a multiple of it, in words of 32 blocks
constexpr int kPlainWords = 2048;                   // of blocks among which plain ones are looked for
constexpr int kSharedWeights = kRouteWarps * 1792;  // a row of weights for each warp: of 114,688 keys

template <int kHeadDim_>
struct RouteConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kHeadDim == 256 ? 32 : 64;  // row blocks of a strip
  static constexpr int kColumns = 128, kDepth = 16;        // a step multiplies [kRows, kDepth] by [kDepth, kColumns]
  using Product = sage::Product<kRows, kColumns, kDepth>;
  static constexpr int kRowPieces = kRows * kDepth / 4, kColumnPieces = kColumns * kDepth / 4 / kRouteThreads;  // float4s: all, a thread's
};

template <class C>
struct RouteShared {
  using Product = typename C::Product;
  struct Products {
    union {
      alignas(16) float q[Product::row_of_a(C::kHeadDim)];   // the strip's means, while scores are computed
      alignas(16) float p[2][Product::row_of_a(C::kDepth)];  // weights, two steps of them, while tails are summed up
    };
    alignas(16) float columns[2][Product::row_of_b(C::kDepth)];
  };
  union {
    Products products;
    u32 weights[kSharedWeights];  // while lists are chosen
  };
  alignas(16) float k_shift[C::kHeadDim];
  float spread[C::kRows];  // of the row's scores, for kSol
  float top[C::kRows];     // the largest score of what is left out
  bool plain[kPlainWords / kPitchWords];
};

template <class C>
constexpr int route_shared_bytes() {
  return sizeof(RouteShared<C>);
}

// log2(2^a + 2^b); NaN where both are infinite
__device__ __forceinline__ float log2_sum(float a, float b) { return fmaxf(a, b) + log2_approx(1.0f + exp2_approx(-fabsf(a - b))); }

// A number's bits, in the order of the numbers, all above 0.
__device__ __forceinline__ u32 sortable(float x) {
  const u32 bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_sortable(u32 x) { return __uint_as_float(x >> 31 ? x & 0x7FFFFFFFu : ~x); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int other = 1; other < 32; other *= 2) x += __shfl_xor_sync(kAllLanes, x, other);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int other = 1; other < 32; other *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, other));
  return x;
}

template <class C>
struct Router {
  using Product = typename C::Product;
  const RouteParams& p;
  RouteShared<C>& shared;
  float* const strip_scores;  // [kRows, pitch], then a row for each warp
  int batch, head, bh, bh_kv;
  int row0, seen;  // the strip's first row block; KV blocks that any of its rows may see

  __device__ __forceinline__ Router(const RouteParams& p, RouteShared<C>& shared)
      : p(p), shared(shared), strip_scores(p.scratch + (i64)blockIdx.x * (C::kRows + kRouteWarps) * p.pitch) {}

  __device__ __forceinline__ int first_key(int row) const { return p.q_start + row * kKvBlock; }  // the position of its first query
  __device__ __forceinline__ int last_key(int row) const { return p.q_start + min(row * kKvBlock + kKvBlock, p.len_q) - 1; }

  __device__ __forceinline__ void strip(int number) {
    bh = number / p.strips, row0 = number % p.strips * C::kRows;
    batch = bh / p.heads, head = bh % p.heads;
    bh_kv = batch * (p.heads / p.heads_per_kv) + head / p.heads_per_kv;
    seen = p.causal ? min(p.blocks, last_key(min(row0 + C::kRows, p.rows) - 1) / kKvBlock + 1) : p.blocks;
    find_plain();
    const bool scored = p.tail || p.selection != kStatic;
    if (scored) pool_queries();
    __syncthreads();  // the means are stored
    if (scored) scores();
#pragma unroll 1
    for (int row = row0 + threadIdx.x / 32 * kListRows; row < min(row0 + C::kRows, p.rows); row += kRouteWarps * kListRows) choose(row);
    if (p.tail) {
      __syncthreads();  // what is left out is marked
      sum_up();
    }
    __syncthreads();  // shared memory and the scores are free
  }

  // Which words of blocks, four at a time, hold none but blocks whose keys all exist and no sink: most do, and need few questions.
  __device__ __forceinline__ void find_plain() {
    const int lane = threadIdx.x % 32;
    const float* const keys = p.counts + (i64)batch * p.pitch + lane;
    for (int word = threadIdx.x / 32 * kPitchWords; 32 * word < min(seen, 32 * kPlainWords); word += kRouteWarps * kPitchWords) {
      bool plain = true;
#pragma unroll
      for (int i = 0; i < kPitchWords; ++i)
        plain &= keys[32 * (word + i)] == kKvBlock && !(p.sinks && word + i < p.words && p.sinks[word + i]);
      plain = !__any_sync(kAllLanes, !plain);
      if (lane == 0) shared.plain[word / kPitchWords] = plain;
    }
  }
  __device__ __forceinline__ bool is_plain(int word) const { return word < kPlainWords && shared.plain[word / kPitchWords]; }

  __device__ __forceinline__ void pool_queries() {
    using Sum = BlockSum<C::kHeadDim>;
    const int lane = threadIdx.x % 32, channel = lane % Sum::kLanes * kChunk;
    for (int d = threadIdx.x; d < C::kHeadDim; d += kRouteThreads) shared.k_shift[d] = p.k_shift[(i64)bh_kv * C::kHeadDim + d];
#pragma unroll 1
    for (int r = threadIdx.x / 32; r < C::kRows; r += kRouteWarps) {
      Sum s;
      if (row0 + r < p.rows) {
        const BlockTokens tokens = tokens_of_block(p.live, batch, row0 + r, p.len_q);
        s.add(p.q, batch, head, p.dtype, p.vectorized, p.order, row0 + r, tokens, p.head_dim);
        const float factor = 1.0f / max(tokens.count(), 1);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) s.sum[e] *= factor;
      }
      float square = 0.0f;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) square = fmaf(s.sum[e] * s.sum[e], p.k_var[(i64)bh_kv * C::kHeadDim + channel + e], square);
#pragma unroll
      for (int other = 1; other < Sum::kLanes; other *= 2) square += __shfl_xor_sync(kAllLanes, square, other);
      if (lane < Sum::kLanes)
#pragma unroll
        for (int e = 0; e < kChunk; ++e) shared.products.q[Product::row_of_a(channel + e) + r] = s.sum[e];
      if (lane == 0) shared.spread[r] = sqrtf(fmaf(square, p.scale * p.scale, kTinySpread));
    }
  }

  // --- products -------------------------------------------------------------------------------------------------------------------

  // Steps of a product: while one is multiplied, the next is under way from memory. fetch(step) gives a thread's pieces of it, put(step,
  // pieces) stores them in shared memory, in the step's half of it.
  template <class Fetch, class Put, class Multiply>
  __device__ __forceinline__ void in_steps(int steps, Fetch fetch, Put put, Multiply multiply) const {
    auto pieces = fetch(0);
    put(0, pieces);
    __syncthreads();  // step 0 is stored
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) pieces = fetch(step + 1);
      multiply(step);
      if (step + 1 < steps) put(step + 1, pieces);
      __syncthreads();  // the next step is stored, this one's half is free
    }
  }

  // Stores a run of a product's sums, times `factor`.
  static __device__ __forceinline__ void store_run(float* to, const float* x, float factor) {
    if constexpr (Product::kRun == 4)
      *reinterpret_cast<float4*>(to) = float4{x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor};
    else
      *reinterpret_cast<float2*>(to) = float2{x[0] * factor, x[1] * factor};
  }

  // strip_scores[row][block] = q_mean · (k_mean − k_shift) · scale
  __device__ __forceinline__ void scores() {
    struct Pieces {
      float4 column[C::kColumnPieces];
    };
    constexpr int kSteps = C::kHeadDim / C::kDepth, kAcross = C::kDepth / 4;
    const float* const k_mean = p.k_mean + (i64)bh_kv * p.blocks * C::kHeadDim;
    Product scores;
    in_steps((seen + C::kColumns - 1) / C::kColumns * kSteps,
             [&](int step) {
               Pieces x;
#pragma unroll
               for (int i = 0; i < C::kColumnPieces; ++i) {
                 const int piece = threadIdx.x + i * kRouteThreads;
                 const int block = step / kSteps * C::kColumns + piece / kAcross, d = step % kSteps * C::kDepth + piece % kAcross * 4;
                 x.column[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
                 if (block < seen) {
                   const float4 mean = *reinterpret_cast<const float4*>(k_mean + block * C::kHeadDim + d);
                   const float4 shift = *reinterpret_cast<const float4*>(shared.k_shift + d);
                   x.column[i] = float4{mean.x - shift.x, mean.y - shift.y, mean.z - shift.z, mean.w - shift.w};
                 }
               }
               return x;
             },
             [&](int step, const Pieces& x) {
#pragma unroll
               for (int i = 0; i < C::kColumnPieces; ++i) {
                 const int piece = threadIdx.x + i * kRouteThreads;
                 float* const to = shared.products.columns[step % 2] + Product::row_of_b(piece % kAcross * 4) + piece / kAcross;
                 const float four[4] = {x.column[i].x, x.column[i].y, x.column[i].z, x.column[i].w};
#pragma unroll
                 for (int d = 0; d < 4; ++d) to[Product::row_of_b(d)] = four[d];
               }
             },
             [&](int step) {
               scores.multiply(shared.products.q + Product::row_of_a(step % kSteps * C::kDepth), shared.products.columns[step % 2]);
               if (step % kSteps < kSteps - 1) return;
               float* const to = strip_scores + step / kSteps * C::kColumns;
               scores.each([&](int row, int column, float* x) { store_run(to + (i64)row * p.pitch + column, x, p.scale); });
               scores = {};
             });
  }

  // The tails of the strip's rows: m = the largest score of what is left out, weights 2^(score − m), l = weights · keys, O = weights · sums
  // of V.
  __device__ __forceinline__ void sum_up() {
    struct Pieces {
      float4 score, keys, column[C::kColumnPieces];
    };
    constexpr int kAcross = C::kDepth / 4, kWidth = C::kHeadDim < C::kColumns ? C::kHeadDim : C::kColumns, kOfRow = kWidth / 4;
    static_assert(kAcross == 4, "four lanes share a row of weights");
    const float* const v_sum = p.v_sum + (i64)bh_kv * p.blocks * C::kHeadDim;
    // The thread's part of the weights: four columns of this row.
    const int own_row = threadIdx.x / kAcross, own_column = threadIdx.x % kAcross * 4;
    const bool weighs = threadIdx.x < C::kRowPieces;
    const float* const scores = strip_scores + (i64)own_row * p.pitch + own_column;
    const float* const counts = p.counts + (i64)batch * p.pitch + own_column;
    const float top = weighs ? shared.top[own_row] : -kInf, base = top > -kInf ? top : 0.0f;
#pragma unroll 1
    for (int channel0 = 0; channel0 < C::kHeadDim; channel0 += kWidth) {
      Product sums;
      float l = 0.0f;
      in_steps((seen + C::kDepth - 1) / C::kDepth,
               [&](int step) {
                 Pieces x;
                 if (weighs) {
                   x.score = *reinterpret_cast<const float4*>(scores + step * C::kDepth);
                   x.keys = *reinterpret_cast<const float4*>(counts + step * C::kDepth);
                 }
#pragma unroll
                 for (int i = 0; i < C::kColumnPieces; ++i) {
                   const int piece = threadIdx.x + i * kRouteThreads, block = step * C::kDepth + piece / kOfRow;
                   x.column[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
                   if (piece / kOfRow < C::kDepth && block < seen)
                     x.column[i] = *reinterpret_cast<const float4*>(v_sum + block * C::kHeadDim + channel0 + piece % kOfRow * 4);
                 }
                 return x;
               },
               [&](int step, const Pieces& x) {
                 if (weighs) {
                   float* const to = shared.products.p[step % 2] + Product::row_of_a(own_column) + own_row;
                   const float weight[4] = {exp2_approx(x.score.x - base), exp2_approx(x.score.y - base), exp2_approx(x.score.z - base),
                                            exp2_approx(x.score.w - base)};
                   l = fmaf(weight[0], x.keys.x, fmaf(weight[1], x.keys.y, fmaf(weight[2], x.keys.z, fmaf(weight[3], x.keys.w, l))));
#pragma unroll
                   for (int k = 0; k < 4; ++k) to[Product::row_of_a(k)] = weight[k];
                 }
#pragma unroll
                 for (int i = 0; i < C::kColumnPieces; ++i) {
                   const int piece = threadIdx.x + i * kRouteThreads, k = piece / kOfRow;
                   if (k < C::kDepth)
                     *reinterpret_cast<float4*>(shared.products.columns[step % 2] + Product::row_of_b(k) + piece % kOfRow * 4) =
                         x.column[i];
                 }
               },
               [&](int step) {
                 if (Product::first_column() < kWidth) sums.multiply(shared.products.p[step % 2], shared.products.columns[step % 2]);
               });
      if (weighs && channel0 == 0) {
        l = row_sum(l);
        if (threadIdx.x % kAcross == 0 && row0 + own_row < p.rows) tail_of(own_row)[0] = top, tail_of(own_row)[1] = l;
      }
      if (Product::first_column() >= kWidth) continue;
      sums.each([&](int row, int column, float* x) {
        if (row0 + row >= p.rows) return;
        float* const to = tail_of(row) + 4 + channel0 + column;
        if (shared.top[row] > -kInf)
          store_run(to, x, 1.0f);
        else  // the weights are 0, but V may be NaN
          for (int i = 0; i < Product::kRun; ++i) to[i] = 0.0f;
      });
    }
  }

  __device__ __forceinline__ float* tail_of(int row) const { return p.tail + ((i64)bh * p.rows + row0 + row) * (4 + C::kHeadDim); }

  // --- lists ----------------------------------------------------------------------------------------------------------------------

  // Where a list's rows, the two row blocks from `row` on, stand to the KV blocks: half-open ranges from block 0 on, empty for a row that
  // is not there.
  struct List {
    int row, number;
    int visible[kListRows];  // any of the row's queries sees any of the block's keys
    int whole[kListRows];    // all of them see all keys
    int near_first, near_last;
    float* scores;  // of the first row
  };

  __device__ __forceinline__ List list_of(int row) const {
    List list{row, row / kListRows, {0, 0}, {0, 0}, 1, 0, strip_scores + (i64)(row - row0) * p.pitch};
#pragma unroll
    for (int r = 0; r < kListRows; ++r) {
      if (row + r >= p.rows) continue;
      const int first = first_key(row + r), last = last_key(row + r);
      list.visible[r] = p.causal ? min(p.blocks, last / kKvBlock + 1) : p.blocks;
      list.whole[r] = p.causal && first < p.len_kv - 1 ? (first + 1) / kKvBlock : p.blocks;
      if (p.neighbours < 0) continue;
      if (r == 0) list.near_first = first / kKvBlock - p.neighbours;
      list.near_last = last / kKvBlock + p.neighbours;
    }
    return list;
  }

  // A lane's block of a list's word.
  struct Place {
    int block;
    float keys;  // that exist
    float score[kListRows];
    float* stored[kListRows];  // where those lie
    bool visible, sink, cut;   // cut: not every query sees it whole, so it can't be in a tail
    bool in_question[kListRows], whole_of[kListRows];

    __device__ __forceinline__ bool asked(int r) const { return in_question[r]; }  // the row's score is in question
    __device__ __forceinline__ bool whole(int r) const { return whole_of[r]; }     // all of the row's queries see its keys, which there are
  };

  // The same of a plain word (find_plain) whose blocks every query sees.
  struct PlainPlace {
    int block;
    float score[kListRows];
    float* stored[kListRows];
    static constexpr float keys = kKvBlock;
    static constexpr bool visible = true, sink = false, cut = false;

    static __device__ __forceinline__ bool asked(int) { return true; }
    static __device__ __forceinline__ bool whole(int) { return true; }
  };

  __device__ __forceinline__ Place place(const List& list, int word, float keys, const PlainPlace& of) const {
    const int block = of.block;
    const bool exists = keys > 0.0f, sink = p.sinks && word < p.words && (p.sinks[word] >> threadIdx.x % 32 & 1);
    const bool visible = exists && block < max(list.visible[0], list.visible[1]);
    Place at{block, keys, {of.score[0], of.score[1]}, {of.stored[0], of.stored[1]}, visible, sink, false, {}, {}};
#pragma unroll
    for (int r = 0; r < kListRows; ++r) {
      at.in_question[r] = exists & (block < list.visible[r]) & !sink;
      at.whole_of[r] = exists & (block < list.whole[r]);
      at.cut |= (list.row + r < p.rows) & (block >= list.whole[r]);
    }
    return at;
  }

  // body(word, place) for all words of blocks that are seen, and as many more as fill the row. Memory is far: four words are under way at
  // a time.
  template <class Body>
  __device__ __forceinline__ void each_word(const List& list, Body body) const {
    const int lane = threadIdx.x % 32;
    const int plain_end = min(min(list.visible[0], list.visible[1]), min(list.whole[0], list.whole[1]));
    float *first = list.scores + lane, *second = first + p.pitch;
    const float* keys = p.counts + (i64)batch * p.pitch + lane;
    const auto load = [&](int word, int i) -> PlainPlace {
      float *x = first + 32 * i, *y = second + 32 * i;
      return {32 * (word + i) + lane, {p.scratch ? *x : 0.0f, p.scratch ? *y : 0.0f}, {x, y}};
    };
#pragma unroll 1
    for (int word = 0; 32 * word < seen; word += kPitchWords) {
      if (32 * (word + kPitchWords) <= plain_end && is_plain(word)) {
        PlainPlace at[kPitchWords];
#pragma unroll
        for (int i = 0; i < kPitchWords; ++i) at[i] = load(word, i);
#pragma unroll
        for (int i = 0; i < kPitchWords; ++i) body(word + i, at[i]);
      } else {
#pragma unroll 1
        for (int i = 0; i < kPitchWords; ++i) body(word + i, place(list, word + i, keys[32 * i], load(word, i)));
      }
      first += 32 * kPitchWords, second += 32 * kPitchWords, keys += 32 * kPitchWords;
    }
  }

  // What decides about the blocks in question.
  struct Line {
    float lse[kListRows];  // log2 of the sum of 2^score over the row's blocks in question
    float threshold;       // kSol, kMass: a block's weight is above it
    u32 smallest;          // kTopk, kCdf: a block's weight, ordered, is not below it
    bool all;              // a score is NaN: every block is above
  };

  // log2 of the block's shares of the rows' softmaxes, summed; NaN where it is not in question.
  template <class At>
  __device__ __forceinline__ float weight(const At& at, const Line& line) const {
    return log2_sum(at.asked(0) ? at.score[0] - line.lse[0] : -kInf, at.asked(1) ? at.score[1] - line.lse[1] : -kInf);
  }

  // A list's weights, ordered; 0 where the block is not in question. Each warp has its own, in shared memory where they fit.
  __device__ __forceinline__ u32* ordered_weights() const {
    const int warp = threadIdx.x / 32, size = kRouteWarps * p.pitch;
    u32* const far = reinterpret_cast<u32*>(strip_scores + (i64)C::kRows * p.pitch);
    return (size <= kSharedWeights ? shared.weights : far) + warp * p.pitch;
  }
  __device__ __forceinline__ bool by_rank() const { return p.selection == kTopk || p.selection == kCdf; }

  __device__ __forceinline__ Line draw_line(const List& list) const {
    Line line{{-kInf, -kInf}, 0.0f, 0, false};
    float top[kListRows] = {-kFiniteMax, -kFiniteMax}, sum[kListRows] = {};  // finite: a difference of infinities is NaN
    int asked[kListRows] = {}, candidates = 0;
    each_word(list, [&](int, const auto& at) {
      candidates += at.asked(0) | at.asked(1);
#pragma unroll
      for (int r = 0; r < kListRows; ++r) {
        const float x = at.asked(r) ? at.score[r] : -kInf, higher = fmaxf(top[r], x);
        sum[r] = fmaf(sum[r], exp2_approx(top[r] - higher), exp2_approx(x - higher));
        top[r] = higher, asked[r] += at.asked(r);
      }
    });
    float of_row[kListRows];
    const float given = p.thresholds ? p.thresholds[head] : (float)p.threshold;
#pragma unroll
    for (int r = 0; r < kListRows; ++r) {
      const float highest = warp_max(top[r]), blocks = warp_sum((float)asked[r]);
      const float all = warp_sum(sum[r] * exp2_approx(top[r] - highest));
      line.lse[r] = blocks > 0.0f ? highest + log2_approx(all) : -kInf;
      line.all |= !(line.lse[r] < kInf);
      of_row[r] = list.row + r >= p.rows ? -kInf
                  : p.selection == kMass ? log2_approx(given / fmaxf(blocks, 1.0f))
                                         : given * shared.spread[list.row + r - row0] - line.lse[r];
    }
    const float higher = fmaxf(of_row[0], of_row[1]);
    line.threshold = fabsf(higher) == kInf ? higher : log2_sum(of_row[0], of_row[1]);
    if (by_rank()) line.smallest = smallest_of_largest(list, line, warp_sum((float)candidates));
    return line;
  }

  // The smallest weight, ordered, such that the weights above it do not reach the budget: a number of blocks, or a share of their sum.
  __device__ __forceinline__ u32 smallest_of_largest(const List& list, const Line& line, float candidates) const {
    u32* const weights = ordered_weights() + threadIdx.x % 32;  // the lane's own
    u32 low = 0xFFFFFFFFu, high = 0;
    each_word(list, [&](int word, const auto& at) {
      const u32 x = at.asked(0) | at.asked(1) ? sortable(weight(at, line)) : 0u;
      weights[32 * word] = x, high = max(high, x), low = min(low, x - 1);  // 0 − 1: none
    });
#pragma unroll
    for (int other = 1; other < 32; other *= 2)
      high = max(high, __shfl_xor_sync(kAllLanes, high, other)), low = min(low, __shfl_xor_sync(kAllLanes, low, other));
    if (!high) return high;  // there is none
    const double share = p.thresholds ? (double)p.thresholds[head] : p.threshold;
    if (p.selection == kTopk) {
      const float number = fminf((float)rint(share * candidates), candidates - (share < 1.0 ? 1.0f : 0.0f));
      return search(low, high, fmaxf(number, 1.0f), [&](u32 least) { return sum_above(weights, least, [](u32) { return 1.0f; }); });
    }
    const auto above = [&](u32 least) { return sum_above(weights, least, [](u32 x) { return exp2_approx(from_sortable(x)); }); };
    return search(low, high, (float)share * above(0), above);
  }

  // The sum of value(x) over the weights above `least`, of all lanes.
  template <class Value>
  __device__ __forceinline__ float sum_above(const u32* weights, u32 least, Value value) const {
    float sum = 0.0f;
#pragma unroll 8
    for (int at = 0; at < seen; at += 32) {
      const u32 x = weights[at];
      sum += x > least ? value(x) : 0.0f;
    }
    return warp_sum(sum);
  }

  // The smallest x such that above(x) < budget. above(low) is all there is, above(high) is 0.
  template <class Above>
  __device__ __forceinline__ u32 search(u32 low, u32 high, float budget, Above above) const {
    if (!(budget > 0.0f)) return 0xFFFFFFFFu;
#pragma unroll 1
    while (high - low > 1) {
      const u32 middle = low + (high - low) / 2;
      const float found = above(middle);
      if (p.selection == kTopk && found == budget) return middle + 1;  // these are as many as shall be
      (found < budget ? high : low) = middle;
    }
    return high;
  }

  // A list, a warp's work: its bits, and −inf in the place of every score that is in no tail.
  __device__ __forceinline__ void choose(int row) const {
    const int lane = threadIdx.x % 32;
    const List list = list_of(row);
    const bool scored = p.selection != kStatic;
    const Line line = scored ? draw_line(list) : Line{};
    const u32* const weights = ordered_weights() + lane;
    const bool everything = p.query_sinks && p.query_sinks[list.number / 32] >> list.number % 32 & 1;
    const u8* const mask = p.block_mask + batch * p.mask_stride_b + head * p.mask_stride_h + (i64)list.number * p.blocks;
    u32* const bits = p.lists + ((i64)bh * p.lists_of_head + list.number) * 2 * p.words;
    float top[kListRows] = {-kInf, -kInf};
    int exact_blocks = 0;
    each_word(list, [&](int word, const auto& at) {
      bool exact = at.sink | everything | ((at.block >= list.near_first) & (at.block <= list.near_last));
      if (scored)
        exact |= at.cut | line.all | (by_rank() ? weights[32 * word] >= line.smallest : !(weight(at, line) <= line.threshold));
      else
        exact |= at.visible && mask[at.block];
      exact &= at.visible;
      const u32 exact_bits = __ballot_sync(kAllLanes, exact);
      const u32 uneven_bits = __ballot_sync(kAllLanes, (at.block < p.blocks) & ((at.keys < kKvBlock) | at.cut));
      if (lane == 0 && word < p.words) bits[word] = exact_bits, bits[p.words + word] = uneven_bits;
      exact_blocks += __popc(exact_bits);
      if (!p.tail) return;
#pragma unroll
      for (int r = 0; r < kListRows; ++r) {
        const bool left_out = at.whole(r) & !exact;
        top[r] = fmaxf(top[r], left_out ? at.score[r] : -kInf);
        if (!left_out) *at.stored[r] = -kInf;
      }
    });
    // Beyond the strip's diagonal, and beyond what each_word rounds that up to.
    for (int word = (seen - 1) / (32 * kPitchWords) * kPitchWords + kPitchWords + lane; word < p.words; word += 32)
      bits[word] = bits[p.words + word] = 0;
    if (lane == 0) atomicAdd(p.exact_blocks, (u64)exact_blocks);
    if (!p.tail) return;
#pragma unroll
    for (int r = 0; r < kListRows; ++r) {
      top[r] = warp_max(top[r]);
      if (lane == 0) shared.top[row + r - row0] = top[r];
    }
  }
};

template <class C>
__device__ __forceinline__ void route_blocks(const RouteParams& p) {
  extern __shared__ __align__(128) u8 stages[];
  Router<C> router(p, *reinterpret_cast<RouteShared<C>*>(stages));
  for (int number = blockIdx.x; number < p.strips * p.bh_count; number += p.ctas) router.strip(number);
}

}  // namespace sage
