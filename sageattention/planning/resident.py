"""Which calls are for kernels that keep K and V of a head in shared memory (kernels/resident.py)."""

from __future__ import annotations

from ..kernels.family import KernelFamily, find_tile
from ..numerics.constants import pad_head_dim
from .problem import Problem

ROW_PIECE = 8  # channels of 16-bit rows that are moved at once
# These kernels quantise K and V once for each CTA instead of once for each head. That pays up to KEYS_OF_WORK_TILE keys, and where a CTA
# has a work tile for each KEYS_OF_WORK_TILE more; of packed sequences, where there are MIN_PAIRS (sequence, KV head) pairs for each
# multiprocessor. By measurement: docs/kernels/resident.md.
KEYS_OF_WORK_TILE, MIN_PAIRS = 256, 4


def takes(kernels: KernelFamily, problem: Problem) -> bool:
    """Whether the kernels can compute the call, if its rows turn out to be aligned."""
    head_dim = pad_head_dim(problem.head_dim)
    return (
        head_dim in kernels.head_dims and problem.len_kv <= kernels.most_keys(head_dim) and problem.mask_kind in kernels.masks
        and not problem.causal and problem.dtype == kernels.dtype and problem.head_dim % ROW_PIECE == 0
    )  # fmt: skip


def pays(kernels: KernelFamily, problem: Problem, multiprocessors: int) -> bool:
    """Whether quantising K and V once for each CTA takes less than two launches that do it once."""
    if problem.varlen:
        return problem.batch * problem.heads_kv >= MIN_PAIRS * multiprocessors
    return work_tiles(kernels, problem) >= (problem.len_kv / KEYS_OF_WORK_TILE - 1) * multiprocessors


def work_tiles(kernels: KernelFamily, problem: Problem) -> int:
    """Of a dense call."""
    block_m = find_tile(kernels.tiles, 0, pad_head_dim(problem.head_dim)).block_m
    return problem.batch * problem.heads_q * -(-problem.len_q // block_m)
