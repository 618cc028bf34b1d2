"""What a problem decides of its launches: grids, splits, the workspace's byte offsets."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...device import capability
from ...kernels.binaries import Image
from ...kernels.table import CLASSIFY
from ...numerics.constants import FINITE_MAX, LOG2E, MOST_LIVE_KEYS, QK_MAX, SCORE_LIMIT, k_mean_stride
from ...numerics.live_keys import reachable
from ...planning.plan import CudaPlan
from ...planning.problem import Problem
from ...planning.tile_lists import tile_list_shape
from . import driver
from .launcher import Kernel

QUANTIZE_K_SHARE = 0.6  # share of resident CTAs that quantise K; the rest compute V's statistics
V_CHUNK_TOKENS, MAX_V_CHUNKS = (128, 512), 64  # tokens of a chunk of V's statistics; every CTA of quantize_v reads all chunks' results
ALIGN = 256
MAX_GRID = 2**31 - 1


@dataclass(frozen=True)
class Workspace:
    """Byte offsets of one group's buffers, most of them for each of its (batch, kv head) pairs."""

    kv: int  # [tiles] of the layout's kTileBytes
    v_stats: int  # [v_chunks, 3, D] fp32
    v_stats_ready: int  # [v_chunks] int32
    v_stats_live: int  # [v_chunks] int32
    k_scale_partial: int  # [k_ctas_per_head] fp32
    k_scale_max: int  # int32
    live_keys: int  # fp32
    v_amax: int  # [D] fp32
    v_mean: int  # [D] fp32
    v_quant_sum: int  # [D] int32
    k_mean: int  # [D] fp32
    split_kv_workspace: int  # of the whole group: [CTAs] of KernelFamily.split_kv_bytes
    split_kv_ready: int  # [CTAs, 2] int32, then the scheduler's counter
    size: int


@dataclass(frozen=True, kw_only=True)
class AttendPlan:
    """Everything about a call's attention launches but their addresses and strides."""

    problem: Problem
    plan: CudaPlan
    attend: Kernel
    device: int
    groups: tuple[tuple[int, int], ...]  # (first, count) of (batch, kv head) pairs
    workspace: Workspace  # for the largest group
    len_kv: int  # keys that any query may reach
    tiles: int
    q_tiles: int
    grid_limit: int  # most CTAs of an attention launch; persistent kernels have one a multiprocessor
    shares: bool  # work tiles that do not fill a wave are split among all CTAs
    split_kv_flags: int  # words of split_kv_ready, which quantize_k sets to 0
    attend_tail: tuple  # the parameter struct's end


@dataclass(frozen=True, kw_only=True)
class LaunchPlan(AttendPlan):
    """The same of all launches of a call that quantises K and V first."""

    classify: Kernel | None  # where there is a mask
    quantize_k: Kernel
    quantize_v: Kernel
    k_ctas_per_head: int  # CTAs of a (batch, kv head) pair that quantise K,
    v_chunks: int  # that compute V's statistics,
    v_ctas_per_head: int  # that quantise V
    quantize_k_tail: tuple  # the parameter structs' ends
    quantize_v_tail: tuple


