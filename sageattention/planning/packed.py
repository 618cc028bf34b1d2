"""Packed sequences: what is computed at once, and how much memory that takes, from what the host knows without reading an offset."""

from __future__ import annotations

from typing import NamedTuple

from .plan import CudaPlan
from .problem import Problem

MIN_RUN_KEYS, MAX_RUN_KEYS = 128, 512  # keys of a run, about: what a block quantises of a head of a sequence
MAX_RUNS = 64  # of the longest sequence; every block reads the statistics of all runs of its sequence


class PackedProblem(NamedTuple):
    """A call of packed sequences. `problem.batch` is how many, `len_q` and `len_kv` are the longest lengths that there may be."""

    problem: Problem
    total_q: int
    total_k: int


class PackedShape(NamedTuple):
    """How a call is cut into groups of (sequence, KV head) pairs. Blocks, tiles and runs are those of one head in a group, at most."""

    sequences: int  # of a group
    heads: int  # KV heads of a group
    run_keys: int
    q_blocks: int
    kv_tiles: int
    runs: int
    alive: int  # groups that exist at once: one is quantised while another one is attended, or one after the other


def packed_shape(packed: PackedProblem, plan: CudaPlan, quantizer_blocks: int) -> PackedShape:
    """The shape of a call.

    All of it is one group, if the workspace has room for its K and V; else some heads of all sequences; else, where even one head is too
    much, some sequences. One head of the longest sequence is taken at least.

    Args:
        quantizer_blocks: how many blocks that quantise K the card holds at a time.
    """
    p, tile = packed.problem, plan.tile
    run_keys = _run_keys(packed, tile.block_n, quantizer_blocks)

    def shape(sequences: int, heads: int, alive: int = 1) -> PackedShape:
        def most(total: int, longest: int, tokens: int) -> int:  # pieces of `tokens`, of which a sequence's last one may be shorter
            return min(sequences * -(-longest // tokens), total // tokens + sequences)

        return PackedShape(
            sequences, heads, run_keys, most(packed.total_q, p.len_q, tile.block_m), most(packed.total_k, p.len_kv, tile.block_n),
            most(packed.total_k, p.len_kv, run_keys), alive,
        )  # fmt: skip

    def size(sequences: int, heads: int) -> int:
        return group_bytes(shape(sequences, heads), plan)

    limit, alive = CudaPlan.WORKSPACE_LIMIT, CudaPlan.GROUPS_ALIVE
    if size(p.batch, p.heads_kv) <= limit:
        return shape(p.batch, p.heads_kv)
    if size(p.batch, 1) <= limit // alive:
        return shape(p.batch, _even_share(p.heads_kv, limit // alive, size(p.batch, 1)), alive)
    if size(p.batch, 1) <= limit:
        return shape(p.batch, 1)
    heads = _even_share(p.heads_kv, limit, size(1, 1))
    return shape(_even_share(p.batch, limit, size(1, heads)), heads)


def _even_share(count: int, limit: int, each: int) -> int:
    """Of `count` things of so many bytes, how many are in a group of at most `limit`; groups are of even size."""
    groups = -(-count // max(1, limit // each))
    return -(-count // groups)


def _run_keys(packed: PackedProblem, tile: int, quantizer_blocks: int) -> int:
    """Whole tiles: enough runs to fill the card twice, if they do not get too short for that."""
    p = packed.problem
    wanted = max(MIN_RUN_KEYS, min(MAX_RUN_KEYS, packed.total_k * p.heads_kv // (2 * quantizer_blocks)), -(-p.len_kv // MAX_RUNS))
    return -(-wanted // tile) * tile


def buffers(shape: PackedShape, plan: CudaPlan) -> tuple[int, ...]:
    """Bytes of each buffer of `Workspace` for one KV head of a group."""
    d, runs, sequences = plan.head_dim, shape.runs, shape.sequences
    return (
        shape.kv_tiles * plan.kernels.tile_bytes(d), runs * 3 * d * 4, runs * 4, 0, runs * 4, sequences * 4, sequences * 4,
        *[sequences * d * 4] * 4,
    )  # fmt: skip


def group_bytes(shape: PackedShape, plan: CudaPlan) -> int:
    """Bytes that a group's quantised K and V and their statistics take, at most."""
    return shape.heads * sum(buffers(shape, plan))
