"""The one table: every variant, its numerics, its tiles and where it runs.

The planner, the reference, the kernels' launch code, the build script and the tests all read it; no tile, scale layout or
symbol is written down anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from .images import Entry, Image
from .params import AttendParams, KeysParams, ValuesParams

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
ANCHOR_TOKENS = 128


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
    k_scale: str  # keys that share a scale: "token" (one), "fragment" (those one thread holds of `fragment_keys`), "tile" (all of a tile)
    p_max: float  # P of the row maximum
    v_max: float
    v_mean: bool = False  # V's per-channel mean is taken out and added back,
    v_rounded: bool = False  # less the mean of what was left of V and rounded: then V as it was rounded has V's mean
    p_tile_max: bool = False  # P is taken against the tile's own row maximum, not the running one
    exact_sum: bool = False  # the softmax denominator sums P before it is rounded
    accumulate: str = "fp32"  # the MMA accumulator of P·V: "fp32", "fp16", "int32" (exact), "fp8" (an FP8 MMA's ~14 bits)
    promote: int = 0  # keys after which the accumulator is added to fp32 registers; 0: after every KV tile
    kv_tile: int = 64  # keys per step of the online softmax
    fragment_keys: int = FRAGMENT_KEYS  # a "fragment" scale covers a quarter of so many consecutive keys
    linear: bool = False  # P of the first eight of every sixteen keys is on a straight line for each octave
    lazy: int = 0  # not 0: tiles from the last to the first, in steps of lazy / head_dim keys; a reference moves when it has to (`slack`)
    slack: float = 0.0  # a row's maximum may outgrow its reference by 2^slack before all is rescaled: P reaches p_max · 2^slack

    @property
    def v_bytes(self) -> int:
        """Bytes of one element of quantised V."""
        return 2 if self.pv == "fp16" else 1


# fp16 P and V with fp32 accumulators: the products need no head room, so both operands use fp16's range; p_max = 2^10 keeps
# weights down to 6e-8 of the row maximum out of the subnormals.
FP16_FP32 = Scheme("fp16", True, "token", p_max=2.0**10, v_max=2.0**14)
FP16_FP32_TRITON = replace(FP16_FP32, exact_sum=True)
# The same for MMA kernels, where a scale per token would cost a multiplication per score; a scale per fragment is one factor a thread.
FP16_FP32_MMA = replace(FP16_FP32, k_scale="fragment", exact_sum=True, slack=3.0)
# Hopper's wgmma kernel takes 96 keys at a time, with two scales a thread (.0107 on normal inputs). Its denominator is a column of ones
# in V, so it sums what P was rounded to.
FP16_FP32_WGMMA = replace(FP16_FP32_MMA, fragment_keys=48, exact_sum=False, kv_tile=96)
# fp16 accumulators, promoted every KV tile: keys in the accumulator · p_max · 2^slack · v_max · 2 < 65504. The last 2 is for a P that
# the fma rounds above p_max. The same for "fp16": promoting less often gains nothing.
FP16_FP16_FP32 = Scheme("fp16", True, "fragment", p_max=16.0, v_max=8.0, accumulate="fp16", exact_sum=True, slack=1.0)
# P against the tile's own maximum needs no head room: only fp32 numbers grow with the slack. So nothing is rescaled in practice.
TILE_MAX_SLACK = 16.0
# e4m3 P and V over their whole range. P of the tile's own maximum is exact, which takes 6 % off the error; V's mean, taken out, is exact
# too. An FP8 MMA keeps about 14 bits whatever its accumulator is called (Ada, Hopper), so "fp32" is promoted every tile as well.
FP8_FP32 = Scheme("fp8", True, "fragment", p_max=448.0, v_max=448.0, v_mean=True, p_tile_max=True, accumulate="fp8")
# Hopper's wgmma kernel has no time to promote every tile, so P is against the running maximum. What that costs is won back twice over
# where the mean added back also makes up for the rounding of V: that error is the same for all keys, P's is not (.0395 → .0353).
# Half of the weights do without an exponential (.0371); a promoted sum is of 256 keys.
FP8_FP32_WGMMA = replace(
    FP8_FP32, p_tile_max=False, v_rounded=True, p_max=56.0, slack=3.0, promote=256, linear=True, kv_tile=128, lazy=64 * 128
)
# By mma.sync the mean makes up for the rounding of V as well (.0364 → .0313).
FP8_FP32_MMA = replace(FP8_FP32, v_rounded=True, exact_sum=True, slack=TILE_MAX_SLACK)
FP8_FP16 = replace(FP8_FP32_MMA, p_max=56.0, v_max=4.5, accumulate="fp16")
# u8 P against the tile's own row maximum, or the flat tail beside a sink key is lost; s8 V; exact sums inside a tile, which is
# 64 keys: at 128 the error on normal inputs is .0145 instead of .0139. The mean added back makes up for the rounding of V, or it is .0148.
INT8_INT32 = Scheme(
    "int8", True, "fragment", p_max=255.0, v_max=127.0, v_mean=True, v_rounded=True, p_tile_max=True, accumulate="int32",
    slack=TILE_MAX_SLACK,
)  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """Launch shape of an attention kernel: queries and keys per block, warps, pipeline stages.

    CUDA kernels also say how many blocks of a multiprocessor the registers are budgeted for, and whether Q's fragments wait in
    shared memory instead of registers, or only what a tile needs once (walk_shared: Q's scales, the number of the first tile), whether
    what follows from the thread's number is worked out anew for each tile, and whether V is kept from being loaded ahead of the
    weights (1: it waits for their sum, 2: for the warp).
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    blocks: int = 1
    query_shared: bool = False
    walk_shared: bool = False
    thread_anew: bool = False
    values_late: int = 0


Tiles = dict[tuple[int | str, ...], Tile]


def find_tile(tiles: Tiles, arch: int, head_dim: int, *kind: str) -> Tile:
    """The launch shape for `arch` and a compiled `head_dim`, and for a kind of kernel (mask, accumulator) that differs."""
    row = arch if (arch, head_dim) in tiles else 0
    keys = [(row, head_dim, *kind[:n]) for n in range(len(kind), -1, -1)]
    return next(tiles[key] for key in keys if key in tiles)


@dataclass(frozen=True)
class Kernels:
    """The CUDA kernels for one format of quantised K and V: a quantiser, and attention for each head dimension, mask and accumulator.

    Image `attend_NAME_dD` holds the attention kernels of one compiled head dimension. The quantisers of all kernels made for the same
    devices share an image, and those of the same tile the quantiser of K.
    """

    name: str
    source: str  # of the attention kernels, relative to csrc/
    layout: str  # the C++ type of a tile of K and V, {d} being the compiled head dimension
    tile_bytes: Callable[[int], int]  # what that type's kTileBytes is
    schemes: dict[str, Scheme]  # what is computed, by pv_accum_dtype, the default first
    tiles: Tiles  # by (arch, compiled head_dim), with mask and accumulator where they differ; arch 0 is the default
    entry: Callable[[Kernels, int, int, str, str], Entry]  # the attention kernel for (arch, head_dim, mask, accumulator)
    arch: int = 0  # compute capability of the only devices it is made for, whose machine code is "sm_XXa"; 0: any from min_arch on
    min_arch: int = 75
    # Without a mask, a block goes on with further queries, and may share its last ones with another: what it then leaves to that one.
    partial_bytes: Callable[[int], int] | None = None

    @property
    def persistent(self) -> bool:
        """Whether a grid of any size does all unmasked work."""
        return self.partial_bytes is not None

    @property
    def head_dims(self) -> tuple[int, ...]:
        return tuple(d for d in HEAD_DIMS if any(key[1] == d for key in self.tiles))

    @property
    def accumulators(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s.accumulate for s in self.schemes.values()))

    @property
    def pv(self) -> str:
        """The type of P and V."""
        return next(iter(self.schemes.values())).pv

    @property
    def quantiser(self) -> str:
        """The quantisers' image."""
        return f"quantise_{self.name.split('_')[0]}"

    def unit_keys(self, head_dim: int) -> int:
        """Keys of K that share scales: kScaleKeys of the layout."""
        return find_tile(self.tiles, 0, head_dim).block_n // (2 if self.arch else 1)

    def keys_symbol(self, head_dim: int) -> str:
        return f"keys_{self.name.split('_')[0]}_{find_tile(self.tiles, 0, head_dim).block_n}_d{head_dim}"

    def values_symbol(self, head_dim: int) -> str:
        return f"values_{self.name}_d{head_dim}"

    def attend_image(self, head_dim: int) -> str:
        return f"attend_{self.name}_d{head_dim}"

    def attend_symbol(self, head_dim: int, mask: str, accumulate: str) -> str:
        return f"attend_{self.name}_d{head_dim}_{mask}_{accumulate}"

    def built_for(self, target: str) -> bool:
        """Whether there are images for this target of the compiler, such as "sm_80"."""
        arch = int(target.split("_")[1].rstrip("a"))
        return target == f"sm_{self.arch}a" if self.arch else arch >= self.min_arch


