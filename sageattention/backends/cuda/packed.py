"""Packed sequences on the CUDA kernels: each is quantised and attended as a dense call of its own, many of them in one launch.

The offsets stay on the device. A first launch makes work lists of them (csrc/kernel/place_sequences.cuh), the others read those; the host
only knows how long the lists are at most.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch

from ...device import capability
from ...kernels.binaries import Image
from ...kernels.params import PlaceSequencesParams, packer
from ...kernels.table import PLACE_SEQUENCES
from ...planning.packed import PackedProblem, PackedShape, buffers, packed_shape
from ...planning.plan import CudaPlan
from ..call import Result
from . import driver, host
from .launcher import Kernel, Launch
from .workspace import ALIGN, MAX_GRID, LaunchPlan, attend_tail, resident_plan_of, workspace

SEQUENCE_BYTES = 32  # sizeof(Sequence), csrc/kernel/params.cuh
_pack_place, _place_constants = packer(PlaceSequencesParams)


class Lists(NamedTuple):
    """Byte offsets of what `place_sequences` writes: the sequences, and by group of them the work lists and their lengths."""

    sequences: int
    q_blocks: int
    runs: int
    counts: int
    size: int


class PackedPlan(NamedTuple):
    """Everything about a call's launches but its addresses and strides."""

    shape: PackedShape
    place: Kernel
    launch_plan: LaunchPlan
    groups: int  # of sequences
    lists: Lists


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: tuple[torch.Tensor, torch.Tensor], packed: PackedProblem, plan: CudaPlan,
    known: dict[Any, Any],
) -> Result:  # fmt: skip
    """(out [total_q, Hq, D], lse [Hq, total_q] or None).

    Args:
        cu_seqlens: of the queries and of the keys, contiguous.
        known: what is kept for calls that differ from this one in nothing but addresses.
    """
    p = packed.problem
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(p.heads_q, packed.total_q, dtype=torch.float32, device=q.device) if p.return_lse else None
    q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    unaligned = (q_at | out_at) % 16, (k_at | v_at) % 16
    bound = known.get(unaligned)
    if bound is None and plan.kernels.resident and host.rows_aligned(p, max(unaligned), *(t[None] for t in (q, k, v, out))):
        bound = known[unaligned] = _bind_resident(q, k, v, out, packed, plan, cu_seqlens)
    if isinstance(bound, host.BoundResident):
        cu_q, cu_k = cu_seqlens
        at = cu_q.data_ptr(), cu_k.data_ptr()
        launch = host.resident_launch(bound, q_at, k_at, v_at, out_at, 0 if lse is None else lse.data_ptr(), at)
        host.issue(bound.launch_plan.device, [(launch,)])
        return out, lse
    plan = plan.halves or plan
    if bound is None:
        own = packed_plan(packed, plan)
        launches = host.bind(own.launch_plan, q[None], k[None], v[None], out[None], None, None, unaligned)
        bound = known[unaligned] = own, launches, _place_tail(packed, own.shape, plan, cu_seqlens)
    (shape, place, r, groups, lists), launches, place_tail = bound
    space = torch.empty(r.workspace.size * shape.alive + lists.size, dtype=torch.uint8, device=q.device)
    bases = tuple(space.data_ptr() + number * r.workspace.size for number in range(shape.alive))
    lists_at, lse_at = space.data_ptr() + shape.alive * r.workspace.size, 0 if lse is None else lse.data_ptr()
    chains: list[tuple[Launch, ...]] = []
    for group in range(groups):
        extra = host.Extra(packed=_group(shape, lists, lists_at, group))
        chains += host.chains(launches, bases, q_at, k_at, v_at, 0, extra, out_at, lse_at, len(chains))
    if shape.alive == 1:
        chains = [tuple(itertools.chain.from_iterable(chains))]
    offsets = (cu.data_ptr() for cu in cu_seqlens)
    first = place, groups, 1, 1, _pack_place(*offsets, *_group(shape, lists, lists_at, 0), place_tail), False
    host.issue(r.device, chains, (first,))
    return out, lse


