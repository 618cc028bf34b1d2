"""PyTorch's own attention, with what it lacks: the log-sum-exp, and exact zeros where a row is masked."""

from __future__ import annotations

import torch

from .. import torch_internals, tracing
from ..layout import from_hnd
from ..numerics.constants import MASK_LIMIT
from ..planning.plan import Plan
from ..planning.problem import Problem
from .call import PreparedCall, Result
from .cuda import masked_rows

LSE_CHUNK = 256 << 20  # bytes of fp32 scores at a time


def run(call: PreparedCall[Plan]) -> Result:
    """Compute a call by `scaled_dot_product_attention`."""
    q, k, v = call.hnd()
    p, mask = call.problem, call.mask
    causal = p.causal
    if mask is not None:
        if p.mask == "additive":
            mask = _narrow_mask(mask, q.dtype)
        if causal:
            mask, causal = _with_causal(mask, p), False
    out = torch_internals.attention(q, k, v, mask, is_causal=causal, scale=float(p.sm_scale), enable_gqa=bool(p.heads_q != p.heads_kv))
    if mask is not None and not _zeroed_by_kernel(out, call):
        out = torch.where(_seen(mask).any(-1, keepdim=True), out, 0)
    return from_hnd(out, p.layout), _lse(call, q, k) if p.return_lse else None


def _zeroed_by_kernel(out: torch.Tensor, call: PreparedCall[Plan]) -> bool:
    """Give fully masked rows the 0 that not every backend of torch's gives them, by a kernel; False where torch's operators have to."""
    p = call.problem
    if call.mask is None or p.device != "cuda" or p.needs_grad or tracing.transformed():
        return False
    return masked_rows.zero(out, call.mask, p, call.bound)


def _seen(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask != -torch.inf


def by_torch_alone(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, sm_scale: float | None
) -> torch.Tensor:
    """A call that `Problem` can't describe, as it is; what torch's function says to it holds."""
    grouped = q.dim() == k.dim() == 4 and q.size(1) != k.size(1)
    return torch_internals.attention(q, k, v, mask, is_causal=bool(is_causal), scale=sm_scale, enable_gqa=grouped)


def _lse(call: PreparedCall[Plan], q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp that SDPA keeps to itself, from fp32 scores of as many queries at a time as fit into `LSE_CHUNK` bytes."""
    p = call.problem
    k = k.float().repeat_interleave(p.heads_q // p.heads_kv, 1)
    rows = max(1, LSE_CHUNK // (4 * p.batch * p.heads_q * p.len_kv))
    parts = []
    for start in range(0, p.len_q, rows):
        scores = q[:, :, start : start + rows].float() @ k.mT * p.sm_scale
        if call.mask is not None:
            mask = call.mask if call.mask.shape[2] == 1 else call.mask[:, :, start : start + rows]
            scores = scores.masked_fill(~mask, -torch.inf) if p.mask == "bool" else scores + mask
        if p.causal:
            keys = torch.arange(p.len_kv, device=q.device)
            scores = scores.masked_fill(keys > torch.arange(start, start + scores.shape[2], device=q.device)[:, None], -torch.inf)
        parts.append(torch.logsumexp(scores, -1))
    return torch.cat(parts, 2)


def _narrow_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An additive mask in q's dtype, as SDPA wants it. Finite stays finite, also times log2(e) in fp32, which some backends take."""
    if mask.dtype == dtype == torch.float16:  # whose largest number is far from that
        return mask
    limit = min(torch.finfo(dtype).max, torch.finfo(mask.dtype).max, MASK_LIMIT)
    return torch.where(mask == -torch.inf, mask, mask.clamp(-limit, limit)).to(dtype)


def _with_causal(mask: torch.Tensor, p: Problem) -> torch.Tensor:
    keep = torch.ones(p.len_q, p.len_kv, dtype=torch.bool, device=mask.device).tril()
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)