@dataclass(frozen=True)
class Variant:
    """One way to compute attention, as offered to the user.

    `archs` are the compute capabilities (as 10·major + minor) that have a fast path; empty means any device the backend
    reaches. A CUDA variant runs the first of its `kernels` that the device, the head dimension and the accumulator admit; `tiles`
    are the Triton kernel's launch shapes.
    """

    name: str
    backend: str  # "sdpa", "reference", "triton", "cuda"
    summary: str
    scheme: Scheme | None = None
    min_arch: int = 0
    archs: tuple[int, ...] = ()
    accum: dict[str, Scheme] = field(default_factory=dict)  # pv_accum_dtype → scheme, where the caller may choose; the default first
    tiles: Tiles = field(default_factory=dict)
    kernels: tuple[Kernels, ...] = ()

    @property
    def schemes(self) -> dict[str, Scheme]:
        """All that it computes anywhere, by accumulator or kernels and accumulator."""
        own = {"default": self.scheme} if self.scheme else {}
        return own | self.accum | {f"{k.name}-{accum}": scheme for k in self.kernels for accum, scheme in k.schemes.items()}

    def choose(self, arch: int, forced: bool, head_dim: int, accum: str = "") -> Kernels | None:
        """The kernels for a family of devices. One that is `forced` gets none of those that are made for one kind of device alone."""
        accum = accum or next(iter(self.accum))
        for k in self.kernels:
            if head_dim in k.head_dims and accum in k.schemes and (not k.arch or (k.arch == arch and not forced)):
                return k
        return None


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
        (90, 64): Tile(64, 128, 4, 3),
        (90, 128): Tile(64, 128, 4, 2),
        (90, 256): Tile(64, 64, 4, 2),
    },
)