@functools.lru_cache(maxsize=4096)
def packed_plan(packed: PackedProblem, plan: CudaPlan) -> PackedPlan:
    """The launches of a call.

    Raises:
        KernelMissing: a kernel can't be loaded.
    """
    p, names, d, scheme = packed.problem, plan.kernels, plan.head_dim, plan.scheme
    card = capability.of_device(p.device, p.device_index)
    quantizer, attention = plan.images
    quantize_k, quantize_v = (quantizer.entry(symbol(d, "packed")) for symbol in (names.quantize_k_symbol, names.quantize_v_symbol))

    def kernel(image: Image, symbol: str) -> Kernel:
        return driver.kernel(p.device_index, image, symbol, plan.variant.name)

    shape = packed_shape(packed, plan, quantize_k.min_blocks * card.multiprocessors)
    groups = -(-p.batch // shape.sequences)
    head_groups = tuple((first, min(shape.heads, p.heads_kv - first)) for first in range(0, p.heads_kv, shape.heads))
    # A dense call of one batch, whose K and V are all runs that there may be. The kernels take what belongs to each sequence.
    flags, grid = (1, card.multiprocessors) if names.persistent else (0, MAX_GRID)  # a flag: the counter of work tiles
    launch_plan = LaunchPlan(
        problem=p._replace(batch=1, len_q=packed.total_q, len_kv=packed.total_k), plan=plan, device=p.device_index, groups=head_groups,
        classify=None, quantize_k=kernel(quantizer, quantize_k.symbol), quantize_v=kernel(quantizer, quantize_v.symbol),
        attend=kernel(attention, plan.attend), workspace=workspace(shape.heads, buffers(shape, plan), (0, flags * 4)),
        len_kv=packed.total_k, tiles=shape.kv_tiles, k_ctas_per_head=shape.runs, v_chunks=shape.runs, v_ctas_per_head=shape.runs,
        q_tiles=shape.q_blocks, grid_limit=grid, shares=False, split_kv_flags=flags,
        quantize_k_tail=(shape.kv_tiles, names.tile_bytes(d), shape.runs, False, 0, 0, flags, shape.runs, shape.run_keys),
        quantize_v_tail=(shape.runs, shape.runs, shape.kv_tiles, shape.runs, shape.run_keys, scheme.v_mean, scheme.v_max),
        attend_tail=attend_tail(p, plan),
    )  # fmt: skip
    return PackedPlan(shape, kernel(quantizer, PLACE_SEQUENCES.symbol), launch_plan, groups, _lists(p.batch, groups, shape))


def _bind_resident(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, packed: PackedProblem, plan: CudaPlan,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor],
) -> host.BoundResident:  # fmt: skip
    """The launch reads the offsets itself, a block for as many (sequence, KV head) pairs as come its way."""
    p = packed.problem
    whole = p._replace(batch=1, len_q=packed.total_q, len_kv=packed.total_k)
    wide_q, wide_k = (cu.dtype == torch.int64 for cu in cu_seqlens)
    return host.bind_resident(
        resident_plan_of(whole, plan, p.batch * p.heads_kv), q[None], k[None], v[None], out[None],
        (p.batch, wide_q, wide_k, packed.total_q, packed.total_k, p.len_q, p.len_kv),
    )  # fmt: skip


def _lists(batch: int, groups: int, shape: PackedShape) -> Lists:
    offsets = [0]
    for size in (batch * SEQUENCE_BYTES, groups * shape.q_blocks * 4, groups * shape.runs * 4, groups * 2 * 4):
        offsets.append(offsets[-1] + -(-size // ALIGN) * ALIGN)
    return Lists(*offsets)


def _group(shape: PackedShape, lists: Lists, at: int, group: int) -> tuple[int, int, int, int]:
    """The pointers of PackedSequences, for a group of sequences."""
    return (
        at + lists.sequences + group * shape.sequences * SEQUENCE_BYTES, at + lists.q_blocks + group * shape.q_blocks * 4,
        at + lists.runs + group * shape.runs * 4, at + lists.counts + group * 2 * 4,
    )  # fmt: skip


def _place_tail(packed: PackedProblem, shape: PackedShape, plan: CudaPlan, cu_seqlens: tuple[torch.Tensor, torch.Tensor]) -> bytes:
    """The end of PlaceSequencesParams, behind the pointers."""
    p, tile = packed.problem, plan.tile
    (tail,) = _place_constants(
        p.batch, shape.sequences, *(cu.dtype == torch.int64 for cu in cu_seqlens), packed.total_q, packed.total_k, p.len_q, p.len_kv,
        tile.block_m, tile.block_n, shape.run_keys, shape.q_blocks, shape.kv_tiles, shape.runs,
    )  # fmt: skip
    return tail
