"""The `reference` variant of block-sparse calls: `numerics.sparse`, in fp64, on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..layout import from_hnd, to_hnd
from ..numerics.block_selection import Selection
from ..numerics.sparse import attend, coarse, exact_share, route
from ..numerics.sparse_geometry import Geometry
from ..planning.sparse_problem import SparseProblem, SparseTensors


class SparseResult(NamedTuple):
    """out in q's layout and dtype; lse [B, Hq, Nq] fp32, natural log, or None; share of the visible blocks that are exact, fp32 scalar."""

    out: torch.Tensor
    lse: torch.Tensor | None
    share: torch.Tensor


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sparse: SparseProblem, tensors: SparseTensors) -> SparseResult:
    """Compute a checked call."""
    p = sparse.problem
    q, k, v = (to_hnd(t, p.layout) for t in (q, k, v))
    geometry = geometry_of(sparse, tensors, sparse.q_block)
    chosen = route(
        q, k, v, selections(sparse, tensors), geometry, tail=sparse.tail, block_mask=tensors.block_mask, sm_scale=p.sm_scale
    )  # fmt: skip
    out, lse = attend(q, k, v, chosen, geometry, sm_scale=p.sm_scale)
    if tensors.coarse_gate is not None:
        out += to_hnd(tensors.coarse_gate, p.layout) * coarse(q, k, v, geometry, sm_scale=p.sm_scale)
    limit = torch.finfo(q.dtype).max
    out = from_hnd(out.clamp(-limit, limit).to(q.dtype), p.layout)
    return SparseResult(out, lse.float() if p.return_lse else None, exact_share(chosen, p.len_q, p.len_kv, geometry).float())


def geometry_of(sparse: SparseProblem, tensors: SparseTensors, q_block: int) -> Geometry:
    """What is around a call's scores, with lists of `q_block` queries."""
    return Geometry(
        q_block, sparse.problem.causal, sparse.q_start, sparse.sinks, sparse.query_sinks, sparse.neighbours, tensors.order,
        tensors.key_mask, tensors.block_len,
    )  # fmt: skip


def selections(sparse: SparseProblem, tensors: SparseTensors) -> list[Selection]:
    """The rule of each query head."""
    heads = sparse.problem.heads_q
    tau = [sparse.tau] * heads if tensors.tau is None else tensors.tau.tolist()
    keep = [sparse.keep] * heads if tensors.keep is None else tensors.keep.tolist()
    return [Selection(sparse.selection, t, s, sparse.similarity) for t, s in zip(tau, keep)]
