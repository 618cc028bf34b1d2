"""Where heads and tokens lie in a tensor: "HND" is [B, H, N, D], "NHD" is [B, N, H, D]. Nothing else knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

AXES = {"HND": (1, 2), "NHD": (2, 1)}  # of heads, of tokens


def strides(t: torch.Tensor, layout: str) -> tuple[int, int, int]:
    """The strides of (batch, head, token), in elements."""
    batch, first, second, _ = t.stride()
    return (batch, first, second) if layout == "HND" else (batch, second, first)


def to_hnd(t: torch.Tensor, layout: str) -> torch.Tensor:
    """A view as [B, H, N, D]."""
    return t if layout == "HND" else t.transpose(1, 2)


def from_hnd(t: torch.Tensor, layout: str) -> torch.Tensor:
    """A [B, H, N, D] tensor in the layout; contiguous where it is another one."""
    return t if layout == "HND" else t.transpose(1, 2).contiguous()
