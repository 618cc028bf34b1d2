"""What a problem decides of its launches: grids, splits, the workspace's byte offsets."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...device import capability
from ...kernels.table import CLASSIFY
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
    v_parts_live: int  # [splits] int32
    k_scale_parts: int  # [key_runs] fp32
    k_scale_max: int  # int32
    live_keys: int  # fp32
    v_amax: int  # [D] fp32
    v_mean: int  # [D] fp32
    v_codes: int  # [D] int32
    anchor: int  # [D] fp32
    partials: int  # of the whole group: [blocks] of Kernels.partial_bytes
    partials_done: int  # [blocks, 2] int32, and behind them the number of the next item
    size: int


@dataclass(frozen=True)
class Recipe:
    """Everything about a call's launches but its addresses and strides."""

    problem: Problem
    plan: Plan  # kept alive here, so that its id, by which caches find it, stays its own
    classify: Kernel | None  # where there is a mask
    keys: Kernel
    values: Kernel
    attend: Kernel
    device: int
    groups: tuple[tuple[int, int], ...]  # (first pair, pairs)
    workspace: Workspace  # for the largest group
    len_kv: int  # keys that any query may reach
    tiles: int
    key_runs: int  # blocks for each pair's keys,
    splits: int  # its values' statistics,
    value_runs: int  # its values
    blocks_q: int
    grid_limit: int  # attention blocks of a launch, where they go on with what is left over
    shares: bool  # the blocks share out what does not fill a wave
    dones: int  # words of partials_done
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
    masked = p.mask != "none"
    keys, values = quantiser.entry(names.keys_symbol(d, masked)), quantiser.entry(names.values_symbol(d))
    kernels = (
        driver.kernel(p.device_index, quantiser, CLASSIFY.symbol, plan.variant.name) if masked else None,
        driver.kernel(p.device_index, quantiser, keys.symbol, plan.variant.name),
        driver.kernel(p.device_index, quantiser, values.symbol, plan.variant.name),
        driver.kernel(p.device_index, attention, plan.attend, plan.variant.name),
    )
    # Causal: nobody sees a key beyond the last query. Keys that were quantised before the queries were known are there all the same.
    len_kv = min(p.len_kv, p.len_q) if p.causal and not one_group else p.len_kv
    all_pairs, tiles, tile_bytes = p.batch * p.heads_kv, -(-len_kv // plan.tile.block_n), names.tile_bytes(d)
    pairs = all_pairs if one_group else plan.heads_per_group
    groups = tuple((first, min(pairs, all_pairs - first)) for first in range(0, all_pairs, pairs))
    step = anchor_stride(len_kv)
    keys_all = tiles * plan.tile.block_n
    units = keys_all // names.unit_keys(d), -(-keys_all * scheme.v_bytes // values.threads)
    slots = keys.min_blocks * card.multiprocessors
    key_runs = _runs(pairs, units[0], slots * KEYS_SHARE)
    most, fewest = (min(MAX_SPLITS, -(-len_kv // tokens)) for tokens in SPLIT_TOKENS)
    split_tokens = -(-len_kv // max(fewest, min(int(slots * (1 - KEYS_SHARE)) // pairs, most)))
    splits = -(-len_kv // split_tokens)
    value_runs = _runs(pairs, units[1], values.min_blocks * card.multiprocessors)  # each warp has 32 / v_bytes keys at a time
    blocks_q = -(-p.len_q // plan.tile.block_m)
    limit, shares, dones = MAX_GRID, False, 0
    if names.persistent and len(groups) == 1:
        limit = card.multiprocessors
        items = blocks_q * pairs * (p.heads_q // p.heads_kv)
        if not one_group:
            dones = 2 * limit + 1
            # Causal items are dealt out longest first, which leaves nothing to share. A block waits for another one's part.
            shares = items > limit > 1 and items % limit > 0 and not (p.causal and not masked)
            shares = shares and tiles * tile_bytes * pairs + names.partial_bytes(d) * limit <= WORKSPACE_LIMIT["cuda"]
    return Recipe(
        p, plan, *kernels, p.device_index, groups,
        _workspace(
            pairs, (tiles * tile_bytes, splits * 3 * d * 4, splits * 4, splits * 4, key_runs * 4, 4, 4, *[d * 4] * 4),
            (names.partial_bytes(d) * limit if shares else 0, dones * 4),
        ),
        len_kv, tiles, key_runs, splits, value_runs, blocks_q, limit, shares, dones,
        (tiles, tile_bytes, key_runs, -(-len_kv // step), step, dones, splits, split_tokens),
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
