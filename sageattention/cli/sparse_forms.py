"""Block-sparse calls as a video model makes them, for `bench --sparse` and `check`: the prefix a sink, tokens in cubes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..block_order import cube_order
from ..sparse import sageattn_sparse
from . import video
from .candidates import Attention, variant

if TYPE_CHECKING:
    import torch

# What models of long videos ask for, of `workloads.MODELS`.
SHAPES = ("h3_480p", "ltx_1080p", "h3_768p_5s", "wan_720p", "h3_768p_15s", "hunyuan15_720p", "h3_1080p_15s")
FORMS: dict[str, dict[str, Any]] = {
    "sol 1": {"selection": "sol", "tau": 1.0},
    "sol 1.3": {"selection": "sol", "tau": 1.3},
    "mass 1": {"selection": "mass", "tau": 1.0},
    "mass 2": {"selection": "mass", "tau": 2.0},
    "topk 0.2": {"selection": "topk", "keep": 0.2},
    "topk 0.1, no tail": {"selection": "topk", "keep": 0.1, "tail": False},
}


def candidates(names: list[str]) -> Iterator[Attention]:
    """Every form by every variant named, "auto" included.

    Raises:
        Unsupported: no such variant.
    """
    for name in names:
        found = variant(name).variant
        for form, keywords in FORMS.items():
            yield Attention(f"{form} {name}", functools.partial(call, variant=name, **keywords), variant=found)


def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """One call of `sageattn_sparse` on `video` inputs, [B, H, N, D] with as many queries as keys."""
    prefix = video.grid_of(q.shape[2]).prefix
    out = sageattn_sparse(q, k, v, order=_order(q.shape[2], str(q.device)), sinks=prefix, **keywords)
    assert not isinstance(out, tuple)  # no keyword asks for more
    return out


@functools.lru_cache(maxsize=8)
def _order(tokens: int, device: str) -> torch.Tensor:
    prefix, frames, height, width = video.grid_of(tokens)
    return cube_order(frames, height, width, prefix=prefix, device=device)
