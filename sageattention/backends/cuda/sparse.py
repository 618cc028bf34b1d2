"""Block-sparse calls on the CUDA kernels: routed, then K and V quantised and attended by the lists.

The kernels take 128 queries at a time, so that a list of 64 serves 128: the blocks of either half are exact for both, and in
neither's tail. Calls whose lists and tails would take too much memory are made for some heads at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...layout import from_hnd, to_hnd
from ...numerics import block_bits
from ...numerics.sparse import coarse, route
from ...numerics.sparse_geometry import BlockView
from ...planning.plan import CudaPlan
from ...planning.sparse_problem import SparseProblem, SparseTensors
from ..call import result_like
from ..sparse_reference import SparseResult, geometry_of, selections
from . import host
from .route import LIST_ROWS, SCRATCH_LIMIT, Routed, Sizes, from_reference, fused, has_kernels, route_plan_of, visible_blocks
from .workspace import launch_plan_of

MEMORY_LIMIT = 250 << 20  # bytes beyond the output


class Part(NamedTuple):
    """A call, or some heads of one batch of it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    sparse: SparseProblem
    tensors: SparseTensors


def load(sparse: SparseProblem, plan: CudaPlan) -> None:
    """Load a call's kernels; KernelMissing: there is one that can't be had."""
    launch_plan_of(sparse.problem, plan, sparse=True)
    if has_kernels(sparse):
        route_plan_of(sparse, plan)


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sparse: SparseProblem, tensors: SparseTensors, plan: CudaPlan,
    into_q: bool = False,
) -> SparseResult:  # fmt: skip
    """Compute a checked call by a plan for it; `into_q`: as of `Operands`."""
    p = sparse.problem
    if tensors.block_mask is not None and sparse.q_block < LIST_ROWS:
        tensors = tensors._replace(block_mask=_union(tensors.block_mask))
    out, lse = (q, None) if into_q else result_like(q, p)
    exact = torch.zeros((), dtype=torch.int64, device=q.device)
    for part in _parts(Part(q, k, v, out, lse, sparse, tensors), plan):
        _attend(part, plan, _route(part, plan, exact))  # no name keeps a part's lists and tails while the next one is routed
    add_coarse(out, q, k, v, sparse, tensors)
    return SparseResult(out, lse, (exact / visible_blocks(sparse)).float())


def add_coarse(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sparse: SparseProblem, tensors: SparseTensors) -> None:
    """Add the gated coarse attention of a call that has a gate."""
    p = sparse.problem
    if tensors.coarse_gate is None:
        return
    by_heads = to_hnd(q, p.layout), to_hnd(k, p.layout), to_hnd(v, p.layout)
    added = coarse(*by_heads, geometry_of(sparse, tensors, LIST_ROWS), sm_scale=p.sm_scale, dtype=torch.float32)
    out += (tensors.coarse_gate * from_hnd(added, p.layout)).to(out.dtype)


def _union(block_mask: torch.Tensor) -> torch.Tensor:
    """[…, lists of 64, blocks] → […, lists of 128, blocks]."""
    odd = block_mask.shape[2] % 2
    return torch.nn.functional.pad(block_mask, (0, 0, 0, odd)).unflatten(2, (-1, 2)).any(3)


