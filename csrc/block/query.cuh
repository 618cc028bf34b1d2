// Attention prologue: rows of Q → rotated INT8 A fragments and one fp32 score scale a row, in registers.
#pragma once
#include "../common/math.cuh"
#include "rotate.cuh"

namespace sage {

// raw[i][c]: the lane's channels (rotate.cuh) of row row0 + 8i of the head at `head`, i < kRows. Rows beyond the end repeat the last.
// token_of(row): where a row of the sequence lies in memory.
template <int kHeadDim, int kRows, int kDtype, bool kVectors, class TokenOf>
__device__ __forceinline__ void load_raw(const u8* head, TokenOf token_of, i64 stride, int row0, int len, int t, int head_dim,
                                         Raw8<kDtype> (&raw)[kRows][kHeadDim / 32]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c)
      raw[i][c] = load8<kDtype, kVectors>(head + token_of(min(row0 + 8 * i, len - 1)) * stride * kElementBytes<kDtype>, 32 * c + kChunk * t,
                                          head_dim);
}

// x[8c + e]: the lane's channels of a row in fp32.
template <int kHeadDim, int kDtype>
__device__ __forceinline__ void unpack_row(const Raw8<kDtype> (&raw)[kHeadDim / 32], float (&x)[kHeadDim / 4]) {
#pragma unroll
  for (int c = 0; c < kHeadDim / 32; ++c) unpack8<kDtype>(raw[c], x + kChunk * c);
}

// The bound of a score scale that keeps every score within the softmax's range. kKScaleFloor keeps it finite where the largest K scale is 0
// (all keys alike); all scores are 0 then. k_scale_max: the bits of a float.
__device__ __forceinline__ float max_score_scale(float score_limit, i32 k_scale_max) {
  return score_limit / fmaxf(__int_as_float(k_scale_max), kKScaleFloor);
}

// load_raw in fp32: x[r][half] is row row0 + 16r + 8·half.
template <int kHeadDim, int kRowTiles, int kDtype, bool kVectors, class TokenOf>
__device__ __forceinline__ void load_rows(const u8* head, TokenOf token_of, i64 stride, int row0, int len, int t, int head_dim,
                                          float (&x)[kRowTiles][2][kHeadDim / 4]) {
  Raw8<kDtype> raw[2 * kRowTiles][kHeadDim / 32];
  load_raw<kHeadDim, 2 * kRowTiles, kDtype, kVectors>(head, token_of, stride, row0, len, t, head_dim, raw);
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) unpack_row<kHeadDim>(raw[i], x[i / 2][i % 2]);
}

// Rotates and quantises a row x; writes registers `half` and `half` + 2 of the A fragments a[32 channels][4]. Returns the row's score
// scale: base-2 score = (q8 · k8) · scale · k_scale.
template <int kHeadDim>
__device__ __forceinline__ float quantize_row(float (&x)[kHeadDim / 4], int t, float score_scale, float sign, u32 (&a)[kHeadDim / 32][4],
                                              int half) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 4; ++i) x[i] *= 0.5f / kHeadDim;  // before the rotation, so that no sum overflows
  rotate<kHeadDim>(x, t);
  const float amax = row_max(abs_max(x));
  const float inverse = int8_inverse(amax) * sign;
#pragma unroll
  for (int c = 0; c < kHeadDim / 32; ++c) {
    const auto channel = [&](int i) { return x[quantized_register<kHeadDim>(kChunk * c + i)]; };
    a[c][half] = quantize_s8x4(channel(0), channel(1), channel(2), channel(3), inverse);
    a[c][half + 2] = quantize_s8x4(channel(4), channel(5), channel(6), channel(7), inverse);
  }
  return amax * score_scale;
}

