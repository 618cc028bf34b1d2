// The attention kernel on Hopper but for its main loop: three producer warps and two consumer warpgroups. mainloop_sm90_fp16.cuh describes
// a CTA.
#pragma once
#include "mainloop_sm90.cuh"
#include "output_sm90.cuh"
#include "producer_sm90.cuh"
#include "query_sm90.cuh"

namespace sage {

// Dynamic shared memory of a launch, in bytes.
template <class C>
constexpr int attend_shared_bytes() {
  return C::kSharedBytes;
}

// The CTA: three producer warps and two consumer warpgroups, one work tile after another; the next one's KV tiles are loaded while the last
// one's output is stored. Mainloop<C> is a MainloopSm90<C> with O in `o` and run(range, l), which computes a work tile.
template <class C, template <class> class Mainloop>
__device__ __forceinline__ void attend_block(const AttendParams& p) {
  static_assert(C::kBarriers % 8 == 0 && C::kStage0 % 128 == 0 && C::Layout::kTileBytes % 128 == 0, "operands lie on 128 bytes");
  extern __shared__ __align__(128) u8 bytes[];
  const u32 shared = shared_address(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      const u32 barrier = shared + C::kBarriers + i * C::kBarrierPitch;
      mbarrier_init(barrier + kKFull, C::kStageTiles), mbarrier_init(barrier + kVFull, C::kStageTiles);
      mbarrier_init(barrier + kKEmpty, C::kConsumerWarps), mbarrier_init(barrier + kVEmpty, C::kConsumerWarps);
    }
    mbarrier_init(shared + C::kWorkBarriers + kWorkFull, 32 + C::kRouted + 1);  // the lanes of producer warp 1, itself, producer warp 2
    mbarrier_init(shared + C::kWorkBarriers + kWorkEmpty, C::kConsumerWarps);
    mbarrier_init(shared + C::kWorkBarriers + kWorkPublished, 1);
    fence_async_proxy();
  }
  if (threadIdx.x / 32 == 1) {  // for all prologues of all consumers
    with_dtype(p.dtype, [&](auto type) {
      if constexpr (decltype(type)::value != kFloat32) {
        const int lane = threadIdx.x % 32;
        store_shared16(shared + C::kRotation + 16 * lane, Rotation<C::kHeadDim, decltype(type)::value>(lane).matrix);
      }
    });
  }
  __syncthreads();  // barriers and matrix are initialised
  if (threadIdx.x < 128) {
    setmaxnreg_dec<C::kProducerRegisters>();
    if (threadIdx.x < 32)
      load_kv_tiles<C>(p, shared);
    else if (threadIdx.x < 64)
      load_raw_q<C>(p, shared);
    else if (threadIdx.x < 96)
      publish_work_tile<C>(p, shared);
  } else {
    setmaxnreg_inc<C::kConsumerRegisters>();
    // The shuffle tells the compiler that sQ is warp-uniform: descriptors are then computed in uniform registers.
    const u32 sQ = __shfl_sync(kAllLanes, shared + C::q_offset(0, special_tid_x() / 128 - 1), 0);
    Mainloop<C> mainloop{p, shared, sQ};
    mainloop.causal = C::kMask == Mask::causal || (kCausalAtRunTime<C::kMask> && p.causal);
    for (mainloop.iteration = 0;; ++mainloop.iteration) {
      mbarrier_wait(shared + C::kWorkBarriers + kWorkFull, mainloop.iteration & 1);
      const KvRange range(shared + C::work_slot(mainloop.iteration));
      if (!(range.flags & kWorkValid)) break;
      if constexpr (C::kQStages > 1) mainloop.sQ = sQ + C::q_offset(mainloop.iteration, 0);
      quantize_q<C>(p, shared, mainloop.iteration, mainloop.q_scale);
      float l_i[2];
      mainloop.run(range, l_i);
      const u32 to = shared + C::work_slot(mainloop.iteration);
      if (p.split_kv_workspace) {
        const u32 flags = KvRange(to).flags;
        if (flags & kWritesPartial) {
          SplitKvPartial<C>(p, (int)load_shared(to + work::kPartial)).write(mainloop.o, l_i, mainloop.m_i);
          continue;
        }
        if (flags & kJoinsPartial) SplitKvPartial<C>(p, (int)load_shared(to + work::kPartial)).join(mainloop.o, l_i, mainloop.m_i);
      }
      store_output<C>(p, mainloop.o, l_i, mainloop.m_i, to);
    }
  }
}

}  // namespace sage
