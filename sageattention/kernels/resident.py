"""Hopper's attention kernels whose K and V stay in shared memory: a call's only launch, where there are few keys.

They are made for tensors of one 16-bit dtype, whose rows are aligned: with all that others need a kernel would have four times the
instructions, and latency is what binds it.
"""

from __future__ import annotations

from ..numerics.constants import KV_TILE_SM90_WIDE
from ..numerics.scheme import FP16_FP32_WGMMA_WIDE
from .binaries import Entry
from .family import KernelFamily, Tile, Tiles, find_tile, initializer
from .params import ResidentParams

# Warpgroups of 64 queries, and as many tiles of keys as fit 227 KiB.
_KEYS = KV_TILE_SM90_WIDE["fp16"]
_TILES: Tiles = {(0, 64): Tile(256, _KEYS, 16, 15), (0, 128): Tile(192, _KEYS, 12, 8)}


def _entry(kernels: KernelFamily, arch: int, head_dim: int, mask: str, accumulate: str) -> Entry:
    t = find_tile(kernels.tiles, arch, head_dim)
    tile = initializer(
        "ResidentTile",
        {"mask": f"Mask::{mask}", "dtype": f"k{kernels.dtype.capitalize()}", "kv_tiles": t.stages, "warpgroups": t.warps // 4},
    )
    config = f"ResidentConfig<{kernels.layout.format(d=head_dim)}, {tile}>"
    return Entry(
        kernels.attend_symbol(head_dim, mask, accumulate), f"attend_resident<{config}>", ResidentParams, 32 * t.warps,
        smem=f"{config}::kSharedBytes", checks=(f"{config}::kBlockM == {t.block_m} && {config}::kThreads == {32 * t.warps}",),
    )  # fmt: skip


def _tile_bytes(head_dim: int) -> int:
    """csrc/layout/core_matrix.cuh: K in INT8, scales, V, eight columns of ones."""
    return _KEYS * (head_dim + (head_dim + 8) * 2) + 128


def _family(dtype: str, short: str) -> KernelFamily:
    return KernelFamily(
        f"resident_fp16_of_{short}", "kernel/attend_resident.cuh", f"CoreMatrix<{{d}}, 2, {_KEYS}, true>", _tile_bytes,
        {"fp32": FP16_FP32_WGMMA_WIDE}, _TILES, _entry, arch=90, masks=("none", "packed"), quantizers="", scale_blocks=2, v_ones=True,
        dtype=dtype,
    )  # fmt: skip


RESIDENT_FP16 = (_family("bfloat16", "bf16"), _family("float16", "fp16"))
