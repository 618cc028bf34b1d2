// Shared memory by its 32-bit address: loads, stores, and the transposing ldmatrix (PTX ISA, "Data Movement and Conversion Instructions").
#pragma once
#include "types.cuh"

namespace sage {

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// load_sharedN, store_sharedN: N bytes, aligned to N.
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

__device__ __forceinline__ void store_shared(u32 shared, u32 x) { asm volatile("st.shared.u32 [%0],%1;" ::"r"(shared), "r"(x) : "memory"); }

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

// Eight numbers, aligned to 16 bytes.
__device__ __forceinline__ void load_shared8_floats(u32 shared, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const uint4 v = load_shared16(shared + 4 * i);
    x[i] = __uint_as_float(v.x), x[i + 1] = __uint_as_float(v.y), x[i + 2] = __uint_as_float(v.z), x[i + 3] = __uint_as_float(v.w);
  }
}

__device__ __forceinline__ void store_shared_float(u32 shared, float x) {
  asm volatile("st.shared.f32 [%0],%1;" ::"r"(shared), "f"(x) : "memory");
}

// Loads four 8×8 matrices of 16-bit elements, each transposed: lane 4·g + t gets rows 2t, 2t+1 of column g. Lanes 8i … 8i+7 pass
// the row addresses of matrix i.
__device__ __forceinline__ uint4 ldmatrix_x4_trans(u32 shared) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}

// Transposes an 8×8 matrix of 16-bit elements in the warp's registers: lane 4·g + t passes columns 2t, 2t+1 of row g and gets rows 2t, 2t+1
// of column g.
__device__ __forceinline__ u32 movmatrix_trans(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace sage
