"""How real programs call an attention function, each form with the inputs it is used on and what it asks for.

`BY_KEYWORD` are calls of our functions with other libraries' parameters, `IN_TORCHS_PLACE` calls of torch's function, which ours stand in
for. The same forms are tested on a CPU and, for every variant, on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

TORCH = torch._C._nn.scaled_dot_product_attention

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """One way to call.

    Attributes:
        call: takes the function, q, k, v [B, H, N, D] and the mask; gives back the output as [B, H, N, D], perhaps with an LSE.
        exact: what torch's function has to be given for the same, beside q, k, v and the mask.
        mask: whether the form has one, [Nq, Nk], bool.
    """

    call: Callable[..., Any]
    exact: dict[str, Any] = field(default_factory=dict)
    mask: bool = False
    heads_kv: int = 4
    len_q: int = 40
    len_kv: int = 40
    head_dim: int = 64
    head_dim_v: int = 0
    dtype: torch.dtype = torch.float16

    def tensors(self, device: str = "cpu") -> tuple[Tensors, torch.Tensor | None]:
        """(q, k, v) and the mask."""
        g = torch.Generator().manual_seed(0)
        shapes = (4, self.len_q, self.head_dim), (self.heads_kv, self.len_kv, self.head_dim)
        shapes = (*shapes, (self.heads_kv, self.len_kv, self.head_dim_v or self.head_dim))
        q, k, v = (torch.randn(2, *shape, generator=g).to(device, self.dtype) for shape in shapes)
        mask = torch.rand(self.len_q, self.len_kv, generator=g) > 0.3
        mask[:, 0] = True
        return (q, k, v), mask.to(device) if self.mask else None

    def truth(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """By torch's function in fp32, from fp64 where the form has it."""
        q, k, v = (t if t.dtype == torch.float64 else t.float() for t in (q, k, v))
        return TORCH(q, k, v, mask, **{"enable_gqa": self.heads_kv != 4, **self.exact})


def nhd(function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **others: Any) -> Any:
    """A call in the layout [B, N, H, D]."""
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    result = function(q=q, k=k, v=v, tensor_layout="NHD", **others)
    out, lse = result if isinstance(result, tuple) else (result, None)
    return out.transpose(1, 2) if lse is None else (out.transpose(1, 2), lse)


def ring(function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, causal: bool = False) -> Any:
    """Ring attention as yunchang, xfuser, raylight and vLLM-Omni compute a step of it."""
    step = functools.partial(function, tensor_layout="NHD", return_lse=True)
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    out, lse = step(
        q, k, v, dropout_p=0, softmax_scale=0.2, causal=causal, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, return_softmax=False
    )
    return out.transpose(1, 2), lse


def flash(function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None) -> Any:
    """All of flash_attn_func's parameters."""
    options = {"softcap": None, "alibi_slopes": None, "deterministic": True, "return_attn_probs": False}
    return nhd(function, q, k, v, dropout_p=0.0, softmax_scale=None, causal=True, window_size=[-1, -1], **options)


BY_KEYWORD = {
    "ComfyUI": Form(lambda f, q, k, v, m: nhd(f, q, k, v, attn_mask=m, is_causal=False, sm_scale=None, smooth_k=False), mask=True),
    "KJNodes": Form(lambda f, q, k, v, m: f(q, k, v, is_causal=False, attn_mask=m, tensor_layout="HND"), mask=True, len_kv=50),
    "WanVideoWrapper": Form(lambda f, q, k, v, m: f(q, k, v, attn_mask=None, dropout_p=0, is_causal=False), len_kv=50),
    "HunyuanVideoWrapper": Form(lambda f, q, k, v, m: f(q, k, v, attn_mask=m, dropout_p=0, is_causal=False), mask=True),
    "bleh": Form(lambda f, q, k, v, m: nhd(f, q, k, v, is_causal=False, dropout_p=0.0, attn_mask=m, sm_scale=0.3), {"scale": 0.3}, True),
    "SD.Next": Form(
        lambda f, q, k, v, m: f(q=q, k=k, v=v, attn_mask=None, dropout_p=0.0, is_causal=True, scale=0.2), {"scale": 0.2, "is_causal": True}
    ),
    "diffusers": Form(lambda f, q, k, v, m: nhd(f, q, k, v, is_causal=False, sm_scale=None, return_lse=True), len_kv=50),
    "xfuser": Form(lambda f, q, k, v, m: f(q, k, v, is_causal=True, return_lse=True), {"is_causal": True}),
    "a ring's step": Form(ring, {"scale": 0.2}, len_kv=50),
    "a ring's causal step": Form(functools.partial(ring, causal=True), {"scale": 0.2, "is_causal": True}),
    "flash-attention": Form(flash, {"is_causal": True}),
    "fewer heads": Form(lambda f, q, k, v, m: f(q, k, v, enable_gqa=True, scale=0.2, sm_scale=0.2), {"scale": 0.2}, heads_kv=2),
}

