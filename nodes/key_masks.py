"""Attention masks that hide whole keys, such as the padding of a text: the only ones that block-sparse attention takes."""

from __future__ import annotations

import torch

from ..sageattention.planning.tensor_values import once

HIDDEN = -1e4  # what adds this or less to a score hides the key: e^-10000 is 0


def of_mask(mask: torch.Tensor | None) -> torch.Tensor | str | None:
    """bool [B or 1, N], True where the key exists; None where all do; why the mask is no such one."""
    if mask is None:
        return None
    if mask.dim() < 2 or mask.shape[-2] != 1 or (mask.dim() == 4 and mask.shape[1] != 1):
        return "its mask differs between queries or heads"
    return once(mask, _look)


def _look(mask: torch.Tensor) -> torch.Tensor | str | None:
    """Waits for the device, once for each mask."""
    keys = mask.reshape(-1, mask.shape[-1])
    live = keys if keys.dtype == torch.bool else keys > HIDDEN
    if keys.dtype != torch.bool and not bool(((keys == 0) | ~live).all()):
        return "its mask adds to scores"
    return None if bool(live.all()) else live
