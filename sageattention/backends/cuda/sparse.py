"""Block-sparse calls on the CUDA kernels: a router in fp32 torch operations, then K and V quantised and attended by its lists.

The kernels take 128 queries at a time, so that a list of 64 serves 128: the blocks of either half are exact for both, and in
neither's tail.
"""

from __future__ import annotations

import torch

from ...layout import from_hnd, to_hnd
from ...numerics import block_bits
from ...numerics.constants import KV_BLOCK
from ...numerics.sparse import Route, Tail, coarse, exact_share, route
from ...numerics.sparse_geometry import BlockView
from ...planning.plan import CudaPlan
from ...planning.sparse_problem import SparseProblem, SparseTensors
from ..call import result_like
from ..sparse_reference import SparseResult, geometry_of, selections
from . import host
from .workspace import launch_plan_of

LIST_ROWS = 128  # queries of a list
TAIL_HEAD = 4  # numbers of a tail before O: m, l, two unused


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sparse: SparseProblem, tensors: SparseTensors, plan: CudaPlan) -> SparseResult:
    """Compute a checked call by a plan for it."""
    p = sparse.problem
    by_heads = to_hnd(q, p.layout), to_hnd(k, p.layout), to_hnd(v, p.layout)
    geometry = geometry_of(sparse, tensors, LIST_ROWS)
    block_mask = tensors.block_mask
    if block_mask is not None and sparse.q_block < LIST_ROWS:
        block_mask = _union(block_mask)
    rules = selections(sparse, tensors)
    chosen = route(*by_heads, rules, geometry, tail=sparse.tail, block_mask=block_mask, sm_scale=p.sm_scale, dtype=torch.float32)
    view = BlockView(p.len_q, p.len_kv, geometry, q.device)
    out, lse = result_like(q, p)
    assert lse is not None  # every block-sparse call has one
    _launch(q, k, v, out, lse, sparse, plan, chosen, view)
    if tensors.coarse_gate is not None:
        added = coarse(*by_heads, geometry, sm_scale=p.sm_scale, dtype=torch.float32)
        out += (tensors.coarse_gate * from_hnd(added, p.layout)).to(out.dtype)
    return SparseResult(out, lse, exact_share(chosen, p.len_q, p.len_kv, geometry).float())


def _union(block_mask: torch.Tensor) -> torch.Tensor:
    """[…, lists of 64, blocks] → […, lists of 128, blocks]."""
    odd = block_mask.shape[2] % 2
    return torch.nn.functional.pad(block_mask, (0, 0, 0, odd)).unflatten(2, (-1, 2)).any(3)


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sparse: SparseProblem, plan: CudaPlan,
    chosen: Route, view: BlockView,
) -> None:  # fmt: skip
    p = sparse.problem
    r = launch_plan_of(p, plan, sparse=True)
    live = _live(view, p.batch)
    bits = _planes(chosen.bits, live, view)
    words = bits.shape[-1]
    live_words = None if live is None else block_bits.pack(live)
    row = 0 if live_words is None or live_words.shape[0] == 1 else live_words.shape[1]
    lists = host.Lists(
        0, (), (bits.stride(0), bits.stride(1), bits.stride(2), words, LIST_ROWS),
        (row, 0, 1, 0 if live_words is None else live_words.shape[1]), 0, 0, (row, 0, 0), 0,
    )  # fmt: skip
    k_mean = torch.nn.functional.pad(chosen.k_shift, (0, plan.head_dim - p.head_dim)).contiguous()
    tail = None if chosen.tail is None else _padded(chosen.tail, plan.head_dim)
    order = view.geometry.order
    live_at = 0 if live_words is None else live_words.data_ptr()
    extra = host.Extra(
        bits.data_ptr(), live_at, live_at, 0 if order is None else order.data_ptr(), 0 if tail is None else tail.data_ptr(),
        k_mean.data_ptr(), k_mean.shape[-1] * 4,
    )  # fmt: skip
    q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    bound = host.bind(r, q, k, v, out, None, lists, ((q_at | out_at) % 16, (k_at | v_at) % 16))
    space = torch.empty(bound.size, dtype=torch.uint8, device=q.device)
    host.issue(r.device, host.chains(bound, space.data_ptr(), q_at, k_at, v_at, 0, extra, out_at, lse.data_ptr()))


def _live(view: BlockView, batch: int) -> torch.Tensor | None:
    """bool [B | 1, Nk] in block order, True where the key exists; None where all do."""
    g = view.geometry
    if g.key_mask is None and g.block_len is None:
        return None
    rows = (view.live_keys(b) for b in range(batch))
    return torch.stack([row for row in rows if row is not None])


def _planes(exact: torch.Tensor, live: torch.Tensor | None, view: BlockView) -> torch.Tensor:
    """The kernels' lists, int32 [B, Hq, lists, 2, words]: blocks that are seen, and those that not every query sees whole."""
    whole = view.whole if live is None else view.whole & _all_live(live, view)[:, None]
    if view.len_kv % KV_BLOCK:
        whole = whole & (torch.arange(view.n, device=exact.device) < view.n - 1)
    whole = whole.expand(whole.shape[0] if whole.dim() == 3 else 1, view.m, view.n)
    uneven = torch.stack([view.of_lists(~w) for w in whole])
    planes = exact.new_empty(*exact.shape[:3], 2, exact.shape[3])
    planes[:, :, :, 0], planes[:, :, :, 1] = exact, block_bits.pack(uneven)[:, None]
    return planes


def _all_live(live: torch.Tensor, view: BlockView) -> torch.Tensor:
    """bool [B | 1, n], whether every key of a block exists."""
    return torch.nn.functional.pad(live, (0, -view.len_kv % KV_BLOCK), value=True).unflatten(1, (-1, KV_BLOCK)).all(2)


def _padded(tail: Tail, head_dim: int) -> torch.Tensor:
    """The kernels' tails, fp32 [B, Hq, ⌈Nq / 64⌉, 4 + D]."""
    m, l, o = tail
    state = m.new_zeros(*m.shape, TAIL_HEAD + head_dim)
    state[..., 0], state[..., 1], state[..., TAIL_HEAD : TAIL_HEAD + o.shape[-1]] = m, l, o
    return state
