"""Calls whose masked keys hold garbage, and the same calls with those keys cut off."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

FORMS = ("bool", "additive", "finite", "dense", "dense additive")


@dataclass(frozen=True)
class Case:
    """q [batch, heads, len_q, head_dim], k and v [batch, heads_kv, len_kv, head_dim], bf16, normal but for the keys that nobody sees.

    hides: the keys that are hidden, [len_kv] bool, drawn with a generator.
    spoil: what the hidden keys and values become.
    form: of the mask, one of `FORMS`; "causal" hides the keys from `len_q` on beside them.
    """

    name: str
    len_kv: int
    hides: Callable[[int, torch.Generator], torch.Tensor]
    spoil: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    form: str = "bool"
    causal: bool = False
    len_q: int = 128
    heads: int = 1
    heads_kv: int = 1
    head_dim: int = 128
    batch: int = 1

    def spoilt(self, device: str = "cpu") -> dict:
        """Keywords of the call with garbage in the hidden keys."""
        q, k, v, hidden = self._parts()
        bad_k, bad_v = self.spoil(k[:, :, hidden], v[:, :, hidden])
        k[:, :, hidden], v[:, :, hidden] = bad_k, bad_v
        return self._call(q, k, v, self._mask(hidden), device)

    def cut(self, device: str = "cpu") -> dict:
        """The call without the hidden keys: what is left of a causal mask is dense."""
        q, k, v, hidden = self._parts()
        mask = None
        if self.causal:
            mask = torch.ones(self.len_q, self.len_kv, dtype=torch.bool).tril()[None, None, :, ~hidden]
        return self._call(q, k[:, :, ~hidden], v[:, :, ~hidden], mask, device, causal=False)

    def _parts(self) -> tuple[torch.Tensor, ...]:
        g = torch.Generator().manual_seed(0)
        shapes = (self.heads, self.len_q), (self.heads_kv, self.len_kv), (self.heads_kv, self.len_kv)
        q, k, v = (torch.randn(self.batch, *shape, self.head_dim, generator=g).bfloat16() for shape in shapes)
        return q, k, v, self.hides(self.len_kv, g)

    def _mask(self, hidden: torch.Tensor) -> torch.Tensor | None:
        if not hidden[: self.len_q if self.causal else None].any():
            return None
        row = ~hidden[None, None, None]
        if self.form.startswith("dense"):
            row = row.expand(-1, -1, self.len_q, -1).contiguous()
        if self.form in ("bool", "dense"):
            return row
        return torch.zeros(row.shape).masked_fill(~row, -3e4 if self.form == "finite" else -math.inf)

    def _call(self, q, k, v, mask, device: str, causal: bool | None = None) -> dict:
        tensors = {name: t.to(device) for name, t in (("q", q), ("k", k), ("v", v))}
        return {**tensors, "attn_mask": mask if mask is None else mask.to(device), "is_causal": self.causal if causal is None else causal}


def last(count: int) -> Callable[[int, torch.Generator], torch.Tensor]:
    return lambda len_kv, g: torch.arange(len_kv) >= len_kv - count


def one_in(count: int) -> Callable[[int, torch.Generator], torch.Tensor]:
    return lambda len_kv, g: torch.rand(len_kv, generator=g) < 1 / count


def alike(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As padding by a text encoder is: all rows the same."""
    return k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v)


def times(k_factor: float, v_factor: float) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    return lambda k, v: (k * k_factor, v * v_factor)


def filled(value: float) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    return lambda k, v: (torch.full_like(k, value), torch.full_like(v, value))


CASES = (
    Case("padding all alike", 4608, last(472), alike),
    Case("half is padding", 1024, last(512), alike),
    Case("larger values", 1024, one_in(4), times(1, 20)),
    Case("larger keys", 1024, one_in(64), times(50, 1)),
    Case("NaN", 700, one_in(4), filled(math.nan)),
    Case("NaN in padding", 700, last(150), filled(math.nan), "dense"),
    Case("the largest numbers", 700, one_in(4), filled(3e38), "additive"),
    Case("fifty times, a finite bias", 700, one_in(4), times(50, 50), "finite"),
    Case("NaN, dense additive", 700, one_in(8), filled(math.nan), "dense additive"),
    Case("causal and padding", 512, last(200), alike, causal=True, len_q=512, heads=6, heads_kv=6),
    Case("causal, keys behind the last query", 700, last(500), filled(math.nan), causal=True, len_q=200),
    Case("causal and holes", 400, one_in(8), filled(math.nan), causal=True, len_q=400),
    Case("heads that share keys", 600, last(250), times(50, 50), "dense", heads=4, heads_kv=2, batch=2, len_q=64),
)
