"""Host side of the CUDA variants: workspace, groups of heads, launches.

What depends on the problem alone is a `LaunchPlan`, what strides and alignment add to it makes a `BoundCall`; both are worked out once. A
call allocates the output and one workspace, fills addresses into the parameter structs, and hands all its launches to the driver at once.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ... import torch_internals
from ...kernels.params import AttendParams, ClassifyParams, QuantizeKParams, QuantizeVParams, ResidentKv, packer
from ...layout import strides
from ...numerics.constants import BAND_ROWS, BIAS_ROW, DTYPES, MASK_KINDS
from ...planning.plan import CudaPlan
from ...planning.problem import Problem
from ...planning.tile_lists import WORD_BITS, tile_list_shape
from ..call import PreparedCall, QuantizedKV, Result, result_like
from . import driver
from .launcher import Launch
from .workspace import AttendPlan, LaunchPlan, Workspace, launch_plan_of, resident_plan_of

WEIGHED_BYTES = 40 << 20  # of quantised K and V; Hopper's L2 holds 50 MB
# Of classify_mask: a CTA's warps, the keys of a warp at once, 16 a lane; keys of a CTA, and of one whose warps share the rows.
CLASSIFY_WARPS, CLASSIFY_STRIP = 8, 512
CLASSIFY_KEYS, CLASSIFY_ROWS_KEYS = CLASSIFY_WARPS * CLASSIFY_STRIP, 1024
_EACH, _SHIFTED, _ALIGNED = range(3)  # RunLoad
_MASK_KINDS = {getattr(torch, name): number for name, number in MASK_KINDS.items()}
_pack_classify, _classify_constants = packer(ClassifyParams)
_pack_resident_kv, _resident_kv_constants = packer(ResidentKv)
(_pack_quantize_k, _quantize_k_constants), (_pack_quantize_v, _quantize_v_constants), (_pack_attend, _attend_constants) = (
    packer(p) for p in (QuantizeKParams, QuantizeVParams, AttendParams)
)


@dataclass(frozen=True)
class CudaQuantizedKV(QuantizedKV[CudaPlan]):
    """K and V of all heads, in the layout of the plan's kernels."""

    workspace: Workspace | None  # where in the buffer everything lies; None where there is nothing to attend to
    buffer: torch.Tensor


def run(call: PreparedCall[CudaPlan]) -> Result:
    """Quantise and attend."""
    q, k, v, mask, p, bound = call.q, call.k, call.v, call.mask, call.problem, call.bound
    out, lse = call.result()
    q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    mask_at = 0 if mask is None else mask.data_ptr()
    unaligned = (q_at | out_at) % 16, (k_at | v_at) % 16, mask_at % 16
    key = (unaligned, "into q") if call.into_q else unaligned  # the output's strides are q's then
    form = bound.get(key)
    if form is None and call.plan.kernels.resident and rows_aligned(p, max(unaligned), q, k, v, out):
        form = bound[key] = bind_resident(resident_plan_of(p, call.plan), q, k, v, out)
    if isinstance(form, BoundResident):
        launch = resident_launch(form, q_at, k_at, v_at, out_at, 0 if lse is None else lse.data_ptr())
        issue(form.launch_plan.device, [(launch,)])
        return out, lse
    if form is None:
        plan = call.plan.halves or call.plan
        launch_plan = launch_plan_of(p, plan)
        lists = None if mask is None else _lists(launch_plan, mask, unaligned[2], plan.kernels.v_ones)
        form = bound[key] = bind(launch_plan, q, k, v, out, mask, lists, unaligned[:2])
    lists = form.lists
    ring = torch.empty(form.size + (lists.size if lists else 0), dtype=torch.uint8, device=q.device)
    base, lse_at = ring.data_ptr(), 0 if lse is None else lse.data_ptr()
    launch_plan, lists_at = form.launch_plan, base + form.size
    extra = lists.at(lists_at) if lists else Extra()
    first = (_classify_launch(launch_plan, lists, mask_at, lists_at),) if lists else ()
    by_group = chains(form, (base, base + launch_plan.workspace.size), q_at, k_at, v_at, mask_at, extra, out_at, lse_at)
    issue(launch_plan.device, by_group, first)
    return out, lse


