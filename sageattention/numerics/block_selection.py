"""Which KV blocks a block of queries computes exactly: scores of pooled blocks against one threshold a row.

Scores are logits in base 2, σ_ij = q_mean_i · k_mean_j · sm_scale · log2(e), one row for each 64 queries. A list serves `q_block` queries,
64 or 128. For 128 the two rows are brought together as the sum of their softmaxes: a block's weight is Σ_r 2^(σ_rj − lse_r) over
the rows r, and it is exact where that is more than the threshold's weight Σ_r 2^(t_r − lse_r). With one row that is σ > t.
The softmax is over the blocks in question: those that the row sees, that are no sinks (they are exact anyway) and that are alike (below).
All of it is computed as logarithms, which neither overflow nor round small weights to ties.

    sol   t = τ · sqrt(Σ_d q_mean_d² k_var_d · (sm_scale · log2 e)² + 1e-6)     (Sol-Attn, arXiv:2607.24027)
    mass  t = lse + log2(τ / n), n the blocks in question: τ times their mean share, one τ for all heads
    topk  the κ largest weights, ties included, κ = round(keep · n), at least 1, and all n only at keep = 1
                                                                                (SLA; VSA without neighbours and tail)
    cdf   the largest weights until their share of the row reaches `keep`, ties included   (SpargeAttn, arXiv:2502.18137)
    static  a given mask

A KV block whose keys are less alike than `similarity` is exact; so is every block for queries that are as uneven (SpargeAttn).
A NaN score counts as above every threshold: the row then computes all that it may see, and gives what dense attention gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .constants import SELECTIONS, TINY_SPREAD
from .pooling import PooledKV, PooledQ

KINDS = tuple(SELECTIONS)


class Selection(NamedTuple):
    """How the exact blocks of a head are chosen.

    Attributes:
        kind: one of `KINDS`.
        tau: the threshold of "sol" and "mass"; a tensor broadcasts against [heads, lists, blocks].
        keep: the share of blocks of "topk", the share of the softmax of "cdf"; 0 to 1; a tensor as `tau`.
        similarity: mean cosine between tokens that a block needs to be judged by its mean; 0 or less asks nothing.
    """

    kind: str
    tau: float | torch.Tensor = 1.0
    keep: float | torch.Tensor = 0.1
    similarity: float = 0.0

    @classmethod
    def of_heads(cls, rules: Sequence[Selection], like: torch.Tensor) -> Selection:
        """The rules of several heads, which differ in `tau` and `keep`, as one, on the device of `like`."""
        tau, keep = (like.new_tensor([r[i] for r in rules], dtype=torch.float64)[:, None, None] for i in (1, 2))
        return rules[0]._replace(tau=tau, keep=keep)

    def head(self, heads: slice) -> Selection:
        """The rule of some of the heads."""
        tau, keep = (x[heads] if isinstance(x, torch.Tensor) else x for x in (self.tau, self.keep))
        return self._replace(tau=tau, keep=keep)


def scores(q: PooledQ, kv: PooledKV, scale: float) -> torch.Tensor:
    """σ [..., m, n], in base 2; `scale` is sm_scale · log2(e)."""
    return q.q_mean @ kv.k_mean.mT * scale


def select(
    sigma: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor,
    selection: Selection,
    q: PooledQ,
    kv: PooledKV,
    scale: float,
    rows: int,
) -> torch.Tensor:
    """The blocks that the scores choose, of those that are visible.

    Args:
        sigma: [..., m, n], `scores`; a row for each 64 queries.
        visible: bool [m, n], blocks of which a row sees at least one key.
        sinks: bool [n], blocks that are exact anyway.
        rows: rows of `sigma` that share a list, 1 or 2.

    Returns:
        bool [..., ⌈m / rows⌉, n].
    """
    seen = _group(visible, rows, False).any(-2)
    if kv.k_similarity is None or q.q_similarity is None:
        return draw_line(sigma, visible & ~sinks, selection, q, kv, scale, rows).chosen & seen
    uneven = (kv.k_similarity < selection.similarity)[..., None, :]
    line = draw_line(sigma, visible & ~sinks & ~uneven, selection, q, kv, scale, rows)
    everything = _group((q.q_similarity < selection.similarity)[..., None], rows, False).any(-2)
    return (line.chosen | uneven | everything) & seen


class Line(NamedTuple):
    """What decides about the blocks in question.

    Attributes:
        weight: [..., lists, n], log2 of the summed softmax; −inf where a block is not in question.
        threshold: [..., lists, 1], log2, too.
        lse: [..., lists, 1], the largest log2 Σ_j 2^σ_rj of the rows r: threshold + lse is of the size of a score.
        chosen: bool [..., lists, n], weights above the threshold; of "topk" and "cdf" those that equal it, too.
    """

    weight: torch.Tensor
    threshold: torch.Tensor
    lse: torch.Tensor
    chosen: torch.Tensor


def draw_line(
    sigma: torch.Tensor, asked: torch.Tensor, selection: Selection, q: PooledQ, kv: PooledKV, scale: float, rows: int
) -> Line:  # fmt: skip
    """Weights and threshold of every list; `asked` is bool [..., m, n], the blocks in question for each row of scores."""
    lse = _log2_sum(sigma.masked_fill(~asked, -math.inf))
    weight = _join(torch.where(asked, sigma - lse, -math.inf), rows)
    candidates = _group(asked, rows, False).any(-2)
    if selection.kind == "sol":
        spread = (q.q_mean.square() @ kv.k_var[..., None] * scale**2 + TINY_SPREAD).sqrt()
        threshold = _join(selection.tau * spread - lse, rows)
    elif selection.kind == "mass":
        mean_share = 1 / asked.sum(-1, keepdim=True).clamp_min(1).to(sigma.dtype)
        threshold = _join((selection.tau * mean_share).log2(), rows)
    elif selection.kind in ("topk", "cdf"):
        ordered = weight.masked_fill(~candidates, -math.inf).sort(-1, descending=True).values
        count = _share_of_blocks if selection.kind == "topk" else _share_of_weight
        number = count(ordered, candidates.sum(-1, keepdim=True), selection.keep)
        number = number.expand(*ordered.shape[:-1], 1)
        last = ordered.gather(-1, (number - 1).clamp_min(0)) if ordered.shape[-1] else number.to(ordered)
        threshold = torch.where(number > 0, last, math.inf)
    else:
        raise ValueError(f"selection {selection.kind!r} has no scores, accepted are {', '.join(KINDS[:-1])}")
    above = ~(weight <= threshold) if selection.kind in ("sol", "mass") else ~(weight < threshold)
    return Line(weight, threshold, _group(lse, rows, -math.inf).amax(-2), above & candidates)


def _share_of_blocks(ordered: torch.Tensor, number: torch.Tensor, keep: float | torch.Tensor) -> torch.Tensor:
    """κ [..., lists, 1] of "topk"; `number` [..., lists, 1] are the candidates."""
    share = torch.as_tensor(keep, dtype=torch.float64, device=number.device)
    return torch.minimum((share * number).round(), number - (share < 1).long()).clamp_min(1).long()


def _share_of_weight(ordered: torch.Tensor, number: torch.Tensor, keep: float | torch.Tensor) -> torch.Tensor:
    """Blocks [..., lists, 1] that hold `keep` of a row's weight: those whose predecessors hold less. `ordered` [..., lists, n] falls."""
    share = (ordered - _log2_sum(ordered)).exp2()
    return torch.minimum((~(share.cumsum(-1) - share >= keep)).sum(-1, keepdim=True), number)


def _join(log_weights: torch.Tensor, rows: int) -> torch.Tensor:
    """log2 of the sum of the weights of every `rows` rows: [..., m, n] → [..., ⌈m / rows⌉, n]."""
    if rows == 1:
        return log_weights
    return _log2_sum(_group(log_weights, rows, -math.inf), -2).squeeze(-2)


def _group(x: torch.Tensor, rows: int, fill: float | bool) -> torch.Tensor:
    """[..., m, n] → [..., ⌈m / rows⌉, rows, n], missing rows filled."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % rows), value=fill).unflatten(-2, (-1, rows))


def _log2_sum(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """log2 Σ 2^x along `dim`, which stays; −inf where all are."""
    return torch.logsumexp(x * math.log(2), dim, keepdim=True) / math.log(2)
