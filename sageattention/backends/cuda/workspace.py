"""What a problem decides of its launches: grids, splits, the workspace's byte offsets."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...device import capability
from ...numerics.constants import FINITE_MAX, INT8_MAX, LOG2E, SCORE_LIMIT, anchor_stride
from ...planning.plan import WORKSPACE_LIMIT, Plan
from ...planning.problem import Problem
from . import driver
from .launcher import Kernel

KEYS_SHARE = 0.6  # of the multiprocessors' room for blocks: the quantiser of K leaves the rest to the statistics of V,
SPLIT_TOKENS, MAX_SPLITS = (128, 512), 64  # whose blocks have so many tokens each; every block of `values` reads all their results
ALIGN = 256
MAX_RECIPES = 4096
MAX_GRID = 2**31 - 1


@dataclass(frozen=True)
class Workspace:
    """Byte offsets of one group's buffers; `pairs` (batch, kv head) pairs each."""

    kv: int  # [tiles] of the layout's kTileBytes
    v_parts: int  # [splits, 3, D] fp32
    v_parts_done: int  # [splits] int32
    k_scale_parts: int  # [key_runs] fp32
    k_scale_max: int  # int32
    v_amax: int  # [D] fp32
    v_mean: int  # [D] fp32
    v_codes: int  # [D] int32
    anchor: int  # [D] fp32
    partials: int  # of the whole group: [blocks] of Kernels.partial_bytes
    partials_done: int  # [blocks, 2] int32
    size: int


@dataclass(frozen=True)
class Recipe:
    """Everything about a call's launches but its addresses and strides."""

    problem: Problem
    plan: Plan  # kept alive here, so that its id, by which caches find it, stays its own
    keys: Kernel
    values: Kernel
    attend: Kernel
    device: int
    groups: tuple[tuple[int, int], ...]  # (first pair, pairs)
    workspace: Workspace  # for the largest group
    tiles: int
    key_runs: int  # blocks for each pair's keys,
    splits: int  # its values' statistics,
    value_runs: int  # its values
    blocks_q: int
    grid_limit: int  # attention blocks of a launch, where they go on with what is left over
    dones: int  # 0, or the blocks share out by tiles what does not fill a wave, and tell each other by so many words
    keys_tail: tuple  # the parameter structs' ends
    values_tail: tuple
    attend_tail: tuple


_recipes: dict[tuple, Recipe] = {}


def recipe_of(p: Problem, plan: Plan, one_group: bool = False) -> Recipe:
    """The recipe of a call, all heads in one group or in as many as the plan says."""
    key = p, id(plan), one_group
    known = _recipes.get(key)
    if known is None:
        if len(_recipes) >= MAX_RECIPES:
            _recipes.clear()
        known = _recipes[key] = _new_recipe(p, plan, one_group)
    return known


def _new_recipe(p: Problem, plan: Plan, one_group: bool) -> Recipe:
    scheme, names, d = plan.scheme, plan.kernels, plan.head_dim
    card = capability.of_device(p.device, p.device_index)
    quantiser, attention = plan.images
    keys, values = quantiser.entry(names.keys_symbol(d)), quantiser.entry(names.values_symbol(d))
    kernels = (
        driver.kernel(p.device_index, quantiser, keys.symbol, plan.variant.name),
        driver.kernel(p.device_index, quantiser, values.symbol, plan.variant.name),
        driver.kernel(p.device_index, attention, plan.attend, plan.variant.name),
    )
    all_pairs, tiles, tile_bytes = p.batch * p.heads_kv, -(-p.len_kv // plan.tile.block_n), names.tile_bytes(d)
    pairs = all_pairs if one_group else plan.heads_per_group
    groups = tuple((first, min(pairs, all_pairs - first)) for first in range(0, all_pairs, pairs))
    step = anchor_stride(p.len_kv)
    keys_all = tiles * plan.tile.block_n
    units = keys_all // names.unit_keys(d), -(-keys_all * scheme.v_bytes // values.threads)
    slots = keys.min_blocks * card.multiprocessors
    key_runs = _runs(pairs, units[0], slots * KEYS_SHARE)
    most, fewest = (min(MAX_SPLITS, -(-p.len_kv // tokens)) for tokens in SPLIT_TOKENS)
    split_tokens = -(-p.len_kv // max(fewest, min(int(slots * (1 - KEYS_SHARE)) // pairs, most)))
    splits = -(-p.len_kv // split_tokens)
    value_runs = _runs(pairs, units[1], values.min_blocks * card.multiprocessors)  # each warp has 32 / v_bytes keys at a time
    blocks_q = -(-p.len_q // plan.tile.block_m)
    limit, partial_bytes = MAX_GRID, 0
    if names.persistent and len(groups) == 1 and p.mask == "none" and not p.causal:
        limit = card.multiprocessors
        items, leftover_tiles = blocks_q * pairs * (p.heads_q // p.heads_kv), 2 * limit * tiles
        if not one_group and items > limit and items % limit and leftover_tiles * limit < 2**32:  # the kernel counts in 32 bits
            partial_bytes = names.partial_bytes(d) * limit
    if tiles * tile_bytes * pairs + partial_bytes > WORKSPACE_LIMIT["cuda"]:
        partial_bytes = 0
    dones = 2 * limit if partial_bytes else 0
    return Recipe(
        p, plan, *kernels, p.device_index, groups,
        _workspace(pairs, (tiles * tile_bytes, splits * 3 * d * 4, splits * 4, key_runs * 4, 4, *[d * 4] * 4), (partial_bytes, dones * 4)),
        tiles, key_runs, splits, value_runs, blocks_q, limit, dones,
        (tiles, tile_bytes, key_runs, -(-p.len_kv // step), step, dones, splits, split_tokens),
        (key_runs, splits, tiles, value_runs, scheme.v_mean, scheme.v_max),
        (
            min(abs(p.sm_scale) * LOG2E * 4 * d / INT8_MAX, FINITE_MAX), math.copysign(1.0, p.sm_scale),
            max(-FINITE_MAX, min(p.sm_scale, FINITE_MAX)), SCORE_LIMIT / (INT8_MAX**2 * d), 1 / scheme.v_max, math.log2(scheme.p_max),
            scheme.slack,
        ),
    )  # fmt: skip


def _runs(pairs: int, units: int, slots: float) -> int:
    """Blocks per pair of a quantising launch: whole waves, each block paying about two units to start."""
    length = min(range(1, units + 1), key=lambda n: -(-pairs * -(-units // n) // slots) * (n + 2))
    return -(-units // length)


def _workspace(pairs: int, each: tuple[int, ...], once: tuple[int, ...]) -> Workspace:
    """Buffers of so many bytes for each pair, then others."""
    offsets = [0]
    for size in *(pairs * size for size in each), *once:
        offsets.append(offsets[-1] + -(-size // ALIGN) * ALIGN)
    return Workspace(*offsets)
