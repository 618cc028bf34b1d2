"""What torch's own attention lacks where a call has a dense mask, each in one small launch: torch's operators would go over the mask, and
over the output, several times more."""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.params import NarrowMaskParams, RepairRowsParams, packer
from ...kernels.table import NARROW_KEYS, NARROW_MASK, REPAIR_ROWS
from ...numerics.constants import MASK_KINDS
from ...planning.problem import Problem
from . import lone
from .launcher import Kernel

MAX_ROWS = 2**31 - REPAIR_ROWS.threads  # the kernel counts rows in 32 bits

_KINDS = {getattr(torch, name): number for name, number in MASK_KINDS.items()}
(_pack_narrow, _narrow_constants), (_pack_repair, _repair_constants) = packer(NarrowMaskParams), packer(RepairRowsParams)


def narrow(mask: torch.Tensor, dtype: torch.dtype, limit: float, p: Problem, bound: dict[Any, Any]) -> torch.Tensor | None:
    """An additive mask in another dtype, its finite biases cut off at ±limit; None where that can't be done here.

    Args:
        mask: 4-D, any strides; on a CUDA device.
        bound: of the prepared call, for what its launches have in common.
    """
    launch = bound.get("narrow")
    if launch is None:
        launch = bound["narrow"] = _bind_narrow(mask, dtype, limit, p)
    kernel, ctas, before, after = launch
    if kernel is None:
        return None
    out = torch.empty(mask.shape, dtype=dtype, device=mask.device)
    lone.launch(p.device_index, kernel, ctas, _pack_narrow(mask.data_ptr(), before, out.data_ptr(), after))
    return out


def repairs(mask: torch.Tensor, v: torch.Tensor, p: Problem) -> bool:
    """Whether `repair` serves a call."""
    possible = mask.dtype in _KINDS and v.dtype in lone.DTYPES and v.stride(-1) == 1 and p.batch * p.heads_q * p.len_q <= MAX_ROWS
    return possible and lone.kernel(p.device_index, REPAIR_ROWS) is not None


def repair(out: torch.Tensor, mask: torch.Tensor, v: torch.Tensor, limit: float, p: Problem, bound: dict[Any, Any]) -> None:
    """Rows that torch's attention gets wrong, set right in place, where `repairs` says that it can be done.

    A row that sees no key becomes 0. One whose every bias is below -limit, or that has some above limit, becomes the mean of V over
    these keys: beside such numbers fp32 has no room for scores.

    Args:
        out: [B, H, Nq, D], channels adjacent; on a CUDA device.
        mask: 4-D, bool or additive, as the call has it.
        v: [B, Hkv, Nk, D].
        limit: biases up to here, in either sign, torch's attention has taken right; infinite where that is all of them.
        bound: as for `narrow`.
    """
    key = "repair", out.stride(), limit  # torch's layouts vary with its backend
    launch = bound.get(key)
    if launch is None:
        launch = bound[key] = _bind_repair(out, mask, v, limit, p)
    kernel, ctas, of_mask, of_out, rest = launch
    lone.launch(p.device_index, kernel, ctas, _pack_repair(mask.data_ptr(), of_mask, out.data_ptr(), of_out, v.data_ptr(), rest))


Bound = tuple[Kernel | None, int, bytes, bytes]  # kernel, CTAs, and the parameters between the addresses
NOT_HERE: Bound = (None, 0, b"", b"")


def _bind_narrow(mask: torch.Tensor, dtype: torch.dtype, limit: float, p: Problem) -> Bound:
    batch, heads, len_q, len_kv = mask.shape
    ctas_per_row = -(-len_kv // NARROW_KEYS)
    ctas = batch * heads * len_q * ctas_per_row
    known = mask.dtype in lone.DTYPES and dtype in lone.DTYPES
    kernel = lone.kernel(p.device_index, NARROW_MASK) if known and ctas <= lone.MAX_CTAS else None
    if kernel is None:
        return NOT_HERE
    dtypes = lone.DTYPES[mask.dtype], lone.DTYPES[dtype]
    before, after = _narrow_constants(*mask.stride(), heads, len_q, len_kv, ctas_per_row, *dtypes, limit)
    return kernel, ctas, before, after


def _bind_repair(
    out: torch.Tensor, mask: torch.Tensor, v: torch.Tensor, limit: float, p: Problem
) -> tuple[Kernel, int, bytes, bytes, bytes]:  # fmt: skip
    rows, kernel = p.batch * p.heads_q * p.len_q, lone.kernel(p.device_index, REPAIR_ROWS)
    assert kernel is not None  # `repairs` has said so
    mask_strides = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
    of_mask, of_out, rest = _repair_constants(
        *mask_strides, *out.stride()[:3], *v.stride()[:3], p.heads_q, p.heads_q // p.heads_kv, p.len_q, p.len_kv, out.shape[-1], rows,
        _KINDS[mask.dtype], lone.DTYPES[out.dtype], p.causal, limit,
    )  # fmt: skip
    return kernel, -(-rows // REPAIR_ROWS.threads), of_mask, of_out, rest
