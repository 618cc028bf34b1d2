"""`sageattn_sparse`: attention that computes the blocks that matter and sums up the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .api import is_traced

if TYPE_CHECKING:
    import torch


def sageattn_sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    *,
    tensor_layout: str = "HND", selection: str = "sol", tau: float | torch.Tensor | None = None,
    keep: float | torch.Tensor | None = None, similarity: float = 0.0, q_block: int = 128, tail: bool = True,
    neighbours: int | None = None, order: torch.Tensor | None = None, sinks: int | Sequence = (), query_sinks: int | Sequence = (),
    block_len: torch.Tensor | None = None, block_mask: torch.Tensor | None = None, key_mask: torch.Tensor | None = None,
    coarse_gate: torch.Tensor | None = None, is_causal: bool = False, q_start: int | None = None, sm_scale: float | None = None,
    return_lse: bool = False, return_share: bool = False, variant: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, ...]:  # fmt: skip
    """Block-sparse attention: each `q_block` queries compute some of the blocks of 64 keys exactly, the others by their mean.

    A router scores blocks by their means, σ_ij = mean of 64 queries · mean of 64 keys · sm_scale, and `selection` draws the line:

        "sol"     σ_ij above `tau` times the spread of the scores (Sol-Attn, arXiv:2607.24027); default 1.3
        "mass"    the block's share of softmax_j σ_ij, sinks aside, above `tau` times the mean share; default 2. One line for all heads,
                  whose lists then differ in length as their attention does
        "topk"    the share `keep` with the largest σ_ij, sinks aside, ties included; default 0.1. SLA; VSA with q_block=64,
                  neighbours=-1, tail=False
        "cdf"     the largest until they hold the share `keep` of softmax_j σ_ij, sinks aside (SpargeAttn, arXiv:2502.18137); default 0.7
        "static"  `block_mask`

    A list serves `q_block` queries; for 128 the scores of both halves are joined as the sum of their softmaxes.

    Args:
        q, k, v, tensor_layout, sm_scale: as for `sageattn`.
        tau, keep: a number, or fp32 [Hq] with one for each head.
        similarity: blocks whose tokens' mean cosine with each other is below it are exact, for their mean does not stand for them; so is
            every block for such queries. Default 0 asks nothing. Not for "static".
        tail: blocks that are not exact count as one term each, with logit σ_ij and the weight of their keys; else they are left out.
        neighbours: blocks on either side of the query's own that are exact; −1 turns the rule off. Default 1, and −1 for "static". Where
            Nq ≠ Nk there is no such rule without `q_start`.
        order: int32 [N], a permutation: the row of q, k and v that stands at each position of the block order, see `block_order`. The
            tensors, the output and the other arguments but `block_len` and `block_mask` keep their own order. For Nq = Nk.
        sinks: keys that are exact for every query, `query_sinks`: queries that compute every block: a number of tokens at the beginning,
            (start, stop), or a sequence of such pairs. Blocks that hold one of the tokens count whole.
        block_len: int32 [⌈Nk/64⌉] or [B, ⌈Nk/64⌉], 0 to 64: keys that exist at the beginning of each block, for padded tiles. Where
            Nq = Nk, only as many rows count in the queries' means; all are computed.
        block_mask: bool [B or 1, Hq or 1, ⌈Nq/q_block⌉, ⌈Nk/64⌉], True computes the block. For "static".
        key_mask: bool [B, Nk], True where the key exists. Others may hold anything, and count in no mean and no sum.
        coarse_gate: q's shape and dtype; coarse_gate ⊙ (softmax_j σ_ij · mean of the block's values) is added to the output, not to the
            lse (VSA, arXiv:2505.13389).
        is_causal: query i sees keys up to q_start + i. Blocks on the diagonal are exact.
        q_start: key position of query 0; default 0 where Nq = Nk. Without it queries and keys are no common sequence.
        return_share: adds the share of the visible blocks that were exact, an fp32 scalar on q's device.
        variant: "auto", "reference" or a CUDA variant's name, see `available_variants`. `SAGEATTENTION_VARIANT` is not looked at.

    Returns:
        out, or a tuple of out, lse [B, Hq, Nq] (fp32, natural log) and share, as asked for. A query without any exact block and tail gives
        0 and −inf. NaN in a router's input selects every block: the result is then what dense attention gives.

    Raises:
        Unsupported: an argument that makes no sense, or a variant that can't run here.
        KernelMissing: no block-sparse kernel is in this installation for q's device.
    """
    arguments: dict[str, Any] = {
        "selection": selection, "tau": tau, "keep": keep, "similarity": similarity, "q_block": q_block, "tail": tail,
        "neighbours": neighbours, "q_start": q_start, "sinks": sinks, "query_sinks": query_sinks, "order": order, "block_len": block_len,
        "block_mask": block_mask, "key_mask": key_mask, "coarse_gate": coarse_gate,
    }  # fmt: skip
    result: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]
    if is_traced(q):
        from . import torch_library

        result = torch_library.sparse_call(q, k, v, tensor_layout, is_causal, sm_scale, variant, **arguments)
    else:
        from .sparse_dispatch import prepare

        call = prepare(
            q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, sm_scale=sm_scale, return_lse=return_lse, variant=variant,
            **arguments,
        )  # fmt: skip
        result = call.run()
    out, lse, share = result
    extra = [given for given, asked in ((lse, return_lse), (share, return_share)) if asked and given is not None]
    return (out, *extra) if extra else out
