"""Block-sparse attention in plain PyTorch: the exact result that routers and kernels are tested against, on any device.

Two steps, as the kernels have them. `route` pools, selects and sums up the blocks that are left out; `attend` computes the softmax over
the chosen blocks, each row beginning at the state of its tail:

    m₀ = max σ_ij,  l₀ = Σ c_j 2^(σ_ij − m₀),  o₀ = Σ 2^(σ_ij − m₀) Σ_{t in j} v_t      over the blocks j that are not exact,

so that a block that is left out weighs as c_j keys at its mean, the same for the 64 rows that share σ_i. Without a tail the state is
(−∞, 0, 0). Tensors are [B, H, N, D]. A router holds the scores of few heads at a time, the attention one (batch, head).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from . import block_bits
from .block_selection import Selection, draw_line, scores, select
from .constants import LOG2E
from .pooling import BLOCK, PooledKV, PooledQ, pool_kv, pool_q
from .sparse_geometry import BlockView, Geometry

HELD = 1 << 25  # scores that a router works on at a time


class Tail(NamedTuple):
    """Starting state of the online softmax for every 64 rows: m and l [B, Hq, ⌈Nq/64⌉], o [B, Hq, ⌈Nq/64⌉, D]; m in base 2."""

    m: torch.Tensor
    l: torch.Tensor
    o: torch.Tensor


class Route(NamedTuple):
    """What a router hands to the attention.

    Attributes:
        bits: int32 [B, Hq, ⌈Nq/q_block⌉, words], see `block_bits`: the KV blocks that are computed exactly.
        k_shift: [B, Hkv, D], which the attention subtracts from K, as the scores of the tail did.
        tail: None where the other blocks are left out.
    """

    bits: torch.Tensor
    k_shift: torch.Tensor
    tail: Tail | None


def route(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection | Sequence[Selection],
    geometry: Geometry,
    *,
    tail: bool = True,
    block_mask: torch.Tensor | None = None,
    sm_scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Route:
    """Choose the exact blocks and sum up the others.

    Args:
        q: [B, Hq, Nq, D]; k, v: [B, Hkv, Nk, D], Hq a multiple of Hkv.
        selection: one for all heads, or one for each of the Hq; "static" goes with `block_mask` alone.
        block_mask: bool [B or 1, Hq or 1, ⌈Nq/q_block⌉, ⌈Nk/64⌉]: True is exact, in place of the scores.
        dtype: of the computation. fp64 takes every finite input; fp32 those whose squares are finite.
    """
    batch, heads, len_q, head_dim = q.shape
    view = BlockView(len_q, k.shape[2], geometry, q.device)
    scale = _scale(sm_scale, head_dim) * LOG2E
    bits = torch.zeros(batch, heads, view.lists, block_bits.words(view.n), dtype=torch.int32, device=q.device)
    k_shift = q.new_zeros(batch, k.shape[1], head_dim, dtype=dtype)
    state = _empty_tail(batch, heads, view.m, head_dim, dtype, q.device) if tail else None
    rules = selection if isinstance(selection, Selection) else Selection.of_heads(selection, q)
    for part in _pooled_heads(q, k, v, view, dtype, similarity=rules.similarity > 0 and block_mask is None):
        b, h, kv = part.batch, part.heads, part.kv
        k_shift[b, part.kv_heads] = part.k_shift
        sigma, live = scores(part.q, kv, scale), kv.counts > 0
        visible = view.visible & live
        exact = (view.sinks | view.query_sinks | view.of_lists(view.near)) & view.of_lists(visible)
        if block_mask is not None:
            exact = exact | block_mask[b if block_mask.shape[0] > 1 else 0, h if block_mask.shape[1] > 1 else 0] & view.of_lists(visible)
        else:
            exact = exact | view.of_lists(visible & ~view.whole)  # the diagonal of a causal call can't be in a tail
            exact = exact | select(sigma, visible, view.sinks, rules.head(h), part.q, kv, scale, view.rows)
        bits[b, h] = block_bits.pack(exact)
        if state is not None:
            state.m[b, h], state.l[b, h], state.o[b, h] = _tail(sigma, view.whole & live & ~view.of_rows(exact), kv)
    return Route(bits, k_shift, state)


def undecided(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection | Sequence[Selection],
    geometry: Geometry,
    *,
    tolerance: float = 1e-5,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """Blocks that another router may choose or not: those whose score is as near to the threshold as rounding in fp32 puts it.

    |weight − threshold| ≤ tolerance · (|score| + |threshold|), in base 2; of "cdf" also those that a `keep` so little off would change.
    Arguments as for `route`.

    Returns:
        bool [B, Hq, ⌈Nq/q_block⌉, ⌈Nk/64⌉].
    """
    batch, heads, len_q, head_dim = q.shape
    view = BlockView(len_q, k.shape[2], geometry, q.device)
    scale = _scale(sm_scale, head_dim) * LOG2E
    near = torch.zeros(batch, heads, view.lists, view.n, dtype=torch.bool, device=q.device)
    rules = selection if isinstance(selection, Selection) else Selection.of_heads(selection, q)
    for part in _pooled_heads(q, k, v, view, torch.float64, similarity=True):
        rule, kv = rules.head(part.heads), part.kv
        asked = view.visible & (kv.counts > 0) & ~view.sinks
        if kv.k_similarity is not None:
            asked = asked & ~(kv.k_similarity < rule.similarity)[..., None, :]
        sigma = scores(part.q, kv, scale)
        line = draw_line(sigma, asked, rule, part.q, kv, scale, view.rows)
        size = (line.weight + line.lse).abs() + (line.threshold + line.lse).abs()
        finite = line.weight.isfinite() & line.threshold.isfinite()
        near[part.batch, part.heads] = finite & ((line.weight - line.threshold).abs() <= tolerance * size)
        if rule.kind == "cdf":
            less, more = (rule._replace(keep=rule.keep * (1 + sign * tolerance)) for sign in (-1, 1))
            fewer, further = (draw_line(sigma, asked, r, part.q, kv, scale, view.rows).chosen for r in (less, more))
            near[part.batch, part.heads] |= fewer ^ further
    return near


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: Route,
    geometry: Geometry,
    *,
    sm_scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the blocks of `chosen.bits`, each row begun at its tail. `geometry` is the one of the route.

    Returns:
        (out [B, Hq, Nq, D], lse [B, Hq, Nq] in natural log), in `dtype`. A row without any key and tail gives 0 and −inf.
    """
    batch, heads, len_q, head_dim = q.shape
    group = heads // k.shape[1] if heads else 1
    scale = _scale(sm_scale, head_dim)
    view = BlockView(len_q, k.shape[2], geometry, q.device)
    out, lse = q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:3], dtype=dtype)
    for b in range(batch):
        live = view.live_keys(b)
        for h in range(heads):
            if h % group == 0:
                shift = chosen.k_shift[b, h // group].to(dtype)
                keys, values = view.arrange(k[b, h // group]).to(dtype) - shift, view.arrange(v[b, h // group]).to(dtype)
            rows, lists = view.arrange(q[b, h]).to(dtype), block_bits.unpack(chosen.bits[b, h], view.n)
            begin = None if chosen.tail is None else Tail(*(x[b, h].to(dtype).repeat_interleave(BLOCK, 0)[:len_q] for x in chosen.tail))
            o, logsum = _attend_head(rows, keys, values, lists, live, begin, view, scale * LOG2E)
            out[b, h, view.place], lse[b, h, view.place] = o, logsum + rows @ shift * scale
    return out, lse


def coarse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: Geometry,
    *,
    sm_scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """softmax_j(q_mean_i · k_mean_j · sm_scale) v_mean_j, the same for the 64 rows of block i: VSA's coarse attention, [B, Hq, Nq, D].

    Blocks without a key count nothing. Causal geometry has no meaning here and is not looked at.
    """
    batch, heads, len_q, head_dim = q.shape
    view = BlockView(len_q, k.shape[2], geometry, q.device)
    out = q.new_zeros(q.shape, dtype=dtype)
    for part in _pooled_heads(q, k, v, view, dtype, similarity=False):
        kv, live = part.kv, part.kv.counts > 0
        p = torch.softmax(scores(part.q, kv, _scale(sm_scale, head_dim)).masked_fill(~live, -math.inf), -1)
        mean = torch.where(live.any(), p @ (kv.v_sum / kv.counts.clamp_min(1)[:, None]), 0)
        out[part.batch, part.heads, view.place] = mean.repeat_interleave(BLOCK, -2)[:, :len_q]
    return out


def exact_share(chosen: Route, len_q: int, len_kv: int, geometry: Geometry) -> torch.Tensor:
    """Share of the blocks that a query may see which are computed exactly, a scalar tensor on the route's device; 1 where there is none."""
    view = BlockView(len_q, len_kv, geometry, chosen.bits.device)
    visible = view.of_lists(view.visible)
    possible = visible.sum() * chosen.bits.shape[0] * chosen.bits.shape[1]
    exact = block_bits.unpack(chosen.bits, view.n).sum()
    return torch.where(possible > 0, exact / possible.clamp_min(1), 1.0)


class PooledHeads(NamedTuple):
    """Some query heads of one batch, pooled; `kv` has each KV head once for every query head that shares it, `k_shift` once."""

    batch: int
    heads: slice
    kv_heads: slice
    q: PooledQ
    kv: PooledKV
    k_shift: torch.Tensor


def _pooled_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, view: BlockView, dtype: torch.dtype, *, similarity: bool
) -> Iterator[PooledHeads]:
    """All heads, as many at a time as `HELD` allows."""
    group = q.shape[1] // k.shape[1] if q.shape[1] else 1
    # Tokens are copied in their own dtype where they are masked or reordered; of the scores several results are alive at once.
    step = max(1, HELD // (group * max(view.m * view.n, max(view.len_q, view.len_kv) * q.shape[3] // 8, 1)))
    for b in range(q.shape[0]):
        live, live_q = view.live_keys(b), view.live_queries(b)
        for first in range(0, k.shape[1] if q.shape[1] else 0, step):
            own = slice(first, min(first + step, k.shape[1]))
            heads = slice(own.start * group, own.stop * group)
            kv = pool_kv(view.arrange(k[b, own]), view.arrange(v[b, own]), live, dtype=dtype, similarity=similarity)
            alike = None if kv.k_similarity is None else kv.k_similarity.repeat_interleave(group, 0)
            k_shift, k_mean, k_var, v_sum = (x.repeat_interleave(group, 0) for x in (kv.k_shift, kv.k_mean, kv.k_var, kv.v_sum))
            shared = PooledKV(k_shift, k_mean, k_var, alike, v_sum, kv.counts)
            pooled = pool_q(view.arrange(q[b, heads]), live_q, dtype=dtype, similarity=similarity)
            yield PooledHeads(b, heads, own, pooled, shared, kv.k_shift)


def _attend_head(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lists: torch.Tensor,
    live: torch.Tensor | None,
    begin: Tail | None,
    view: BlockView,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One head in block order: rows [Nq, D], keys and values [Nk, D], `lists` bool [lists, n], `begin` a state for each row."""
    out, lse = torch.empty_like(rows), torch.empty_like(rows[:, 0])
    slots = torch.arange(view.n * BLOCK, device=rows.device).view(view.n, BLOCK)
    exists = slots < view.len_kv if live is None else torch.nn.functional.pad(live, (0, -view.len_kv % BLOCK)).view_as(slots)
    for part, chosen in zip(torch.arange(view.len_q, device=rows.device).split(view.geometry.q_block), lists):
        index = slots[chosen][exists[chosen]]
        s = rows[part] @ keys[index].T * scale
        seen = view.seen_keys(part, index)
        if seen is not None:
            s = s.masked_fill(~seen, -math.inf)
        out[part], lse[part] = _softmax_from(None if begin is None else Tail(*(x[part] for x in begin)), s, values[index])
    return out, lse


def _tail(sigma: torch.Tensor, others: torch.Tensor, kv: PooledKV) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(m₀ [..., m], l₀ [..., m], o₀ [..., m, D]) of the blocks `others` [..., m, n]."""
    logits = sigma.masked_fill(~others, -math.inf)
    m = logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -math.inf)
    weight = torch.exp2(logits - _finite(m)[..., None])
    return m, weight @ kv.counts, torch.where(others.any(-1, keepdim=True), weight @ kv.v_sum, 0)


def _softmax_from(begin: Tail | None, s: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the logits s [rows, keys] (base 2) from a starting state of each row: (out [rows, D], lse [rows] in natural log)."""
    rows, head_dim = s.shape[0], values.shape[1]
    if begin is None:
        begin = Tail(s.new_full((rows,), -math.inf), s.new_zeros(rows), s.new_zeros(rows, head_dim))
    m = torch.maximum(begin.m, s.amax(-1)) if s.shape[1] else begin.m
    alpha, p = torch.exp2(begin.m - _finite(m)), torch.exp2(s - _finite(m)[:, None])
    l = begin.l * alpha + p.sum(-1)
    o = begin.o * alpha[:, None] + p @ values
    empty = l == 0  # not l <= 0: a NaN stays one
    out = torch.where(empty[:, None], 0, o / torch.where(empty, 1, l)[:, None])
    return out, torch.where(empty, -math.inf, (m + torch.log2(torch.where(empty, 1, l))) / LOG2E)


def _empty_tail(batch: int, heads: int, blocks: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tail:
    m = torch.full((batch, heads, blocks), -math.inf, dtype=dtype, device=device)
    return Tail(m, torch.zeros_like(m), torch.zeros(batch, heads, blocks, head_dim, dtype=dtype, device=device))


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    """A maximum to subtract: 0 where there is nothing, so that −inf − (−inf) never happens."""
    return torch.where(maximum == -math.inf, 0, maximum)


def _scale(sm_scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if sm_scale is None else sm_scale
