"""Checks a block-sparse call, finds its variant and runs it: what `dispatch` is to dense calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import dispatch, precision
from .backends import sparse_reference
from .backends.call import Operands, Result, empty_result
from .backends.cuda import sparse as sparse_cuda
from .backends.sparse_reference import SparseResult
from .kernels import binaries
from .planning.here import machine, seen_on
from .planning.plan import CudaPlan, Plan
from .planning.problem import Problem
from .planning.sparse_plan import sparse_plan
from .planning.sparse_problem import SparseProblem, SparseTensors


def variant_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str, variant: str) -> str:
    """The name of the variant that runs a block-sparse call of such tensors; nothing runs.

    Raises:
        Unsupported, KernelMissing: as `sageattn_sparse`.
    """
    dense = Problem.from_tensors(q, k, v, tensor_layout=tensor_layout, is_causal=False, sm_scale=None, return_lse=True)
    problem, _ = SparseProblem.from_call(dense, q)
    return sparse_plan(problem, machine(dense), variant, *binaries.forced()).variant.name


@dataclass(eq=False, slots=True)
class SparseCall(Operands):
    """One block-sparse call that is checked and planned, to be computed once."""

    sparse: SparseProblem
    tensors: SparseTensors
    plan: Plan

    def run(self, release: Callable[[], object] | None = None) -> SparseResult:
        """Compute the call; `release`: as for `dispatch.Call.run`.

        Raises:
            KernelMissing: a kernel can't be loaded; `release` was not called.
        """
        with precision.exact(self.q.device.type):
            return self._run(release)

    def _run(self, release: Callable[[], object] | None) -> SparseResult:
        sparse, plan, p, device = self.sparse, self.plan, self.sparse.problem, self.q.device
        if p.empty:
            result = SparseResult(*empty_result(self.q, p), _all_blocks(device))
        elif not isinstance(plan, CudaPlan):
            result = sparse_reference.run(self.q, self.k, self.v, sparse, self.tensors)
        elif sparse.all_exact:
            return SparseResult(*self._run_dense(plan, release), _all_blocks(device))
        else:
            if release is not None and self.tensors.coarse_gate is None:
                sparse_cuda.load(sparse, plan)
                self.take_over(release, p)
                release = None
            result = sparse_cuda.run(self.q, self.k, self.v, sparse, self.tensors, plan, self.into_q)
        if release is not None:
            release()
        return result

    def _run_dense(self, plan: CudaPlan, release: Callable[[], object] | None) -> Result:
        """A call without a block to leave out, by the variant's dense kernels: the order of the tokens does not matter then."""
        p, mask = self.sparse.problem, None if self.tensors.key_mask is None else self.tensors.key_mask[:, None, None]
        call = dispatch.prepare(
            self.q, self.k, self.v, tensor_layout=p.layout, is_causal=p.causal, attn_mask=mask, sm_scale=p.sm_scale,
            return_lse=p.return_lse, variant=plan.variant.name, accum=plan.accum,
        )  # fmt: skip
        if self.tensors.coarse_gate is None:
            del self.q, self.k, self.v  # for that call to be the last that has them
            return call.run(release)
        out, lse = call.run()
        sparse_cuda.add_coarse(out, self.q, self.k, self.v, self.sparse, self.tensors)
        if release is not None:
            release()
        return out, lse


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    variant: str = "auto",
    **sparse: Any,
) -> SparseCall:
    """Validate a call of `sageattn_sparse` and plan it; nothing runs. `sparse`: the arguments of `SparseProblem.from_call`.

    Raises:
        Unsupported, KernelMissing: as `sageattn_sparse`.
    """
    dense = Problem.from_tensors(q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, sm_scale=sm_scale, return_lse=return_lse)
    problem, tensors = SparseProblem.from_call(dense, q, **sparse)
    card = machine(dense)
    return SparseCall(q, k, v, problem, tensors, sparse_plan(problem, card, variant, *binaries.forced(), seen_on(card)))


def _all_blocks(device: torch.device) -> torch.Tensor:
    """The share of a call that leaves none out."""
    return torch.ones((), dtype=torch.float32, device=device)
