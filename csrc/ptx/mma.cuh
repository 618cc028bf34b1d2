// Tensor-core products, one instruction each (PTX ISA, "Matrix multiply-accumulate operation using mma instruction").
// Lane = 4·g + t. A: rows g and g+8; B: column g; C: rows g and g+8, columns 2t and 2t+1.
#pragma once
#include "types.cuh"

namespace sage {

// D[16,8] = A[16,32] · B[32,8] + C, int8 → int32. A register holds four consecutive k of one row (column for B).
__device__ __forceinline__ void mma_s8(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const u32 (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else  // Turing has the 8×8×16 shape only: two halves of the rows, two halves of k
  const u32 b[2] = {b0, b1};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = 2 * (i & 1);
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1},{%2},{%3},{%4,%5};"
        : "=r"(d[half]), "=r"(d[half + 1])
        : "r"(a[i]), "r"(b[i >> 1]), "r"(i < 2 ? c[half] : d[half]), "r"(i < 2 ? c[half + 1] : d[half + 1]));
  }
#endif
}

// D[16,8] = A[16,32] · B[32,8] + C, A unsigned, B signed int8 → int32.
__device__ __forceinline__ void mma_u8_s8(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const u32 (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
  const u32 b[2] = {b0, b1};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = 2 * (i & 1);
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1},{%2},{%3},{%4,%5};"
        : "=r"(d[half]), "=r"(d[half + 1])
        : "r"(a[i]), "r"(b[i >> 1]), "r"(i < 2 ? c[half] : d[half]), "r"(i < 2 ? c[half + 1] : d[half + 1]));
  }
#endif
}

// C[16,8] += A[16,16] · B[16,8], fp16 → fp32. A register holds two consecutive k.
__device__ __forceinline__ void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const u32 b[2] = {b0, b1};
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}

// Whether m16n8k16 is one instruction, for fp16 and bf16.
#if __CUDA_ARCH__ >= 800
constexpr bool kMma16 = true;
#else
constexpr bool kMma16 = false;
#endif

// C[16,8] += A[16,16] · B[16,8], bf16 → fp32; where kMma16 holds. A register holds two consecutive k.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C[16,8] += A[16,8] · B[8,8], tf32 → fp32; where kMma16 holds. A register holds one k in fp32, whose last 13 bits are ignored.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C[16,8] += A[16,16] · B[16,8], all fp16. C: one register (columns 2t, 2t+1) for row g, one for row g+8.
__device__ __forceinline__ void mma_f16_f16(u32 (&c)[2], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1},{%2,%3,%4,%5},{%6,%7},{%0,%1};"
      : "+r"(c[0]), "+r"(c[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const u32 b[2] = {b0, b1};
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1},{%2,%3},{%4},{%0,%1};"
        : "+r"(c[0]), "+r"(c[1])
        : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}

// C[16,8] += A[16,32] · B[32,8], e4m3 → fp32; from sm_89 on. Ada's and Hopper's tensor cores keep about 14 bits of the sum.
__device__ __forceinline__ void mma_e4m3(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C[16,8] += A[16,32] · B[32,8], e4m3 → fp16; from sm_89 on. C as for mma_f16_f16.
__device__ __forceinline__ void mma_e4m3_f16(u32 (&c)[2], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16 {%0,%1},{%2,%3,%4,%5},{%6,%7},{%0,%1};"
      : "+r"(c[0]), "+r"(c[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace sage
