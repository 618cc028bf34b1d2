// Asynchronous copies from global to shared memory and the barriers that they complete (PTX ISA, "Asynchronous copy", "mbarrier").
#pragma once
#include "types.cuh"

namespace sage {

// Copies 16 bytes, both addresses 16-byte aligned. Asynchronous from sm_80 on; on sm_75 the copy is complete on return, and commit and
// wait do nothing.
__device__ __forceinline__ void cp_async16(u32 shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16;" ::"r"(shared), "l"(global) : "memory");
#else
  const uint4 v = *reinterpret_cast<const uint4*>(global);
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}

// The same from sm_80 on, or 16 zeros, for which nothing is read.
__device__ __forceinline__ void cp_async16_or_zeros(u32 shared, const void* global, bool copies) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16,%2;" ::"r"(shared), "l"(global), "r"(copies ? 16 : 0) : "memory");
}

// Fetches the line of 128 bytes that holds this address into L2, for later loads of any thread; none waits for it.
__device__ __forceinline__ void prefetch_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's committed groups are pending.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// From Hopper on one thread copies a whole tile (cp.async.bulk) and an mbarrier in shared memory tells when it has arrived.
#if __CUDA_ARCH__ >= 900
constexpr bool kBulkCopy = true;
#else
constexpr bool kBulkCopy = false;
#endif

// A phase completes after `arrivals`. The caller then makes the barrier visible to the CTA (__syncthreads).
__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1; fence.mbarrier_init.release.cluster;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}

// mbarrier_arrive and cp_async_bulk act in threads whose predicate is set. They do not branch: after a branch that may diverge the
// compiler uses no uniform registers.
__device__ __forceinline__ void mbarrier_arrive(bool predicate, u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{.reg .pred p; setp.ne.u32 p,%0,0; @p mbarrier.arrive.shared::cta.b64 _,[%1];}" ::"r"((u32)predicate), "r"(barrier)
               : "memory");
#endif
}

// Arrives, adds the copy's bytes to those that the phase expects, and starts the copy. Addresses and size are multiples of 16.
__device__ __forceinline__ void cp_async_bulk(bool predicate, u32 shared, const void* global, u32 bytes, u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p,%0,0; @p mbarrier.arrive.expect_tx.shared::cta.b64 _,[%4],%3;"
      "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%1],[%2],%3,[%4];}" ::"r"((u32)predicate),
      "r"(shared), "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// Fetches bytes into L2, for later loads of any thread on the device: none waits for it. Address and size are multiples of 16.
__device__ __forceinline__ void prefetch_l2(const void* global, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0],%1;" ::"l"(global), "r"(bytes));
#endif
}

// Arrives once this thread's cp_async16 copies are complete: at once if there are none.
__device__ __forceinline__ void cp_async_mbarrier_arrive(u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// Waits for the phase of this parity to complete. For the phase before the first (parity 1) it returns at once.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done,[%0],%1; @!done bra again;}" ::"r"(barrier),
               "r"(parity)
               : "memory");
#endif
}

}  // namespace sage
