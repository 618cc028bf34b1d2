// Hopper's asynchronous tensor-core products (PTX ISA, "Asynchronous warpgroup level matrix instructions"). A warpgroup is four
// consecutive warps, whose threads all execute these together.
//
// Accumulator d[64, N]: warp w holds rows 16w … 16w+15; of columns 8i … 8i+7, lane 4·g + t holds columns 2t and 2t+1 of row g as d[4i],
// d[4i+1] and of row g+8 as d[4i+2], d[4i+3].
#pragma once
#include "types.cuh"

namespace sage {

// Descriptor of an operand in shared memory without swizzle: core matrices of 8 rows × 16 bytes, 128 contiguous bytes each. kNextK:
// bytes to the next core matrix along k; the next eight rows follow 128 bytes on. Adding (bytes >> 4) moves the descriptor.
template <int kNextK>
__device__ __forceinline__ u64 wgmma_descriptor(u32 shared) {
  return (u64)(shared >> 4 & 0x3FFF) | (u64)(kNextK >> 4) << 16 | (u64)(128 >> 4) << 32;
}

// Orders register accesses before the next wgmma: needed before the first one and after any write to accumulators or A fragments.
__device__ __forceinline__ void wgmma_fence() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most kPending committed groups are pending.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from moving accesses of these registers past this point: it does not know that a pending wgmma uses them.
template <int kCount>
__device__ __forceinline__ void warpgroup_fence_operand(i32 (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void warpgroup_fence_operand(u32 (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void warpgroup_fence_operand(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Registers first … first + kCount − 1 of an array: some of an accumulator's columns.
template <int kFirst, int kCount, int kAll, class T>
__device__ __forceinline__ T (&registers(T (&d)[kAll]))[kCount] {
  static_assert(kFirst + kCount <= kAll, "within the array");
  return reinterpret_cast<T(&)[kCount]>(d[kFirst]);
}

// Makes ordinary stores to shared memory visible to wgmma and to bulk copies.
__device__ __forceinline__ void fence_async_proxy() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The warpgroup releases registers to the multiprocessor, or acquires them: kCount a thread from here on.
template <int kCount>
__device__ __forceinline__ void setmaxnreg_dec() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

template <int kCount>
__device__ __forceinline__ void setmaxnreg_inc() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// Barrier `id` (1 to 15; 0 is __syncthreads) of kThreads threads.
template <int kThreads>
__device__ __forceinline__ void named_barrier(int id) {
  asm volatile("bar.sync %0,%1;" ::"r"(id), "n"(kThreads) : "memory");
}

// Arrives at it, if the predicate is set, which is the same for a warp's lanes, and does not wait. As mbarrier_arrive, it does not branch.
template <int kThreads>
__device__ __forceinline__ void named_barrier_arrive(bool predicate, int id) {
  asm volatile("{.reg .pred p; setp.ne.u32 p,%0,0; @p bar.arrive %1,%2;}" ::"r"((u32)predicate), "r"(id), "n"(kThreads) : "memory");
}

// An instruction names up to 68 accumulator registers one by one. W_n: the text "%0,…" of n of them; W_OUT_n: their operands.
#define W_4 "%0,%1,%2,%3"
#define W_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define W_16 W_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define W_24 W_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define W_32 W_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define W_36 W_32 ",%32,%33,%34,%35"
#define W_48 W_36 ",%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define W_64 W_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define W_68 W_64 ",%64,%65,%66,%67"
#define W_FOUR(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define W_SIXTEEN(c, i) W_FOUR(c, i), W_FOUR(c, i + 4), W_FOUR(c, i + 8), W_FOUR(c, i + 12)
#define W_OUT_4(c) W_FOUR(c, 0)
#define W_OUT_32(c) W_SIXTEEN(c, 0), W_SIXTEEN(c, 16)
#define W_OUT_36(c) W_OUT_32(c), W_FOUR(c, 32)
#define W_OUT_48(c) W_OUT_32(c), W_SIXTEEN(c, 32)
#define W_OUT_64(c) W_OUT_48(c), W_SIXTEEN(c, 48)
#define W_OUT_68(c) W_OUT_64(c), W_FOUR(c, 64)

// d[64, N] (+)= A · B, both in shared memory. regs = N / 2; x, y, z are the three operand numbers after the accumulators.
#define WGMMA_SHARED(shape, types, bind, regs, x, y, z)                                                                               \
  asm volatile("{.reg .pred p; setp.ne.b32 p,%" #z ",0; wgmma.mma_async.sync.aligned." shape "." types " {" W_##regs "},%" #x ",%" #y \
                                                                                                                     ",p;}"           \
               : W_OUT_##regs(bind)                                                                                                   \
               : "l"(a), "l"(b), "r"((int)add))

// The same with A in registers: each warp's 16 rows as the A fragment of mma.m16n8k16 (m16n8k32 for bytes).
#define WGMMA_REGISTERS(shape, types, bind, regs, x0, x1, x2, x3, y, z, flags)                                       \
  asm volatile("{.reg .pred p; setp.ne.b32 p,%" #z ",0; wgmma.mma_async.sync.aligned." shape "." types " {" W_##regs \
               "},{%" #x0 ",%" #x1 ",%" #x2 ",%" #x3 "},%" #y ",p" flags ";}"                                        \
               : W_OUT_##regs(bind)                                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add))

// d[64, 2·kRegisters] = A[64, 32] · B[2·kRegisters, 32]ᵀ (+ d if add), int8 → int32.
template <int kRegisters>
__device__ __forceinline__ void wgmma_s8(i32 (&d)[kRegisters], u64 a, u64 b, bool add) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  static_assert(kRegisters == 32 || kRegisters == 48 || kRegisters == 64, "only these shapes are defined here");
  if constexpr (kRegisters == 32)
    WGMMA_SHARED("m64n64k32", "s32.s8.s8", "+r", 32, 32, 33, 34);
  else if constexpr (kRegisters == 48)
    WGMMA_SHARED("m64n96k32", "s32.s8.s8", "+r", 48, 48, 49, 50);
  else
    WGMMA_SHARED("m64n128k32", "s32.s8.s8", "+r", 64, 64, 65, 66);
#endif
}

// The same with A in registers.
template <int kRegisters>
__device__ __forceinline__ void wgmma_s8(i32 (&d)[kRegisters], const u32* a, u64 b, bool add) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  static_assert(kRegisters == 32 || kRegisters == 48, "only these shapes are defined here");
  if constexpr (kRegisters == 32)
    WGMMA_REGISTERS("m64n64k32", "s32.s8.s8", "+r", 32, 32, 33, 34, 35, 36, 37, "");
  else
    WGMMA_REGISTERS("m64n96k32", "s32.s8.s8", "+r", 48, 48, 49, 50, 51, 52, 53, "");
#endif
}

// d[64, 2·kRegisters] = A[64, 16] · B[2·kRegisters, 16]ᵀ (+ d if add), fp16 → fp32.
template <int kRegisters>
__device__ __forceinline__ void wgmma_f16(float (&d)[kRegisters], const u32* a, u64 b, bool add) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  static_assert(kRegisters == 36 || kRegisters == 64 || kRegisters == 68, "only these shapes are defined here");
  if constexpr (kRegisters == 36)
    WGMMA_REGISTERS("m64n72k16", "f32.f16.f16", "+f", 36, 36, 37, 38, 39, 40, 41, ",1,1,0");
  else if constexpr (kRegisters == 64)
    WGMMA_REGISTERS("m64n128k16", "f32.f16.f16", "+f", 64, 64, 65, 66, 67, 68, 69, ",1,1,0");
  else
    WGMMA_REGISTERS("m64n136k16", "f32.f16.f16", "+f", 68, 68, 69, 70, 71, 72, 73, ",1,1,0");
#endif
}

// d[64, 2·kRegisters] = A[64, 32] · B[2·kRegisters, 32]ᵀ (+ d if add), e4m3 → fp32 of about 14 bits.
template <int kRegisters>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[kRegisters], const u32* a, u64 b, bool add) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  static_assert(kRegisters == 36 || kRegisters == 68, "only these shapes are defined here");
  if constexpr (kRegisters == 36)
    WGMMA_REGISTERS("m64n72k32", "f32.e4m3.e4m3", "+f", 36, 36, 37, 38, 39, 40, 41, ",1,1");
  else
    WGMMA_REGISTERS("m64n136k32", "f32.e4m3.e4m3", "+f", 68, 68, 69, 70, 71, 72, 73, ",1,1");
#endif
}

// The same; d has the bits of fp32, so that its registers can be those of another wgmma's integers.
template <int kRegisters>
__device__ __forceinline__ void wgmma_e4m3(i32 (&d)[kRegisters], const u32* a, u64 b, bool add) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  static_assert(kRegisters == 4 || kRegisters == 32, "only these shapes are defined here");
  if constexpr (kRegisters == 4)
    WGMMA_REGISTERS("m64n8k32", "f32.e4m3.e4m3", "+r", 4, 4, 5, 6, 7, 8, 9, ",1,1");
  else
    WGMMA_REGISTERS("m64n64k32", "f32.e4m3.e4m3", "+r", 32, 32, 33, 34, 35, 36, 37, ",1,1");
#endif
}

#undef W_4
#undef W_8
#undef W_16
#undef W_24
#undef W_32
#undef W_36
#undef W_48
#undef W_64
#undef W_68
#undef W_FOUR
#undef W_SIXTEEN
#undef W_OUT_4
#undef W_OUT_32
#undef W_OUT_36
#undef W_OUT_48
#undef W_OUT_64
#undef W_OUT_68
#undef WGMMA_SHARED
#undef WGMMA_REGISTERS

}  // namespace sage
