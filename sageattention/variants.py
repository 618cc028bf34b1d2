"""The one table: every variant, its numerics, its tiles and where it runs.

The planner, the reference, the kernels' launch code, the build script and the tests all read it; no tile, scale layout or
symbol is written down anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .images import Image

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
# A "fragment" K scale covers the keys that one thread of an m16n8 accumulator holds of this many: 8, namely 2t and 2t + 1 of every
# eight, t = lane mod 4. 16 keys of 64 would do the same with half the scales and .0108 instead of .0104 on normal inputs.
FRAGMENT_KEYS = 32
# K is shifted by the mean of about this many evenly strided tokens; any constant shift leaves the softmax as it is.
ANCHOR_TOKENS = 512


def anchor_stride(len_kv: int) -> int:
    """Tokens 0, s, 2·s, … of K are averaged into its anchor; this is s."""
    return max(1, -(-len_kv // ANCHOR_TOKENS))


def pad_head_dim(head_dim: int) -> int:
    """The compiled head dimension that holds `head_dim` (1 to 256)."""
    return next(d for d in HEAD_DIMS if head_dim <= d)


@dataclass(frozen=True)
class Scheme:
    """How a variant rounds: everything that its emulation needs to give the kernel's numbers.

    Scores are S = (q8 · k8) · q_scale · k_scale, with one q_scale per row. P is 2^(S − m) · p_max and V is scaled per channel so
    that its largest magnitude becomes v_max.
    """

    pv: str  # the type of P and V: "fp16", "fp8" (e4m3), "int8" (P unsigned)
    rotate: bool  # Q and K multiplied by one signed Hadamard matrix
    k_scale: str  # keys that share a scale: "token" (one), "fragment" (those one thread holds of 64), "tile" (all of a KV tile)
    p_max: float  # P of the row maximum
    v_max: float
    v_mean: bool = False  # V's per-channel mean is taken out and added back
    p_tile_max: bool = False  # P is taken against the tile's own row maximum, not the running one
    exact_sum: bool = False  # the softmax denominator sums P before it is rounded
    accumulate: str = "fp32"  # the MMA accumulator of P·V: "fp32", "fp16", "int32" (exact), "fp8" (an FP8 MMA's ~14 bits)
    promote: int = 0  # keys after which the accumulator is added to fp32 registers; 0: after every KV tile
    kv_tile: int = 64  # keys per step of the online softmax

    @property
    def v_bytes(self) -> int:
        """Bytes of one element of quantised V."""
        return 2 if self.pv == "fp16" else 1


# fp16 P and V with fp32 accumulators: the products need no head room, so both operands use fp16's range; p_max = 2^10 keeps
# weights down to 6e-8 of the row maximum out of the subnormals.
FP16_FP32 = Scheme("fp16", True, "token", p_max=2.0**10, v_max=2.0**14)
FP16_FP32_TRITON = replace(FP16_FP32, exact_sum=True)
# The same for MMA kernels, where a scale per token would cost a multiplication per score; a scale per fragment is one factor a thread.
FP16_FP32_MMA = replace(FP16_FP32, k_scale="fragment")
# fp16 accumulators, promoted every KV tile: keys in the accumulator · p_max · v_max · 2 < 65504. The factor 2 is for a P that the fma
# rounds above p_max. The same for "fp16": promoting less often gains nothing.
FP16_FP16_FP32 = Scheme("fp16", True, "fragment", p_max=16.0, v_max=8.0, accumulate="fp16")
# e4m3 P and V over their whole range. P of the tile's own maximum is exact, which takes 6 % off the error; V's mean, taken out, is exact
# too. An FP8 MMA keeps about 14 bits whatever its accumulator is called (Ada, Hopper), so "fp32" is promoted every tile as well.
FP8_FP32 = Scheme("fp8", True, "fragment", p_max=448.0, v_max=448.0, v_mean=True, p_tile_max=True, accumulate="fp8")
FP8_FP16 = replace(FP8_FP32, p_max=56.0, v_max=4.5, accumulate="fp16")
# u8 P against the tile's own row maximum, or the flat tail beside a sink key is lost; s8 V; exact sums inside a tile, which is
# 64 keys: at 128 the error on normal inputs is .0152 instead of .0146.
INT8_INT32 = Scheme("int8", True, "fragment", p_max=255.0, v_max=127.0, p_tile_max=True, accumulate="int32")


@dataclass(frozen=True)
class Tile:
    """Launch shape of an attention kernel: queries and keys per block, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Variant:
    """One way to compute attention, as offered to the user.

    `archs` are the compute capabilities (as 10·major + minor) that have a fast path; empty means any device the backend
    reaches. `tiles` maps (arch, compiled head_dim) to a launch shape; arch 0 is the default for the ones not named.
    """

    name: str
    backend: str  # "sdpa", "reference", "triton", "cuda"
    summary: str
    scheme: Scheme | None = None
    min_arch: int = 0
    archs: tuple[int, ...] = ()
    accum: dict[str, Scheme] = field(default_factory=dict)  # pv_accum_dtype → scheme, where the caller may choose
    tiles: dict[tuple[int, int], Tile] = field(default_factory=dict)

    def tile(self, arch: int, head_dim: int) -> Tile:
        """The launch shape for `arch` and a compiled `head_dim`."""
        return self.tiles.get((arch, head_dim)) or self.tiles[0, head_dim]


