"""Launch shapes of the mma.sync kernels that walk tile lists, by architecture, compiled head dimension and accumulator.

Beside what the others keep, these keep a list's words and, for its mixed tiles, the mask: of each card's shapes the first in the order
of speed without a list whose loop over full tiles touches no local memory, or least.
"""

from __future__ import annotations

from ..numerics.constants import KV_TILE
from .family import Tile, Tiles


def mma_tile(
    block_m: int, warps: int, stages: int, blocks: int, q_in_smem: bool = False, loop_state_in_smem: bool = False,
    recompute_thread_idx: bool = False, delay_v_load: int = 0,
) -> Tile:  # fmt: skip
    """The launch shape of an mma.sync kernel: all have KV tiles of one size."""
    return Tile(block_m, KV_TILE, warps, stages, blocks, q_in_smem, loop_state_in_smem, recompute_thread_idx, delay_v_load)


def _rows(*shapes: tuple[Tile, tuple[tuple[int, int, str], ...]]) -> Tiles:
    return {(arch, head_dim, "list", sums): tile for tile, where in shapes for arch, head_dim, sums in where}


LIST_TILES = _rows(  # V in fp16
    (mma_tile(128, 4, 2, 2), ((75, 64, "fp16"),)),
    (mma_tile(128, 4, 3, 2, q_in_smem=True), ((80, 64, "fp16"), (90, 64, "fp16"), (100, 64, "fp16"))),
    (mma_tile(128, 8, 1, 1, loop_state_in_smem=True), ((75, 256, "fp32"),)),
    (mma_tile(128, 8, 1, 1, loop_state_in_smem=True, recompute_thread_idx=True), ((75, 256, "fp16"),)),
    (mma_tile(128, 8, 1, 1, q_in_smem=True), ((86, 256, "fp32"), (89, 256, "fp32"), (120, 256, "fp32"))),
    (mma_tile(128, 8, 1, 1, q_in_smem=True, loop_state_in_smem=True, recompute_thread_idx=True), ((120, 256, "fp16"),)),
    (mma_tile(128, 8, 1, 1, q_in_smem=True, recompute_thread_idx=True), ((86, 256, "fp16"), (89, 256, "fp16"))),
    (mma_tile(128, 8, 2, 1), ((75, 128, "fp32"), (75, 128, "fp16"))),
    (mma_tile(128, 8, 2, 1, q_in_smem=True), ((80, 256, "fp32"),)),
    (mma_tile(128, 8, 2, 1, q_in_smem=True, recompute_thread_idx=True), ((80, 256, "fp16"),)),
    (mma_tile(128, 8, 2, 2, loop_state_in_smem=True), ((75, 64, "fp32"),)),
    (mma_tile(128, 8, 3, 1), ((86, 128, "fp32"), (86, 128, "fp16"), (89, 128, "fp32"), (89, 128, "fp16"), (90, 128, "fp16"),
        (100, 128, "fp16"), (120, 128, "fp32"), (120, 128, "fp16"))),
    (mma_tile(128, 8, 3, 1, q_in_smem=True), ((90, 256, "fp32"), (100, 256, "fp32"), (100, 256, "fp16"))),
    (mma_tile(128, 8, 3, 1, q_in_smem=True, recompute_thread_idx=True), ((90, 256, "fp16"),)),
    (mma_tile(128, 8, 3, 2), ((80, 64, "fp32"),)),
    (mma_tile(128, 8, 3, 2, q_in_smem=True), ((86, 64, "fp32"), (86, 64, "fp16"), (89, 64, "fp32"), (89, 64, "fp16"))),
    (mma_tile(128, 8, 4, 1), ((90, 128, "fp32"), (90, 64, "fp32"), (100, 64, "fp32"), (120, 64, "fp32"), (120, 64, "fp16"))),
    (mma_tile(192, 12, 3, 1), ((80, 128, "fp32"),)),
    (mma_tile(192, 12, 3, 1, q_in_smem=True), ((80, 128, "fp16"), (100, 128, "fp32"))),
)  # fmt: skip

LIST_BYTE_TILES = _rows(  # V in bytes
    (mma_tile(128, 8, 1, 1), ((75, 256, "int32"),)),
    (mma_tile(128, 8, 1, 1, q_in_smem=True), ((90, 256, "fp8"),)),
    (mma_tile(128, 8, 2, 1, loop_state_in_smem=True), ((86, 256, "int32"), (89, 256, "int32"))),
    (mma_tile(128, 8, 2, 1, q_in_smem=True), ((120, 256, "int32"), (120, 256, "fp8"))),
    (mma_tile(128, 8, 2, 1, q_in_smem=True, loop_state_in_smem=True), ((100, 256, "fp8"),)),
    (mma_tile(128, 8, 2, 1, q_in_smem=True, loop_state_in_smem=True, recompute_thread_idx=True), ((89, 256, "fp16"),)),
    (mma_tile(128, 8, 2, 1, q_in_smem=True, recompute_thread_idx=True), ((120, 256, "fp16"),)),
    (mma_tile(128, 8, 3, 1), ((75, 128, "int32"), (89, 128, "fp8"), (90, 128, "fp16"), (90, 128, "fp8"),
        (100, 128, "fp16"), (100, 128, "fp8"), (100, 64, "fp8"), (120, 128, "fp16"), (120, 128, "fp8"))),
    (mma_tile(128, 8, 3, 1, loop_state_in_smem=True), ((89, 256, "fp8"),)),
    (mma_tile(128, 8, 3, 1, q_in_smem=True), ((80, 256, "int32"), (90, 256, "fp16"), (100, 256, "fp16"))),
    (mma_tile(128, 8, 3, 2), ((75, 64, "int32"), (80, 64, "int32"))),
    (mma_tile(128, 8, 3, 2, q_in_smem=True), ((86, 64, "int32"), (89, 64, "int32"), (89, 64, "fp16"), (89, 64, "fp8"), (90, 64, "int32"))),
    (mma_tile(128, 8, 4, 1), ((80, 128, "int32"), (90, 128, "int32"), (90, 64, "fp16"), (90, 64, "fp8"), (100, 64, "int32"),
        (100, 64, "fp16"), (120, 64, "int32"), (120, 64, "fp16"), (120, 64, "fp8"))),
    (mma_tile(128, 8, 4, 1, loop_state_in_smem=True), ((90, 256, "int32"),)),
    (mma_tile(128, 8, 4, 1, q_in_smem=True), ((100, 256, "int32"),)),
    (mma_tile(192, 12, 3, 1, q_in_smem=True), ((86, 128, "int32"), (89, 128, "int32"), (89, 128, "fp16"), (100, 128, "int32"),
        (120, 128, "int32"))),
)  # fmt: skip
