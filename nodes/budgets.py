"""The method "budget": each head has a share of the blocks of its own, by what it needed in the last dense step."""

from __future__ import annotations

from typing import Any

import torch

from ..sageattention import precision
from ..sageattention.block_order import BLOCK
from ..sageattention.numerics.rows import spread
from ..sageattention.planning.tensor_values import once
from .record import Entry
from .schedule import Window

ROWS = 128  # queries that are looked at, evenly spread
MASS = 0.9  # share of a query's weight that its blocks should hold
RANGE = 4.0  # a head gets at most this many times the percentage, and at least its inverse


class Budgets:
    """What the heads of each layer needed when it was last measured, apart for conditional and unconditional passes, for sequences of
    different lengths and for devices that share the work."""

    def __init__(self) -> None:
        self._needs: dict[tuple[Any, ...], torch.Tensor] = {}
        self._shared: dict[tuple[Any, ...], torch.Tensor] = {}
        self._step: object = None
        self._due = False

    def due(self, entry: Entry, window: Window, options: dict[str, Any]) -> bool:
        """Whether this is the last step before the window begins, as far as the sampler tells; else any step before it."""
        if entry.step is not self._step:
            self._step = entry.step
            self._due = _is_last(entry, window, options.get("sample_sigmas"))
        return self._due

    def measure(
        self, layer: str, options: dict[str, Any], q: torch.Tensor, k: torch.Tensor, sm_scale: float | None, order: torch.Tensor | None
    ) -> None:
        """Remember what the heads of a layer need in this call. q, k: [B, H, N, D]."""
        key = _key(layer, options, q)
        self._needs[key] = needs(q, k, sm_scale, order)
        self._shared.pop(key, None)

    def of(self, layer: str, options: dict[str, Any], q: torch.Tensor, keep: float) -> torch.Tensor | None:
        """The share of the blocks for each head, fp32 [H], `keep` on average; None where the layer was not measured. q: [B, H, N, D]."""
        key = _key(layer, options, q)
        shared = self._shared.get(key)
        if shared is None and key in self._needs:
            shared = self._shared[key] = share_out(self._needs[key], keep)  # one tensor for all steps: its values are checked once
        return shared


def _key(layer: str, options: dict[str, Any], q: torch.Tensor) -> tuple[Any, ...]:
    return layer, q.shape[1:3], q.device, *(options.get("cond_or_uncond") or ())


def _is_last(entry: Entry, window: Window, sigmas: torch.Tensor | None) -> bool:
    sigma = entry.step.sigma
    if sigma is None or entry.sampling.percent_to_sigma is None:
        return False
    begins = entry.sampling.sigma_at(window.start)
    if sigma <= begins:
        return False  # after the window
    coming = [value for value in once(sigmas, torch.Tensor.tolist) if value < sigma * (1 - 1e-5)] if sigmas is not None else []
    return not coming or coming[0] <= begins


@torch.no_grad()
def needs(q: torch.Tensor, k: torch.Tensor, sm_scale: float | None, order: torch.Tensor | None) -> torch.Tensor:
    """The share of the blocks that holds `MASS` of a query's weight, the mean of `ROWS` queries of each head.

    Args:
        q: [B, Hq, N, D]; k: [B, Hkv, N, D].
        order: int32 [N], the row at each position of the blocks' order; None for the tensors' own.

    Returns:
        fp32 [Hq], 0 to 1.
    """
    heads, tokens, dim = q.shape[1:]
    rows = spread(tokens, ROWS, q.device)
    place = slice(None) if order is None else order.long()
    scale = dim**-0.5 if sm_scale is None else sm_scale
    found = []
    for head in range(heads):  # one at a time: the scores of all would take gigabytes
        keys = k[:, head * k.shape[1] // heads]
        with precision.exact(q.device.type):
            scores = q[:, head, rows].float() @ keys.float().mT * scale
        weights = torch.nn.functional.pad(scores.softmax(-1)[..., place], (0, -tokens % BLOCK))
        blocks = weights.unflatten(-1, (-1, BLOCK)).sum(-1).sort(-1, descending=True).values.cumsum(-1)
        found.append(((blocks < MASS).sum(-1) + 1).float().mean() / blocks.shape[-1])
    return torch.stack(found)


def share_out(need: torch.Tensor, keep: float) -> torch.Tensor:
    """The share of the blocks for each head, in proportion to its need within the limits, `keep` on average.

    Args:
        need: fp32 [H].
        keep: 0 to 1.

    Returns:
        fp32 [H], 0 to 1.
    """
    least, most = keep / RANGE, min(keep * RANGE, 1.0)
    below, above = torch.zeros_like(need[0]), most / need.amin()
    for _ in range(24):  # bisection, without a wait for the device
        factor = (below + above) / 2
        too_much = (need * factor).clamp(least, most).mean() > keep
        below, above = below.where(too_much, factor), above.where(~too_much, factor)
    return (need * factor).clamp(least, most)
