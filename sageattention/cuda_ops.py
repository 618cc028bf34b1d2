"""Host side of the CUDA variants: workspace, groups of heads, launches.

What depends on the problem alone is worked out once (`_recipe`) and cached; a call packs three parameter structs, allocates the
output and one workspace, and hands all its launches to the driver at once.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch

from . import capability, driver
from .launcher import Kernel
from .params import AttendParams, QuantiseParams, StatsParams, packer
from .plan import Plan
from .problem import Problem
from .result import Result, result_like
from .variants import (
    FINITE_MAX,
    INT8_MAX,
    LOG2E,
    SCORE_LIMIT,
    anchor_stride,
    stats_symbol,
)

STATS_MIN_TOKENS = 256  # a block's share of V is at least this
ANCHOR_SPLITS = 8  # blocks that share the sum of K's sample
ALIGN = 256
MAX_RECIPES = 4096

_DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
_MASK_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.bool: 3}
_pack_stats, _pack_quantise, _pack_attend = (packer(p) for p in (StatsParams, QuantiseParams, AttendParams))


@dataclass(frozen=True)
class Workspace:
    """Byte offsets of one group's buffers; `pairs` (batch, kv head) pairs each."""

    kv: int  # [tiles] of the layout's kTileBytes
    v_amax_parts: int  # [splits, D] fp32
    k_mean_parts: int  # [k_splits, D] fp32
    k_scale_max: int  # int32
    v_amax: int  # [D] fp32
    v_mean: int  # [D] fp32
    anchor: int  # [D] fp32
    size: int


@dataclass(frozen=True)
class Recipe:
    """Everything about a call's launches but its addresses and strides."""

    stats: Kernel
    quantise: Kernel
    attend: Kernel
    device: int
    groups: tuple[tuple[int, int], ...]  # (first pair, pairs)
    workspace: Workspace  # for the largest group
    tiles: int
    splits: int
    split_tokens: int
    k_splits: int
    samples: int
    sample_step: int
    runs: int  # blocks of the quantise launch for each pair
    blocks_q: int
    element: int  # bytes
    constants: tuple  # the attention struct's tail


@dataclass(frozen=True)
class QuantizedKV:
    """K and V of all heads, in the layout of the plan's kernels. Owns no float tensor of the caller's.

    `problem` is the call that K and V were checked as.
    """

    problem: Problem
    plan: Plan
    buffer: torch.Tensor
    layout: Workspace


def run(call) -> Result:
    """Quantise and attend."""
    p = call.problem
    out, lse = result_like(call.q, p)
    recipe = _recipe(p, call.plan)
    layout = recipe.workspace
    ring = torch.empty(layout.size * min(2, len(recipe.groups)), dtype=torch.uint8, device=call.q.device)
    k, v = _tokens(call.k, p), _tokens(call.v, p)
    q, to = _tokens(call.q, p), _tokens(out, p)
    lse_data, mask = 0 if lse is None else lse.data_ptr(), _mask(call.mask, p)
    vectors = _aligned(recipe, p, k, v), _aligned(recipe, p, q), _aligned(recipe, p, to)
    chains = []
    for number, (first, pairs) in enumerate(recipe.groups):
        base = ring.data_ptr() + number % 2 * layout.size
        chains.append(
            (*_quantise_launches(recipe, p, call.plan, layout, base, k, v, vectors[0], first, pairs),
             _attend_launch(recipe, p, layout, base, q, to, lse_data, mask, vectors[1], vectors[2], first, pairs))
        )  # fmt: skip
    _issue(recipe.device, chains)
    return out, lse


def quantize(k: torch.Tensor, v: torch.Tensor, problem: Problem, plan: Plan) -> QuantizedKV:
    """Quantise K and V, all heads in one group."""
    recipe = _recipe(problem, plan, True)
    buffer = torch.empty(recipe.workspace.size, dtype=torch.uint8, device=k.device)
    k_tokens, v_tokens = _tokens(k, problem), _tokens(v, problem)
    vectors = _aligned(recipe, problem, k_tokens, v_tokens)
    (first, pairs), base = recipe.groups[0], buffer.data_ptr()
    launches = _quantise_launches(recipe, problem, plan, recipe.workspace, base, k_tokens, v_tokens, vectors, first, pairs)
    driver.launch(recipe.device, torch._C._cuda_getCurrentRawStream(recipe.device), launches)
    return QuantizedKV(problem, plan, buffer, recipe.workspace)


