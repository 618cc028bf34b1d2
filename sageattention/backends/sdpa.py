"""PyTorch's own attention, with what it lacks: the log-sum-exp, and exact zeros where a row is masked."""

from __future__ import annotations

import torch

from .. import torch_internals, tracing
from ..layout import from_hnd
from ..numerics.constants import MASK_LIMIT
from ..planning.plan import Plan
from ..planning.problem import Problem
from .call import PreparedCall, Result
from .cuda import sdpa_mask

LSE_CHUNK = 256 << 20  # bytes of fp32 scores at a time


def run(call: PreparedCall[Plan]) -> Result:
    """Compute a call by `scaled_dot_product_attention`."""
    (q, k, v), p = call.hnd(), call.problem
    out = _attention(q, k, v, None, p.causal, p) if call.mask is None else _masked(call, call.mask, q, k, v)
    return from_hnd(out, p.layout), _lse(call, q, k) if p.return_lse else None


def _masked(call: PreparedCall[Plan], given: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    p = call.problem
    repaired = _has_kernels(call) and sdpa_mask.repairs(given, v, p)
    # A mask in q's dtype goes to torch as it is where rows beyond its reach are set right afterwards: that saves a pass over the mask.
    wide = p.mask == "additive" and not given.dtype == q.dtype == torch.float16  # fp16 ends far below such numbers
    left_wide = wide and repaired and given.dtype == q.dtype
    mask = _narrow_mask(call, given, q.dtype) if wide and not left_wide else given
    mask = _with_causal(mask, p) if p.causal else mask
    if p.len_kv > 1 and (mask.shape[-1] == 1 or mask.stride(-1) != 1):  # an error of torch's memory-efficient backend
        mask = mask.expand(*mask.shape[:-1], p.len_kv).contiguous()
    out = _attention(q, k, v, mask, False, p)
    if not repaired:
        return torch.where(_seen(mask).any(-1, keepdim=True), out, 0)  # what not every backend of torch's does
    out = out if out.stride(-1) == 1 else out.contiguous()
    sdpa_mask.repair(out, given, v, MASK_LIMIT if left_wide else torch.inf, p, call.bound)
    return out


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, p: Problem) -> torch.Tensor:
    by_cudnn = p.device == "cuda" and torch_internals.prefers_cudnn(p.device_index)
    attend = torch_internals.attention_by_cudnn if by_cudnn else torch_internals.attention
    return attend(q, k, v, mask, is_causal=causal, scale=float(p.sm_scale), enable_gqa=bool(p.heads_q != p.heads_kv))


def _has_kernels(call: PreparedCall[Plan]) -> bool:
    """Whether a call's tensors may be handed to kernels: autograd and torch's transforms see its operators alone."""
    return call.problem.device == "cuda" and not call.problem.needs_grad and not tracing.transformed()


def _seen(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask != -torch.inf


def by_torch_alone(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, sm_scale: float | None
) -> torch.Tensor:
    """A call that `Problem` can't describe, as it is; what torch's function says to it holds."""
    grouped = q.dim() == k.dim() == v.dim() == 4 and not q.size(1) == k.size(1) == v.size(1)
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


def _narrow_mask(call: PreparedCall[Plan], mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An additive mask in q's dtype, as SDPA wants it. Finite stays finite, also times log2(e) in fp32, which some backends take."""
    limit = min(torch.finfo(dtype).max, torch.finfo(mask.dtype).max, MASK_LIMIT)
    narrowed = sdpa_mask.narrow(mask, dtype, limit, call.problem, call.bound) if _has_kernels(call) else None
    if narrowed is not None:
        return narrowed
    wide = mask if mask.dtype == dtype else mask.float()  # a limit of fp16's is none of bf16's
    return torch.where(mask == -torch.inf, mask, wide.clamp(-limit, limit)).to(dtype)


def _with_causal(mask: torch.Tensor, p: Problem) -> torch.Tensor:
    keep = torch.ones(p.len_q, p.len_kv, dtype=torch.bool, device=mask.device).tril()
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)
