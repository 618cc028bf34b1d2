"""Block statistics that the sparse router reads: means of K and Q over blocks of 64 tokens, sums of V.

All functions take heads of one batch, [..., N, D], and compute in `dtype`. `live` marks tokens that exist (False: masked by `key_mask`, or
padding beyond `block_len`), the same for all heads; tokens that do not exist may hold anything, NaN included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .constants import KV_BLOCK

BLOCK = KV_BLOCK  # tokens: the KV block, and the query rows that share a tail


def count_blocks(tokens: int, size: int = BLOCK) -> int:
    """Blocks of `size` tokens that hold `tokens` tokens."""
    return -(-tokens // size)


class PooledKV(NamedTuple):
    """KV blocks of heads; n of each. An empty block has count, mean and sum 0.

    Attributes:
        k_shift: [..., D], mean of the block means, empty blocks aside; the attention subtracts the same vector from K.
        k_mean: [..., n, D], mean of the live keys of each block, minus `k_shift`.
        k_var: [..., D], mean of k_mean², empty blocks aside.
        k_similarity: [..., n], see `self_similarity`, of the keys minus `k_shift`; None where it was not asked for.
        v_sum: [..., n, D], sum of the live values.
        counts: [n], live keys.
    """

    k_shift: torch.Tensor
    k_mean: torch.Tensor
    k_var: torch.Tensor
    k_similarity: torch.Tensor | None
    v_sum: torch.Tensor
    counts: torch.Tensor


class PooledQ(NamedTuple):
    """Query blocks of heads: q_mean [..., m, D], mean of the live rows (0 where there is none), and their q_similarity [..., m] or None."""

    q_mean: torch.Tensor
    q_similarity: torch.Tensor | None


def pool_kv(
    k: torch.Tensor, v: torch.Tensor, live: torch.Tensor | None = None, *, dtype: torch.dtype = torch.float64, similarity: bool = True
) -> PooledKV:  # fmt: skip
    """Pool k and v [..., N, D]; `live` is bool [N], None for all. `similarity`: also how alike the keys of a block are."""
    blocks, exists = _blocked(k, live)
    counts = exists.sum((1, 2)).to(dtype)
    used = counts > 0
    mean = blocks.sum(-2, dtype=dtype) / counts.clamp_min(1)[:, None]
    k_shift = mean.sum(-2) / used.sum().clamp_min(1)
    k_mean = torch.where(used[:, None], mean - k_shift[..., None, :], 0)
    k_var = k_mean.square().sum(-2) / used.sum().clamp_min(1)
    alike = self_similarity(torch.where(exists, blocks.to(dtype) - k_shift[..., None, None, :], 0), counts) if similarity else None
    return PooledKV(k_shift, k_mean, k_var, alike, _blocked(v, live)[0].sum(-2, dtype=dtype), counts)


def pool_q(
    q: torch.Tensor, live: torch.Tensor | None = None, *, dtype: torch.dtype = torch.float64, similarity: bool = True
) -> PooledQ:  # fmt: skip
    """Pool q [..., N, D]; `live` is bool [N], None for all. `similarity`: also how alike the queries of a block are."""
    blocks, exists = _blocked(q, live)
    counts = exists.sum((1, 2)).to(dtype)
    mean = blocks.sum(-2, dtype=dtype) / counts.clamp_min(1)[:, None]
    return PooledQ(mean, self_similarity(blocks.to(dtype), counts) if similarity else None)


def self_similarity(blocks: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean cosine over all pairs of live tokens (a token with itself included) of each block: |mean of the unit vectors|², in [0, 1].

    Args:
        blocks: [..., n, 64, D], 0 where no token is.
        counts: [n] live tokens. A block without any gives 1.
    """
    unit = blocks / blocks.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(blocks.dtype).tiny)
    square = (unit.sum(-2) / counts.clamp_min(1)[:, None]).square().sum(-1)
    return torch.where(counts > 0, square, 1)


def _blocked(x: torch.Tensor, live: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., N, D] as [..., n, 64, D] with 0 where no token lives, and where one does: bool [n, 64, 1]."""
    pad = -x.shape[-2] % BLOCK
    if live is None:
        live = torch.ones(x.shape[-2], dtype=torch.bool, device=x.device)
    else:
        x = torch.where(live[:, None], x, 0)
    blocks = torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, BLOCK))
    return blocks, torch.nn.functional.pad(live, (0, pad)).view(-1, BLOCK, 1)
