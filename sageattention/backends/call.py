"""A checked call as a backend takes it, and the tensors it gives back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..planning.plan import Plan
from ..planning.problem import Problem

Result = tuple[torch.Tensor, torch.Tensor | None]


class Call(NamedTuple):
    """One checked attention call: its tensors, what it is, and what will run it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None  # broadcastable to [B, H, Nq, Nk], always 4-D
    problem: Problem
    plan: Plan
    forms: dict  # what a backend has worked out for calls that differ from this one in nothing but addresses


def result_like(q: torch.Tensor, problem: Problem) -> Result:
    """Uninitialised (out, lse or None) for a problem."""
    if problem.head_dim_v:
        out = q.new_empty((*q.shape[:-1], problem.head_dim_v))
    else:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not problem.return_lse:
        return out, None
    return out, torch.empty(problem.batch, problem.heads_q, problem.len_q, dtype=torch.float32, device=q.device)


def to_hnd(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as [B, H, N, D] views."""
    if call.problem.layout == "HND":
        return call.q, call.k, call.v
    return call.q.transpose(1, 2), call.k.transpose(1, 2), call.v.transpose(1, 2)


def from_hnd(out: torch.Tensor, call: Call) -> torch.Tensor:
    """An output [B, H, N, D] in the call's layout, contiguous."""
    return out if call.problem.layout == "HND" else out.transpose(1, 2).contiguous()
