"""Hopper's attention kernels whose K and V stay in shared memory: a call's only launch, where there are few keys."""

from __future__ import annotations

from ..numerics.constants import KV_TILE_SM90_WIDE
from ..numerics.scheme import FP16_FP32_WGMMA_WIDE
from .binaries import Entry
from .family import KernelFamily, Tile, Tiles, find_tile, initializer
from .params import ResidentParams

# Three warpgroups of 64 queries, and as many tiles of keys as fit 227 KiB.
LOCAL = 192  # bytes of local memory that a thread may use outside its main loop, once a head
_KEYS = KV_TILE_SM90_WIDE["fp16"]
_TILES: Tiles = {(0, 64): Tile(192, _KEYS, 12, 16), (0, 128): Tile(192, _KEYS, 12, 8)}


def _entry(kernels: KernelFamily, arch: int, head_dim: int, mask: str, accumulate: str) -> Entry:
    t = find_tile(kernels.tiles, arch, head_dim)
    tile = initializer("ResidentTile", {"mask": f"Mask::{mask}", "kv_tiles": t.stages})
    config = f"ResidentConfig<{kernels.layout.format(d=head_dim)}, {tile}>"
    return Entry(
        kernels.attend_symbol(head_dim, mask, accumulate), f"attend_resident<{config}>", ResidentParams, 32 * t.warps,
        smem=f"{config}::kSharedBytes", local=LOCAL, checks=(f"{config}::kBlockM == {t.block_m} && {config}::kThreads == {32 * t.warps}",),
    )  # fmt: skip


def _tile_bytes(head_dim: int) -> int:
    """csrc/layout/core_matrix.cuh: K in INT8, scales, V, eight columns of ones."""
    return _KEYS * (head_dim + (head_dim + 8) * 2) + 128


RESIDENT_FP16 = KernelFamily(
    "resident_fp16", "kernel/attend_resident.cuh", f"CoreMatrix<{{d}}, 2, {_KEYS}, true>", _tile_bytes, {"fp32": FP16_FP32_WGMMA_WIDE},
    _TILES, _entry, arch=90, masks=("none", "packed"), quantizers="", scale_blocks=2, v_ones=True,
)  # fmt: skip
