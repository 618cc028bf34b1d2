// csrc/ptx/types.cuh for the host.
#pragma once
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;