# --- CUDA kernels ---------------------------------------------------------------------------------------------------------------

MASKS = ("none", "causal", "dense")
BULK_ARCH = 90  # from here on a tile is one bulk copy, with two barriers a stage: it has landed, it has been read
BARRIER_BYTES = 8
WARP_ROWS = 16  # of an MMA
BIAS_KEYS = 64
BIAS_BYTES = WARP_ROWS * (BIAS_KEYS + 8) * 4  # a warp's stage of a dense mask

# mma.sync kernels; the machine code behind each choice is in docs/kernels.md. What a fragment of K or V costs in shared memory serves
# 32 rows of a warp where the registers allow it, without a spill in the main loop: head_dim 128 on A100 and Hopper, where shared memory
# would bind otherwise; two blocks of four such warps hide each other's softmax. Cards with a quarter of the tensor throughput (8.6, 8.9,
# 12.x, Turing) are bound by it with 16 rows as well, and want as many warps as the registers hold: twelve. At head_dim 64, 16 rows leave
# room for 16 warps. 8.6, 8.9 and 12.x have 99 KiB of shared memory for a block, Turing 64 and no asynchronous copies; with a dense mask
# each warp stages 4.5 KiB of bias beside the pipeline.
_TWO, _EIGHT, _TWELVE = Tile(128, 64, 4, 3, 2, True), Tile(128, 64, 8, 3, 1), Tile(192, 64, 12, 3, 1)
MMA_TILES: Tiles = {
    (0, 64): Tile(128, 64, 8, 3, 2),
    (0, 128): _TWO,
    (0, 128, "dense", "fp16"): replace(_EIGHT, stages=2),
    (0, 256): Tile(128, 64, 8, 3, 1, True),
    (0, 256, "dense"): Tile(128, 64, 8, 2, 1, True),
    (0, 256, "dense", "fp16"): Tile(128, 64, 8, 1, 1, True),
    (75, 64): Tile(128, 64, 8, 2, 2),
    (75, 64, "dense"): Tile(64, 64, 4, 2, 1),
    (75, 128): replace(_EIGHT, stages=2),
    (75, 128, "dense"): replace(_EIGHT, stages=1),
    (75, 256): replace(_EIGHT, stages=1),
    (75, 256, "dense"): Tile(32, 64, 2, 1, 1),
    (80, 128): _TWELVE,
    (80, 128, "none", "fp32"): _TWO,
    (80, 128, "dense"): replace(_EIGHT, stages=2),
    (80, 256): Tile(128, 64, 8, 2, 1, True),
    (80, 256, "dense"): Tile(64, 64, 4, 2, 1, True),
    (100, 128): _TWELVE,
    (100, 128, "dense"): _EIGHT,
}
MMA_BYTE_TILES: Tiles = {
    (0, 64): Tile(128, 64, 8, 3, 2),
    (0, 128): replace(_TWO, stages=4),
    (0, 256): replace(_EIGHT, stages=4),
    (75, 64): Tile(128, 64, 8, 3, 2),
    (75, 64, "dense"): replace(_EIGHT, stages=2),
    (75, 128): _EIGHT,
    (75, 128, "dense"): replace(_EIGHT, stages=1),
    (75, 256): replace(_EIGHT, stages=1),
    (75, 256, "dense"): Tile(64, 64, 4, 1, 1),
    (80, 128): replace(_TWO, stages=4),
    (80, 128, "dense"): _EIGHT,
    (80, 256): _EIGHT,
    (100, 64): Tile(128, 64, 8, 3, 2),
    (100, 64, "none", "fp8"): _EIGHT,
    (100, 64, "causal", "fp8"): _EIGHT,
    (100, 128): _TWELVE,
    (100, 128, "dense"): _EIGHT,
}
for _arch in (86, 89, 120):
    MMA_TILES[_arch, 64] = MMA_BYTE_TILES[_arch, 64] = Tile(128, 64, 8, 3, 2)
    MMA_TILES[_arch, 64, "dense"] = MMA_BYTE_TILES[_arch, 64, "dense"] = _EIGHT
    MMA_TILES[_arch, 128] = MMA_BYTE_TILES[_arch, 128] = _TWELVE
    MMA_TILES[_arch, 128, "dense"] = MMA_BYTE_TILES[_arch, 128, "dense"] = replace(_EIGHT, stages=2)
    MMA_TILES[_arch, 256] = MMA_BYTE_TILES[_arch, 256] = replace(_EIGHT, stages=2)
    MMA_TILES[_arch, 256, "dense"] = MMA_BYTE_TILES[_arch, 256, "dense"] = replace(_EIGHT, stages=1)
