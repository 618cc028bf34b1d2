"""What `csrc/tools/build.py` compiles: every kernel image, for every architecture."""

from __future__ import annotations

from collections.abc import Iterator

from ..numerics.constants import HEAD_DIMS
from .architectures import TARGETS, TEST_TARGETS
from .binaries import Entry, Image
from .family import KernelFamily
from .mma import MMA_FP8, MMA_FP16, MMA_INT8
from .params import (
    ClassifyParams,
    MergeParams,
    NarrowMaskParams,
    PoolParams,
    QuantizeKParams,
    QuantizeVParams,
    RepairRowsParams,
    RouteParams,
)
from .wgmma import WGMMA_FP8, WGMMA_FP8_SPARSE, WGMMA_FP8_WIDE, WGMMA_FP16, WGMMA_FP16_SPARSE, WGMMA_FP16_WIDE

KERNELS: tuple[KernelFamily, ...] = (
    WGMMA_FP16, WGMMA_FP16_WIDE, MMA_FP16, MMA_FP8, WGMMA_FP8, WGMMA_FP8_WIDE, MMA_INT8, WGMMA_FP16_SPARSE, WGMMA_FP8_SPARSE,
)  # fmt: skip

QUANTIZE_V_THREADS = 128
QUANTIZE_V_RESIDENT = 768  # threads whose registers fit a multiprocessor
# The same for K, by compiled head dimension and by architecture where that differs: on 7.5 the whole rotation is in fp32, for which the
# compiler lacks two registers.
QUANTIZE_K_RESIDENT = {(0, 64): 768, (0, 128): 768, (0, 256): 512, (75, 128): 512, (75, 256): 256}

LIVE_RESIDENT = {64: 512, 128: 512, 256: 256}  # of kernels that look at which keys are live: that takes registers


def _quantize_k_entry(kernels: KernelFamily, arch: int, head_dim: int, live: bool) -> Entry:
    layout = kernels.layout.format(d=head_dim)
    threads = 4 * kernels.scale_block_keys(head_dim)
    resident = QUANTIZE_K_RESIDENT.get((arch, head_dim)) or QUANTIZE_K_RESIDENT[0, head_dim]
    if live:
        resident = min(resident, LIVE_RESIDENT[head_dim])
    checks = (f"{layout}::kScaleKeys == {kernels.scale_block_keys(head_dim)}",)
    symbol = kernels.quantize_k_symbol(head_dim, live)
    return Entry(symbol, f"quantize_k<{layout}, {str(live).lower()}>", QuantizeKParams, threads, max(1, resident // threads), checks=checks)


def _quantize_v_entry(kernels: KernelFamily, head_dim: int, live: bool) -> Entry:
    layout = kernels.layout.format(d=head_dim)
    resident = LIVE_RESIDENT[head_dim] if live else QUANTIZE_V_RESIDENT
    return Entry(
        kernels.quantize_v_symbol(head_dim, live), f"quantize_v<{layout}, PvType::{kernels.pv}, {str(live).lower()}>", QuantizeVParams,
        QUANTIZE_V_THREADS, resident // QUANTIZE_V_THREADS, checks=(f"{layout}::kTileBytes == {kernels.tile_bytes(head_dim)}",),
    )  # fmt: skip


CLASSIFY = Entry("classify_mask", "classify_band", ClassifyParams, 256, 2)
NARROW_KEYS = 2048  # of a row, in a CTA
NARROW_MASK = Entry(
    "narrow_mask", "narrow_rows", NarrowMaskParams, 256, 4, checks=(f"kNarrowThreads == 256 && kNarrowKeys == {NARROW_KEYS}",)
)
REPAIR_ROWS = Entry("repair_rows", "repair", RepairRowsParams, 128, checks=("kRepairThreads == 128",))
MERGE_ATTENTION = Entry("merge_attention", "merge", MergeParams, 256, checks=("kMergeThreads == 256",))

ROUTE = "route"  # the image of the router of block-sparse calls
POOL_THREADS, ROUTE_ROWS, ROUTE_WARPS = 256, {64: 64, 128: 64, 256: 32}, 8  # ROUTE_ROWS: query blocks of a strip, by head dimension


def pool_entry(head_dim: int) -> Entry:
    """Block means of K and block sums of V."""
    checks = (f"kPoolThreads == {POOL_THREADS}",)
    return Entry(f"pool_d{head_dim}", f"pool_keys_values<{head_dim}>", PoolParams, POOL_THREADS, checks=checks)


def center_entry(head_dim: int) -> Entry:
    """What the block means of a head have in common."""
    return Entry(f"center_d{head_dim}", f"center_keys<{head_dim}>", PoolParams, 512, checks=("kCenterThreads == 512",))


def route_entry(head_dim: int) -> Entry:
    """Lists of exact blocks, and tails of the others."""
    config, threads = f"RouteConfig<{head_dim}>", 32 * ROUTE_WARPS
    checks = (f"kRouteThreads == {threads}", f"{config}::kRows == {ROUTE_ROWS[head_dim]}")
    return Entry(
        f"route_d{head_dim}", f"route_blocks<{config}>", RouteParams, threads, 2, f"route_shared_bytes<{config}>()", checks=checks
    )  # fmt: skip


def _images(target: str) -> Iterator[Image]:
    """Every image for one target of the compiler."""
    arch, built = int(target.split("_")[1].rstrip("a")), [k for k in KERNELS if k.built_for(target)]
    for name in dict.fromkeys(k.quantizer for k in built):
        made = [(k, d) for k in built if k.quantizer == name for d in k.head_dims]
        keys = {k.quantize_k_symbol(d, live): _quantize_k_entry(k, arch, d, live) for k, d in reversed(made) for live in k.quantizers_live}
        entries = (CLASSIFY, *reversed(keys.values()), *(_quantize_v_entry(k, d, live) for k, d in made for live in k.quantizers_live))
        yield Image(name, target, "kernel/quantize.cuh", entries, released=target not in TEST_TARGETS)
    yield Image("sdpa_mask", target, "kernel/sdpa_mask.cuh", (NARROW_MASK, REPAIR_ROWS), released=target not in TEST_TARGETS)
    yield Image("merge_attention", target, "kernel/merge_attention.cuh", (MERGE_ATTENTION,), released=target not in TEST_TARGETS)
    route = tuple(entry(d) for d in HEAD_DIMS for entry in (pool_entry, center_entry, route_entry))
    yield Image(ROUTE, target, "kernel/route_blocks.cuh", route, released=target not in TEST_TARGETS)
    for k in built:
        for d in k.head_dims:
            entries = tuple(k.entry(k, arch, d, mask, accumulate) for mask in k.masks for accumulate in k.accumulators)
            yield Image(k.attend_image(d), target, k.source, entries, released=target not in TEST_TARGETS)


# The images for tests are compiled only where their architecture is named.
IMAGES: tuple[Image, ...] = tuple(image for target in TARGETS for image in _images(target))
