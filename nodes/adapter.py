"""The one adapter between ComfyUI's attention call and ours.

ComfyUI calls an override as `override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
skip_output_reshape=False, **more)`, where `func` is the attention that would have run, and takes its result. Tensors are
[B, L, heads·D], or [B, heads, L, D] with `skip_reshape`; the result is [B, L, heads·D], or [B, heads, L, D] with
`skip_output_reshape`. `more` holds `scale`, `enable_gqa`, `low_precision_attention`, `transformer_options`, and what later
cores add.

`attn_precision` asks for scores in fp32, which ours always are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..sageattention import KernelMissing, Unsupported, ops
from .record import Record


class SageOverride:
    """An attention override for one patched model.

    What our variant refuses, and what "auto" leaves alone, goes on unchanged to the override that was there before, or else
    to the model's own attention.

    Attributes:
        variant: a name from `sageattention.variants.VARIANTS`, or "auto".
        previous: the override that this one replaced, or None.
        record: what ran so far.
    """

    def __init__(self, variant: str, previous: Callable[..., torch.Tensor] | None = None):
        self.variant = variant
        self.previous = previous
        self.record = Record()

    def __deepcopy__(self, memo: dict[int, Any]) -> SageOverride:
        """Itself: a clone of a patched model deep-copies its options, and the counts should stay in one place."""
        return self

    def __call__(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One attention call, as the module's head describes it."""
        try:
            out = self._attend(*args, **kwargs)
        except (Unsupported, KernelMissing) as error:
            self.record.count_fallback(str(error), layer_name(kwargs.get("transformer_options")))
            out = None
        if out is not None:
            return out
        if self.previous is not None:
            return self.previous(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        low_precision_attention: bool = True,
        **others: Any,
    ) -> torch.Tensor | None:
        """Our attention's result, or None where the call is left to the model's own attention on purpose.

        Raises:
            Unsupported, KernelMissing: our variant can't do this call; nothing was written.
        """
        if low_precision_attention is False:
            self.record.count_kept("the model asks for full precision in some layers")
            return None
        split = _check_heads if skip_reshape else _split_heads
        q, k, v = split(q, k, v, heads, enable_gqa)
        # The layout follows the output that is wanted, since views of the inputs cost nothing and a copy of the output does.
        layout = "HND" if skip_output_reshape else "NHD"
        if skip_reshape != skip_output_reshape:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        call = ops.prepare(
            q, k, v, tensor_layout=layout, is_causal=False, attn_mask=_four_dimensional(mask), sm_scale=scale, return_lse=False,
            variant=self.variant,
        )  # fmt: skip
        if call.plan.variant.backend == "sdpa":
            self.record.count_kept(_why_sdpa(call.plan))
            return None
        out, _ = ops.run(call)
        self.record.count_run(call.plan.variant.name)
        return out if skip_output_reshape else out.flatten(2)


def layer_name(transformer_options: dict[str, Any] | None) -> str:
    """Where in the model a call comes from, as far as its options tell: "input block 4.0", "double block 7", "block 3", ""."""
    options = transformer_options or {}
    block, index = options.get("block"), options.get("block_index")
    if block is not None:  # U-Nets: ("input", 4), and the index of the transformer block inside
        return f"{block[0]} block {block[1]}" + (f".{index}" if index is not None else "")
    if index is None:
        return ""
    return f"{options.get('block_type', '')} block {index}".lstrip()


def _split_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, L, heads·D] to [B, L, heads, D]; k and v have fewer heads where `enable_gqa` says so."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3:
            raise Unsupported(name, f"got {t.dim()} dimensions {tuple(t.shape)}, accepted are 3, [B, L, heads·D]")
    inner = q.shape[2]
    if heads < 1 or inner % heads:
        raise Unsupported("heads", f"got {heads}, accepted is a divisor of q's last dimension, {inner}")
    dim = inner // heads
    for name, t in (("k", k), ("v", v)):
        if t.shape[2] != inner and not (enable_gqa and dim and t.shape[2] % dim == 0):
            raise Unsupported(name, f"its last dimension is {t.shape[2]}, q's is {inner}; with enable_gqa a multiple of {dim} will do")
    q, k, v = (t.unflatten(2, (t.shape[2] // dim if dim else heads, dim)) for t in (q, k, v))
    return q, k, v


def _check_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, heads, L, D], as it is."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise Unsupported(name, f"got {t.dim()} dimensions {tuple(t.shape)}, accepted are 4, [B, heads, L, D]")
        if t.shape[1] != heads and (name == "q" or not enable_gqa):
            raise Unsupported(name, f"it has {t.shape[1]} heads, the call says {heads}; only k and v may differ, with enable_gqa")
    return q, k, v


def _four_dimensional(mask: torch.Tensor | None) -> torch.Tensor | None:
    """[Lq, Lk] holds for every batch and head, [B, Lq, Lk] for every head."""
    if mask is None or mask.dim() == 4:
        return mask
    return mask[:, None] if mask.dim() == 3 else mask


def _why_sdpa(plan: Any) -> str:
    if not plan.rejected:
        return plan.reason
    return "; ".join(f"{name}: {reason}" for name, reason in plan.rejected)