def load(problem: Problem, plan: CudaPlan) -> None:
    """Load the kernels of a call, and of its halves."""
    launch_plan_of(problem, plan.halves or plan)
    if plan.kernels.resident:
        resident_plan_of(problem, plan)


def quantize(k: torch.Tensor, v: torch.Tensor, problem: Problem, plan: CudaPlan, mask: torch.Tensor | None) -> CudaQuantizedKV:
    """Quantise K and V, all heads in one group. Keys that the mask hides from every query take no part."""
    plan = plan.halves or plan
    if problem.empty:
        return CudaQuantizedKV(problem, plan, None, torch.empty(0, dtype=torch.uint8, device=k.device))
    launch_plan = launch_plan_of(problem, plan, True)
    buffer = torch.empty(launch_plan.workspace.size, dtype=torch.uint8, device=k.device)
    k_at, v_at = k.data_ptr(), v.data_ptr()
    lists, extra = None, Extra()
    launches: tuple[Launch, ...] = ()
    if mask is not None:
        lists, space, launches = _classify(launch_plan, mask)
        extra = lists.at(space.data_ptr())
    (quantize_bound,) = bind_quantize(launch_plan, k, v, lists, (k_at | v_at) % 16)
    issue(launch_plan.device, [(*launches, *quantize_launches(launch_plan, quantize_bound, buffer.data_ptr(), k_at, v_at, extra))])
    return CudaQuantizedKV(problem, plan, launch_plan.workspace, buffer)


def attend(q: torch.Tensor, kv: CudaQuantizedKV, problem: Problem, mask: torch.Tensor | None) -> Result:
    """Attend every head of `q` to K and V that were quantised before."""
    out, lse = result_like(q, problem)
    launch_plan = launch_plan_of(problem, kv.plan.halves or kv.plan, True)
    q_at, out_at, lse_at = q.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr()
    assert kv.workspace is not None  # an empty call does not come here
    lists, mask_at, extra = None, 0, Extra()
    launches: tuple[Launch, ...] = ()
    if mask is not None:
        lists, space, launches = _classify(launch_plan, mask)
        mask_at, extra = mask.data_ptr(), lists.at(space.data_ptr())
    (attend_bound,) = bind_attend(launch_plan, q, out, mask, lists, (q_at | out_at) % 16)
    launch = attend_launch(launch_plan, attend_bound, kv.workspace, kv.buffer.data_ptr(), q_at, mask_at, extra, out_at, lse_at)
    issue(launch_plan.device, [(*launches, (*launch[:5], False))])  # anything may be ahead of it on the stream
    return out, lse


# --- launches ---------------------------------------------------------------------------------------------------------------------


def _classify(r: LaunchPlan, mask: torch.Tensor) -> tuple[Lists, torch.Tensor, tuple[Launch, ...]]:
    """A mask's lists, memory of their own, and the launches that fill it."""
    at = mask.data_ptr()
    lists = _lists(r, mask, at % 16)
    space = torch.empty(lists.size, dtype=torch.uint8, device=mask.device)
    return lists, space, (_classify_launch(r, lists, at, space.data_ptr()),)


def _classify_launch(r: LaunchPlan, lists: Lists, mask: int, at: int) -> Launch:
    strides, tail = lists.constants
    own = lists.at(at)
    assert r.classify is not None  # the problem has a mask
    return r.classify, lists.blocks, 1, 1, _pack_classify(mask, strides, own.lists, own.live, own.kept, own.bias, tail), False


