"""Numbers that the emulation, the Triton kernels and the CUDA kernels share: each is written here, and only here.

The build turns `CPP` and `CPP_ENUMS` into the header `sage/constants.cuh`, which the sources in csrc/ include.
"""

import math

HEAD_DIMS = (64, 128, 256)  # the compiled head dimensions; a real one is zero-padded to the next of these inside the kernels
INT8_MAX = 127
BITS = {"fp16": 16, "fp8": 8, "int8": 8}  # of one element, by the types that schemes name
QK_MAX = {"int8": INT8_MAX}  # the largest quantised magnitude of Q and K, by their type
E4M3_MAX = 448.0
LOG2E = 1.4426950408889634
LN2 = math.log(2.0)
# 1.5 · 2²³: adding it leaves an integer |x| < 2²² in the low bits of the mantissa, rounded to nearest even; so does an INT8 product's
# accumulator that starts at its bits.
PRESET = 12582912.0

# No score leaves ±2^21 (base-2 units), where softmax has long been one-hot. The kernels fold `PRESET` into
# fma(s, scale, −max); its rounding, .75 of the scale, then lifts P above p_max by less than a factor of two.
SCORE_LIMIT = float(2**21)
# Where an intermediate number is cut off instead of overflowing.
FINITE_MAX = 1e38
# An additive mask stays finite: finfo.min · log2(e) would be −inf, which means "masked out" instead of "very unlikely".
MASK_LIMIT = FINITE_MAX
# Anything this small is quantised as zero, so that 127 / amax stays finite.
AMAX_MIN = 2.0**-100
# Stored K scales are smaller and row scales larger by this: (q8 · k8) · k_scale is then finite for any K (|q8 · k8| < 2^22).
K_SCALE_SHIFT = 2.0**-16
# A head's largest K scale counts as at least this where a row scale's bound is divided by it: it is 0 where all keys are alike. About
# 2^-120, below every K scale but 0 (AMAX_MIN / (2 · 127 · D)).
K_SCALE_FLOOR = 7.5e-37
# Keys of a tile of the mma.sync kernels, and of Hopper's by type of P and V, up to head_dim 128 and at 256.
KV_TILE = 64
KV_TILE_SM90 = {"fp16": 96, "fp8": 128}
KV_TILE_SM90_WIDE = {"fp16": 64, "fp8": 128}
# Keys of a block of block-sparse attention.
KV_BLOCK = 64
TINY_SPREAD = 1e-6  # under the root of the spread by which "sol" draws its line
# A "fragment" K scale covers the keys that one thread of an m16n8 accumulator holds of this many: 16, namely 2t and 2t + 1 of every
# eight, t = lane mod 4. So a thread has one K scale a tile and takes its row maxima over integers. .0109 on normal inputs; two scales
# a tile (8 keys each) give .0104 for twice the products.
FRAGMENT_KEYS = KV_TILE
# Hopper's FP8 kernel takes a straight line for the exponential of half the weights: it is too high by this, in base 2, on average.
LINE_EXCESS = 15 / 256
# There a row whose scores all begin a promotion group more than this (base 2) below its maximum has P of that group raised by
# 2^TAIL_BOOST_LOG2: a flat tail would underflow e4m3 on the line.
TAIL_THRESHOLD, TAIL_BOOST_LOG2 = 3.0, 4.0
# K is shifted by the mean of about this many evenly strided tokens; any constant shift leaves the softmax as it is. Each block of the
# quantiser reads them: 128 cost .4 % of accuracy where all that K has in common is noise.
K_MEAN_TOKENS = 128
# A key that has more than this, in nats, under the largest bias of every row takes no part in the statistics of K and V.
NEGLIGIBLE_BIAS = 1000.0
# Queries whose tile lists are written together: a block of queries reads as many of these bands as it holds.
BAND_ROWS = 32
# Words of a band's plane at most: shared memory holds both planes while a mask is classified.
MAX_WORDS = 1024
# Words of live keys, a bit each, that a CTA of a quantiser holds; its keys begin anywhere in the first one.
LIVE_WORDS = 512
MOST_LIVE_KEYS = 32 * (LIVE_WORDS - 1)


# Relative L2 errors, output rounding included, that variants may have where logits have a standard deviation of six nats, as models' do, by
# the type of P and V.
ERROR_BOUNDS = {"fp16": 0.030, "fp8": 0.044, "int8": 0.032}

DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2}  # as the kernels' parameters number them
MASK_KINDS = DTYPES | {"bool": 3}
# And an additive mask of one row for all queries as the pre-pass leaves it: fp32 in base 2, whole tiles of keys.
BIAS_ROW = len(MASK_KINDS)
SELECTIONS = {"sol": 0, "topk": 1, "mass": 2, "cdf": 3, "static": 4}  # of the exact blocks, see `block_selection`

CPP: dict[str, int | float] = {
    "kInt8Max": INT8_MAX, "kE4m3Max": E4M3_MAX, "kLog2E4m3Max": math.log2(E4M3_MAX), "kLog2e": LOG2E, "kLn2": LN2, "kPreset": PRESET,
    "kFiniteMax": FINITE_MAX, "kAmaxMin": AMAX_MIN, "kKScaleFloor": K_SCALE_FLOOR, "kKvTile": KV_TILE,
    "kMaxKMeanTokens": K_MEAN_TOKENS, "kNegligibleBias": NEGLIGIBLE_BIAS, "kBandRows": BAND_ROWS, "kMaxWords": MAX_WORDS,
    "kLiveWords": LIVE_WORDS, "kKvBlock": KV_BLOCK, "kTinySpread": TINY_SPREAD,
    "kLineExcess": LINE_EXCESS, "kTailThreshold": TAIL_THRESHOLD, "kTailBoostLog2": TAIL_BOOST_LOG2,
}  # fmt: skip
CPP_ENUMS: dict[str, dict[str, int]] = {
    "Dtype": {f"k{name.capitalize()}": number for name, number in DTYPES.items()},
    "MaskKind": dict(zip(("kMaskF16", "kMaskBf16", "kMaskF32", "kMaskBool", "kMaskBiasRow"), (*MASK_KINDS.values(), BIAS_ROW))),
    "Selection": {f"k{name.capitalize()}": number for name, number in SELECTIONS.items()},
}


def k_mean_stride(len_kv: int) -> int:
    """Tokens 0, s, 2·s, … of K are averaged into its k_mean; this is s."""
    return max(1, -(-len_kv // K_MEAN_TOKENS))


def pad_head_dim(head_dim: int) -> int:
    """The compiled head dimension that holds `head_dim` (1 to 256)."""
    return next(d for d in HEAD_DIMS if head_dim <= d)
