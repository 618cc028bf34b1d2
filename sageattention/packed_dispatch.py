"""Checks a call of packed sequences, finds what runs it and runs it: what `dispatch` is to dense calls."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import settings
from .backends import sdpa_packed
from .backends.call import Result
from .backends.cuda import packed as packed_cuda
from .dispatch import Known, kernel_backend, say_what_runs
from .dispatch import compute as dense
from .errors import KernelMissing, Unsupported
from .memo import Memo
from .planning import rules, varlen
from .planning.here import machine, plan_for, warn_once
from .planning.packed import PackedProblem
from .planning.plan import CudaPlan, Plan
from .planning.problem import Problem, facts
from .variants import SDPA, TRITON_FP16, Candidate


def compute(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool,
    sm_scale: float | None,
    return_lse: bool,
    variant: str,
    accum: str = "",
) -> Result:
    """`sageattn_varlen`: (out [total_q, Hq, D], lse [Hq, total_q] or None).

    Raises:
        Unsupported, KernelMissing: as `prepare`.
    """
    given = facts(q, k, v, None, "packed", is_causal, sm_scale, return_lse)
    offsets = tuple((type(cu), cu.shape, cu.dtype, cu.device) for cu in (cu_seqlens_q, cu_seqlens_k) if isinstance(cu, torch.Tensor))
    key: tuple[Any, ...] | None = None
    if given is not None and type(max_seqlen_q) is type(max_seqlen_k) is int:
        key = given, offsets, max_seqlen_q, max_seqlen_k, cu_seqlens_q is cu_seqlens_k, variant, accum, settings.state
    known = _prepared.get(key) if key else None
    if known is None:
        problem = Problem.from_packed(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=is_causal, sm_scale=sm_scale, return_lse=return_lse
        )
        call = PackedCall(q, k, v, cu_seqlens_q, cu_seqlens_k, problem, {})
        known = Known(problem, next(call.plans(variant, accum)), call.bound)
        if key:
            _prepared[key] = known
    problem, chosen, bound = known
    call = PackedCall(q, k, v, cu_seqlens_q, cu_seqlens_k, problem, bound)
    try:
        result = call.run(chosen)
    except KernelMissing as error:
        chosen, result = call.run_otherwise(chosen, error)
    say_what_runs(chosen)
    return result


_prepared: Memo[tuple[Any, ...], Known] = Memo()  # as `dispatch` has it


@dataclass(slots=True)
class PackedCall:
    """One call of packed sequences that is checked, but for the values of its offsets."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    problem: Problem
    bound: dict[Any, Any]

    def plans(self, variant: str, accum: str = "") -> Iterator[Plan]:
        """What may run the call, best first; of "auto" the last one is PyTorch's own attention, which runs everywhere.

        Raises:
            Unsupported, KernelMissing: a variant that was asked for by name can't do it.
        """
        problem = self.problem
        chosen = plan_for(problem, variant, accum)
        if chosen.variant is not SDPA or not chosen.auto or self._torch_reads():
            yield chosen
        if not chosen.auto:
            return
        card = machine(problem)
        reason = "PyTorch's own attention would have to compute the sequences one by one"
        for candidate in dict.fromkeys((*rules.candidates(card, card.arch), Candidate(TRITON_FP16.name))):
            try:
                plan = plan_for(problem, candidate.variant, candidate.accum)
            except (Unsupported, KernelMissing):
                continue
            yield replace(plan, reason=reason, auto=True)
        yield Plan(SDPA, "no variant here reads packed sequences", auto=True)

    def run_otherwise(self, missed: Plan, error: KernelMissing) -> tuple[Plan, Result]:
        """By the next plan of "auto" that can be had, where the kernel of its choice was found missing.

        Raises:
            KernelMissing: `error`, where the variant was asked for by name.
        """
        if not missed.auto:
            raise error
        warn_once(f"auto of packed sequences passes by {missed.variant.name}: {error.reason}")
        for plan in self.plans("auto"):
            with contextlib.suppress(KernelMissing):
                if plan.variant is not missed.variant:
                    return plan, self.run(plan)
        raise error

    def run(self, chosen: Plan) -> Result:
        """Compute the call by a plan for it.

        Raises:
            Unsupported: the offsets are wrong. The CUDA variants and torch's function do not look at them.
            KernelMissing: a kernel of the plan can't be had.
        """
        q, k, v, p = self.q, self.k, self.v, self.problem
        offsets = self.cu_seqlens_q.contiguous(), self.cu_seqlens_k.contiguous()  # no kernel knows strides of theirs
        if p.empty or not (q.numel() and k.numel()):
            return self._empty()
        if isinstance(chosen, CudaPlan):
            return packed_cuda.run(q, k, v, offsets, PackedProblem(p, q.shape[0], k.shape[0]), chosen, self.bound)
        if chosen.variant is TRITON_FP16:
            self._read()
            triton: Any = kernel_backend(TRITON_FP16)
            return triton.run_packed(q, k, v, triton.Packed(*offsets), p, chosen)
        if chosen.variant is SDPA and self._torch_reads():
            return sdpa_packed.run(q, k, v, *offsets, p)
        return self._one_by_one(chosen)

    def _torch_reads(self) -> bool:
        return sdpa_packed.reads(self.problem, self.cu_seqlens_q is self.cu_seqlens_k)

    def _empty(self) -> Result:
        lse = self.q.new_full((self.q.shape[1], self.q.shape[0]), -torch.inf, dtype=torch.float32) if self.problem.return_lse else None
        return torch.zeros_like(self.q, memory_format=torch.contiguous_format), lse

    def _read(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The offsets' values, which a kernel would trust; reading them waits for the GPU."""
        p = self.problem
        offsets_q = varlen.check("cu_seqlens_q", self.cu_seqlens_q, "q", self.q.shape[0], "max_seqlen_q", p.len_q)
        offsets_k = varlen.check("cu_seqlens_k", self.cu_seqlens_k, "k", self.k.shape[0], "max_seqlen_k", p.len_kv)
        if offsets_q is None or offsets_k is None:
            unread = "can't be read while a CUDA graph is captured"
            raise Unsupported("cu_seqlens_q", f"{unread}; make the call once before, or name a CUDA variant, which does not read them")
        return offsets_q, offsets_k

    def _one_by_one(self, chosen: Plan) -> Result:
        """Each sequence as a call of its own."""
        p, outs, lses = self.problem, [], []
        if p.device == "cuda":
            warn_once(f"packed sequences are computed one by one ({chosen.variant.name}), which is slow: {chosen.reason}")
        for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(offsets) for offsets in self._read())):
            out, lse = dense(
                self.q[None, q0:q1], self.k[None, k0:k1], self.v[None, k0:k1], tensor_layout="NHD", is_causal=p.causal, attn_mask=None,
                sm_scale=p.sm_scale, return_lse=p.return_lse, variant=chosen.variant.name, accum=chosen.accum,
            )  # fmt: skip
            outs.append(out[0])
            lses += [] if lse is None else [lse[0]]
        return torch.cat(outs), torch.cat(lses, 1) if p.return_lse else None