// quantize_row for eight rows at once. Lane 4g + t passes its channels of row g; it gets quantized[j] of row 2t + j, the bytes of 16-byte
// chunk g (head_dim 128), of chunks g and g + 8 (256) or of half g / 4 of chunk g % 4 (64), and returns row g's score scale.
template <int kHeadDim, int kDtype>
__device__ __forceinline__ float quantize_rows8(const Raw8<kDtype> (&raw)[kHeadDim / 32], const Rotation<kHeadDim, kDtype>& rotation,
                                                int lane, float score_scale, float sign, u32 (&quantized)[2][kHeadDim / 32]) {
  float y[2][kHeadDim / 8], amax[2];
  rotation(raw, [](int, float (&c)[4]) { c[0] = c[1] = c[2] = c[3] = 0.0f; }, y);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    amax[j] = abs_max(y[j]);
#pragma unroll
    for (int other = 4; other <= 16; other *= 2) amax[j] = fmaxf(amax[j], __shfl_xor_sync(kAllLanes, amax[j], other));
    const float inverse = int8_inverse(amax[j]) * sign;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i)
      quantized[j][i] = quantize_s8x4(y[j][4 * i], y[j][4 * i + 1], y[j][4 * i + 2], y[j][4 * i + 3], inverse);
    amax[j] = __shfl_sync(kAllLanes, amax[j], lane / 8, 32);
  }
  return (lane & 4 ? amax[1] : amax[0]) * score_scale;
}

// k_mean_score divides both vectors by their largest magnitude first, so that no product overflows: 1 / top, or 0 for a zero vector.
__device__ __forceinline__ float unit_inverse(float top) { return top < kAmaxMin ? 0.0f : 1.0f / top; }

// sm_scale · (x · y) of two vectors spread over four lanes. dot: the lane's part of their product, each divided by its largest magnitude.
__device__ __forceinline__ float unit_score(float dot, float x_top, float y_top, float sm_scale) {
  return clamp_finite(clamp_finite(row_sum(dot) * clamp_finite(x_top * sm_scale)) * y_top);
}

// sm_scale · (q · k_mean), in each of the row's four lanes: what subtracting k_mean from K takes from every score of the row, and LSE has
// to get back. x: the row's channels; k_mean [D], zero beyond head_dim.
template <int kHeadDim>
__device__ __forceinline__ float k_mean_score(const float (&x)[kHeadDim / 4], const float* k_mean, int t, float sm_scale) {
  float y[kHeadDim / 4];
#pragma unroll
  for (int i = 0; i < kHeadDim / 4; ++i) y[i] = k_mean[i / kChunk * 32 + kChunk * t + i % kChunk];
  const float x_top = row_max(abs_max(x)), y_top = row_max(abs_max(y));
  const float x_inverse = unit_inverse(x_top), y_inverse = unit_inverse(y_top);
  float dot = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeadDim / 4; ++i) dot = fmaf(x[i] * x_inverse, y[i] * y_inverse, dot);
  return unit_score(dot, x_top, y_top, sm_scale);
}

// The same for a row in memory. Rarely called: it trades time for code size.
template <int kDtype>
__device__ __forceinline__ float k_mean_score(const u8* row, int head_dim, const float* k_mean, int t, float sm_scale) {
  float x[kChunk], y[kChunk], x_top = 0.0f, y_top = 0.0f, dot = 0.0f;
  const auto each_chunk = [&](auto body) {
#pragma unroll 1
    for (int channel = kChunk * t; channel < head_dim; channel += 32) {
      unpack8<kDtype>(load8<kDtype, false>(row, channel, head_dim), x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) y[i] = k_mean[channel + i];
      body();
    }
  };
  each_chunk([&] { x_top = fmaxf(x_top, abs_max(x)), y_top = fmaxf(y_top, abs_max(y)); });
  x_top = row_max(x_top), y_top = row_max(y_top);
  const float x_inverse = unit_inverse(x_top), y_inverse = unit_inverse(y_top);
  each_chunk([&] {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) dot = fmaf(x[i] * x_inverse, y[i] * y_inverse, dot);
  });
  return unit_score(dot, x_top, y_top, sm_scale);
}

}  // namespace sage
