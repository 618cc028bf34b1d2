"""Rows of a long tensor that stand for all of them."""

from __future__ import annotations

import torch


def spread(length: int, most: int, device: torch.device) -> torch.Tensor:
    """Numbers of `most` of `length` rows (of all, where there are no more), evenly spread from the first to the last, int64.

    In integers: torch.linspace counts in the default dtype, and a 16-bit one rounds beyond the last row.
    """
    count = min(length, most)
    return torch.arange(count, device=device) * (length - 1) // max(count - 1, 1)
