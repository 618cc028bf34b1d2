// Packed sequences for the quantisers: a CTA works on one run of keys of one sequence, as a CTA of that sequence's own dense launch does.
#pragma once
#include "../common/tensor.cuh"
#include "../kernel/params.cuh"

namespace sage {

// A CTA's part of a packed launch whose `heads` KV heads have max_runs CTAs each.
struct PackedRun {
  Sequence sequence;
  int head, part, parts;  // part of the sequence's `parts` runs

  // cta: of those heads · max_runs. Returns false if it has nothing to do.
  __device__ __forceinline__ bool find(const PackedSequences& packed, int cta, int max_runs, int run_keys) {
    head = cta / max_runs;
    const int run = cta % max_runs;
    if (run >= packed.counts[1]) return false;
    sequence = packed.sequences[packed.runs[run]];
    part = run - sequence.run, parts = ceil_div(sequence.k_len, run_keys);
    return true;
  }

  // The first of `count` elements a run and head, or a sequence and head.
  template <class T>
  __device__ __forceinline__ T* of_runs(T* all, int heads, int count = 1) const {
    return all + (i64)sequence.run * heads * count;
  }
  template <class T>
  __device__ __forceinline__ T* of_sequence(T* all, int heads, int count = 1) const {
    return all + (i64)sequence.number * heads * count;
  }
  __device__ __forceinline__ u8* tiles(u8* kv, int heads, int tile_bytes) const { return kv + (i64)sequence.kv_tile * heads * tile_bytes; }
  __device__ __forceinline__ const void* tokens(const Tokens& x, i32 dtype) const {
    return static_cast<const u8*>(x.data) + sequence.k_start * x.stride_n * (dtype == kFloat32 ? 4 : 2);
  }
};

// The dense launch of one sequence, as which a CTA works, in shared memory: there it takes no registers.
template <class Params>
struct SequenceLaunch {
  Params params;
  int block;  // the CTA's number in it
  bool any;   // whether the CTA has anything to do
};

}  // namespace sage