def attend_all(q: torch.Tensor, kv: QuantizedKV, problem: Problem, mask: torch.Tensor | None) -> Result:
    """Attend every head of `q` to K and V that were quantised before."""
    out, lse = result_like(q, problem)
    recipe = _recipe(problem, kv.plan, True)
    q_tokens, to = _tokens(q, problem), _tokens(out, problem)
    launch = _attend_launch(
        recipe, problem, kv.layout, kv.buffer.data_ptr(), q_tokens, to, 0 if lse is None else lse.data_ptr(), _mask(mask, problem),
        _aligned(recipe, problem, q_tokens), _aligned(recipe, problem, to), *recipe.groups[0],
    )  # fmt: skip
    driver.launch(recipe.device, torch._C._cuda_getCurrentRawStream(recipe.device), ((*launch[:5], False),))
    return out, lse


# --- launches ---------------------------------------------------------------------------------------------------------------------


def _quantise_launches(
    r: Recipe, p: Problem, plan: Plan, w: Workspace, base: int, k: tuple, v: tuple, vectors: int, first: int, pairs: int
):  # fmt: skip
    shape = first, pairs, p.heads_kv, p.len_kv, p.head_dim, _DTYPES[p.dtype], vectors
    stats = _pack_stats(
        *k, *v, base + w.v_amax_parts, base + w.k_mean_parts, base + w.k_scale_max, *shape,
        r.splits, r.split_tokens, r.k_splits, r.samples, r.sample_step,
    )  # fmt: skip
    quantise = _pack_quantise(
        *k, *v, base + w.v_amax_parts, base + w.k_mean_parts, base + w.kv, base + w.k_scale_max, base + w.v_amax, base + w.v_mean,
        base + w.anchor, *shape,
        r.splits, r.k_splits, r.tiles, r.runs, plan.scheme.v_max,
    )  # fmt: skip
    return (r.stats, pairs * r.splits, 1, 1, stats, False), (r.quantise, pairs * r.runs, 1, 1, quantise, True)


def _attend_launch(
    r: Recipe, p: Problem, w: Workspace, base: int, q: tuple, out: tuple, lse: int, mask: tuple, q_vectors: int, out_vectors: int,
    first: int, pairs: int,
):  # fmt: skip
    ratio = p.heads_q // p.heads_kv
    params = _pack_attend(
        *q, base + w.kv, base + w.k_scale_max, base + w.v_amax, base + w.v_mean, base + w.anchor, *mask[:5], *out, lse,
        first, pairs, p.heads_kv, ratio, p.len_q, p.len_kv, p.head_dim, _DTYPES[p.dtype], q_vectors, out_vectors,
        p.causal, mask[5], r.tiles, r.blocks_q, *r.constants,
    )  # fmt: skip
    return r.attend, r.blocks_q * pairs * ratio, 1, 1, params, True


def _issue(device: int, chains: list) -> None:
    """Run the groups' launches. Several groups alternate between the caller's stream and a second one, so that a group is quantised,
    and its first blocks start, while the last blocks of the one before still run."""
    stream = torch._C._cuda_getCurrentRawStream(device)
    if len(chains) == 1:
        driver.launch(device, stream, chains[0])
        return
    with torch.cuda.device(device):
        own, side = torch.cuda.current_stream(device), _side_stream(device)
        side.wait_stream(own)
        for number, chain in enumerate(chains):
            driver.launch(device, side.cuda_stream if number % 2 else stream, chain)
        own.wait_stream(side)


_threads = threading.local()


def _side_stream(device: int) -> torch.cuda.Stream:
    """This thread's second stream on a device. One per thread: another thread's stream may be under capture."""
    streams = _threads.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


# --- what a tensor contributes ----------------------------------------------------------------------------------------------------


def _tokens(t: torch.Tensor, p: Problem) -> tuple[int, int, int, int]:
    """(address, batch, head and token stride), the `Tokens` struct."""
    b, x, y, _ = t.stride()
    return (t.data_ptr(), b, y, x) if p.layout == "NHD" else (t.data_ptr(), b, x, y)


