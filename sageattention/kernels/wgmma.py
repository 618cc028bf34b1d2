"""Hopper's own attention kernels, by wgmma: their tiles, and what is compiled for each."""

from __future__ import annotations

from collections.abc import Callable

from ..numerics.scheme import FP8_FP32_WGMMA, FP16_FP32_WGMMA
from .binaries import Entry
from .family import BARRIER_BYTES, KernelFamily, Tile, Tiles, find_tile
from .params import AttendParams

# Hopper's own kernels: two warpgroups of 64 queries each beside one that fetches. 96 keys: two score arrays of more do not fit the
# registers. head_dim 256 stays with mma.sync: its accumulators alone would take 128 of a thread's 240 registers.
WGMMA_TILES: Tiles = {(0, d): Tile(128, 96, 12, 4) for d in (64, 128)}
WGMMA_BYTE_TILES: Tiles = {(0, d): Tile(128, 128, 12, 4) for d in (64, 128)}
PRODUCER_WARPS = 4  # among a tile's
# Bytes of local memory a thread may use outside its main loop.
WGMMA_LOCAL = {"none": 40, "causal": 40, "list": 40}


def _wgmma_entry(kernels: KernelFamily, arch: int, head_dim: int, mask: str, accumulate: str) -> Entry:
    t = find_tile(kernels.tiles, arch, head_dim, mask, accumulate)
    barriers = 4 * t.stages + 4  # K and V of a stage are there, and have been read; a turn is found, what it needs there, and read
    work_slots = 32 * 16 + 2 * (48 + 2 * head_dim * 4)  # the rotation's matrix; what a block works on and what its channels are made of
    q_stages = 2 if head_dim == 128 else 1  # by measurement: at head_dim 64 one is better
    smem = q_stages * t.block_m * head_dim + t.stages * kernels.tile_bytes(head_dim) + barriers * BARRIER_BYTES + work_slots
    smem += t.block_m * (2 * head_dim + 64)  # queries as they come
    form = "" if kernels.pv == "fp16" else "_fp8"
    config = f"Wgmma{form[1:].capitalize()}Config<{kernels.layout.format(d=head_dim)}, Mask::{mask}, {t.stages}, {q_stages}>"
    expression = f"attend_wgmma{form}<{config}, {smem}>"
    return Entry(kernels.attend_symbol(head_dim, mask, accumulate), expression, AttendParams, 32 * t.warps, 1, smem, WGMMA_LOCAL[mask])


def _core_matrix_bytes(value_bytes: int, tile: int, ones: bool) -> Callable[[int], int]:
    """Of a tile (csrc/layout/core_matrix.cuh): INT8 codes, scales, values, perhaps eight columns of ones."""
    return lambda head_dim: tile * head_dim + 128 + tile * (head_dim + 8 * ones) * value_bytes


def _split_kv_bytes(tiles: Tiles) -> Callable[[int], int]:
    """Of a block, in fp32 (csrc/kernel/attend_sm90.cuh, Partial): each computing thread's share of O, two sums, two references."""

    def size(head_dim: int) -> int:
        t = find_tile(tiles, 0, head_dim)
        threads = 32 * (t.warps - PRODUCER_WARPS)
        return (t.block_m * head_dim + threads * 4) * 4

    return size


WGMMA_FP16 = KernelFamily(
    "wgmma_fp16", "kernel/mainloop_sm90_fp16.cuh", "CoreMatrix<{d}, 2, 96, true>", _core_matrix_bytes(2, 96, True),
    {"fp32": FP16_FP32_WGMMA}, WGMMA_TILES, _wgmma_entry, arch=90, split_kv_bytes=_split_kv_bytes(WGMMA_TILES),
)  # fmt: skip

WGMMA_FP8 = KernelFamily(
    "wgmma_fp8", "kernel/mainloop_sm90_fp8.cuh", "CoreMatrix<{d}, 1, 128, true>", _core_matrix_bytes(1, 128, True),
    {"fp32+fp32": FP8_FP32_WGMMA, "fp32": FP8_FP32_WGMMA, "fp32+fp16": FP8_FP32_WGMMA},  # fp16 accumulators are no faster
    WGMMA_BYTE_TILES, _wgmma_entry, arch=90, split_kv_bytes=_split_kv_bytes(WGMMA_BYTE_TILES),
)  # fmt: skip
