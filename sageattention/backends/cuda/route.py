"""The router of block-sparse calls as kernels: blocks are pooled, the exact ones of each list chosen, the others summed up.

`Routed` is what the attention kernels take. `fused` makes it in three launches; `from_reference` makes it of a `Route`, for the rules that
no kernel has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...device import capability
from ...kernels.params import PoolParams, RouteParams, packer
from ...kernels.table import IMAGES, POOL_THREADS, ROUTE, ROUTE_PITCH, ROUTE_ROWS, ROUTE_WARPS
from ...layout import strides
from ...numerics import block_bits
from ...numerics.constants import DTYPES, FINITE_MAX, KV_BLOCK, LOG2E, SELECTIONS
from ...numerics.pooling import count_blocks
from ...numerics.sparse import Route
from ...numerics.sparse_geometry import BlockView
from ...planning.plan import CudaPlan
from ...planning.sparse_problem import SparseProblem, SparseTensors
from . import driver, host
from .launcher import Kernel

LIST_ROWS = 128  # queries of a list
TAIL_HEAD = 4  # numbers of a tail before O: m, l, two unused
SCRATCH_LIMIT = 120 << 20  # bytes of scores at work
_pack_pool, _pool_constants = packer(PoolParams)
_pack_route, _route_constants = packer(RouteParams)


class Routed(NamedTuple):
    """What the attention kernels take beside q, k and v; D is their compiled head_dim.

    Attributes:
        lists: int32 [B, Hq, lists, 2, words], for 128 queries each: blocks that are exact, and those that not every query sees whole.
        live: int32 [B, words], the keys that exist, a bit each; None where all do.
        k_mean: fp32 [B, Hkv, D], which the attention subtracts from K.
        tail: fp32 [B, Hq, ⌈Nq/64⌉, 4 + D], {m, l, unused, unused, o}; None where the other blocks are left out.
    """

    lists: torch.Tensor
    live: torch.Tensor | None
    k_mean: torch.Tensor
    tail: torch.Tensor | None


class Sizes(NamedTuple):
    """Bytes that routing a call takes.

    Attributes:
        pooled: of a KV head, gone with the router.
        routed: of a KV head and its query heads, for the attention.
        strip: of scores, for each CTA.
    """

    pooled: int
    routed: int
    strip: int

    @classmethod
    def of(cls, sparse: SparseProblem, head_dim: int) -> Sizes:
        p = sparse.problem
        blocks, group = count_blocks(p.len_kv), p.heads_q // p.heads_kv
        tail = count_blocks(p.len_q) * (TAIL_HEAD + head_dim) * sparse.tail
        lists = count_blocks(p.len_q, LIST_ROWS) * 2 * block_bits.words(blocks)
        scores = (ROUTE_ROWS[head_dim] + ROUTE_WARPS) * _pitch(blocks) * needs_scores(sparse)
        return cls(4 * blocks * head_dim * (1 + sparse.tail), 4 * group * (tail + lists), 4 * scores)


def needs_scores(sparse: SparseProblem) -> bool:
    return sparse.tail or sparse.selection != "static"


def has_kernels(sparse: SparseProblem) -> bool:
    """Whether `fused` knows the call's rule: no kernel tells how alike the tokens of a block are."""
    return sparse.similarity <= 0


def fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sparse: SparseProblem, tensors: SparseTensors, plan: CudaPlan, view: BlockView,
    exact: torch.Tensor,
) -> Routed:  # fmt: skip
    """Route a checked call.

    Args:
        view: with lists of 128 queries, as `tensors.block_mask` has them.
        exact: int64, one number, to which the exact blocks are added.
    """
    p, d, device = sparse.problem, plan.head_dim, q.device
    r = route_plan_of(sparse, plan)
    words, live, live_q = block_bits.words(view.n), _packed(view.live_keys, p.batch), _packed(view.live_queries, p.batch)
    lists = torch.empty(p.batch, p.heads_q, view.lists, 2, words, dtype=torch.int32, device=device)
    k_mean = torch.empty(p.batch, p.heads_kv, d, dtype=torch.float32, device=device)
    tail = torch.empty(p.batch, p.heads_q, view.m, TAIL_HEAD + d, dtype=torch.float32, device=device) if sparse.tail else None
    k_var = torch.empty_like(k_mean)
    pooled = torch.empty(1 + sparse.tail, p.batch * p.heads_kv, view.n, d, dtype=torch.float32, device=device)
    counts = torch.empty(p.batch, _pitch(view.n), dtype=torch.float32, device=device)
    scratch = torch.empty(r.ctas * r.strip_bytes, dtype=torch.uint8, device=device)
    sinks = block_bits.pack(view.sinks) if sparse.sinks else None
    query_sinks = block_bits.pack(view.query_sinks[:, 0]) if sparse.query_sinks else None
    mask = None if tensors.block_mask is None else tensors.block_mask.contiguous()
    thresholds = tensors.tau if tensors.tau is not None else tensors.keep
    thresholds = None if thresholds is None else thresholds.contiguous()
    q_at, k_at, v_at, k_means = q.data_ptr(), k.data_ptr(), v.data_ptr(), pooled[0].data_ptr()
    v_sums, order = pooled[1].data_ptr() if sparse.tail else 0, _address(tensors.order)
    q_strides, k_strides, v_strides = (strides(t, p.layout) for t in (q, k, v))
    live_keys = _live_rows(live)
    of_k, of_v, of_pool = _pool_constants(
        *k_strides, *v_strides, *live_keys, p.batch * p.heads_kv, p.heads_kv, p.len_kv, p.head_dim, view.n, _pitch(view.n),
        DTYPES[p.dtype], host.rows_vectorized(p, (k_at | v_at) % 16, k_strides, v_strides),
    )  # fmt: skip
    pooling = _pack_pool(
        k_at, of_k, v_at if sparse.tail else 0, of_v, k_means, v_sums, k_mean.data_ptr(), k_var.data_ptr(), counts.data_ptr(), order,
        _address(live), of_pool,
    )  # fmt: skip
    of_q, of_live, of_mask, threshold, rest = _route_constants(
        *q_strides, *_live_rows(live_q), *_mask_strides(mask), sparse.tau or sparse.keep, p.batch * p.heads_q, p.heads_q,
        p.heads_q // p.heads_kv, p.len_q, p.len_kv, p.head_dim, DTYPES[p.dtype], host.rows_vectorized(p, q_at % 16, q_strides), view.m,
        view.lists, view.n, words, _pitch(view.n), r.strips, r.ctas, SELECTIONS[sparse.selection], p.causal, view.start, r.neighbours,
        r.scale,
    )  # fmt: skip
    routing = _pack_route(
        q_at, of_q, k_means, v_sums, k_mean.data_ptr(), k_var.data_ptr(), counts.data_ptr(), order, _address(live_q), of_live,
        _address(sinks), _address(query_sinks), _address(mask), of_mask, _address(thresholds), threshold,
        scratch.data_ptr() if r.strip_bytes else 0, lists.data_ptr(), _address(tail), exact.data_ptr(), rest,
    )  # fmt: skip
    launches = (
        (r.pool, r.pool_ctas, 1, 1, pooling, False),
        (r.center, p.batch * p.heads_kv, 1, 1, pooling, False),
        (r.choose, r.ctas, 1, 1, routing, False),
    )
    host.issue(p.device_index, [launches])
    return Routed(lists, live, k_mean, tail)


def from_reference(chosen: Route, view: BlockView, batch: int, plan: CudaPlan) -> Routed:
    """What the kernels take of a route that was computed otherwise, in fp32."""
    exact, beyond = chosen.bits, plan.head_dim - chosen.k_shift.shape[-1]
    live = _packed(view.live_keys, batch)
    whole = view.whole if live is None else view.whole & _all_live(live, view)[:, None]
    if view.len_kv % KV_BLOCK:
        whole = whole & (torch.arange(view.n, device=exact.device) < view.n - 1)
    whole = whole.expand(whole.shape[0] if whole.dim() == 3 else 1, view.m, view.n)
    lists = exact.new_empty(*exact.shape[:3], 2, exact.shape[3])
    lists[:, :, :, 0], lists[:, :, :, 1] = exact, block_bits.pack(view.of_lists(~whole))[:, None]
    tail = None
    if chosen.tail is not None:
        m, l, o = chosen.tail
        tail = m.new_zeros(*m.shape, TAIL_HEAD + plan.head_dim)
        tail[..., 0], tail[..., 1], tail[..., TAIL_HEAD : TAIL_HEAD + o.shape[-1]] = m, l, o
    return Routed(lists, live, torch.nn.functional.pad(chosen.k_shift, (0, beyond)).contiguous(), tail)


