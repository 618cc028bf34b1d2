"""What a problem decides of its launches: grids, splits, the workspace's byte offsets."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...device import capability
from ...numerics.constants import FINITE_MAX, LOG2E, QK_MAX, SCORE_LIMIT, k_mean_stride
from ...planning.plan import CudaPlan
from ...planning.problem import Problem
from . import driver
from .launcher import Kernel

QUANTIZE_K_SHARE = 0.6  # of the multiprocessors' room for blocks: the quantiser of K leaves the rest to the statistics of V,
V_CHUNK_TOKENS, MAX_V_CHUNKS = (128, 512), 64  # whose blocks have so many tokens each; every block of `values` reads all their results
ALIGN = 256
MAX_GRID = 2**31 - 1


@dataclass(frozen=True)
class Workspace:
    """Byte offsets of one group's buffers; `pairs` (batch, kv head) pairs each."""

    kv: int  # [tiles] of the layout's kTileBytes
    v_stats: int  # [splits, 3, D] fp32
    v_stats_ready: int  # [splits] int32
    k_scale_partial: int  # [k_ctas_per_head] fp32
    k_scale_max: int  # int32
    v_amax: int  # [D] fp32
    v_mean: int  # [D] fp32
    v_quant_sum: int  # [D] int32
    k_mean: int  # [D] fp32
    split_kv_workspace: int  # of the whole group: [blocks] of KernelFamily.split_kv_bytes
    split_kv_ready: int  # [blocks, 2] int32
    size: int


@dataclass(frozen=True)
class LaunchPlan:
    """Everything about a call's launches but its addresses and strides."""

    problem: Problem
    plan: CudaPlan
    keys: Kernel
    values: Kernel
    attend: Kernel
    device: int
    groups: tuple[tuple[int, int], ...]  # (first pair, pairs)
    workspace: Workspace  # for the largest group
    tiles: int
    k_ctas_per_head: int  # blocks for each pair's keys,
    v_chunks: int  # its values' statistics,
    v_ctas_per_head: int  # its values
    q_tiles: int
    grid_limit: int  # attention blocks of a launch, where they go on with what is left over
    split_kv_flags: int  # 0, or the blocks share out by tiles what does not fill a wave, and tell each other by so many words
    quantize_k_tail: tuple  # the parameter structs' ends
    quantize_v_tail: tuple
    attend_tail: tuple


@functools.lru_cache(maxsize=4096)
def launch_plan_of(p: Problem, plan: CudaPlan, one_group: bool = False) -> LaunchPlan:
    """The launches of a call, all heads in one group or in as many as the plan says.

    Raises:
        KernelMissing: a kernel can't be loaded.
    """
    scheme, names, d = plan.scheme, plan.kernels, plan.head_dim
    card = capability.of_device(p.device, p.device_index)
    quantizer, attention = plan.images
    keys, values = quantizer.entry(names.quantize_k_symbol(d)), quantizer.entry(names.quantize_v_symbol(d))
    kernels = (
        driver.kernel(p.device_index, quantizer, keys.symbol, plan.variant.name),
        driver.kernel(p.device_index, quantizer, values.symbol, plan.variant.name),
        driver.kernel(p.device_index, attention, plan.attend, plan.variant.name),
    )
    bh_total, tiles, tile_bytes = p.batch * p.heads_kv, -(-p.len_kv // plan.tile.block_n), names.tile_bytes(d)
    bh_count = bh_total if one_group else plan.heads_per_group
    groups = tuple((first, min(bh_count, bh_total - first)) for first in range(0, bh_total, bh_count))
    step = k_mean_stride(p.len_kv)
    keys_all = tiles * plan.tile.block_n
    units = keys_all // names.scale_block_keys(d), -(-keys_all * scheme.v_bits // (8 * values.threads))
    slots = keys.min_blocks * card.multiprocessors
    k_ctas_per_head = _runs(bh_count, units[0], slots * QUANTIZE_K_SHARE)
    most, fewest = (min(MAX_V_CHUNKS, -(-p.len_kv // tokens)) for tokens in V_CHUNK_TOKENS)
    v_chunk_tokens = -(-p.len_kv // max(fewest, min(int(slots * (1 - QUANTIZE_K_SHARE)) // bh_count, most)))
    v_chunks = -(-p.len_kv // v_chunk_tokens)
    v_ctas_per_head = _runs(bh_count, units[1], values.min_blocks * card.multiprocessors)  # a warp has 256 / v_bits keys at a time
    q_tiles = -(-p.len_q // plan.tile.block_m)
    limit, split_kv_bytes = MAX_GRID, 0
    if names.split_kv_bytes is not None and len(groups) == 1 and p.mask == "none" and not p.causal:
        limit = card.multiprocessors
        items, leftover_tiles = q_tiles * bh_count * (p.heads_q // p.heads_kv), 2 * limit * tiles
        if not one_group and items > limit and items % limit and leftover_tiles * limit < 2**32:  # the kernel counts in 32 bits
            split_kv_bytes = names.split_kv_bytes(d) * limit
    if tiles * tile_bytes * bh_count + split_kv_bytes > CudaPlan.WORKSPACE_LIMIT:
        split_kv_bytes = 0
    split_kv_flags = 2 * limit if split_kv_bytes else 0
    qk_max = QK_MAX[scheme.qk]
    return LaunchPlan(
        p, plan, *kernels, p.device_index, groups,
        _workspace(
            bh_count,
            (tiles * tile_bytes, v_chunks * 3 * d * 4, v_chunks * 4, k_ctas_per_head * 4, 4, *[d * 4] * 4),
            (split_kv_bytes, split_kv_flags * 4),
        ),
        tiles, k_ctas_per_head, v_chunks, v_ctas_per_head, q_tiles, limit, split_kv_flags,
        (tiles, tile_bytes, k_ctas_per_head, -(-p.len_kv // step), step, split_kv_flags, v_chunks, v_chunk_tokens),
        (k_ctas_per_head, v_chunks, tiles, v_ctas_per_head, scheme.v_mean, scheme.v_max),
        (
            min(abs(p.sm_scale) * LOG2E * 4 * d / qk_max, FINITE_MAX), math.copysign(1.0, p.sm_scale),
            max(-FINITE_MAX, min(p.sm_scale, FINITE_MAX)), SCORE_LIMIT / (qk_max**2 * d), 1 / scheme.v_max, math.log2(scheme.p_max),
            scheme.rescale_threshold,
        ),
    )  # fmt: skip


def _runs(bh_count: int, units: int, slots: float) -> int:
    """Blocks per pair of a quantising launch: whole waves, each block paying about two units to start."""
    length = min(range(1, units + 1), key=lambda n: -(-bh_count * -(-units // n) // slots) * (n + 2))
    return -(-units // length)


def _workspace(bh_count: int, each: tuple[int, ...], once: tuple[int, ...]) -> Workspace:
    """Buffers of so many bytes for each pair, then others."""
    offsets = [0]
    for size in *(bh_count * size for size in each), *once:
        offsets.append(offsets[-1] + -(-size // ALIGN) * ALIGN)
    return Workspace(*offsets)
