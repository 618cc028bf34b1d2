"""Checks a block-sparse call, finds its variant and runs it: what `dispatch` is to dense calls."""

from __future__ import annotations

from typing import Any

import torch

from . import dispatch, precision
from .backends import sparse_reference
from .backends.call import empty_result
from .backends.cuda import sparse as sparse_cuda
from .backends.sparse_reference import SparseResult
from .kernels import binaries
from .planning.here import machine, seen_on
from .planning.plan import CudaPlan
from .planning.problem import Problem
from .planning.sparse_plan import sparse_plan
from .planning.sparse_problem import SparseProblem, SparseTensors


def variant_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str, variant: str) -> str:
    """The name of the variant that runs a block-sparse call of such tensors; nothing runs.

    Raises:
        Unsupported, KernelMissing: as `sageattn_sparse`.
    """
    dense = Problem.from_tensors(q, k, v, tensor_layout=tensor_layout, is_causal=False, sm_scale=None, return_lse=True)
    problem, _ = SparseProblem.from_call(
        dense, q, selection="sol", tau=None, keep=None, similarity=0.0, q_block=128, tail=True, neighbours=None, q_start=None, sinks=(),
        query_sinks=(), order=None, block_len=None, block_mask=None, key_mask=None, coarse_gate=None,
    )  # fmt: skip
    return sparse_plan(problem, machine(dense), variant, *binaries.forced()).variant.name


def compute(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    tensor_layout: str,
    is_causal: bool,
    sm_scale: float | None,
    return_lse: bool,
    variant: str,
    **sparse: Any,
) -> SparseResult:
    """One call of `sageattn_sparse`; `sparse` are the arguments of `SparseProblem.from_call`.

    Raises:
        Unsupported, KernelMissing: as `sageattn_sparse`.
    """
    dense = Problem.from_tensors(q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, sm_scale=sm_scale, return_lse=return_lse)
    problem, tensors = SparseProblem.from_call(dense, q, **sparse)
    card = machine(dense)
    plan = sparse_plan(problem, card, variant, *binaries.forced(), seen_on(card))
    if dense.empty:
        out, lse = empty_result(q, dense)
        return SparseResult(out, lse, torch.ones((), dtype=torch.float32, device=q.device))
    with precision.exact(q.device.type):
        if not isinstance(plan, CudaPlan):
            return sparse_reference.run(q, k, v, problem, tensors)
        return (_run_dense if problem.all_exact else sparse_cuda.run)(q, k, v, problem, tensors, plan)


def _run_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sparse: SparseProblem, tensors: SparseTensors, plan: CudaPlan
) -> SparseResult:
    """A call without a block to leave out, by the variant's dense kernels: the order of the tokens does not matter then."""
    p, mask = sparse.problem, None if tensors.key_mask is None else tensors.key_mask[:, None, None]
    out, lse = dispatch.compute(
        q, k, v, tensor_layout=p.layout, is_causal=p.causal, attn_mask=mask, sm_scale=p.sm_scale, return_lse=p.return_lse,
        variant=plan.variant.name, accum=plan.accum,
    )  # fmt: skip
    sparse_cuda.add_coarse(out, q, k, v, sparse, tensors)
    return SparseResult(out, lse, torch.ones((), dtype=torch.float32, device=q.device))
