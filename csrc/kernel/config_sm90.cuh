// Shape of the Hopper kernels: their tiles, shared memory, barriers.
#pragma once
#include "../block/mask.cuh"
#include "../layout/core_matrix.cuh"
#include "../ptx/special.cuh"
#include "params.cuh"

namespace sage {

// One kernel: a row of sageattention/kernels/wgmma.py.
struct WgmmaTile {
  Mask mask;
  int stages, q_stages;  // of KV; of Q: with two, no consumer waits until the last work tile's Q has been read
  int stage_tiles = 1;   // KV tiles of a stage
  bool routed = false;   // serves block-sparse calls: rows begin with what their list leaves out, and lie in an order
};

template <class Layout_, WgmmaTile kWgmmaTile>
struct WgmmaConfig {
  using Layout = Layout_;
  static constexpr int kHeadDim = Layout::kHeadDim, kTile = Layout::kTile, kStages = kWgmmaTile.stages, kQStages = kWgmmaTile.q_stages;
  static constexpr int kStageTiles = kWgmmaTile.stage_tiles, kStageBytes = kStageTiles * Layout::kTileBytes;
  static constexpr Mask kMask = kWgmmaTile.mask;
  static constexpr int kUnmaskedLeast = 1,
                       kUnmaskedMultiple = 1;  // tiles of unmasked_tiles(): at least, and a multiple of; the rest is done as masked
  static constexpr bool kResident = false;     // K and V pass through the stages of a ring
  static constexpr int kConsumers = 2;         // warpgroups,
  static constexpr int kFirstConsumer = 128;   // from this thread on
  static constexpr int kConsumerWarps = 4 * kConsumers, kThreads = 128 * (kConsumers + 1), kBlockM = 64 * kConsumers;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // of 65536: 128 · 24 + 256 · 240
  static constexpr int kScoreRegisters = kTile / 2, kOutRegisters = Layout::kVColumns / 2;
  static constexpr int kProbRegisters = Layout::kVBytes / Layout::kVColumns / 8;  // of P, in the type of V

  // Shared memory, byte offsets: Q in core-matrix order, 64 rows after another; KV stages; their barriers;
  static constexpr int kQPitch = 64 * 16, kQBytes = 64 * kHeadDim;
  static constexpr int kStage0 = kQStages * kConsumers * kQBytes;
  static constexpr int kBarriers = kStage0 + kStages * kStageBytes, kBarrierPitch = 32;
  // the barriers of work tiles; the rotation's matrix; two slots of {work tile, V's scale and mean per channel, of block-sparse calls also
  // the initial state of each warpgroup's rows and the token of each row}; Q as in memory.
  static constexpr int kWorkBarriers = kBarriers + kStages * kBarrierPitch;
  static constexpr int kRotation = kWorkBarriers + 32, kWorkSlot0 = kRotation + 32 * 16;
  static constexpr int kWorkTileBytes = kMask == Mask::packed ? 64 : 48;
  static constexpr bool kRouted = kWgmmaTile.routed;
  static constexpr int kTailBytes = (4 + kHeadDim) * 4, kTails = kWorkTileBytes + 2 * kHeadDim * 4;
  static constexpr int kTokens = kTails + kConsumers * kTailBytes, kWorkSlotBytes = kRouted ? kTokens + kBlockM * 4 : kTails;
  static constexpr bool kHasRawQ = kHeadDim <= 128;  // beside KV tiles of head_dim 256 there is no room
  static constexpr int kRawQ = kWorkSlot0 + 2 * kWorkSlotBytes,
                       kRawQPitch = 2 * kHeadDim + 64;  // bytes of a row; + 64 avoids bank conflicts
  static constexpr int kSharedBytes = kRawQ + (kHasRawQ ? kBlockM * kRawQPitch : 0);

  static __device__ __forceinline__ u32 q_offset(int iteration, int warpgroup) {
    return (iteration % (u32)kQStages * kConsumers + warpgroup) * kQBytes;
  }
  static __device__ __forceinline__ u32 work_slot(int iteration) { return kWorkSlot0 + iteration % 2u * kWorkSlotBytes; }
  static __device__ __forceinline__ u32 channel_scales(u32 work) { return work + kWorkTileBytes; }
  static __device__ __forceinline__ const float* k_mean(const AttendParams& p, int bh) { return p.k_mean + bh * kHeadDim; }
};

// A stage's barriers: K is loaded, V is loaded, all consumer warps have read K, have read V.
enum StageBarrier : u32 { kKFull = 0, kVFull = 8, kKEmpty = 16, kVEmpty = 24 };
// A work slot's barriers: its channels and Q are loaded; all consumer warps have read its Q; the producer warps may read its work tile.
enum WorkBarrier : u32 { kWorkFull = 0, kWorkEmpty = 8, kWorkPublished = 16 };

// A position in the ring of stages.
template <int kStages>
struct Ring {
  u32 stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void retreat() {
    if (stage-- == 0) stage = kStages - 1, parity ^= 1;
  }
};

// The dtype of the call's tensors. Resident kernels are made for one, and for rows aligned to 16 bytes.
template <class C>
__device__ __forceinline__ i32 dtype_of(const AttendParams& p) {
  if constexpr (C::kResident)
    return C::kDtype;
  else
    return p.dtype;
}

// The lane that acts for its warp: lane 0.
__device__ __forceinline__ bool elected() { return special_tid_x() % 32 == 0; }

}  // namespace sage