def _parts(whole: Part, plan: CudaPlan) -> Iterator[Part]:
    """The call, cut where its lists and tails, and what its router or its attention takes beside them, exceed `MEMORY_LIMIT`."""
    p, sizes = whole.sparse.problem, Sizes.of(whole.sparse, plan.head_dim)
    most = min((MEMORY_LIMIT - SCRATCH_LIMIT) // (sizes.pooled + sizes.routed), (MEMORY_LIMIT - plan.WORKSPACE_LIMIT) // sizes.routed)
    if p.batch * p.heads_kv <= most:
        yield whole
        return
    count = -(-p.heads_kv // -(-p.heads_kv // max(most, 1)))
    for b in range(p.batch):
        for first in range(0, p.heads_kv, count):
            yield _heads(whole, b, slice(first, min(first + count, p.heads_kv)))


def _heads(whole: Part, b: int, kv: slice) -> Part:
    """The KV heads `kv` of batch `b`, with the query heads that share them."""
    p, tensors = whole.sparse.problem, whole.tensors
    group, batch = p.heads_q // p.heads_kv, slice(b, b + 1)
    own = slice(kv.start * group, kv.stop * group)
    q, out = (to_hnd(t, p.layout)[batch, own] for t in (whole.q, whole.out))
    k, v = (to_hnd(t, p.layout)[batch, kv] for t in (whole.k, whole.v))
    given = {name: t[own] for name, t in (("tau", tensors.tau), ("keep", tensors.keep)) if t is not None}
    if tensors.key_mask is not None:
        given["key_mask"] = tensors.key_mask[batch]
    if tensors.block_len is not None and tensors.block_len.dim() == 2 and tensors.block_len.shape[0] > 1:
        given["block_len"] = tensors.block_len[batch]
    if tensors.block_mask is not None:
        mask = tensors.block_mask[batch] if tensors.block_mask.shape[0] > 1 else tensors.block_mask
        given["block_mask"] = mask[:, own] if mask.shape[1] > 1 else mask
    problem = p._replace(batch=1, heads_q=own.stop - own.start, heads_kv=kv.stop - kv.start)
    sparse = whole.sparse._replace(problem=problem)
    views = to_hnd(q, p.layout), to_hnd(k, p.layout), to_hnd(v, p.layout), to_hnd(out, p.layout)  # to_hnd is its own inverse
    lse = None if whole.lse is None else whole.lse[batch, own]
    return Part(*views, lse, sparse, tensors._replace(**given))


def _route(part: Part, plan: CudaPlan, exact: torch.Tensor) -> Routed:
    p = part.sparse.problem
    view = BlockView(p.len_q, p.len_kv, geometry_of(part.sparse, part.tensors, LIST_ROWS), part.q.device)
    if has_kernels(part.sparse):
        return fused(part.q, part.k, part.v, part.sparse, part.tensors, plan, view, exact)
    return _by_reference(part, plan, view, exact)


def _by_reference(part: Part, plan: CudaPlan, view: BlockView, exact: torch.Tensor) -> Routed:
    """Routed by PyTorch's operations, in fp32."""
    p, tensors = part.sparse.problem, part.tensors
    by_heads = to_hnd(part.q, p.layout), to_hnd(part.k, p.layout), to_hnd(part.v, p.layout)
    chosen = route(
        *by_heads, selections(part.sparse, tensors), view.geometry, tail=part.sparse.tail, block_mask=tensors.block_mask,
        sm_scale=p.sm_scale, dtype=torch.float32,
    )  # fmt: skip
    exact += block_bits.unpack(chosen.bits, view.n).sum()
    return from_reference(chosen, view, p.batch, plan)


def _attend(part: Part, plan: CudaPlan, routed: Routed) -> None:
    q, k, v, out, lse, sparse, tensors = part
    r = launch_plan_of(sparse.problem, plan, sparse=True)
    bits, live, words = routed.lists, routed.live, routed.lists.shape[-1]
    row = 0 if live is None else live.shape[1]
    lists = host.Lists(
        0, (), (bits.stride(0), bits.stride(1), bits.stride(2), words, LIST_ROWS), (row, 0, 1, row), 0, 0, (row, 0, 0), 0
    )  # fmt: skip
    live_at = 0 if live is None else live.data_ptr()
    extra = host.Extra(
        bits.data_ptr(), live_at, live_at, 0 if tensors.order is None else tensors.order.data_ptr(),
        0 if routed.tail is None else routed.tail.data_ptr(), routed.k_mean.data_ptr(), routed.k_mean.shape[-1] * 4,
    )  # fmt: skip
    q_at, k_at, v_at, out_at, lse_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr()
    bound = host.bind(r, q, k, v, out, None, lists, ((q_at | out_at) % 16, (k_at | v_at) % 16))
    space = torch.empty(bound.size, dtype=torch.uint8, device=q.device)
    base = space.data_ptr()
    host.issue(r.device, host.chains(bound, (base, base + r.workspace.size), q_at, k_at, v_at, 0, extra, out_at, lse_at))
