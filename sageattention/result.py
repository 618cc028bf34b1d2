"""The output of an attention call."""

from __future__ import annotations

import torch

from .problem import Problem

Result = tuple[torch.Tensor, torch.Tensor | None]


def result_like(q: torch.Tensor, problem: Problem) -> Result:
    """Uninitialised (out, lse or None) for a problem."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not problem.return_lse:
        return out, None
    return out, torch.empty(problem.batch, problem.heads_q, problem.len_q, dtype=torch.float32, device=q.device)
