"""Which keys a mask leaves to anyone: the others take no part in the statistics that K and V are quantised by."""

from __future__ import annotations

import math

import torch

from .constants import NEGLIGIBLE_BIAS

CHUNK = 1 << 23  # elements of the mask that are looked at at once, where that takes memory


def reachable(len_q: int, len_kv: int, is_causal: bool) -> int:
    """How many keys, from the first on, any query may see."""
    return min(len_q, len_kv) if is_causal else len_kv


def live_keys(mask: torch.Tensor, heads_kv: int, len_q: int, len_kv: int, is_causal: bool = False) -> torch.Tensor:
    """The keys that some query sees, over all query heads of a kv head. Reads nothing back from the mask's device.

    A key is not live where the mask removes it (False, −inf) or `is_causal` hides it, or where its bias lies more than `NEGLIGIBLE_BIAS`
    under the largest of the row, in every row.

    Args:
        mask: bool (True keeps) or additive, [B | 1, Hq | 1, Nq | 1, Nk | 1].

    Returns:
        bool [B | 1, Hkv | 1, Nk], 1 where the mask is the same for all.
    """
    mask = mask[tuple(slice(1) if stride == 0 else slice(None) for stride in mask.stride()[:3])]
    batch, heads, rows, _ = mask.shape
    rows = len_q if is_causal else rows
    mask = mask.expand(batch, heads, rows, len_kv)
    keys = torch.arange(len_kv, device=mask.device)
    whole = mask.dtype == torch.bool and not is_causal
    step = rows if whole else max(1, CHUNK // (batch * heads * len_kv))
    live = torch.zeros(batch, heads, len_kv, dtype=torch.bool, device=mask.device)
    for start in range(0, rows, max(step, 1)):
        part = mask[:, :, start : start + step]
        hidden = keys > torch.arange(start, start + part.shape[2], device=mask.device)[:, None] if is_causal else None
        if mask.dtype == torch.bool:
            kept = part if hidden is None else part & ~hidden
        else:
            bias = part.float() if hidden is None else part.float().masked_fill(hidden, -math.inf)
            kept = (bias != -math.inf) & ~(bias < bias.amax(-1, keepdim=True) - NEGLIGIBLE_BIAS)
        live |= kept.any(2)
    return live.unflatten(1, (heads_kv, -1)).any(2) if heads > 1 else live