@functools.lru_cache(maxsize=4096)
def launch_plan_of(p: Problem, plan: CudaPlan, one_group: bool = False, sparse: bool = False) -> LaunchPlan:
    """The launches of a call, all heads in one group or in as many as the plan says; `sparse`: by lists and a k_mean that are given.

    Raises:
        KernelMissing: a kernel can't be loaded.
    """
    scheme, names, d = plan.scheme, plan.kernels, plan.head_dim
    card = capability.of_device(p.device, p.device_index)
    quantizer, attention = plan.images
    masked = p.mask != "none"
    live = masked or sparse
    kind = "live" if live else "all"
    quantize_k, quantize_v = quantizer.entry(names.quantize_k_symbol(d, kind)), quantizer.entry(names.quantize_v_symbol(d, kind))

    def kernel(image: Image, symbol: str) -> Kernel:
        return driver.kernel(p.device_index, image, symbol, plan.variant.name)

    # Causal: nobody sees a key beyond the last query. Keys that were quantised before the queries were known are there all the same.
    len_kv = reachable(p.len_q, p.len_kv, p.causal and not one_group and not sparse)
    bh_total, tiles, tile_bytes = p.batch * p.heads_kv, -(-len_kv // plan.tile.block_n), names.tile_bytes(d)
    bh_count = bh_total if one_group else min(bh_total, plan.heads_per_group)  # a part of a call has fewer
    groups = tuple((first, min(bh_count, bh_total - first)) for first in range(0, bh_total, bh_count))
    step = k_mean_stride(len_kv)
    keys_all = tiles * plan.tile.block_n
    units = keys_all // names.scale_block_keys(d), -(-keys_all * scheme.v_bits // (8 * quantize_v.threads))
    slots = quantize_k.min_blocks * card.multiprocessors
    k_ctas_per_head = _runs(bh_count, units[0], slots * QUANTIZE_K_SHARE)
    if live:
        k_ctas_per_head = max(k_ctas_per_head, -(-units[0] // (MOST_LIVE_KEYS // names.scale_block_keys(d))))
    most, fewest = (min(MAX_V_CHUNKS, -(-len_kv // tokens)) for tokens in V_CHUNK_TOKENS)
    v_chunk_tokens = -(-len_kv // max(fewest, min(int(slots * (1 - QUANTIZE_K_SHARE)) // bh_count, most)))
    v_chunk_tokens = min(v_chunk_tokens, MOST_LIVE_KEYS) if live else v_chunk_tokens
    v_chunks = -(-len_kv // v_chunk_tokens)
    v_ctas_per_head = _runs(bh_count, units[1], quantize_v.min_blocks * card.multiprocessors)  # a warp has 256 / v_bits keys at a time
    q_tiles = -(-p.len_q // plan.tile.block_m)
    limit, shares, split_kv_flags, split_kv_bytes = MAX_GRID, False, 0, 0
    if names.split_kv_bytes is not None and len(groups) == 1:
        limit = card.multiprocessors
        items = q_tiles * bh_count * (p.heads_q // p.heads_kv)
        if not one_group:
            split_kv_flags = 2 * limit + 1
            # Causal items are dealt out longest first, which leaves nothing to share. A block waits for another one's part.
            shares = items > limit > 1 and items % limit > 0 and not (p.causal and not live)
            lists = tile_list_shape(p, len_kv, plan.tile.block_n).size if masked else 0
            split_kv_bytes = names.split_kv_bytes(d) * limit
            shares = shares and tiles * tile_bytes * bh_count + split_kv_bytes + lists <= CudaPlan.WORKSPACE_LIMIT
    return LaunchPlan(
        problem=p, plan=plan, device=p.device_index, groups=groups,
        classify=kernel(quantizer, CLASSIFY.symbol) if masked else None,
        quantize_k=kernel(quantizer, quantize_k.symbol), quantize_v=kernel(quantizer, quantize_v.symbol),
        attend=kernel(attention, plan.attend),
        workspace=workspace(
            bh_count, (tiles * tile_bytes, v_chunks * 3 * d * 4, v_chunks * 4, v_chunks * 4, k_ctas_per_head * 4, 4, 4, *[d * 4] * 4),
            (split_kv_bytes if shares else 0, split_kv_flags * 4),
        ),
        len_kv=len_kv, tiles=tiles, k_ctas_per_head=k_ctas_per_head, v_chunks=v_chunks, v_ctas_per_head=v_ctas_per_head,
        q_tiles=q_tiles, grid_limit=limit, shares=shares, split_kv_flags=split_kv_flags,
        quantize_k_tail=(
            tiles, tile_bytes, k_ctas_per_head, sparse, -(-len_kv // step), step, split_kv_flags, v_chunks, v_chunk_tokens,
        ),
        quantize_v_tail=(k_ctas_per_head, v_chunks, tiles, v_ctas_per_head, 0, scheme.v_mean, scheme.v_max),
        attend_tail=attend_tail(p, plan),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def resident_plan_of(p: Problem, plan: CudaPlan, pairs: int = 0) -> AttendPlan:
    """The launch of a call whose K and V stay in shared memory, which takes no workspace; `pairs`: of a packed one, its (sequence, KV head)
    pairs.

    Raises:
        KernelMissing: the kernel can't be loaded.
    """
    multiprocessors = capability.of_device(p.device, p.device_index).multiprocessors
    return AttendPlan(
        problem=p, plan=plan, attend=driver.kernel(p.device_index, plan.images[1], plan.attend, plan.variant.name), device=p.device_index,
        groups=((0, p.batch * p.heads_kv),), workspace=workspace(0, (0,) * 11, (0, 0)), len_kv=p.len_kv,
        tiles=-(-p.len_kv // plan.tile.block_n), q_tiles=-(-p.len_q // plan.tile.block_m),
        grid_limit=min(multiprocessors, pairs or multiprocessors), shares=False, split_kv_flags=0, attend_tail=attend_tail(p, plan),
    )  # fmt: skip


def attend_tail(p: Problem, plan: CudaPlan) -> tuple:
    """The numbers that an attention kernel scales by: the end of its parameters."""
    scheme, d, qk_max = plan.scheme, plan.head_dim, QK_MAX[plan.scheme.qk]
    return (
        min(abs(p.sm_scale) * LOG2E * 4 * d / qk_max, FINITE_MAX), math.copysign(1.0, p.sm_scale),
        max(-FINITE_MAX, min(p.sm_scale, FINITE_MAX)), SCORE_LIMIT / (qk_max**2 * d), 1 / scheme.v_max, math.log2(scheme.p_max),
        scheme.rescale_threshold,
    )  # fmt: skip


def _runs(bh_count: int, units: int, slots: float) -> int:
    """Blocks per pair of a quantising launch: whole waves, each block paying about two units to start."""
    length = min(range(1, units + 1), key=lambda n: -(-bh_count * -(-units // n) // slots) * (n + 2))
    return -(-units // length)


def workspace(bh_count: int, each: tuple[int, ...], once: tuple[int, ...]) -> Workspace:
    """Buffers of so many bytes for each pair, then others."""
    offsets = [0]
    for size in *(bh_count * size for size in each), *once:
        offsets.append(offsets[-1] + -(-size // ALIGN) * ALIGN)
    return Workspace(*offsets)