MMA_TILES[120, 128, "causal"] = _EIGHT
MMA_TILES[120, 256] = Tile(128, 64, 8, 1, 1, True)
MMA_BYTE_TILES[120, 256, "dense"] = Tile(64, 64, 4, 1, 1, True)
# Where sums of fp16 or emulated FP8 MMAs take more registers.
for _mask in MASKS:
    MMA_TILES[0, 64, _mask, "fp16"] = _TWO
    MMA_TILES[75, 64, _mask, "fp16"] = MMA_TILES[75, 64, "dense"] if _mask == "dense" else Tile(128, 64, 4, 2, 2)
    for _sums in ("fp8", "fp16"):
        MMA_BYTE_TILES[0, 128, _mask, _sums] = MMA_BYTE_TILES[100, 128, _mask, _sums] = _EIGHT
        MMA_BYTE_TILES[0, 256, _mask, _sums] = replace(_EIGHT, query_shared=True)
        MMA_BYTE_TILES[120, 128, _mask, _sums] = replace(_EIGHT, stages=2) if _mask == "dense" else _EIGHT
MMA_TILES[0, 128, "none", "fp16"], MMA_TILES[0, 128, "causal", "fp16"] = replace(_TWO, stages=2), _EIGHT
MMA_TILES[100, 128, "none", "fp16"] = MMA_TILES[100, 128, "causal", "fp16"] = _EIGHT
MMA_BYTE_TILES[89, 128, "none", "fp8"] = MMA_BYTE_TILES[89, 128, "causal", "fp8"] = _EIGHT
# … and where the accumulators of head_dim 256 leave too few for the loop's own numbers: which option suffices is the compiler's whim. On
# 10.0 other tiles do better: its FP8 products are fp16 ones of what the compiler unpacks.
_SHARED = replace(_EIGHT, query_shared=True)


def _frugal(tile: Tile) -> Tile:
    return replace(tile, walk_shared=True, thread_anew=True)


