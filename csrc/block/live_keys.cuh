// Reads which keys are live, that is, take part in the statistics of K and V (LiveKeys in params.cuh).
#pragma once
#include "../common/warp.cuh"
#include "../kernel/params.cuh"
#include "../ptx/special.cuh"

namespace sage {

// At compile time, which keys the quantisers find: all of a dense call, those that are live, or those of one of several packed sequences.
enum class Keys { all, live, packed };

struct LiveRows {
  const LiveKeys& live;  // a kernel parameter, so it takes no registers
  const u32* bits;       // of the head; null: every key is live
  int len_kv;

  __device__ __forceinline__ LiveRows(const LiveKeys& live, int batch, int head, int len_kv)
      : live(live), bits(live.bits ? live.bits + batch * live.stride_b + head * live.stride_h : nullptr), len_kv(len_kv) {}

  // Keys 32·w … 32·w + 31, a bit each. Begins with the last rows, which see most in the masks of models, and ends once all are live.
  __device__ __forceinline__ u32 word(int w) const {
    constexpr int kBatch = 8;
    const u32 all = existing(w);
    u32 any = 0;
#pragma unroll 1
    for (int last = live.rows - 1; last >= 0 && any != all; last -= kBatch)
#pragma unroll
      for (int i = 0; i < kBatch; ++i) any |= bits[(i64)max(last - i, 0) * live.words + w];
    return any;
  }

  // The same as a collective of the warp, whose lanes share the rows.
  __device__ __forceinline__ u32 word_by_warp(int w) const {
    const u32 all = existing(w);
    u32 any = 0;
#pragma unroll 1
    for (int last = live.rows - 1; last >= 0 && any != all; last -= 32) {
      any |= bits[(i64)max(last - special_tid_x() % 32, 0) * live.words + w];
#pragma unroll
      for (int other = 1; other < 32; other *= 2) any |= __shfl_xor_sync(kAllLanes, any, other);
    }
    return any;
  }

  // The keys of word w that there are.
  __device__ __forceinline__ u32 existing(int w) const {
    const int left = len_kv - 32 * w;
    return left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0u;
  }
};

// Consecutive keys' bits in shared memory. Keys count from the start of the sequence.
template <int kWords>
struct LiveWindow {
  u32 word[kWords];

  // Loads the words of `count` keys from `key` on, which fit. Returns whether all existing keys of these words are live. A collective of
  // the CTA.
  __device__ __forceinline__ bool load(const LiveRows& live, int key, int count, int threads) {
    const int first = key / 32, words = (key % 32 + count + 31) / 32;
    bool all = true;
    for (int i = special_tid_x(); i < words; i += threads) {
      const u32 bits = first + i < live.live.words ? live.word(first + i) : 0u;
      word[i] = bits, all = all && bits == live.existing(first + i);
    }
    return __syncthreads_and(all);  // the words are stored
  }
  __device__ __forceinline__ bool get(int key, int first) const {
    const int bit = key - first / 32 * 32;
    return word[bit / 32] >> bit % 32 & 1;
  }
};

}  // namespace sage
