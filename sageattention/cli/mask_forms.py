"""Masks as models hand them over, for `bench --masks` and `check`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .workloads import Shape

PADDING, TEXT = 200, 512  # tokens


@dataclass(frozen=True)
class MaskForm:
    """One way to mask a call.

    Attributes:
        keywords: (shape, dtype of q, device) → keywords of `sageattn`. Seeded: always the same.
    """

    name: str
    summary: str
    keywords: Callable[[Shape, torch.dtype, torch.device | str], dict[str, Any]]

    def fits(self, shape: Shape) -> bool:
        """Whether models have it with such a shape: those that tell queries apart are for self-attention."""
        return shape.len_q == shape.len_kv or self.name not in ("text", "causal")


def padding(shape: Shape, device: torch.device | str) -> torch.Tensor:
    """[B, 1, 1, Nk] bool that hides the last `PADDING` keys, of short sequences the last quarter."""
    import torch

    hidden = min(PADDING, shape.len_kv // 4)
    return (torch.arange(shape.len_kv, device=device) < shape.len_kv - hidden).expand(shape.batch, 1, 1, -1).contiguous()


def text_then_image(shape: Shape, device: torch.device | str) -> torch.Tensor:
    """[1, 1, N, N] bool: `TEXT` tokens, of short sequences the first quarter, see those before them; the image behind them sees all."""
    import torch

    text = min(TEXT, shape.len_q // 4)
    kept = torch.ones(1, 1, shape.len_q, shape.len_kv, dtype=torch.bool, device=device)
    kept[:, :, :text] = torch.arange(shape.len_kv, device=device) <= torch.arange(text, device=device)[:, None]
    return kept


def _unlikely(shape: Shape, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    import torch

    bias = torch.zeros(shape.batch, 1, 1, shape.len_kv, dtype=dtype, device=device)
    return bias.masked_fill_(~padding(shape, device), torch.finfo(dtype).min)


def _random(shape: Shape, device: torch.device | str) -> torch.Tensor:
    import torch

    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(1, 1, shape.len_q, shape.len_kv, dtype=torch.bool, device=device).bernoulli_(0.5, generator=generator)


MASK_FORMS: dict[str, MaskForm] = {
    form.name: form
    for form in (
        MaskForm("key bool", f"the last {PADDING} keys hidden, bool", lambda s, dtype, device: {"attn_mask": padding(s, device)}),
        MaskForm("key finfo.min", "the same as a bias of finfo.min", lambda s, dtype, device: {"attn_mask": _unlikely(s, dtype, device)}),
        MaskForm(
            "text", f"{TEXT} causal tokens of text, then an image that sees all",
            lambda s, dtype, device: {"attn_mask": text_then_image(s, device)},
        ),
        MaskForm("random", "every second pair by chance, bool", lambda s, dtype, device: {"attn_mask": _random(s, device)}),
        MaskForm("causal", "is_causal", lambda s, dtype, device: {"is_causal": True}),
    )
}  # fmt: skip