for _mask in MASKS:
    _lean = _frugal(replace(_EIGHT, stages=1 if _mask == "dense" else 2))
    MMA_TILES[75, 256, _mask, "fp16"] = _frugal(find_tile(MMA_TILES, 75, 256, _mask))
    MMA_TILES[86, 256, _mask, "fp16"] = MMA_TILES[89, 256, _mask, "fp16"] = _lean
    MMA_BYTE_TILES[89, 256, _mask, "fp8"] = MMA_BYTE_TILES[89, 256, _mask, "fp16"] = _lean
    MMA_BYTE_TILES[120, 256, _mask, "fp8"] = replace(_lean, values_late=2)
for _arch, _mask, _sums in ((75, "dense", "fp32"), (80, "dense", "fp16"), (120, "causal", "fp16"), (120, "dense", "fp16")):
    MMA_TILES[_arch, 256, _mask, _sums] = replace(find_tile(MMA_TILES, _arch, 256, _mask, _sums), thread_anew=True)
MMA_BYTE_TILES |= {
    (0, 256, "none", "fp8"): _frugal(_SHARED),
    (0, 256, "causal", "fp8"): replace(_SHARED, thread_anew=True),
    (0, 256, "dense", "fp8"): replace(_SHARED, thread_anew=True),
    (89, 256, "dense", "fp8"): replace(_EIGHT, stages=1, thread_anew=True),
    (100, 256): MMA_BYTE_TILES[0, 256],
    (100, 256, "none", "fp8"): replace(_SHARED, stages=2, walk_shared=True, values_late=1),
    (100, 256, "causal", "fp8"): replace(_SHARED, stages=2, walk_shared=True, values_late=1),
    (100, 256, "dense", "fp8"): _SHARED,
    (100, 256, "none", "fp16"): _SHARED,
    (100, 256, "causal", "fp16"): _SHARED,
    (100, 256, "dense", "fp16"): _SHARED,
    (120, 256, "causal", "fp8"): replace(MMA_BYTE_TILES[120, 256, "causal", "fp8"], query_shared=True),
    (120, 256, "dense", "fp8"): Tile(64, 64, 4, 2, values_late=2),
}
# Bytes of local memory a thread may use outside its main loop: at head_dim 256 the accumulators leave the compiler a register or two short.
MMA_LOCAL = {64: 0, 128: 0, 256: 16}
WGMMA_LOCAL = {"none": 16, "causal": 8, "dense": 32}


def _mma_entry(kernels: Kernels, arch: int, head_dim: int, mask: str, accumulate: str) -> Entry:
    t = find_tile(kernels.tiles, arch, head_dim, mask, accumulate)
    row_tiles = t.block_m // (WARP_ROWS * t.warps)
    smem = t.stages * (kernels.tile_bytes(head_dim) + (2 * BARRIER_BYTES if arch >= BULK_ARCH else 0))
    if t.query_shared:
        smem += t.block_m * head_dim
    if t.query_shared or t.walk_shared:
        smem += 8 * row_tiles * 32 * t.warps
    if t.walk_shared:
        smem += 16
    if mask == "dense":
        smem += t.warps * BIAS_BYTES
    flags = ", ".join(str(x).lower() for x in (t.query_shared, t.walk_shared, t.thread_anew, t.values_late))
    config = f"{head_dim}, Mask::{mask}, Values::{kernels.pv}, Accumulate::{accumulate}, {t.warps}, {row_tiles}, {t.stages}, {flags}"
    symbol = kernels.attend_symbol(head_dim, mask, accumulate)
    return Entry(symbol, f"attend_mma<AttendConfig<{config}>, {smem}>", AttendParams, 32 * t.warps, t.blocks, smem, MMA_LOCAL[head_dim])


def _fragment_bytes(value_bytes: int) -> Callable[[int], int]:
    """Of a tile of 64 keys (csrc/block/fragment.cuh): INT8 codes, values, four fp32 scales."""
    return lambda head_dim: 64 * head_dim * (1 + value_bytes) + 16


