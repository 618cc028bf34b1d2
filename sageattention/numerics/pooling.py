"""Block statistics that the sparse router reads: means of K and Q over blocks of 64 tokens, sums of V.

All functions take one (batch, head) and compute in the dtype of their input; the callers convert. `live` marks tokens that exist
(False: masked by `key_mask`, or padding beyond `block_len`); tokens that do not exist may hold anything, NaN included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 64  # tokens: the KV block, and the query rows that share a tail


def count_blocks(tokens: int, size: int = BLOCK) -> int:
    """Blocks of `size` tokens that hold `tokens` tokens."""
    return -(-tokens // size)


class PooledKV(NamedTuple):
    """One head's KV blocks; n of them. An empty block has count, mean and sum 0.

    Attributes:
        k_shift: [D], mean of the block means, empty blocks aside; the attention subtracts the same vector from K.
        k_mean: [n, D], mean of the live keys of each block, minus `k_shift`.
        k_var: [D], mean of k_mean², empty blocks aside.
        k_similarity: [n], see `similarity`, of the keys minus `k_shift`.
        v_sum: [n, D], sum of the live values.
        counts: [n], live keys.
    """

    k_shift: torch.Tensor
    k_mean: torch.Tensor
    k_var: torch.Tensor
    k_similarity: torch.Tensor
    v_sum: torch.Tensor
    counts: torch.Tensor


class PooledQ(NamedTuple):
    """One head's query blocks: q_mean [m, D], mean of the live rows (0 where there is none), and their q_similarity [m]."""

    q_mean: torch.Tensor
    q_similarity: torch.Tensor


def pool_kv(k: torch.Tensor, v: torch.Tensor, live: torch.Tensor | None = None) -> PooledKV:
    """Pool k and v [N, D] of one head; `live` is bool [N], None for all."""
    blocks, exists = _blocked(k, live)
    counts = exists.sum((1, 2)).to(k.dtype)
    used = counts > 0
    mean = blocks.sum(1) / counts.clamp_min(1)[:, None]
    k_shift = mean.sum(0) / used.sum().clamp_min(1)
    k_mean = torch.where(used[:, None], mean - k_shift, 0)
    k_var = k_mean.square().sum(0) / used.sum().clamp_min(1)
    similarity = self_similarity(torch.where(exists, blocks - k_shift, 0), counts)
    return PooledKV(k_shift, k_mean, k_var, similarity, _blocked(v, live)[0].sum(1), counts)


def pool_q(q: torch.Tensor, live: torch.Tensor | None = None) -> PooledQ:
    """Pool q [N, D] of one head; `live` is bool [N], None for all."""
    blocks, exists = _blocked(q, live)
    counts = exists.sum((1, 2)).to(q.dtype)
    return PooledQ(blocks.sum(1) / counts.clamp_min(1)[:, None], self_similarity(blocks, counts))


def self_similarity(blocks: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean cosine over all pairs of live tokens (a token with itself included) of each block: |mean of the unit vectors|², in [0, 1].

    Args:
        blocks: [n, 64, D], 0 where no token is.
        counts: [n] live tokens. A block without any gives 1.
    """
    unit = blocks / blocks.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(blocks.dtype).tiny)
    square = (unit.sum(1) / counts.clamp_min(1)[:, None]).square().sum(-1)
    return torch.where(counts > 0, square, 1)


def _blocked(x: torch.Tensor, live: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, D] as [n, 64, D] with 0 where no token lives, and where one does: bool [n, 64, 1]."""
    live = torch.ones(x.shape[0], dtype=torch.bool, device=x.device) if live is None else live
    pad = -x.shape[0] % BLOCK
    blocks = torch.nn.functional.pad(torch.where(live[:, None], x, 0), (0, 0, 0, pad)).unflatten(0, (-1, BLOCK))
    return blocks, torch.nn.functional.pad(live, (0, pad)).view(-1, BLOCK, 1)
