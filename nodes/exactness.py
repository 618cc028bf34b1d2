"""How far an attention's output is from fp32 attention, on a sample of its rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..sageattention import layout, precision
from ..sageattention.numerics.rows import spread

if TYPE_CHECKING:
    from ..sageattention.dispatch import Call

ROWS = 128  # evenly spread over the queries; all of a shorter call
MEMORY = 64 << 20  # bytes of scores at a time, or those of the heads that share one K


def of_call(out: torch.Tensor, call: Call) -> float:
    """`worst_head` of a call's output, in its layout."""
    return worst_head(layout.to_hnd(out, call.problem.layout), *call.hnd(), call.mask, call.problem.sm_scale)


def worst_head(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sm_scale: float
) -> float:  # fmt: skip
    """The relative L2 error of an output's worst head; infinite where one holds a value that is not finite.

    Rows that fp32 attention has no finite value for, because a mask hides every key from them, don't count. Waits for the device.

    Args:
        out, q: [B, Hq, Nq, D]; k, v: [B, Hkv, Nk, D].
        mask: bool (True is seen) or additive, broadcastable to [B, Hq, Nq, Nk], 4-D.
    """
    batch, heads, len_q, _ = q.shape
    group = heads // k.shape[1]
    rows = spread(len_q, ROWS, q.device)
    q, out = q.index_select(2, rows), out.index_select(2, rows)
    if mask is not None and mask.shape[2] > 1:
        mask = mask.index_select(2, rows)
    parts = []
    step = max(1, MEMORY // (4 * batch * group * len(rows) * k.shape[2]))  # K and V heads at a time
    for first in range(0, k.shape[1], step):
        kv = slice(first, first + step)
        of_q = slice(first * group, (first + step) * group)
        part = mask if mask is None or mask.shape[1] == 1 else mask[:, of_q]
        with precision.exact(q.device.type):
            parts.append(_attend(q[:, of_q], k[:, kv], v[:, kv], part, sm_scale))
    error = float(_relative_l2(out.float(), torch.cat(parts, 1)).amax())
    return math.inf if math.isnan(error) else error


def _relative_l2(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """[B, H] of [B, H, rows, D]."""
    counts = exact.isfinite().all(-1, keepdim=True)
    exact, difference = exact.where(counts, 0), (out - exact).where(counts, 0)
    norm, off = exact.norm(dim=(-2, -1)), difference.norm(dim=(-2, -1))
    return (off / norm).where(off != 0, 0)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sm_scale: float) -> torch.Tensor:
    """fp32 attention of [B, H, rows, D] queries to [B, Hkv, Nk, D] keys and values."""
    batch, heads, rows, dim = q.shape
    heads_kv, len_kv = k.shape[1:3]
    grouped = q.reshape(batch * heads_kv, -1, dim)  # the queries of all heads that share a K
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    scores = _fp32_product(grouped, k.transpose(1, 2)).mul_(sm_scale)
    if mask is not None:
        by_head = scores.view(batch, heads, rows, len_kv)
        if mask.dtype == torch.bool:
            by_head.masked_fill_(~mask, -math.inf)
        else:
            by_head.add_(mask)
    p = scores.softmax(-1)
    del scores  # as long as P, which has its memory's worth of parts to come
    return _product_with_values(p, v).view(batch, heads, rows, v.shape[-1])


def _fp32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a · b with every product exact and every sum in fp32. Tensor cores do that for narrow types, at a fraction of fp32's cost."""
    if _by_tensor_cores(a):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _product_with_values(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """P · V, P in fp32: for narrow types as the sum of what rounds to them and of the rest."""
    if not _by_tensor_cores(v):
        return torch.bmm(p, v.float())
    high = p.to(v.dtype)
    return _fp32_product(high, v).add_(_fp32_product(p.sub_(high).to(v.dtype), v))


def _by_tensor_cores(t: torch.Tensor) -> bool:
    """Whether torch multiplies this type with fp32 sums and an fp32 result here."""
    if not t.is_cuda or t.dtype not in (torch.float16, torch.bfloat16) or torch.__version__ < "2.8" or torch.version.cuda is None:
        return False
    if t.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:  # ComfyUI's --fast sets it
        return False
    return torch.cuda.get_device_capability(t.device) >= (8, 0)
