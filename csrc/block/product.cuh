// A CTA's matrix product as good as in fp32, of operands in shared memory: C[kRows, kColumns] += A[kRows, kDepth] · B[kDepth, kColumns] a
// step, by eight warps.
//
// Where there are tensor cores for tf32, which has 11 bits of a number, each number is the sum of two: high · high + high · low + low ·
// high leaves out 2^-21 of a product. Elsewhere it is FMAs.
#pragma once
#include "../ptx/mma.cuh"
#include "../ptx/types.cuh"

namespace sage {

constexpr int kProductThreads = 256;

// Both have:
//   row_of_a(k), row_of_b(k): where row k of transposed A, and of B, begins in memory, in numbers;
//   first_column(): of the warp or thread, which has no columns before it;
//   each(body): body(row, column, x) for all of the thread's sums, x[0 … kRun − 1] being those from `column` on.
template <int kRows, int kColumns, int kDepth, bool kTensor = kMma16>
struct Product {
  static constexpr int kRun = 2, kRowTiles = kRows / 32, kColumnTiles = 4;  // of a warp; a CTA has 2 × 4 warps
  static_assert(kRows % 32 == 0 && kColumns == 128 && kDepth % 8 == 0, "whole MMAs");
  float sum[kRowTiles][kColumnTiles][4] = {};

  // Four lanes that store rows k, k + 4, k + 8, k + 12, or load an operand's k, k + 1, k + 2, k + 3, meet banks that are eight apart.
  static constexpr int row_of_a(int k) { return k * (kRows + 8) + k / 4 * 8; }
  static constexpr int row_of_b(int k) { return k * (kColumns + 8) + k / 4 * 8; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 128 * 16 * kRowTiles; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 32 % 4 * 8 * kColumnTiles; }

  // `count` operand registers: the leading 11 bits of each number, and what is left of it.
  template <int kCount>
  struct Split {
    u32 part[2][kCount];

    __device__ __forceinline__ void set(int i, float x) {
      part[0][i] = __float_as_uint(x) & 0xFFFFE000u;
      part[1][i] = __float_as_uint(x - __uint_as_float(part[0][i]));
    }
  };

  __device__ __forceinline__ void multiply(const float* rows, const float* columns) {
    const int t = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
    rows += row_of_a(t) + first_row() + g, columns += row_of_b(t) + first_column() + g;
#pragma unroll
    for (int k0 = 0; k0 < kDepth; k0 += 8) {
      Split<4> a[kRowTiles];
      Split<2> b[kColumnTiles];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) a[m].set(i, rows[row_of_a(k0 + i / 2 * 4) + 16 * m + i % 2 * 8]);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) b[n].set(i, columns[row_of_b(k0 + i * 4) + 8 * n]);
#pragma unroll
      for (int part = 2; part >= 0; --part)  // the small ones first; all tiles between two products of one tile
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n) mma_tf32(sum[m][n], a[m].part[part % 2], b[n].part[part / 2][0], b[n].part[part / 2][1]);
    }
  }

  template <class Body>
  __device__ __forceinline__ void each(Body body) {
    const int t = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
          body(first_row() + 16 * m + 8 * half + g, first_column() + 8 * n + 2 * t, sum[m][n] + 2 * half);
  }
};

template <int kRows, int kColumns, int kDepth>
struct Product<kRows, kColumns, kDepth, false> {
  static constexpr int kRun = 4, kThreadRows = kRows / 16;  // a thread has two runs of columns; a warp 4 × 8 threads; a CTA 4 × 2 warps
  static_assert(kThreadRows % 2 == 0 && kColumns == 128, "eight columns a thread");
  float sum[kThreadRows][2 * kRun] = {};

  static constexpr int row_of_a(int k) { return k * (kRows + 4); }
  static constexpr int row_of_b(int k) { return k * (kColumns + 4); }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 64 * (4 * kThreadRows) + threadIdx.x % 32 / 8 * kThreadRows; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 32 % 2 * 64 + threadIdx.x % 8 * kRun; }  // and that + 32

  __device__ __forceinline__ void multiply(const float* rows, const float* columns) {
    rows += first_row(), columns += first_column();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float a[kThreadRows], b[2 * kRun];
#pragma unroll
      for (int i = 0; i < kThreadRows; i += 2) {
        const float2 x = *reinterpret_cast<const float2*>(rows + row_of_a(k) + i);
        a[i] = x.x, a[i + 1] = x.y;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 x = *reinterpret_cast<const float4*>(columns + row_of_b(k) + 32 * i);
        b[4 * i] = x.x, b[4 * i + 1] = x.y, b[4 * i + 2] = x.z, b[4 * i + 3] = x.w;
      }
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r)
#pragma unroll
        for (int c = 0; c < 2 * kRun; ++c) sum[r][c] = fmaf(a[r], b[c], sum[r][c]);
    }
  }

  template <class Body>
  __device__ __forceinline__ void each(Body body) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) body(first_row() + r, first_column() + 32 * i, sum[r] + kRun * i);
  }
};

}  // namespace sage
