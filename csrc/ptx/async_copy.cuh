// Moves between global memory, shared memory and registers.
#pragma once
#include "types.cuh"

namespace sage {

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes, global → shared, both 16-byte aligned. Asynchronous from sm_80 on; before that it has landed when it returns,
// so the waits below have nothing to do.
__device__ __forceinline__ void cp_async16(u32 shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16;" ::"r"(shared), "l"(global) : "memory");
#else
  const uint4 v = *reinterpret_cast<const uint4*>(global);
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// From Hopper on one thread fetches a whole tile (cp.async.bulk), and an mbarrier in shared memory says when it has landed.
#if __CUDA_ARCH__ >= 900
constexpr bool kBulkCopy = true;
#else
constexpr bool kBulkCopy = false;
#endif

// A phase ends after `arrivals`. Whoever initialises it makes that visible to the block afterwards.
__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1; fence.mbarrier_init.release.cluster;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}

// The next two act in the threads whose predicate is set, without a branch: a warp that might have diverged costs the
// compiler its uniform registers.
__device__ __forceinline__ void mbarrier_arrive(bool predicate, u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{.reg .pred p; setp.ne.u32 p,%0,0; @p mbarrier.arrive.shared::cta.b64 _,[%1];}" ::"r"((u32)predicate), "r"(barrier)
               : "memory");
#endif
}

// Arrives, and adds the bytes of the copy to what the phase waits for. Addresses and size are multiples of 16.
__device__ __forceinline__ void cp_async_bulk(bool predicate, u32 shared, const void* global, u32 bytes, u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p,%0,0; @p mbarrier.arrive.expect_tx.shared::cta.b64 _,[%4],%3;"
      "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%1],[%2],%3,[%4];}" ::"r"((u32)predicate),
      "r"(shared), "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// Arrives as soon as this thread's asynchronous copies have landed: at once, if there are none.
__device__ __forceinline__ void cp_async_mbarrier_arrive(u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// A word by which one block tells another that what it has written before is there.
__device__ __forceinline__ void store_release(i32* to, i32 x) { asm volatile("st.release.gpu.s32 [%0],%1;" ::"l"(to), "r"(x) : "memory"); }

__device__ __forceinline__ i32 load_acquire(const i32* from) {
  i32 x;
  asm volatile("ld.acquire.gpu.s32 %0,[%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done,[%0],%1; @!done bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

__device__ __forceinline__ uint4 load_shared16(u32 shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared));
  return v;
}

__device__ __forceinline__ uint2 load_shared8(u32 shared) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared));
  return v;
}

__device__ __forceinline__ void store_shared16(u32 shared, const u32 (&v)[4]) {
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(shared), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

__device__ __forceinline__ void store_shared8(u32 shared, u32 x, u32 y) {
  asm volatile("st.shared.v2.u32 [%0],{%1,%2};" ::"r"(shared), "r"(x), "r"(y) : "memory");
}

__device__ __forceinline__ u32 load_shared(u32 shared) {
  u32 x;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(x) : "r"(shared));
  return x;
}

__device__ __forceinline__ float load_shared_float(u32 shared) {
  float x;
  asm volatile("ld.shared.f32 %0,[%1];" : "=f"(x) : "r"(shared));
  return x;
}

__device__ __forceinline__ float2 load_shared_float2(u32 shared) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0,%1},[%2];" : "=f"(x.x), "=f"(x.y) : "r"(shared) : "memory");
  return x;
}

__device__ __forceinline__ void store_shared_float(u32 shared, float x) {
  asm volatile("st.shared.f32 [%0],%1;" ::"r"(shared), "f"(x) : "memory");
}

// Four 8×8 matrices of 16-bit elements, each transposed: lane 4·g + t gets rows 2t, 2t+1 of column g. Lanes 8i … 8i+7 give
// the row addresses of matrix i.
__device__ __forceinline__ uint4 ldmatrix_x4_trans(u32 shared) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}

// Whether a launch may begin before the one ahead of it has ended.
#if __CUDA_ARCH__ >= 900
constexpr bool kProgrammaticLaunch = true;
#else
constexpr bool kProgrammaticLaunch = false;
#endif

// Programmatic dependent launch: wait for the launches before this one; let the one behind it start. Both do nothing
// where the launch did not ask for it.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace sage