def _aligned(r: Recipe, p: Problem, *tensors: tuple[int, int, int, int]) -> int:
    """1 where rows can be moved in pieces of 16 bytes."""
    if p.head_dim % 8:
        return 0
    bits = 0
    for data, b, h, n in tensors:
        bits |= data | (b | h | n) * r.element
    return int(bits % 16 == 0)


def _mask(mask: torch.Tensor | None, p: Problem) -> tuple[int, int, int, int, int, int]:
    """(address, four strides, kind) of a 4-D mask; 0 strides where it broadcasts."""
    if mask is None:
        return 0, 0, 0, 0, 0, 0
    strides = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
    return mask.data_ptr(), *strides, _MASK_KINDS[mask.dtype]


# --- what the problem decides -----------------------------------------------------------------------------------------------------


_recipes: dict[tuple, tuple[Plan, Recipe]] = {}  # the plan is kept alive, so that its id stays its own


def _recipe(p: Problem, plan: Plan, one_group: bool = False) -> Recipe:
    key = p, id(plan), one_group
    known = _recipes.get(key)
    if known is None:
        if len(_recipes) >= MAX_RECIPES:
            _recipes.clear()
        known = _recipes[key] = plan, _new_recipe(p, plan, one_group)
    return known[1]


def _new_recipe(p: Problem, plan: Plan, one_group: bool) -> Recipe:
    scheme, names, d = plan.scheme, plan.kernels, plan.head_dim
    card = capability.of_device(p.device, p.device_index)
    quantiser, image = plan.images
    kernels = (
        driver.kernel(p.device_index, quantiser, stats_symbol(d), plan.variant.name),
        driver.kernel(p.device_index, quantiser, names.quantise_symbol(d), plan.variant.name),
        driver.kernel(p.device_index, image, plan.attend, plan.variant.name),
    )
    all_pairs, tiles = p.batch * p.heads_kv, -(-p.len_kv // plan.tile.block_n)
    pairs = all_pairs if one_group else plan.heads_per_group
    groups = tuple((first, min(pairs, all_pairs - first)) for first in range(0, all_pairs, pairs))
    splits = max(1, min(4 * card.multiprocessors // pairs, -(-p.len_kv // STATS_MIN_TOKENS)))
    split_tokens = -(-p.len_kv // splits)
    splits = -(-p.len_kv // split_tokens)
    step = anchor_stride(p.len_kv)
    samples = -(-p.len_kv // step)
    k_splits = min(splits, ANCHOR_SPLITS, samples)
    slots = quantiser.entry(names.quantise_symbol(d)).min_blocks * card.multiprocessors
    return Recipe(
        *kernels, p.device_index, groups, _workspace(pairs, tiles * names.tile_bytes(d), splits, k_splits, d),
        tiles, splits, split_tokens, k_splits, samples, step, _runs(pairs, tiles, slots),
        -(-p.len_q // plan.tile.block_m), 4 if p.dtype == "float32" else 2,
        (
            min(abs(p.sm_scale) * LOG2E * 4 * d / INT8_MAX, FINITE_MAX), math.copysign(1.0, p.sm_scale),
            max(-FINITE_MAX, min(p.sm_scale, FINITE_MAX)), SCORE_LIMIT / (INT8_MAX**2 * d), 1 / scheme.v_max, math.log2(scheme.p_max),
            scheme.slack,
        ),
    )  # fmt: skip


def _runs(pairs: int, tiles: int, slots: int) -> int:
    """Blocks per pair of the quantise launch: whole waves, each block paying about a tile and a half to start."""
    length = min(range(1, tiles + 1), key=lambda n: -(-pairs * -(-tiles // n) // slots) * (n + 1.5))
    return -(-tiles // length)


def _workspace(pairs: int, pair_bytes: int, splits: int, k_splits: int, d: int) -> Workspace:
    sizes = pair_bytes, splits * d * 4, k_splits * d * 4, 4, d * 4, d * 4, d * 4
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-pairs * size // ALIGN) * ALIGN)
    return Workspace(*offsets)