def chains(
    bound: BoundCall, bases: tuple[int, ...], q: int, k: int, v: int, mask: int, extra: Extra, out: int, lse: int, earlier: int = 0
) -> list[tuple[Launch, ...]]:  # fmt: skip
    """The launches of each group of heads, `earlier` groups being before them. The groups take turns in the workspaces at `bases`."""
    r, turns = bound.launch_plan, itertools.cycle(bases)
    return [
        (*quantize_launches(r, quantize_bound, base, k, v, extra),
         attend_launch(r, attend_bound, r.workspace, base, q, mask, extra, out, lse))
        for quantize_bound, attend_bound, base in zip(
            bound.quantize_bound, bound.attend_bound, itertools.islice(turns, earlier % len(bases), None)
        )
    ]  # fmt: skip


def quantize_launches(r: LaunchPlan, group: BoundQuantize, base: int, k: int, v: int, extra: Extra) -> tuple[Launch, Launch]:
    """The first two launches of a group whose workspace starts at `base`."""
    w, (k_strides, v_strides, quantize_k_tail) = r.workspace, group.k_constants
    kv, k_scale_partial, v_stats, done = base + w.kv, base + w.k_scale_partial, base + w.v_stats, base + w.v_stats_ready
    quantize_k = _pack_quantize_k(
        k, k_strides, v, v_strides, kv, extra.k_mean_of(group) or base + w.k_mean, k_scale_partial, v_stats, done, base + w.v_quant_sum,
        base + w.v_stats_live, base + w.split_kv_ready, extra.order, *extra.packed, extra.live, quantize_k_tail,
    )  # fmt: skip
    quantize_v = _pack_quantize_v(
        v, v_strides, k_scale_partial, v_stats, done, base + w.v_stats_live, kv, base + w.k_scale_max, base + w.v_amax, base + w.v_mean,
        base + w.v_quant_sum, base + w.live_keys, extra.order, *extra.packed, extra.live, group.v_tail,
    )  # fmt: skip
    return (r.quantize_k, group.k_blocks, 1, 1, quantize_k, bool(extra.live)), (r.quantize_v, group.v_blocks, 1, 1, quantize_v, True)


def attend_launch(
    r: AttendPlan, group: BoundAttend, w: Workspace, base: int, q: int, mask: int, extra: Extra, out: int, lse: int
) -> Launch:  # fmt: skip
    q_strides, mask_strides, kept_strides, list_strides, out_strides, tail = group.constants
    done = base + w.split_kv_ready
    params = _pack_attend(
        q, q_strides, base + w.kv, base + w.k_scale_max, base + w.v_amax, base + w.v_mean, base + w.v_quant_sum, base + w.live_keys,
        extra.k_mean_of(group) or base + w.k_mean, base + w.split_kv_workspace if r.shares else 0,
        done, done + 4 * (r.split_kv_flags - 1) if r.split_kv_flags else 0,
        extra.bias or mask, mask_strides, extra.kept, kept_strides, extra.lists, list_strides, extra.order, extra.tail, *extra.packed,
        out, out_strides, lse, tail,
    )  # fmt: skip
    return r.attend, group.blocks, 1, 1, params, True


def resident_launch(
    bound: BoundResident, q: int, k: int, v: int, out: int, lse: int, cu_seqlens: tuple[int, int] = (0, 0)
) -> Launch:  # fmt: skip
    """The only launch of a call whose K and V stay in shared memory; `cu_seqlens`: of a packed one, of the queries and of the keys."""
    r, (k_strides, v_strides, tail) = bound.launch_plan, bound.kv
    kernel, blocks, _, _, params, _ = attend_launch(r, bound.attend, r.workspace, 0, q, 0, Extra(), out, lse)
    return kernel, blocks, 1, 1, _pack_resident_kv(k, k_strides, v, v_strides, *cu_seqlens, tail) + params, False


