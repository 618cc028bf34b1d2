"""How a variant rounds: `Scheme`, and the ten schemes of all variants."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .constants import BITS, E4M3_MAX, FRAGMENT_KEYS, KV_TILE, KV_TILE_SM90, KV_TILE_SM90_WIDE


@dataclass(frozen=True)
class Scheme:
    """How a variant rounds: everything that its emulation needs to give the kernel's numbers.

    Scores are S = (q8 · k8) · q_scale · k_scale, with one q_scale per row. P is 2^(S − m) · p_max and V is scaled per channel so
    that its largest magnitude becomes v_max.
    """

    pv: str  # the type of P and V: "fp16", "fp8" (e4m3), "int8" (P unsigned)
    rotate: bool  # Q and K multiplied by one signed Hadamard matrix
    k_scale: str  # keys that share a scale: "token" (one), "fragment" (those one thread holds of `fragment_keys`), "tile" (all of a tile)
    p_max: float  # P of the row maximum
    v_max: float
    v_mean: bool = False  # subtract V's channel means before quantising, add them back to O,
    v_rounded: bool = False  # corrected by the mean rounding error, so that dequantised V keeps V's mean
    p_tile_max: bool = False  # P is taken against the tile's own row maximum, not the running one
    exact_sum: bool = False  # the softmax denominator sums P before it is rounded
    accumulate: str = "fp32"  # the MMA accumulator of P·V: "fp32", "fp16", "int32" (exact), "fp8" (an FP8 MMA's ~14 bits)
    promote: int = 0  # keys after which the accumulator is added to fp32 registers; 0: after every KV tile
    kv_tile: int = KV_TILE  # keys per step of the online softmax
    fragment_keys: int = FRAGMENT_KEYS  # a "fragment" scale covers a quarter of this many consecutive keys
    linear: bool = False  # exp2 is piecewise linear, one segment an octave, for keys 0–7 of every 16: e4m3's bits are linear in the score
    # > 0: the last tile comes first, a softmax step takes lazy / head_dim keys, and a row is rescaled only when its maximum has grown by
    # more than rescale_threshold.
    lazy: int = 0
    rescale_threshold: float = 0.0  # base 2; P may reach p_max · 2^rescale_threshold before O, l and m are rescaled
    qk: str = "int8"  # the type of Q and K

    @property
    def v_bits(self) -> int:
        """Bits of one element of quantised V."""
        return BITS[self.pv]

    def kv_bytes(self, channels: int) -> int:
        """Bytes of one key's quantised K and V, without scales."""
        return channels * (BITS[self.qk] + self.v_bits) // 8


# fp16 P and V with fp32 accumulators: the products need no head room, so both operands use fp16's range; p_max = 2^10 keeps
# weights down to 6e-8 of the row maximum out of the subnormals.
FP16_FP32 = Scheme("fp16", True, "token", p_max=2.0**10, v_max=2.0**14)
FP16_FP32_TRITON = replace(FP16_FP32, exact_sum=True)
# The same for MMA kernels, where a scale per token would cost a multiplication per score; a scale per fragment is one factor a thread.
FP16_FP32_MMA = replace(FP16_FP32, k_scale="fragment", exact_sum=True, rescale_threshold=3.0)
# Hopper's wgmma kernel takes 96 keys at a time, with two scales a thread (.0107 on normal inputs). Its denominator is a column of ones
# in V, so it sums what P was rounded to.
FP16_FP32_WGMMA = replace(FP16_FP32_MMA, fragment_keys=KV_TILE_SM90["fp16"] // 2, exact_sum=False, kv_tile=KV_TILE_SM90["fp16"])
# At head_dim 256 registers suffice for 64 keys.
FP16_FP32_WGMMA_WIDE = replace(FP16_FP32_WGMMA, fragment_keys=KV_TILE_SM90_WIDE["fp16"] // 2, kv_tile=KV_TILE_SM90_WIDE["fp16"])
# fp16 accumulators, promoted every KV tile: keys in the accumulator · p_max · 2^rescale_threshold · v_max · 2 < 65504. The last 2 is for
# a P that the fma rounds above p_max. The same for "fp16": promoting less often gains nothing.
FP16_FP16_FP32 = Scheme("fp16", True, "fragment", p_max=16.0, v_max=8.0, accumulate="fp16", exact_sum=True, rescale_threshold=1.0)
# P against the tile's own maximum needs no head room: only fp32 numbers grow with the threshold. So nothing is rescaled in practice.
TILE_MAX_THRESHOLD = 16.0
# e4m3 P and V over their whole range. P of the tile's own maximum is exact, which takes 6 % off the error; V's mean, taken out, is exact
# too. An FP8 MMA keeps about 14 bits whatever its accumulator is called (Ada, Hopper), so "fp32" is promoted every tile as well.
FP8_FP32 = Scheme("fp8", True, "fragment", p_max=E4M3_MAX, v_max=E4M3_MAX, v_mean=True, p_tile_max=True, accumulate="fp8")
# Hopper's wgmma kernel has no time to promote every tile, so P is against the running maximum. What that costs is won back twice over
# where the mean added back also makes up for the rounding of V: that error is the same for all keys, P's is not (.0395 → .0353).
# Half of P needs no exponential (.0371); a promoted sum is of 256 keys.
FP8_FP32_WGMMA = replace(
    FP8_FP32, p_tile_max=False, v_rounded=True, p_max=56.0, rescale_threshold=3.0, promote=256, linear=True,
    fragment_keys=KV_TILE_SM90["fp8"] // 2, kv_tile=KV_TILE_SM90["fp8"], lazy=64 * 128,
)  # fmt: skip
# At head_dim 256 a softmax step and a promoted sum are a tile's keys.
FP8_FP32_WGMMA_WIDE = replace(
    FP8_FP32_WGMMA, promote=KV_TILE_SM90_WIDE["fp8"], fragment_keys=KV_TILE_SM90_WIDE["fp8"] // 2, kv_tile=KV_TILE_SM90_WIDE["fp8"],
    lazy=KV_TILE_SM90_WIDE["fp8"] * 256,
)  # fmt: skip
# By mma.sync the mean makes up for the rounding of V as well (.0364 → .0313).
FP8_FP32_MMA = replace(FP8_FP32, v_rounded=True, exact_sum=True, rescale_threshold=TILE_MAX_THRESHOLD)
FP8_FP16 = replace(FP8_FP32_MMA, p_max=56.0, v_max=4.5, accumulate="fp16")
# u8 P against the tile's own row maximum, or the flat tail beside a sink key is lost; s8 V; exact sums inside a tile, which is
# 64 keys: at 128 the error on normal inputs is .0145 instead of .0139. The mean added back makes up for the rounding of V, or it is .0148.
INT8_INT32 = Scheme(
    "int8", True, "fragment", p_max=255.0, v_max=127.0, v_mean=True, v_rounded=True, p_tile_max=True, accumulate="int32",
    rescale_threshold=TILE_MAX_THRESHOLD,
)  # fmt: skip