MMA_FP16 = Kernels(
    "mma_fp16", "kernel/attend_mma.cuh", "Fragment<{d}, 2>", _fragment_bytes(2),
    {"fp32": FP16_FP32_MMA, "fp16+fp32": FP16_FP16_FP32, "fp16": FP16_FP16_FP32}, MMA_TILES, _mma_entry,
)  # fmt: skip
MMA_FP8 = Kernels(
    "mma_fp8", "kernel/attend_mma.cuh", "Fragment<{d}, 1>", _fragment_bytes(1),
    {"fp32+fp16": FP8_FP16, "fp32": FP8_FP32_MMA, "fp32+fp32": FP8_FP32_MMA}, MMA_BYTE_TILES, _mma_entry, min_arch=89,
)  # fmt: skip
MMA_INT8 = Kernels(
    "mma_int8", "kernel/attend_mma.cuh", "Fragment<{d}, 1>", _fragment_bytes(1), {"int32+fp32": INT8_INT32}, MMA_BYTE_TILES, _mma_entry
)

# Hopper's own kernels: two warpgroups of 64 queries each beside one that fetches. 96 keys: two score arrays of more do not fit the
# registers. head_dim 256 stays with mma.sync: its accumulators alone would take 128 of a thread's 240 registers.
WGMMA_TILES: Tiles = {(0, d): Tile(128, 96, 12, 4) for d in (64, 128)} | {(0, d, "dense"): Tile(128, 96, 12, 3) for d in (64, 128)}
WGMMA_BYTE_TILES: Tiles = {(0, d): Tile(128, 128, 12, 4) for d in (64, 128)}
FETCHING_WARPS = 4  # among a tile's


def _wgmma_entry(kernels: Kernels, arch: int, head_dim: int, mask: str, accumulate: str) -> Entry:
    t = find_tile(kernels.tiles, arch, head_dim, mask, accumulate)
    barriers = 4 * t.stages + 2  # K and V of a stage are there, and have been read; what a turn needs is, and has been
    turns = 32 * 16 + 2 * (48 + 2 * head_dim * 4)  # the rotation's matrix; what a block works on and what its channels are made of
    query_places = 2 if mask == "none" and head_dim == 128 else 1  # by measurement: at head_dim 64 one is better
    smem = query_places * t.block_m * head_dim + t.stages * kernels.tile_bytes(head_dim) + barriers * BARRIER_BYTES + turns
    if mask == "dense":
        smem += t.block_m // WARP_ROWS * -(-t.block_n // BIAS_KEYS) * BIAS_BYTES
    else:
        smem += t.block_m * (2 * head_dim + 64)  # queries as they come
    form = "" if kernels.pv == "fp16" else "_fp8"
    config = f"Wgmma{form[1:].capitalize()}Config<{kernels.layout.format(d=head_dim)}, Mask::{mask}, {t.stages}, {query_places}>"
    expression = f"attend_wgmma{form}<{config}, {smem}>"
    return Entry(kernels.attend_symbol(head_dim, mask, accumulate), expression, AttendParams, 32 * t.warps, 1, smem, WGMMA_LOCAL[mask])


def _core_matrix_bytes(value_bytes: int, tile: int, ones: bool) -> Callable[[int], int]:
    """Of a tile (csrc/block/core_matrix.cuh): INT8 codes, scales, values, perhaps eight columns of ones."""
    return lambda head_dim: tile * head_dim + 128 + tile * (head_dim + 8 * ones) * value_bytes


def _partial_bytes(tiles: Tiles) -> Callable[[int], int]:
    """Of a block, in fp32 (csrc/kernel/wgmma_common.cuh, Partial): each computing thread's share of O, two sums, two references."""

    def size(head_dim: int) -> int:
        t = find_tile(tiles, 0, head_dim)
        threads = 32 * (t.warps - FETCHING_WARPS)
        return (t.block_m * head_dim + threads * 4) * 4

    return size


WGMMA_FP16 = Kernels(
    "wgmma_fp16", "kernel/attend_wgmma.cuh", "CoreMatrix<{d}, 2, 96, true>", _core_matrix_bytes(2, 96, True),
    {"fp32": FP16_FP32_WGMMA}, WGMMA_TILES, _wgmma_entry, arch=90, partial_bytes=_partial_bytes(WGMMA_TILES),
)  # fmt: skip

WGMMA_FP8 = Kernels(
    "wgmma_fp8", "kernel/attend_wgmma_fp8.cuh", "CoreMatrix<{d}, 1, 128, true>", _core_matrix_bytes(1, 128, True),
    {"fp32+fp32": FP8_FP32_WGMMA, "fp32": FP8_FP32_WGMMA, "fp32+fp16": FP8_FP32_WGMMA},  # fp16 accumulators are no faster
    WGMMA_BYTE_TILES, _wgmma_entry, arch=90, partial_bytes=_partial_bytes(WGMMA_BYTE_TILES),
)  # fmt: skip