IN_TORCHS_PLACE = {
    "q, k, v": Form(lambda f, q, k, v, m: f(q, k, v), len_kv=50),
    "a mask by position": Form(lambda f, q, k, v, m: f(q, k, v, m), mask=True, len_kv=50),
    "all by position": Form(lambda f, q, k, v, m: f(q, k, v, m, 0.0, False), mask=True),
    "causal by position": Form(lambda f, q, k, v, m: f(q, k, v, None, 0.0, True), {"is_causal": True}),
    "causal by keyword after a position": Form(lambda f, q, k, v, m: f(q, k, v, None, is_causal=True), {"is_causal": True}),
    "dropout by keyword after a position": Form(lambda f, q, k, v, m: f(q, k, v, m, dropout_p=0.0), mask=True),
    "keywords": Form(lambda f, q, k, v, m: f(q, k, v, attn_mask=m, dropout_p=0.0, is_causal=False), mask=True),
    "a scale": Form(lambda f, q, k, v, m: f(q, k, v, None, 0.0, False, scale=0.3), {"scale": 0.3}),
    "fewer heads": Form(lambda f, q, k, v, m: f(q, k, v, m, enable_gqa=True), heads_kv=2, mask=True),
    "one query": Form(lambda f, q, k, v, m: f(q, k, v), len_q=1),
    "head_dim 384": Form(lambda f, q, k, v, m: f(q, k, v, m, scale=0.3), {"scale": 0.3}, True, head_dim=384),
    "head_dim 512": Form(lambda f, q, k, v, m: f(q, k, v), head_dim=512),
    "a V of another width": Form(lambda f, q, k, v, m: f(q, k, v, attn_mask=m), mask=True, head_dim_v=32),
    "fp64": Form(lambda f, q, k, v, m: f(q, k, v, is_causal=True), {"is_causal": True}, dtype=torch.float64),
    "rank 3": Form(lambda f, q, k, v, m: f(*(t.flatten(0, 1) for t in (q, k, v)), m).unflatten(0, (2, 4)), mask=True),
    "rank 5": Form(lambda f, q, k, v, m: f(*(t[None] for t in (q, k, v)), is_causal=True)[0], {"is_causal": True}),
    "strides along head_dim": Form(lambda f, q, k, v, m: f(*(t.mT.contiguous().mT for t in (q, k, v)), None, 0.0, False)),
}
# What no variant reads, and torch's own function computes bit by bit.
TORCHS = ("head_dim 384", "head_dim 512", "a V of another width", "fp64", "rank 3", "rank 5", "strides along head_dim")


@contextmanager
def in_torchs_place(function: Callable[..., Any]):
    """The function where torch has its own, as upstream's recipe puts it."""
    torch.overrides.get_overridable_functions()  # which torch.compile asks for once; it takes no partial for a function of torch's
    F.scaled_dot_product_attention = function
    try:
        yield
    finally:
        F.scaled_dot_product_attention = TORCH


def torchs(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What a program that knows nothing of ours calls."""
    return F.scaled_dot_product_attention(*args, **kwargs)


def error(result: Any, exact: torch.Tensor) -> float:
    """Relative L2 of the output; an LSE beside it has to be there and finite."""
    out, lse = result if isinstance(result, tuple) else (result, None)
    assert out.shape == exact.shape and (lse is None or lse.isfinite().all())
    return float((out.double() - exact.double()).norm() / exact.double().norm())
