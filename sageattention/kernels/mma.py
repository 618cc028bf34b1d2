"""The attention kernels by mma.sync, for every card from Turing to Blackwell: their tiles, and what is compiled for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..numerics.constants import KV_TILE
from ..numerics.scheme import FP8_FP16, FP8_FP32_MMA, FP16_FP16_FP32, FP16_FP32_MMA, INT8_INT32
from .binaries import Entry
from .family import WARP_ROWS, KernelFamily, Tile, Tiles, find_tile, initializer
from .mma_lists import LIST_BYTE_TILES, LIST_TILES, mma_tile
from .params import AttendParams

FLAGS = ("q_in_smem", "loop_state_in_smem", "recompute_thread_idx", "delay_v_load")


# mma.sync kernels; the machine code behind each choice is in docs/kernels/mma.md. What a fragment of K or V costs in shared memory serves
# 32 rows of a warp where the registers allow it, without a spill in the main loop: head_dim 128 on A100 and Hopper, where shared memory
# would bind otherwise; two blocks of four such warps hide each other's softmax. Cards with a quarter of the tensor throughput (8.6, 8.9,
# 12.x, Turing) are bound by it with 16 rows as well, and want as many warps as the registers hold: twelve. At head_dim 64, 16 rows leave
# room for 16 warps. 8.6, 8.9 and 12.x have 99 KiB of shared memory for a block, Turing 64 and no asynchronous copies. Kernels that walk
# lists have shapes of their own (mma_lists.py).
_TWO, _EIGHT, _TWELVE = mma_tile(128, 4, 3, 2, True), mma_tile(128, 8, 3, 1), mma_tile(192, 12, 3, 1)
MMA_TILES: Tiles = {
    (0, 64): mma_tile(128, 8, 3, 2),
    (0, 128): _TWO,
    (0, 256): mma_tile(128, 8, 3, 1, True),
    (75, 64): mma_tile(128, 8, 2, 2),
    (75, 128): replace(_EIGHT, stages=2),
    (75, 256): replace(_EIGHT, stages=1),
    (80, 128): _TWELVE,
    # 164 KiB of shared memory hold two such blocks, and but one of three stages.
    (80, 128, "none", "fp32"): replace(_TWO, stages=2, loop_state_in_smem=True),
    (80, 256): mma_tile(128, 8, 2, 1, True),
    (100, 128): _TWELVE,
}
MMA_BYTE_TILES: Tiles = {
    (0, 64): mma_tile(128, 8, 3, 2),
    (0, 128): replace(_TWO, stages=4),
    (0, 256): replace(_EIGHT, stages=4),
    (75, 64): mma_tile(128, 8, 3, 2),
    (75, 128): _EIGHT,
    (75, 256): replace(_EIGHT, stages=1),
    (80, 128): _TWO,
    (80, 256): _EIGHT,
    (100, 64): mma_tile(128, 8, 3, 2),
    (100, 64, "none", "fp8"): _EIGHT,
    (100, 64, "causal", "fp8"): _EIGHT,
    (100, 128): _TWELVE,
}
for _arch in (86, 89, 120):
    MMA_TILES[_arch, 64] = MMA_BYTE_TILES[_arch, 64] = mma_tile(128, 8, 3, 2)
    MMA_TILES[_arch, 128] = MMA_BYTE_TILES[_arch, 128] = _TWELVE
    MMA_TILES[_arch, 256] = MMA_BYTE_TILES[_arch, 256] = replace(_EIGHT, stages=2)
MMA_TILES[120, 128, "causal"] = _EIGHT
MMA_TILES[120, 256] = mma_tile(128, 8, 1, 1, True)
# Where sums of fp16 or emulated FP8 MMAs take more registers.
for _mask in ("none", "causal"):
    MMA_TILES[0, 64, _mask, "fp16"] = _TWO
    MMA_TILES[75, 64, _mask, "fp16"] = mma_tile(128, 4, 2, 2)
    for _sums in ("fp8", "fp16"):
        MMA_BYTE_TILES[0, 128, _mask, _sums] = MMA_BYTE_TILES[100, 128, _mask, _sums] = _EIGHT
        MMA_BYTE_TILES[0, 256, _mask, _sums] = replace(_EIGHT, q_in_smem=True)
        MMA_BYTE_TILES[120, 128, _mask, _sums] = _EIGHT
MMA_TILES[0, 128, "none", "fp16"], MMA_TILES[0, 128, "causal", "fp16"] = replace(_TWO, stages=2), _EIGHT
MMA_TILES[100, 128, "none", "fp16"] = MMA_TILES[100, 128, "causal", "fp16"] = _EIGHT
MMA_BYTE_TILES[89, 128, "none", "fp8"] = MMA_BYTE_TILES[89, 128, "causal", "fp8"] = _EIGHT
# … and where the accumulators of head_dim 256 leave too few for the loop's own numbers: which option suffices is the compiler's whim. On
# 10.0 other tiles do better: its FP8 products are fp16 ones of what the compiler unpacks.
_SHARED = replace(_EIGHT, q_in_smem=True)


def _frugal(tile: Tile) -> Tile:
    return replace(tile, loop_state_in_smem=True, recompute_thread_idx=True)


for _mask in ("none", "causal"):
    _lean = _frugal(replace(_EIGHT, stages=2))
    MMA_TILES[75, 256, _mask, "fp16"] = _frugal(find_tile(MMA_TILES, 75, 256, _mask))
    MMA_TILES[86, 256, _mask, "fp16"] = MMA_TILES[89, 256, _mask, "fp16"] = _lean
    MMA_BYTE_TILES[89, 256, _mask, "fp8"] = MMA_BYTE_TILES[89, 256, _mask, "fp16"] = _lean
    MMA_BYTE_TILES[120, 256, _mask, "fp8"] = replace(_lean, delay_v_load=2)
MMA_TILES[120, 256, "causal", "fp16"] = replace(find_tile(MMA_TILES, 120, 256, "causal", "fp16"), recompute_thread_idx=True)
MMA_BYTE_TILES |= {
    (0, 256, "none", "fp8"): _frugal(_SHARED),
    (0, 256, "causal", "fp8"): replace(_SHARED, recompute_thread_idx=True),
    (100, 256): MMA_BYTE_TILES[0, 256],
    (100, 256, "none", "fp8"): replace(_SHARED, stages=2, loop_state_in_smem=True, delay_v_load=1),
    (100, 256, "causal", "fp8"): replace(_SHARED, stages=2, loop_state_in_smem=True, delay_v_load=1),
    (100, 256, "none", "fp16"): _SHARED,
    (100, 256, "causal", "fp16"): _SHARED,
    (89, 256, "none", "fp8"): replace(MMA_BYTE_TILES[89, 256, "none", "fp8"], q_in_smem=True),
    (120, 256, "causal", "fp8"): replace(MMA_BYTE_TILES[120, 256, "causal", "fp8"], q_in_smem=True),
}
MMA_TILES |= LIST_TILES
MMA_BYTE_TILES |= LIST_BYTE_TILES
# Packed sequences, which may be causal, keep a little more in registers than dense calls do and less than lists.
for _tiles, _lists in ((MMA_TILES, LIST_TILES), (MMA_BYTE_TILES, LIST_BYTE_TILES)):
    for _key in list(_lists):
        _arch, _head_dim, _sums = int(_key[0]), int(_key[1]), str(_key[3])
        _like = "causal" if _arch == 90 or (_head_dim == 256 and _sums == "fp8" and _arch in (89, 100, 120)) else "list"
        _tiles[_arch, _head_dim, "packed", _sums] = find_tile(_tiles, _arch, _head_dim, _like, _sums)
# … and where it is a register or two short at 64 and 128, found by trying.
for _tiles, _kernel, _options in (
    (MMA_TILES, (80, 128, "list", "fp32"), {"loop_state_in_smem": True}),
    (MMA_TILES, (80, 128, "list", "fp16"), {"recompute_thread_idx": True}),
    (MMA_TILES, (86, 64, "list", "fp32"), {"loop_state_in_smem": True, "recompute_thread_idx": True}),
    (MMA_TILES, (89, 64, "list", "fp32"), {"loop_state_in_smem": True, "recompute_thread_idx": True}),
    (MMA_BYTE_TILES, (75, 64, "list", "int32"), {"loop_state_in_smem": True}),
    (MMA_BYTE_TILES, (90, 64, "list", "int32"), {"loop_state_in_smem": True}),
    (MMA_BYTE_TILES, (90, 256, "none", "fp8"), {"delay_v_load": 1}),
    (MMA_BYTE_TILES, (100, 128, "list", "int32"), {"loop_state_in_smem": True, "recompute_thread_idx": True}),
    (MMA_BYTE_TILES, (120, 128, "list", "int32"), {"recompute_thread_idx": True}),
):
    _tiles[_kernel] = replace(find_tile(_tiles, *_kernel), **_options)
# Bytes of local memory a thread may use outside its main loop: at head_dim 256 the accumulators leave the compiler a register or two
# short, and a mixed tile of a list wants more than there are.
MMA_LOCAL, LIST_LOCAL = {64: 0, 128: 0, 256: 16}, 96


def _mma_entry(kernels: KernelFamily, arch: int, head_dim: int, mask: str, accumulate: str) -> Entry:
    t = find_tile(kernels.tiles, arch, head_dim, mask, accumulate)
    fields = {
        "mask": f"Mask::{mask}", "pv": f"PvType::{kernels.pv}", "accumulate": f"PvAccum::{accumulate}",
        "warps": t.warps, "row_tiles": t.block_m // (WARP_ROWS * t.warps), "stages": t.stages,
    } | {name: str(value).lower() for name in FLAGS if (value := getattr(t, name))}  # fmt: skip
    config = f"AttendConfig<{head_dim}, {initializer('MmaTile', fields)}>"
    return Entry(
        kernels.attend_symbol(head_dim, mask, accumulate), f"attend_mma<{config}>", AttendParams, 32 * t.warps, t.blocks,
        f"attend_shared_bytes<{config}>()", LIST_LOCAL if mask in ("list", "packed") else MMA_LOCAL[head_dim],
    )  # fmt: skip


def _fragment_bytes(value_bytes: int) -> Callable[[int], int]:
    """Of a tile (csrc/layout/fragment.cuh): K in INT8, V, four fp32 scales."""
    return lambda head_dim: KV_TILE * head_dim * (1 + value_bytes) + 16


MMA_FP16 = KernelFamily(
    "mma_fp16", "kernel/attend_mma.cuh", "Fragment<{d}, 2>", _fragment_bytes(2),
    {"fp32": FP16_FP32_MMA, "fp16+fp32": FP16_FP16_FP32, "fp16": FP16_FP16_FP32}, MMA_TILES, _mma_entry,
)  # fmt: skip
MMA_FP8 = KernelFamily(
    "mma_fp8", "kernel/attend_mma.cuh", "Fragment<{d}, 1>", _fragment_bytes(1),
    {"fp32+fp16": FP8_FP16, "fp32": FP8_FP32_MMA, "fp32+fp32": FP8_FP32_MMA}, MMA_BYTE_TILES, _mma_entry, min_arch=89,
)  # fmt: skip
MMA_INT8 = KernelFamily(
    "mma_int8", "kernel/attend_mma.cuh", "Fragment<{d}, 1>", _fragment_bytes(1), {"int32+fp32": INT8_INT32}, MMA_BYTE_TILES, _mma_entry
)
FAMILIES = (MMA_FP16, MMA_FP8, MMA_INT8)
