"""Two parts of one attention, over different keys, become one, in one pass over their outputs."""

from __future__ import annotations

import torch

from ... import layout
from ...kernels.params import MergeParams, packer
from ...kernels.table import MERGE_ATTENTION
from . import lone

MAX_HEAD_DIM = 256
_pack, _constants = packer(MergeParams)


def merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, tensor_layout: str) -> bool:
    """Merge `other` into `out` and `lse`, in place; False where that can't be done here, and nothing was done.

    Args:
        out, other: 4-D in the layout, of one dtype; on a CUDA device.
        lse, other_lse: [B, H, N] fp32, natural log.
    """
    batch, heads, length = lse.shape
    head_dim, index = out.shape[-1], out.device.index
    possible = (
        out.dtype in lone.DTYPES and 0 < head_dim <= MAX_HEAD_DIM and lse.numel() < 2**31
        and out.stride(-1) == other.stride(-1) == 1 and lse.is_contiguous() and other_lse.is_contiguous()
    )  # fmt: skip
    kernel = lone.kernel(index, MERGE_ATTENTION) if possible else None
    if kernel is None:
        return False
    row_lanes = next(lanes for lanes in (8, 16, 32) if 8 * lanes >= head_dim)
    strides = layout.strides(out, tensor_layout), layout.strides(other, tensor_layout)
    bytes_apart = (out.element_size() * stride for stride in (*strides[0], *strides[1]))
    vectorized = head_dim % 8 == 0 and not any(x % 16 for x in (out.data_ptr(), other.data_ptr(), *bytes_apart))
    of_out, of_other, rest = _constants(
        *strides[0], *strides[1], heads, length, head_dim, lse.numel(), row_lanes, lone.DTYPES[out.dtype], vectorized
    )
    ctas = -(-lse.numel() * row_lanes // MERGE_ATTENTION.threads)
    params = _pack(out.data_ptr(), of_out, other.data_ptr(), of_other, lse.data_ptr(), other_lse.data_ptr(), rest)
    lone.launch(index, kernel, ctas, params)
    return True
