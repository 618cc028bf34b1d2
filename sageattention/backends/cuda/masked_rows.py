"""Zeros where a mask hides every key, beside torch's own attention: one small launch, where torch's operators would go over the mask and
the output once more."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ... import torch_internals
from ...device import capability
from ...errors import KernelMissing
from ...kernels import binaries
from ...kernels.params import ZeroMaskedRowsParams, packer
from ...kernels.table import IMAGES, ZERO_MASKED_ROWS
from ...numerics.constants import MASK_KINDS
from ...planning.problem import Problem
from . import driver
from .launcher import Kernel

MAX_ROWS = 2**31 - ZERO_MASKED_ROWS.threads  # the kernel counts rows in 32 bits

_KINDS = {getattr(torch, name): number for name, number in MASK_KINDS.items()}
_pack, _constants = packer(ZeroMaskedRowsParams)


def zero(out: torch.Tensor, mask: torch.Tensor, p: Problem, bound: dict[Any, Any]) -> bool:
    """Zero the fully masked rows of an output; False where that can't be done here, and nothing was done.

    Args:
        out: [B, H, Nq, D], any strides; on a CUDA device.
        mask: 4-D, bool or additive, as the call has it.
        bound: of the prepared call, for what its launches have in common.
    """
    key = "masked rows", out.stride()
    launch = bound.get(key)
    if launch is None:
        launch = bound[key] = _bind(out, mask, p)
    kernel, blocks, of_mask, of_out = launch
    if kernel is None:
        return False
    params = _pack(mask.data_ptr(), of_mask, out.data_ptr(), of_out)
    driver.launch(p.device_index, torch_internals.current_stream(p.device_index), ((kernel, blocks, 1, 1, params, False),))
    return True


def _bind(out: torch.Tensor, mask: torch.Tensor, p: Problem) -> tuple[Kernel | None, int, bytes, bytes]:
    """A launch but for its addresses."""
    rows, words = p.batch * p.heads_q * p.len_q, out.element_size() // 2
    kernel = _kernel(p.device_index) if out.stride(-1) == 1 and rows <= MAX_ROWS and mask.dtype in _KINDS else None
    if kernel is None:
        return None, 0, b"", b""
    mask_strides = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
    of_mask, of_out = _constants(
        *mask_strides, *out.stride()[:3], p.heads_q, p.len_q, p.len_kv, rows, _KINDS[mask.dtype], p.causal, words * out.shape[-1], words
    )
    return kernel, -(-rows // ZERO_MASKED_ROWS.threads), of_mask, of_out


@functools.cache
def _kernel(index: int) -> Kernel | None:
    """The kernel on a device; None where there is none for it, or it can't be loaded."""
    card = capability.of_device("cuda", index)
    image = binaries.select(IMAGES, "masked_rows", card.arch) if card.device == "cuda" else None
    if image is None:
        return None
    try:
        return driver.kernel(index, image, ZERO_MASKED_ROWS.symbol, "sdpa")
    except KernelMissing:
        return None
