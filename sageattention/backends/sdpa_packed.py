"""Packed sequences by PyTorch's own attention: the form of it that reads them in place, where this release has one for the call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..device import capability
from ..planning.problem import Problem
from .call import Result

FLASH_ARCH = 80  # torch's flash kernels run from there on
MAX_HEAD_DIM, HEAD_DIM_STEP = 256, 8  # … and take these


@functools.cache
def _function() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """torch.nn.attention.varlen.varlen_attn and the names of its parameters, which differ between releases; None before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def reads(p: Problem, equal_lengths: bool) -> bool:
    """Whether torch's function takes a call.

    Args:
        equal_lengths: of queries and keys. Where they differ it aligns a causal mask to the last key.
    """
    found = _function() if p.device == "cuda" else None
    if found is None or p.dtype not in ("float16", "bfloat16") or p.head_dim > MAX_HEAD_DIM or p.head_dim % HEAD_DIM_STEP:
        return False
    if capability.of_device(p.device, p.device_index).arch < FLASH_ARCH:
        return False
    _, parameters = found
    takes_scale = "scale" in parameters or p.sm_scale == p.head_dim**-0.5
    takes_heads = "enable_gqa" in parameters or p.heads_q == p.heads_kv
    return takes_scale and takes_heads and (equal_lengths or not p.causal)


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, p: Problem) -> Result:
    """(out [total_q, Hq, D], lse [Hq, total_q] or None) of a call that `reads` allows."""
    from torch.nn.attention.varlen import AuxRequest

    found = _function()
    assert found is not None  # `reads` said so
    attention, parameters = found
    options: dict[str, Any] = {"scale": p.sm_scale} if "scale" in parameters else {}
    if p.heads_q != p.heads_kv:
        options["enable_gqa"] = True
    if p.causal:
        options |= {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    if p.return_lse:
        options["return_aux"] = AuxRequest(lse=True)
    result = attention(q, k, v, cu_seqlens_q.int(), cu_seqlens_k.int(), p.len_q, p.len_kv, **options)
    if not p.return_lse:
        return result, None
    out, lse = result
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)  # its log-sum-exp of no keys