def issue(device: int, chains: list[tuple[Launch, ...]], first: tuple[Launch, ...] = ()) -> None:
    """Run the groups' launches, after those that all of them wait for. Several groups alternate between the caller's stream and a second
    one, so that a group is quantised, and its first blocks start, while the last blocks of the one before still run."""
    stream = torch_internals.current_stream(device)
    if len(chains) == 1:
        driver.launch(device, stream, (*first, *chains[0]))
        return
    with torch.cuda.device(device):
        if first:
            driver.launch(device, stream, first)
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


# --- what strides and alignment add -----------------------------------------------------------------------------------------------


class Extra(NamedTuple):
    """Addresses that a call with tile lists, or of packed sequences, has beyond a dense one; 0 where there is none."""

    lists: int = 0
    live: int = 0
    kept: int = 0
    order: int = 0
    tail: int = 0
    k_mean: int = 0  # of the first (batch, KV head), where it is given
    k_mean_bytes: int = 0  # of each
    bias: int = 0  # of an additive mask of one row, as the pre-pass leaves it
    packed: tuple[int, int, int, int] = (0, 0, 0, 0)  # PackedSequences

    def k_mean_of(self, group: BoundQuantize | BoundAttend) -> int:
        return self.k_mean + group.first * self.k_mean_bytes


class Lists(NamedTuple):
    """The tile lists of a mask, and which keys are live, but for addresses."""

    blocks: int
    constants: tuple[bytes, ...]  # of the launch that makes them: the mask's strides, the struct's tail
    lists: tuple[int, ...]  # strides, words, band_rows: the end of TileLists
    live_keys: tuple[int, ...]  # the end of LiveKeys
    live: int  # bytes from the lists to those
    kept: int  # … to the mask in bits, 0 where it is additive
    kept_strides: tuple[int, int, int]
    size: int
    bias: int = 0  # … to an additive mask of one row, 0 where there is none
    bias_strides: tuple[int, int, int] = (0, 0, 0)

    def at(self, address: int) -> Extra:
        kept, bias = (address + offset if offset else 0 for offset in (self.kept, self.bias))
        return Extra(address, address + self.live, kept, bias=bias)


class BoundQuantize(NamedTuple):
    """A group's quantising launches but for their addresses."""

    k_blocks: int  # CTAs of quantize_k, those for V's statistics included
    k_constants: tuple[bytes, ...]  # K's strides, V's strides, the struct's tail
    v_blocks: int
    v_tail: bytes  # the struct's tail; V's strides are in `k_constants`
    first: int  # the group's first (batch, KV head)


class BoundAttend(NamedTuple):
    """A group's attention launch but for its addresses."""

    blocks: int
    constants: tuple[bytes, ...]  # q's strides, the mask's, its bits', the lists', the output's, the struct's tail
    first: int  # its first (batch, KV head)


class BoundResident(NamedTuple):
    """A call whose K and V stay in shared memory, but for its addresses."""

    launch_plan: AttendPlan
    kv: tuple[bytes, ...]  # K's strides, V's strides, the struct's tail
    attend: BoundAttend


class BoundCall(NamedTuple):
    """Calls that differ in nothing but addresses."""

    launch_plan: LaunchPlan
    lists: Lists | None
    quantize_bound: tuple[BoundQuantize, ...]  # one for each group of heads
    attend_bound: tuple[BoundAttend, ...]
    size: int  # bytes of workspace


