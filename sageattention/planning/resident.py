"""Which calls are for kernels that keep K and V of a head in shared memory (kernels/resident.py)."""

from __future__ import annotations

from ..kernels.family import KernelFamily, find_tile
from ..numerics.constants import pad_head_dim
from .cost import Form
from .problem import Problem

ROW_PIECE, ITEMSIZE = 8, 2  # channels of 16-bit rows that are moved at once; bytes of each
# These kernels quantise K and V once for each CTA instead of once for each head. That pays up to KEYS_OF_WORK_TILE keys, and where a CTA
# has a work tile for each KEYS_OF_WORK_TILE more; of packed sequences, where there are MIN_PAIRS (sequence, KV head) pairs for each
# multiprocessor. By measurement: docs/kernels/resident.md.
KEYS_OF_WORK_TILE, MIN_PAIRS = 256, 4


def takes(kernels: KernelFamily, problem: Problem) -> bool:
    """Whether the kernels can compute the call, if its rows turn out to be aligned."""
    known = problem.mask_kind in kernels.masks and not problem.causal and problem.dtype == kernels.dtype
    return known and _holds(kernels, problem.head_dim, problem.len_kv)


def pays(kernels: KernelFamily, problem: Problem, multiprocessors: int) -> bool:
    """Whether quantising K and V once for each CTA takes less than two launches that do it once."""
    if problem.varlen:
        return problem.batch * problem.heads_kv >= MIN_PAIRS * multiprocessors
    return _has_work(kernels, Form.of(problem), multiprocessors)


def computes(kernels: KernelFamily, form: Form, multiprocessors: int) -> bool:
    """Whether they take a dense call and pay, as the two before; of either 16-bit dtype there are kernels."""
    return (
        form.mask == "none" and form.itemsize == ITEMSIZE
        and _holds(kernels, form.head_dim, form.len_kv) and _has_work(kernels, form, multiprocessors)
    )  # fmt: skip


def _holds(kernels: KernelFamily, head_dim: int, keys: int) -> bool:
    padded = pad_head_dim(head_dim)
    return padded in kernels.head_dims and keys <= kernels.most_keys(padded) and head_dim % ROW_PIECE == 0


def _has_work(kernels: KernelFamily, form: Form, multiprocessors: int) -> bool:
    work_tiles = form.heads * -(-form.len_q // find_tile(kernels.tiles, 0, form.kind[0]).block_m)
    return work_tiles >= (form.len_kv / KEYS_OF_WORK_TILE - 1) * multiprocessors
