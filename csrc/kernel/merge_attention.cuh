// Two parts of one attention, over different keys, become one.
#pragma once
#include "../common/math.cuh"
#include "../common/tensor.cuh"
#include "../ptx/convert.cuh"

namespace sage {

constexpr int kMergeThreads = 256;

struct MergeParams {
  void* out;  // [B, H, N, D] by strides: one part's, and then the whole
  i64 out_stride_b, out_stride_h, out_stride_n;
  const void* other;  // the other part's
  i64 other_stride_b, other_stride_h, other_stride_n;
  float* lse;  // [B, H, N] contiguous, natural log: of `out`, before and after
  const float* other_lse;
  i32 heads, len, head_dim, rows;  // rows: B * H * N
  i32 row_lanes;                   // threads of a row, eight channels each: 8, 16 or 32
  i32 dtype, vectorized;
};

// out · e^lse + other · e^other_lse, over e^lse + e^other_lse.
__device__ __forceinline__ void merge(const MergeParams& p) {
  const i64 thread = (i64)blockIdx.x * kMergeThreads + threadIdx.x;
  const int lane = (int)thread & (p.row_lanes - 1);
  const i64 row = thread / p.row_lanes;
  const bool valid = row < p.rows;
  const float own = valid ? p.lse[row] : 0.0f, theirs = valid ? p.other_lse[row] : 0.0f;
  __syncwarp();  // all lanes of the row have read its LSE
  if (!valid || theirs == -kInf) return;
  const float top = fmaxf(own, theirs);
  const float a = exp2_approx((own - top) * kLog2e), b = exp2_approx((theirs - top) * kLog2e), whole = rcp_approx(a + b);
  if (lane == 0) p.lse[row] = fmaf(log2_approx(a + b), kLn2, top);
  const i64 bh = row / p.len, n = row - bh * p.len, batch = bh / p.heads, head = bh - batch * p.heads;
  with_access(p.dtype, p.vectorized, [&](auto type, auto vectors) {
    constexpr int kDtype = decltype(type)::value;
    constexpr bool kVectors = decltype(vectors)::value;
    u8* to = static_cast<u8*>(p.out) + (batch * p.out_stride_b + head * p.out_stride_h + n * p.out_stride_n) * kElementBytes<kDtype>;
    const u8* from = static_cast<const u8*>(p.other) +
                     (batch * p.other_stride_b + head * p.other_stride_h + n * p.other_stride_n) * kElementBytes<kDtype>;
    float x[kChunk], y[kChunk];
    unpack8<kDtype>(load8<kDtype, kVectors>(to, kChunk * lane, p.head_dim), x);
    unpack8<kDtype>(load8<kDtype, kVectors>(from, kChunk * lane, p.head_dim), y);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = (a > 0.0f ? x[i] * (a * whole) : 0.0f) + y[i] * (b * whole);
    store8<kDtype, kVectors>(to, kChunk * lane, p.head_dim, x);
  });
}

}  // namespace sage
