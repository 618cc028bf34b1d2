"""Hopper's own attention kernels, by wgmma: their tiles, and what is compiled for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..numerics.constants import KV_BLOCK, KV_TILE_SM90, KV_TILE_SM90_WIDE
from ..numerics.scheme import FP8_FP32_WGMMA, FP8_FP32_WGMMA_WIDE, FP16_FP32_WGMMA, FP16_FP32_WGMMA_WIDE, Scheme
from .binaries import Entry
from .family import KernelFamily, Tile, Tiles, find_tile, initializer
from .params import AttendParams

# Hopper's own kernels: two warpgroups of 64 queries each beside one that fetches. 96 keys: two score arrays of more do not fit the
# registers.
_FP16, _FP8 = (Tile(128, KV_TILE_SM90[pv], 12, 4) for pv in ("fp16", "fp8"))
WGMMA_TILES: Tiles = {(0, d): _FP16 for d in (64, 128)}
WGMMA_BYTE_TILES: Tiles = {(0, d): _FP8 for d in (64, 128)}
# At head_dim 256 O takes 128 of a thread's 240 registers, and a tile twice the shared memory.
_FP16_WIDE, _FP8_WIDE = Tile(128, KV_TILE_SM90_WIDE["fp16"], 12, 3), Tile(128, KV_TILE_SM90_WIDE["fp8"], 12, 2)
PRODUCER_WARPS = 4  # among a tile's
# Bytes of local memory a thread may use outside its main loop.
WGMMA_LOCAL = 48
WGMMA_LOCAL_WIDE = 216


def _wgmma_entry(kernels: KernelFamily, arch: int, head_dim: int, mask: str, accumulate: str) -> Entry:
    t = find_tile(kernels.tiles, arch, head_dim, mask, accumulate)
    q_stages = 2 if head_dim == 128 else 1  # by measurement at 64; at 256 two were not tried
    form = "" if kernels.pv == "fp16" else "_fp8_wide" if head_dim == 256 else "_fp8"
    routed = "true" if kernels.masks == ("list",) else "false"
    fields = {"mask": f"Mask::{mask}", "stages": t.stages, "q_stages": q_stages, "stage_tiles": t.stage_tiles, "routed": routed}
    tile = initializer("WgmmaTile", fields)
    config = f"Wgmma{form.title().replace('_', '')}Config<{kernels.layout.format(d=head_dim)}, {tile}>"
    return Entry(
        kernels.attend_symbol(head_dim, mask, accumulate), f"attend_wgmma{form}<{config}>", AttendParams, 32 * t.warps, 1,
        f"attend_shared_bytes<{config}>()", WGMMA_LOCAL_WIDE if head_dim == 256 else WGMMA_LOCAL,
        (f"SplitKvPartial<{config}>::kCtaBytes == {_split_kv_bytes(kernels.tiles)(head_dim)}",),
    )  # fmt: skip


def _core_matrix(v_bytes: int, tile: Tile, scale_blocks: int = 2) -> str:
    return f"CoreMatrix<{{d}}, {v_bytes}, {tile.block_n}, true, {scale_blocks}>"


def _core_matrix_bytes(v_bytes: int, tile: Tile) -> Callable[[int], int]:
    """Of a tile (csrc/layout/core_matrix.cuh): K in INT8, scales, V, eight columns of ones."""
    return lambda head_dim: tile.block_n * (head_dim + (head_dim + 8) * v_bytes) + 128


def _split_kv_bytes(tiles: Tiles) -> Callable[[int], int]:
    """A CTA's, in fp32 (csrc/kernel/output_sm90.cuh, SplitKvPartial): each consumer thread's share of O, two of l, two of m."""

    def size(head_dim: int) -> int:
        t = find_tile(tiles, 0, head_dim)
        threads = 32 * (t.warps - PRODUCER_WARPS)
        return (t.block_m * head_dim + threads * 4) * 4

    return size


WGMMA_FP16 = KernelFamily(
    "wgmma_fp16", "kernel/mainloop_sm90_fp16.cuh", _core_matrix(2, _FP16), _core_matrix_bytes(2, _FP16),
    {"fp32": FP16_FP32_WGMMA}, WGMMA_TILES, _wgmma_entry, arch=90, quantizers="wgmma", scale_blocks=2, v_ones=True,
    split_kv_bytes=_split_kv_bytes(WGMMA_TILES),
)  # fmt: skip

WGMMA_FP8 = KernelFamily(
    "wgmma_fp8", "kernel/mainloop_sm90_fp8.cuh", _core_matrix(1, _FP8), _core_matrix_bytes(1, _FP8),
    {"fp32+fp32": FP8_FP32_WGMMA, "fp32": FP8_FP32_WGMMA, "fp32+fp16": FP8_FP32_WGMMA},  # fp16 accumulators are no faster
    WGMMA_BYTE_TILES, _wgmma_entry, arch=90, quantizers="wgmma", scale_blocks=2, v_ones=True,
    split_kv_bytes=_split_kv_bytes(WGMMA_BYTE_TILES),
)  # fmt: skip


def _wide(family: KernelFamily, source: str, v_bytes: int, tile: Tile, scheme: Scheme) -> KernelFamily:
    tiles: Tiles = {(0, 256): tile}
    return replace(
        family, name=f"{family.name}_wide", source=source, layout=_core_matrix(v_bytes, tile), tile_bytes=_core_matrix_bytes(v_bytes, tile),
        schemes=dict.fromkeys(family.schemes, scheme), tiles=tiles, split_kv_bytes=_split_kv_bytes(tiles),
    )  # fmt: skip


WGMMA_FP16_WIDE = _wide(WGMMA_FP16, WGMMA_FP16.source, 2, _FP16_WIDE, FP16_FP32_WGMMA_WIDE)
WGMMA_FP8_WIDE = _wide(WGMMA_FP8, "kernel/mainloop_sm90_fp8_wide.cuh", 1, _FP8_WIDE, FP8_FP32_WGMMA_WIDE)

# Block-sparse attention: tiles are the blocks of 64 keys that a router chooses from, each one scale block. Two make a stage of FP8: its
# loop then meets as many barriers as that of 128 keys a tile.
_SPARSE_FP16 = Tile(128, KV_BLOCK, 12, 5)
_SPARSE_FP8 = Tile(128, KV_BLOCK, 12, 4, stage_tiles=2)


def _sparse(family: KernelFamily, v_bytes: int, tile: Tile) -> KernelFamily:
    tiles: Tiles = {(0, d): tile for d in (64, 128)}
    schemes = {name: replace(scheme, kv_tile=KV_BLOCK, fragment_keys=KV_BLOCK) for name, scheme in family.schemes.items()}
    return replace(
        family, name=f"{family.name}_sparse", layout=_core_matrix(v_bytes, tile, 1),
        tile_bytes=_core_matrix_bytes(v_bytes, tile), schemes=schemes, tiles=tiles, split_kv_bytes=_split_kv_bytes(tiles), masks=("list",),
        scale_blocks=1,
    )  # fmt: skip


WGMMA_FP16_SPARSE, WGMMA_FP8_SPARSE = _sparse(WGMMA_FP16, 2, _SPARSE_FP16), _sparse(WGMMA_FP8, 1, _SPARSE_FP8)
FAMILIES = (WGMMA_FP16, WGMMA_FP16_WIDE, WGMMA_FP8, WGMMA_FP8_WIDE, WGMMA_FP16_SPARSE, WGMMA_FP8_SPARSE)
