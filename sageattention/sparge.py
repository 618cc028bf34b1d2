"""SpargeAttn's calls on `sageattn_sparse`, for programs that `import spas_sage_attn`.

Signatures and defaults are SpargeAttn's. What differs: the output has q's dtype unless another than the default is asked for; any
head_dim and number of tokens is accepted; `pvthreshd` and `smooth_k` change nothing, as chosen blocks are computed wholly and K is
always shifted.

`provide()`, and in ComfyUI the environment variable `SAGEATTENTION_SPARGE=1`, let `import spas_sage_attn` find these functions where
SpargeAttn is not installed. Its submodule `core` holds them, too; `autotune`, `utils` and the compiled modules are not served: they are
made of SpargeAttn's private formats.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

from .errors import Unsupported
from .layout import AXES
from .sparse import sageattn_sparse

NAME = "spas_sage_attn"
Output = torch.Tensor | tuple[torch.Tensor, float]
Threshold = float | torch.Tensor


def spas_sage2_attn_meansim_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, smooth_k: bool = True, simthreshd1: float = 0.6, cdfthreshd: Threshold = 0.98, pvthreshd: float = 50,
    attention_sink: bool = False, tensor_layout: str = "HND", output_dtype: torch.dtype = torch.float16, return_sparsity: bool = False,
) -> Output:  # fmt: skip
    """Blocks of 64 keys for 128 queries until they hold `cdfthreshd` of the softmax over block means, and those whose tokens are uneven.

    Args:
        q: [B, Hq, Nq, D] for "HND"; k, v: [B, Hkv, Nk, D].
        simthreshd1: mean cosine of a block's tokens below which it is always computed.
        cdfthreshd: a share, or a tensor [Hq] of shares.
        attention_sink: always compute the first block of keys.

    Returns:
        out, or (out, share of the blocks left out).
    """
    _check_neutral(attn_mask, dropout_p)
    return _call(
        q, k, v, output_dtype, return_sparsity, selection="cdf", keep=_per_head(cdfthreshd, q), similarity=simthreshd1,
        is_causal=is_causal, sm_scale=scale, sinks=int(attention_sink), tensor_layout=tensor_layout, neighbours=-1,
    )  # fmt: skip


def spas_sage2_attn_meansim_topk_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, smooth_k: bool = True, simthreshd1: float = -0.1, cdfthreshd: None = None, topk: Threshold = 0.5,
    pvthreshd: float = 50, attention_sink: bool = False, tensor_layout: str = "HND", output_dtype: torch.dtype = torch.float16,
    return_sparsity: bool = False,
) -> Output:  # fmt: skip
    """The same with the share `topk` of the blocks, or a tensor [Hq] of shares."""
    _check_neutral(attn_mask, dropout_p)
    if cdfthreshd is not None:
        raise Unsupported("cdfthreshd", f"got {cdfthreshd!r}, accepted is None; spas_sage2_attn_meansim_cuda goes by that threshold")
    return _call(
        q, k, v, output_dtype, return_sparsity, selection="topk", keep=_per_head(topk, q), similarity=simthreshd1, is_causal=is_causal,
        sm_scale=scale, sinks=int(attention_sink), tensor_layout=tensor_layout, neighbours=-1,
    )  # fmt: skip


def block_sparse_sage2_attn_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask_id: torch.Tensor | None = None, dropout_p: float = 0.0,
    scale: float | None = None, smooth_k: bool = True, pvthreshd: float = 50, attention_sink: bool = False, tensor_layout: str = "HND",
    output_dtype: torch.dtype = torch.float16, return_sparsity: bool = False,
) -> Output:  # fmt: skip
    """The blocks of a mask.

    Args:
        mask_id: [B or 1, Hq or 1, rows, columns] of any dtype, not 0 computes the block: 128 queries × 64 keys or, as SpargeAttn has it on
            Hopper, 64 × 128, told by its shape. Tokens at the end that fill no block of 128 may have none in the mask: they are computed.
    """
    _check_neutral(None, dropout_p)
    tokens = AXES.get(tensor_layout, AXES["HND"])[1]  # another layout is refused by the call
    mask, q_block = _static_mask(mask_id, q.shape[tokens], k.shape[tokens], q.device)
    return _call(
        q, k, v, output_dtype, return_sparsity, selection="static", block_mask=mask, q_block=q_block, sm_scale=scale,
        sinks=int(attention_sink), tensor_layout=tensor_layout,
    )  # fmt: skip


def get_cuda_arch_versions() -> list[str]:
    """ "sm80", "sm90" …, one for each CUDA device; programs choose the shape of their masks by it."""
    return ["sm{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())]


def provide() -> None:
    """Let `import spas_sage_attn` find this module where no such package is installed; one that is, or will be, goes first."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())


