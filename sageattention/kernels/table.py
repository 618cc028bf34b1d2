"""What `csrc/tools/build.py` compiles: every kernel image, for every architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..numerics.constants import HEAD_DIMS
from . import mma, wgmma
from .architectures import ARCHITECTURES, TARGETS, TEST_TARGETS
from .binaries import Entry, Image
from .family import KernelFamily
from .params import (
    ClassifyParams,
    MergeParams,
    NarrowMaskParams,
    PlaceSequencesParams,
    PoolParams,
    QuantizeKParams,
    QuantizeVParams,
    RepairRowsParams,
    RouteParams,
)
from .resident import RESIDENT_FP16

KERNELS: tuple[KernelFamily, ...] = (*wgmma.FAMILIES, *RESIDENT_FP16, *mma.FAMILIES)

QUANTIZE_V_THREADS = 128
# Threads whose registers fit a multiprocessor, by family where that differs.
QUANTIZE_V_RESIDENT = {"": 768, "mma_fp8": 640, "mma_int8": 640, "wgmma_fp8_wide": 640}
# The same for K, by compiled head dimension and by architecture where that differs. On 7.5 the whole rotation is in fp32, which takes more
# registers.
QUANTIZE_K_RESIDENT = {(0, 64): 768, (0, 128): 512, (0, 256): 512, (75, 256): 256, (90, 128): 768}
# Bytes of local memory that are accepted, by architecture, compiled head dimension and keys: one block fewer would cost more.
QUANTIZE_K_LOCAL = {(90, 256, "all"): 8, (90, 256, "packed"): 8, (90, 64, "live"): 8, (90, 128, "live"): 24}

# Of kernels that look at which keys are live, which takes registers; of V on Hopper.
LIVE_RESIDENT, LIVE_V_RESIDENT_SM90 = {64: 512, 128: 512, 256: 256}, 640


def _wants_registers(arch: int, keys: str) -> bool:
    """Whether a quantiser is one for `LIVE_RESIDENT`. Those of packed sequences do with fewer on Hopper alone."""
    return keys == "live" or (keys == "packed" and arch != 90)


def _quantize_k_entry(kernels: KernelFamily, arch: int, head_dim: int, keys: str) -> Entry:
    layout = kernels.layout.format(d=head_dim)
    threads = 4 * kernels.scale_block_keys(head_dim)
    resident = QUANTIZE_K_RESIDENT.get((arch, head_dim)) or QUANTIZE_K_RESIDENT[0, head_dim]
    in_order = kernels.arch == 90 and kernels.masks != ("list",)  # keys that lie in memory order leave registers
    if _wants_registers(arch, keys) and not in_order:
        resident = min(resident, LIVE_RESIDENT[head_dim])
    checks = (f"{layout}::kScaleKeys == {kernels.scale_block_keys(head_dim)}",)
    symbol = kernels.quantize_k_symbol(head_dim, keys)
    return Entry(
        symbol, f"quantize_k<{layout}, Keys::{keys}>", QuantizeKParams, threads, max(1, resident // threads),
        local=QUANTIZE_K_LOCAL.get((arch, head_dim, keys), 0), checks=checks,
    )  # fmt: skip


def _quantize_v_entry(kernels: KernelFamily, arch: int, head_dim: int, keys: str) -> Entry:
    layout = kernels.layout.format(d=head_dim)
    resident = QUANTIZE_V_RESIDENT.get(kernels.name, QUANTIZE_V_RESIDENT[""])
    if _wants_registers(arch, keys):
        resident = LIVE_V_RESIDENT_SM90 if kernels.arch == 90 and head_dim <= 128 else LIVE_RESIDENT[head_dim]
    return Entry(
        kernels.quantize_v_symbol(head_dim, keys), f"quantize_v<{layout}, PvType::{kernels.pv}, Keys::{keys}>", QuantizeVParams,
        QUANTIZE_V_THREADS, resident // QUANTIZE_V_THREADS, checks=(f"{layout}::kTileBytes == {kernels.tile_bytes(head_dim)}",),
    )  # fmt: skip


CLASSIFY = Entry(
    "classify_mask", "classify_band", ClassifyParams, 256, 2,
    local=16, checks=("kClassifyThreads == 256 && MaskRun<kMaskBool>::kKeys == 16",),
)  # fmt: skip
CLASSIFY_BLOCKS = {90: 3}  # more of them, by architecture: elsewhere three spill
PLACE_SEQUENCES = Entry("place_sequences", "place_group", PlaceSequencesParams, 256, 2, checks=("kPlaceThreads == 256",))
NARROW_KEYS = 2048  # of a row, in a CTA
NARROW_MASK = Entry(
    "narrow_mask", "narrow_rows", NarrowMaskParams, 256, 4, checks=(f"kNarrowThreads == 256 && kNarrowKeys == {NARROW_KEYS}",)
)
REPAIR_ROWS = Entry("repair_rows", "repair", RepairRowsParams, 128, checks=("kRepairThreads == 128",))
MERGE_ATTENTION = Entry("merge_attention", "merge", MergeParams, 256, checks=("kMergeThreads == 256",))

ROUTE = "route"  # the image of the router of block-sparse calls
POOL_THREADS, ROUTE_WARPS = 256, 8
ROUTE_ROWS = {64: 64, 128: 64, 256: 32}  # query blocks of a strip, by compiled head dimension
ROUTE_PITCH = 128  # rows of scores are padded to a multiple of it
ROUTE_LOCAL = {(80, 256): 8}  # bytes of local memory that are accepted: a strip's number
ROUTE_SHARED = 64  # KiB of shared memory of a CTA, at most


def pool_entry(head_dim: int) -> Entry:
    """Block means of K and block sums of V."""
    checks = (f"kPoolThreads == {POOL_THREADS}",)
    return Entry(f"pool_d{head_dim}", f"pool_keys_values<{head_dim}>", PoolParams, POOL_THREADS, checks=checks)


def center_entry(head_dim: int) -> Entry:
    """What the block means of a head have in common."""
    return Entry(f"center_d{head_dim}", f"center_keys<{head_dim}>", PoolParams, 512, checks=("kCenterThreads == 512",))


def route_entry(head_dim: int, arch: int) -> Entry:
    """Lists of exact blocks, and tails of the others."""
    resident = 2 if ARCHITECTURES[arch].shared > ROUTE_SHARED * 2 else 1  # at most, for want of shared memory
    config, threads = f"RouteConfig<{head_dim}>", 32 * ROUTE_WARPS
    checks = (
        f"kRouteThreads == {threads}", f"{config}::kRows == {ROUTE_ROWS[head_dim]}", f"32 * kPitchWords == {ROUTE_PITCH}",
        f"route_shared_bytes<{config}>() <= {ROUTE_SHARED} * 1024",
    )  # fmt: skip
    return Entry(
        f"route_d{head_dim}", f"route_blocks<{config}>", RouteParams, threads, resident, f"route_shared_bytes<{config}>()",
        ROUTE_LOCAL.get((arch, head_dim), 0), checks,
    )  # fmt: skip


def _images(target: str) -> Iterator[Image]:
    """Every image for one target of the compiler."""
    arch, built = int(target.split("_")[1].rstrip("a")), [k for k in KERNELS if k.built_for(target)]
    for name in dict.fromkeys(k.quantizer for k in built if not k.resident):
        made = [(k, d) for k in built if k.quantizer == name for d in k.head_dims]
        keys = {k.quantize_k_symbol(d, kind): _quantize_k_entry(k, arch, d, kind) for k, d in reversed(made) for kind in k.key_kinds}
        values = (_quantize_v_entry(k, arch, d, kind) for k, d in made for kind in k.key_kinds)
        classify = replace(CLASSIFY, min_blocks=CLASSIFY_BLOCKS.get(arch, CLASSIFY.min_blocks))
        entries = (classify, PLACE_SEQUENCES, *reversed(keys.values()), *values)
        yield Image(name, target, "kernel/quantize.cuh", entries, released=target not in TEST_TARGETS)
    yield Image("sdpa_mask", target, "kernel/sdpa_mask.cuh", (NARROW_MASK, REPAIR_ROWS), released=target not in TEST_TARGETS)
    yield Image("merge_attention", target, "kernel/merge_attention.cuh", (MERGE_ATTENTION,), released=target not in TEST_TARGETS)
    route = tuple(entry for d in HEAD_DIMS for entry in (pool_entry(d), center_entry(d), route_entry(d, arch)))
    yield Image(ROUTE, target, "kernel/route_blocks.cuh", route, released=target not in TEST_TARGETS)
    for k in built:
        for d in k.head_dims:
            entries = tuple(k.entry(k, arch, d, mask, accumulate) for mask in k.masks for accumulate in k.accumulators)
            yield Image(k.attend_image(d), target, k.source, entries, released=target not in TEST_TARGETS)


# The images for tests are compiled only where their architecture is named.
IMAGES: tuple[Image, ...] = tuple(image for target in TARGETS for image in _images(target))
