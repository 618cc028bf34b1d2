"""Pieces the Triton kernels share: the rotation, the INT8 rounding, masks. Each works on a tile in registers."""

import os

import triton
import triton.language as tl

from ...numerics import constants

INT8_MAX = tl.constexpr(float(constants.INT8_MAX))
AMAX_MIN = tl.constexpr(constants.AMAX_MIN)
LOG2E = tl.constexpr(constants.LOG2E)
K_SCALE_SHIFT = tl.constexpr(constants.K_SCALE_SHIFT)
MASK_LIMIT = tl.constexpr(constants.MASK_LIMIT)
FINITE_MAX = tl.constexpr(constants.FINITE_MAX)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # whose bf16 products are wrong, so it multiplies in fp32
ROUND = tl.constexpr(constants.PRESET)  # adding and taking it away rounds |x| < 2²² to the nearest integer, ties to even


@triton.jit
def _parity(x):
    """1 where the number of set bits of x (0 to 255) is odd."""
    x = x ^ (x >> 4)
    x = x ^ (x >> 2)
    return (x ^ (x >> 1)) & 1


@triton.jit
def _top_bits(x):
    """The part of fp32 x that TF32 holds, cut off rather than rounded: rounding could overflow."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _across(x, M: tl.constexpr, CHUNKS: tl.constexpr, SPAN: tl.constexpr):
    """One butterfly between chunks of 64 channels that lie SPAN chunks apart; x is [M, CHUNKS · 64]."""
    x = x.reshape(M, CHUNKS // (2 * SPAN), 2, SPAN * 64).permute(0, 1, 3, 2)
    low, high = x.split()
    return tl.join(low + high, low - high).permute(0, 1, 3, 2).reshape(M, CHUNKS * 64)


@triton.jit
def rotate(x, M: tl.constexpr, D: tl.constexpr):
    """[M, D] in fp16, bf16 or fp32, times `hadamard.matrix(D)`: [M, D] fp32.

    A Hadamard matrix of D is one of 64 in each chunk of channels, then butterflies between the chunks. The 64 × 64 part is an MMA:
    its entries are powers of two, so 16-bit inputs are exact; fp32 is split into two TF32 terms (22 bits).
    """
    channel, row = tl.arange(0, D), tl.arange(0, 64)
    pairs = (channel & (channel >> 3) & 7) ^ (channel & (channel >> 1) & 64)  # hadamard.sign_bits
    sign = 1.0 - 2.0 * _parity(pairs).to(tl.float32)
    matrix = (1.0 - 2.0 * _parity(row[:, None] & row[None, :]).to(tl.float32)) * (0.5 / D)
    if x.dtype == tl.float32 or INTERPRETED:
        y = (x.to(tl.float32) * sign[None, :]).reshape(M * D // 64, 64)
        top = _top_bits(y)
        y = tl.dot(top, matrix, acc=tl.dot(y - top, matrix, input_precision="tf32"), input_precision="tf32")
    else:
        y = tl.dot((x * sign.to(x.dtype)[None, :]).reshape(M * D // 64, 64), matrix.to(x.dtype))
    y = y.reshape(M, D)
    if D >= 128:
        y = _across(y, M, D // 64, 1)
    if D >= 256:
        y = _across(y, M, D // 64, 2)
    return y


@triton.jit
def round_rows(x, amax):
    """[M, D] fp32 with its row maxima [M] to (INT8 [M, D], fp32 scales [M])."""
    inverse = tl.where(amax > AMAX_MIN, INT8_MAX / tl.maximum(amax, AMAX_MIN), 0.0)
    x8 = ((x * inverse[:, None] + ROUND) - ROUND).to(tl.int8)
    return x8, amax * (1.0 / INT8_MAX)


@triton.jit
def mask_scores(s, mask_ptrs, in_range, ADDITIVE: tl.constexpr):
    """Apply a tile of a dense mask to base-2 scores. A finite bias stays finite; only −inf masks out."""
    if ADDITIVE:
        bias = tl.load(mask_ptrs, mask=in_range, other=0.0).to(tl.float32)
        finite = tl.minimum(tl.maximum(bias * LOG2E, -MASK_LIMIT), MASK_LIMIT)
        return s + tl.where(bias == float("-inf"), bias, finite)
    else:
        keep = tl.load(mask_ptrs, mask=in_range, other=0)
        return tl.where(keep != 0, s, float("-inf"))


@triton.jit
def k_mean_score(x, unit, k_mean, factor):
    """sm_scale · (q · k_mean), [M], by which the k_mean moved every score. Operands are normalised before the product.

    x [M, D] is the rotated, signed q and unit [M] its amax / 127; k_mean [D] is rotated.
    """
    largest = tl.maximum(tl.max(tl.abs(k_mean), 0), AMAX_MIN)
    normal = x * tl.where(unit > AMAX_MIN, 1.0 / tl.maximum(unit, AMAX_MIN), 0.0)[:, None]
    score = tl.sum(normal * (k_mean / largest)[None, :], 1) * tl.minimum(unit * factor, FINITE_MAX)
    score = tl.minimum(tl.maximum(score, -FINITE_MAX), FINITE_MAX) * largest
    return tl.minimum(tl.maximum(score, -FINITE_MAX), FINITE_MAX)