CUDA_FP16 = Variant(
    "sageattn_qk_int8_pv_fp16_cuda",
    "cuda",
    "INT8 QKᵀ, FP16 PV: overflow-safe, the most accurate CUDA variant",
    FP16_FP32_MMA,
    min_arch=75,
    accum=MMA_FP16.schemes,
    kernels=(WGMMA_FP16, MMA_FP16),
)
CUDA_FP8 = Variant(
    "sageattn_qk_int8_pv_fp8_cuda",
    "cuda",
    "INT8 QKᵀ, FP8 PV for Ada and Blackwell",
    FP8_FP16,
    min_arch=89,
    accum=MMA_FP8.schemes,
    kernels=(MMA_FP8,),
)
CUDA_FP8_SM90 = Variant(
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "cuda",
    "INT8 QKᵀ, FP8 PV for Hopper",
    FP8_FP32_WGMMA,
    min_arch=90,
    archs=(90,),
    accum=WGMMA_FP8.schemes,
    kernels=(WGMMA_FP8, MMA_FP8),
)
CUDA_INT8 = Variant(
    "sageattn_qk_int8_pv_int8_cuda",
    "cuda",
    "both products in INT8: the fastest on GeForce cards, by their rates",
    INT8_INT32,
    min_arch=75,
    accum=MMA_INT8.schemes,
    kernels=(MMA_INT8,),
)

VARIANTS: dict[str, Variant] = {v.name: v for v in (SDPA, REFERENCE, TRITON_FP16, CUDA_FP16, CUDA_FP8, CUDA_FP8_SM90, CUDA_INT8)}

# --- kernel images -------------------------------------------------------------------------------------------------------------

VALUES_THREADS = 128
# Threads whose registers fit a multiprocessor, by head dimension; on 7.5, where the whole rotation is in fp32, the compiler lacks two.
KEYS_THREADS, VALUES_RESIDENT = {64: 768, 128: 768, 256: 512}, 768


def _keys_entry(kernels: Kernels, arch: int, head_dim: int) -> Entry:
    layout = kernels.layout.format(d=head_dim)
    threads, resident = 4 * kernels.unit_keys(head_dim), KEYS_THREADS[head_dim]
    if arch == 75 and head_dim > 64:
        resident -= threads
    return Entry(kernels.keys_symbol(head_dim), f"quantise_keys<{layout}>", KeysParams, threads, resident // threads)


def _values_entry(kernels: Kernels, head_dim: int) -> Entry:
    expression = f"quantise_values<{kernels.layout.format(d=head_dim)}, Values::{kernels.pv}>"
    return Entry(kernels.values_symbol(head_dim), expression, ValuesParams, VALUES_THREADS, VALUES_RESIDENT // VALUES_THREADS)


def _images(target: str) -> Iterator[Image]:
    """Every image for one target of the compiler."""
    arch, built = int(target.split("_")[1].rstrip("a")), [k for k in KERNELS if k.built_for(target)]
    for name in dict.fromkeys(k.quantiser for k in built):
        made = [(k, d) for k in built if k.quantiser == name for d in k.head_dims]
        keys = {k.keys_symbol(d): _keys_entry(k, arch, d) for k, d in reversed(made)}
        entries = (*reversed(keys.values()), *(_values_entry(k, d) for k, d in made))
        yield Image(name, target, "kernel/quantise.cuh", entries, released=target not in TEST_TARGETS)
    for k in built:
        for d in k.head_dims:
            entries = tuple(k.entry(k, arch, d, mask, accumulate) for mask in MASKS for accumulate in k.accumulators)
            yield Image(k.attend_image(d), target, k.source, entries, released=target not in TEST_TARGETS)


TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_75", "compute_80", "compute_89")
# The PTX of architectures whose machine code is there is for running their kernels on a later card, which itself takes the last one.
TEST_TARGETS = ("compute_75", "compute_80")
KERNELS: tuple[Kernels, ...] = tuple({k.name: k for v in VARIANTS.values() for k in v.kernels}.values())

# What `csrc/build.py` compiles: every kernel image, for every architecture; the ones for tests only where their architecture is named.
IMAGES: tuple[Image, ...] = tuple(image for target in TARGETS for image in _images(target))