SDPA = Variant("sdpa", "sdpa", "PyTorch's own scaled_dot_product_attention, unquantised")

REFERENCE = Variant(
    "reference", "reference", "the INT8 / FP16 numerics in plain PyTorch: any device, slow, for tests and demonstrations", FP16_FP32
)

TRITON_FP16 = Variant(
    "sageattn_qk_int8_pv_fp16_triton",
    "triton",
    "INT8 QKᵀ, FP16 PV with FP32 accumulation, in Triton: any card that Triton supports",
    FP16_FP32_TRITON,
    min_arch=75,
    tiles={
        (0, 64): Tile(128, 64, 4, 3),
        (0, 128): Tile(128, 64, 8, 2),
        (0, 256): Tile(64, 64, 8, 1),
        (75, 64): Tile(64, 64, 4, 2),
        (75, 128): Tile(64, 64, 4, 2),
        (75, 256): Tile(32, 32, 4, 1),
        (90, 128): Tile(64, 128, 4, 2),
        (90, 256): Tile(64, 64, 4, 2),
    },
)

CUDA_FP16 = Variant(
    "sageattn_qk_int8_pv_fp16_cuda",
    "cuda",
    "INT8 QKᵀ, FP16 PV: overflow-safe, the most accurate CUDA variant",
    FP16_FP32_MMA,
    min_arch=75,
    accum={"fp32": FP16_FP32_MMA, "fp16+fp32": FP16_FP16_FP32, "fp16": FP16_FP16_FP32},
)
CUDA_FP8 = Variant(
    "sageattn_qk_int8_pv_fp8_cuda",
    "cuda",
    "INT8 QKᵀ, FP8 PV for Ada and Blackwell",
    FP8_FP32,
    min_arch=89,
    accum={"fp32": FP8_FP32, "fp32+fp32": FP8_FP32, "fp32+fp16": FP8_FP16},
)
CUDA_FP8_SM90 = Variant(
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "cuda",
    "INT8 QKᵀ, FP8 PV for Hopper",
    FP8_FP32,
    min_arch=90,
    archs=(90,),
    # wgmma's FP16 accumulators are no faster than its FP32 ones: every name runs the accurate scheme.
    accum={"fp32": FP8_FP32, "fp32+fp32": FP8_FP32, "fp32+fp16": FP8_FP32},
)
CUDA_INT8 = Variant(
    "sageattn_qk_int8_pv_int8_cuda",
    "cuda",
    "both products in INT8, for cards without FP8",
    INT8_INT32,
    min_arch=75,
    accum={"int32+fp32": INT8_INT32},
)

VARIANTS: dict[str, Variant] = {v.name: v for v in (SDPA, REFERENCE, TRITON_FP16, CUDA_FP16, CUDA_FP8, CUDA_FP8_SM90, CUDA_INT8)}

# What `csrc/build.py` compiles: every kernel image, for every architecture.
IMAGES: tuple[Image, ...] = ()
