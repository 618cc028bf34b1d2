"""Numbers that the emulation, the Triton kernels and the CUDA kernels share."""

HEAD_DIMS = (64, 128, 256)  # the compiled head dimensions; a real one is zero-padded to the next of these inside the kernels
INT8_MAX = 127
LOG2E = 1.4426950408889634

# No score leaves ±2^21 (base-2 units), where softmax has long been one-hot. The kernels fold the integer preset 12582912 into
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
# A "fragment" K scale covers the keys that one thread of an m16n8 accumulator holds of this many: 16, namely 2t and 2t + 1 of every
# eight, t = lane mod 4. So a thread has one K scale a tile and takes its row maxima over integers. .0109 on normal inputs; two scales
# a tile (8 keys each) give .0104 for twice the products.
FRAGMENT_KEYS = 64
# K is shifted by the mean of about this many evenly strided tokens; any constant shift leaves the softmax as it is. Each block of the
# quantiser reads them: 128 cost .4 % of accuracy where all that K has in common is noise.
K_MEAN_TOKENS = 128


def k_mean_stride(len_kv: int) -> int:
    """Tokens 0, s, 2·s, … of K are averaged into its k_mean; this is s."""
    return max(1, -(-len_kv // K_MEAN_TOKENS))


def pad_head_dim(head_dim: int) -> int:
    """The compiled head dimension that holds `head_dim` (1 to 256)."""
    return next(d for d in HEAD_DIMS if head_dim <= d)