def visible_blocks(sparse: SparseProblem) -> int:
    """Blocks that the lists of a call may hold, over all heads."""
    p = sparse.problem
    blocks, lists, start = count_blocks(p.len_kv), count_blocks(p.len_q, LIST_ROWS), sparse.q_start or 0
    if not p.causal:
        return p.batch * p.heads_q * lists * blocks
    last = (min((i + 1) * LIST_ROWS, p.len_q) - 1 for i in range(lists))
    return p.batch * p.heads_q * sum(min(blocks, (start + row) // KV_BLOCK + 1) for row in last)


@dataclass(frozen=True)
class RoutePlan:
    """What a problem decides of the router's launches."""

    pool: Kernel
    center: Kernel
    choose: Kernel
    pool_ctas: int
    strips: int  # of a head
    ctas: int  # that take strips
    strip_bytes: int  # of scratch, for each of these
    neighbours: int
    scale: float


@functools.lru_cache(maxsize=4096)
def route_plan_of(sparse: SparseProblem, plan: CudaPlan) -> RoutePlan:
    """The router's launches.

    Raises:
        KernelMissing: a kernel can't be loaded.
    """
    p, d = sparse.problem, plan.head_dim
    image = next(i for i in IMAGES if i.name == ROUTE and i.arch == plan.images[1].arch)
    entries = [image.entry(f"{name}_d{d}") for name in ("pool", "center", "route")]
    pool, center, choose = (driver.kernel(p.device_index, image, entry.symbol, plan.variant.name) for entry in entries)
    strip_bytes, strips = Sizes.of(sparse, d).strip, -(-count_blocks(p.len_q) // ROUTE_ROWS[d])
    ctas = min(strips * p.batch * p.heads_q, entries[2].min_blocks * capability.of_device(p.device, p.device_index).multiprocessors)
    if strip_bytes:
        ctas = max(1, min(ctas, SCRATCH_LIMIT // strip_bytes))
    pooled = p.batch * p.heads_kv * count_blocks(p.len_kv) * (1 + sparse.tail)
    return RoutePlan(
        pool, center, choose, -(-pooled // (POOL_THREADS // 32)), strips, ctas, strip_bytes,
        -1 if sparse.neighbours is None or sparse.q_start is None else sparse.neighbours,
        max(-FINITE_MAX, min(p.sm_scale * LOG2E, FINITE_MAX)),
    )  # fmt: skip


def _pitch(blocks: int) -> int:
    """Numbers of a row of scores."""
    return -(-blocks // ROUTE_PITCH) * ROUTE_PITCH


def _packed(live_tokens: Callable[[int], torch.Tensor | None], batch: int) -> torch.Tensor | None:
    """int32 [B, words], bits of the tokens that `live_tokens` gives for each batch; None where all live."""
    rows = [row for row in map(live_tokens, range(batch)) if row is not None]
    return block_bits.pack(torch.stack(rows)) if rows else None


def _live_rows(live: torch.Tensor | None) -> tuple[int, int, int, int]:
    """The end of LiveKeys."""
    return (0, 0, 1, 0) if live is None else (live.shape[1], 0, 1, live.shape[1])


def _mask_strides(mask: torch.Tensor | None) -> tuple[int, int]:
    if mask is None:
        return 0, 0
    batch, head = (0 if size == 1 else stride for size, stride in zip(mask.shape[:2], mask.stride()[:2]))
    return batch, head


def _all_live(live: torch.Tensor, view: BlockView) -> torch.Tensor:
    """bool [B, n], whether every key of a block exists."""
    keys = block_bits.unpack(live, view.len_kv)
    return torch.nn.functional.pad(keys, (0, -view.len_kv % KV_BLOCK), value=True).unflatten(1, (-1, KV_BLOCK)).all(2)


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