class Finder(importlib.abc.MetaPathFinder):
    """Last in `sys.meta_path`: asked for what no other finder has."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name not in (NAME, f"{NAME}.core"):
            return None
        return importlib.util.spec_from_loader(name, _Loader(), origin=__file__, is_package=name == NAME)


class _Loader(importlib.abc.Loader):
    def exec_module(self, module: ModuleType) -> None:
        for name in _SERVED:
            setattr(module, name, globals()[name])


_SERVED = ("spas_sage2_attn_meansim_cuda", "spas_sage2_attn_meansim_topk_cuda", "block_sparse_sage2_attn_cuda", "get_cuda_arch_versions")


def _call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output_dtype: torch.dtype, return_sparsity: bool, **arguments: Any
) -> Output:  # fmt: skip
    out, share = sageattn_sparse(q, k, v, tail=False, return_share=True, **arguments)
    if output_dtype not in (None, torch.float16):  # the default, which callers with other models leave as it is
        out = out.to(output_dtype)
    return (out, 1.0 - float(share)) if return_sparsity else out


def _per_head(threshold: Threshold, q: torch.Tensor) -> Threshold:
    return threshold.to(q.device, torch.float32).flatten() if isinstance(threshold, torch.Tensor) else threshold


def _check_neutral(attn_mask: object, dropout_p: float) -> None:
    if attn_mask is not None:
        raise Unsupported("attn_mask", "is given; accepted is None, blocks are masked by block_sparse_sage2_attn_cuda")
    if dropout_p:
        raise Unsupported("dropout_p", f"got {dropout_p!r}, accepted is 0: there is no training")


_GEOMETRIES = ((128, 64), (64, 128))  # queries × keys of a block of the mask


def _static_mask(mask: torch.Tensor | None, len_q: int, len_kv: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """(bool [B or 1, Hq or 1, ⌈Nq/q_block⌉, ⌈Nk/64⌉], q_block)."""
    blocks = -(-len_kv // 64)
    if mask is None:
        return torch.ones(1, 1, -(-len_q // 128), blocks, dtype=torch.bool, device=device), 128
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        raise Unsupported("mask_id", f"got {getattr(mask, 'shape', mask)!r}, accepted is a tensor [B, H, rows, columns]")
    given = tuple(mask.shape[2:])
    full = {g: (-(-len_q // g[0]), -(-len_kv // g[1])) for g in _GEOMETRIES}
    least = {g: (len_q // 128 * 128 // g[0], len_kv // 128 * 128 // g[1]) for g in _GEOMETRIES}
    fits = [g for g in _GEOMETRIES if given == full[g]]
    fits += [g for g in _GEOMETRIES if all(low <= n <= high for low, n, high in zip(least[g], given, full[g]))]
    if fits:
        (q_block, k_block), (rows, columns) = fits[0], full[fits[0]]
        keep = torch.nn.functional.pad(mask != 0, (0, columns - given[1], 0, rows - given[0]), value=True)
        return keep.repeat_interleave(k_block // 64, 3)[..., :blocks], q_block
    accepted = " or ".join(f"{list(full[g])} of {g[0]} x {g[1]} tokens" for g in _GEOMETRIES)
    raise Unsupported("mask_id", f"its blocks are {list(given)}, accepted are {accepted}")