def _mask_strides(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """In elements, 0 where it broadcasts."""
    b, h, q, k = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
    return b, h, q, k


def _runs_of(mask: torch.Tensor, count: int, unaligned: int) -> bool:
    """Whether `count` neighbouring elements of a row can be loaded at once."""
    *rows, stride_k = _mask_strides(mask)
    return stride_k == 1 and not any(s % count for s in rows) and unaligned % (count * mask.element_size()) == 0


def _broadcast_strides(shape: tuple[int, int, int], size: int) -> tuple[int, int, int]:
    """(batch, head, row) strides of contiguous rows of `size` words, 0 where there is one for all."""
    batches, heads, rows = shape
    return heads * rows * size if batches > 1 else 0, rows * size if heads > 1 else 0, size if rows > 1 else 0


def _lists(r: LaunchPlan, mask: torch.Tensor, unaligned: int, v_ones: bool = False) -> Lists:
    """`v_ones`: K and V are quantised by this very mask, for kernels that need no mask for a key which no query of its KV head sees. That
    is all that a mask says which is the same for all queries."""
    p, tile = r.problem, r.plan.tile
    shape = tile_list_shape(p, r.len_kv, tile.block_n)
    batches, heads, mask_rows, bands, words, live_words, is_bool, bias_len = shape
    rows = bands * (p.heads_q // p.heads_kv if heads > 1 else 1)
    # A CTA has some bytes of a band's planes, but for additive masks of many rows, of which it needs each row's largest bias. Of a bool
    # mask its warps share the rows: many small CTAs read faster than few whose warps have strips of their own.
    tiles = -(-r.len_kv // tile.block_n)
    part_bytes, row_groups = 4 * words, 1
    if is_bool and mask_rows > 1:
        part_bytes = max(1, CLASSIFY_ROWS_KEYS // (8 * tile.block_n))
        row_groups = CLASSIFY_WARPS // -(-part_bytes * 8 * tile.block_n // CLASSIFY_STRIP)
    elif is_bool or mask_rows == 1:
        part_bytes = 4 * max(1, CLASSIFY_KEYS // (WORD_BITS * tile.block_n))
    parts = -(-tiles // (8 * part_bytes))
    *_, stride_k = _mask_strides(mask)
    vectors = _ALIGNED if _runs_of(mask, 16 // mask.element_size(), unaligned) else _SHIFTED if stride_k == 1 else _EACH
    absent = v_ones and mask_rows == 1 and not p.causal and (heads == 1 or p.heads_q == p.heads_kv)
    return Lists(
        batches * heads * bands * parts,
        _classify_constants(
            *_mask_strides(mask), heads, bands, p.len_q, r.len_kv, _MASK_KINDS[mask.dtype], p.causal, vectors, absent, tile.block_n,
            words, live_words, bias_len, parts, part_bytes, row_groups,
        ),
        (*_broadcast_strides((batches, heads, bands), 2 * words), words, BAND_ROWS if bands > 1 else 1 << 30),
        (*_broadcast_strides((batches, heads, bands), live_words)[:1], rows * live_words if heads > 1 else 0, rows, live_words),
        shape.list_bytes, shape.mask_offset if is_bool else 0, _broadcast_strides((batches, heads, mask_rows), live_words), shape.size,
        shape.mask_offset if bias_len else 0, _broadcast_strides((batches, heads, 1), bias_len),
    )  # fmt: skip


def bind(
    r: LaunchPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, mask: torch.Tensor | None, lists: Lists | None,
    unaligned: tuple[int, int],
) -> BoundCall:  # fmt: skip
    """All of a call but its addresses; `unaligned`: of q and out, of k and v, the bytes beyond a multiple of 16."""
    return BoundCall(
        r, lists, bind_quantize(r, k, v, lists, unaligned[1]), bind_attend(r, q, out, mask, lists, unaligned[0]),
        r.workspace.size * min(2, len(r.groups)),
    )  # fmt: skip


def bind_quantize(r: LaunchPlan, k: torch.Tensor, v: torch.Tensor, lists: Lists | None, unaligned: int) -> tuple[BoundQuantize, ...]:
    p = r.problem
    k_strides, v_strides = strides(k, p.layout), strides(v, p.layout)
    vectors = rows_vectorized(p, unaligned, k_strides, v_strides)
    live = lists.live_keys if lists else (0, 0, 0, 0)
    groups = []
    for first, bh_count in r.groups:
        shape = first, bh_count, p.heads_kv, r.len_kv, p.head_dim, DTYPES[p.dtype], vectors
        k_constants = _quantize_k_constants(*k_strides, *v_strides, *live, *shape, *r.quantize_k_tail)
        v_constants = _quantize_v_constants(*v_strides, *live, *shape, *r.quantize_v_tail)
        k_blocks, v_blocks = bh_count * (r.k_ctas_per_head + r.v_chunks), bh_count * r.v_ctas_per_head
        groups.append(BoundQuantize(k_blocks, k_constants, v_blocks, v_constants[-1], first))
    return tuple(groups)


def bind_attend(
    r: AttendPlan, q: torch.Tensor, out: torch.Tensor, mask: torch.Tensor | None, lists: Lists | None, unaligned: int
) -> tuple[BoundAttend, ...]:
    p = r.problem
    q_strides, out_strides = strides(q, p.layout), strides(out, p.layout)
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    kind, pairs_at_once, heads_per_kv = _MASK_KINDS[torch.bool], False, p.heads_q // p.heads_kv
    if lists and lists.bias:
        mask_strides, kind = (*lists.bias_strides, 1), BIAS_ROW
    elif mask is not None:
        mask_strides, kind = _mask_strides(mask), _MASK_KINDS[mask.dtype]
        pairs_at_once = r.len_kv % 2 == 0 and _runs_of(mask, 2, mask.data_ptr() % 16)
    vectors = rows_vectorized(p, unaligned, q_strides), rows_vectorized(p, unaligned, out_strides)
    weighed = r.shares and lists is not None and _weighs(r, lists)

    def group(first: int, bh_count: int) -> BoundAttend:
        items = r.q_tiles * bh_count * heads_per_kv
        blocks = min(items, r.grid_limit)
        full_waves = -1 if weighed else items // blocks - 1 if r.shares else -(-items // blocks)
        return BoundAttend(
            blocks,
            _attend_constants(
                *q_strides, *mask_strides, *(lists.kept_strides if lists else (0, 0, 0)), *(lists.lists if lists else (0, 0, 0, 0, 1)),
                *out_strides, first, bh_count, p.heads_kv, heads_per_kv, p.len_q, r.len_kv, p.head_dim,
                DTYPES[p.dtype], *vectors, p.causal, kind, r.tiles, r.q_tiles, full_waves,
                *((2**32 - 1) // d for d in (r.q_tiles, heads_per_kv, p.heads_kv)), *r.attend_tail, pairs_at_once,
            ),
            first,
        )  # fmt: skip

    return tuple(group(*g) for g in r.groups)


def _weighs(r: AttendPlan, lists: Lists) -> bool:
    """Whether all work tiles are shared out by their cost: their lists differ, but not from head to head, and the CTAs, spread over all
    heads then, find K and V in L2."""
    stride_b, stride_h, stride_band, *_ = lists.lists
    return not stride_b and not stride_h and stride_band > 0 and r.workspace.v_stats - r.workspace.kv <= WEIGHED_BYTES


def bind_resident(
    r: AttendPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, packed: tuple[int, ...] = (0,) * 7
) -> BoundResident:
    """As `bind`, of aligned rows; `packed`: the integers of ResidentKv that only a packed call has."""
    kv = _resident_kv_constants(*strides(k, r.problem.layout), *strides(v, r.problem.layout), *packed)
    return BoundResident(r, kv, bind_attend(r, q, out, None, None, 0)[0])


def rows_aligned(p: Problem, unaligned: int, *tensors: torch.Tensor) -> bool:
    """Whether resident kernels can have them: all rows can be moved in pieces of 16 bytes, and are less than 2 GiB apart."""
    rows = [strides(t, p.layout) for t in tensors]
    return bool(rows_vectorized(p, unaligned, *rows)) and max(stride_n for *_, stride_n in rows) < 2**30


def rows_vectorized(p: Problem, unaligned: int, *rows: tuple[int, int, int]) -> int:
    """1 where rows can be moved in pieces of 16 bytes."""
    per_piece = 16 // (4 if p.dtype == "float32" else 2)
    return int(not unaligned and p.head_dim % 8 == 0 and not any(stride % per_piece for strides in rows for stride in strides))
