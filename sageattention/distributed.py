"""Attention over a sequence that is spread over several GPUs, by torch.distributed; each process has one GPU and one part of the tokens.

`ring` keeps queries where they are, and every process gets all keys and values; `ulysses` exchanges tokens for heads, so that each process
computes whole heads. Ulysses is the faster one where heads suffice, and serves any attention, block-sparse ones too. Both take some heads
at a time: those of the next chunk are under way while one is computed. Parts are equally long and in the order of ranks. Neither has a
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from . import exchange, layout
from .api import sageattn
from .backends.cuda import merge as kernels
from .exchange.boxes import Form

# Chunks at most. More of them leave less of the first exchange in sight, and pay for more and shorter launches.
RING_CHUNKS = 8
ULYSSES_CHUNKS = 4
HEAD_AXES = {"tau": 0, "keep": 0, "block_mask": 1, "attn_mask": 1}  # of attention's options that may have a value for each query head


@torch.no_grad()
def ring(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    variant: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of this process's queries over the keys of all processes of `group`.

    Args:
        q: [B, Hq, n, D] ("HND") or [B, n, Hq, D] ("NHD"), this process's n tokens.
        k, v: the same with Hkv heads, of which Hq is a multiple.
        is_causal: token i of the whole sequence sees tokens up to i. Later ranks then have more to compute than earlier ones.
        variant: of `sageattn`.

    Returns:
        out like q; with `return_lse` (out, lse [B, Hq, n] fp32, natural log).

    Raises:
        ValueError: q, k and v are of several dtypes, or `sageattn` does not support them.
    """
    _one_dtype(q, k, v)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    axis_heads, axis_tokens = layout.AXES[tensor_layout]
    tokens, chunks = q.shape[axis_tokens], _chunks(k.shape[axis_heads], RING_CHUNKS)
    # Causal: no process needs later ones' keys.
    senders = tuple(p for p in range(size) if (p < rank if is_causal else p != rank))
    receivers = tuple(p for p in range(size) if (p > rank if is_causal else p != rank))
    places = _Places(tensor_layout, size, chunks)
    form = Form(min(2, chunks), tuple(places.shape(t, 1) for t in (k, v)), places.by_process, senders, receivers)
    out, lse = torch.empty_like(q), q.new_empty((q.shape[0], q.shape[axis_heads], tokens), dtype=torch.float32)

    def give(chunk: int) -> None:
        parts = [places.heads(t, chunk) for t in (k, v)]
        link.send(boxes[chunk % 2], dict.fromkeys((*receivers, *(() if is_causal else (rank,))), parts), idle=not chunk)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        found = sageattn(q, k, v, tensor_layout, causal, sm_scale, return_lse=True, variant=variant)
        assert isinstance(found, tuple)
        return found

    with exchange.opened(q, group, form) as (link, (boxes,)):
        for chunk in range(min(2, chunks)):
            give(chunk)
        for chunk in range(chunks):
            box, queries = boxes[chunk % 2], places.heads(q, chunk)
            own = attend(queries, places.heads(k, chunk), places.heads(v, chunk), True) if is_causal else None
            link.wait(box)
            if own is None:
                own = attend(queries, box.wholes[0], box.wholes[1], False)
            elif rank:
                earlier = [whole.narrow(axis_tokens, 0, rank * tokens) for whole in box.wholes]
                merge(*own, *attend(queries, earlier[0], earlier[1], False), tensor_layout)
            link.done(box)
            link.copy(places.heads(out, chunk), own[0], idle=chunk + 1 == chunks)
            lse.narrow(1, chunk * own[1].shape[1], own[1].shape[1]).copy_(own[1])
            if chunk + 2 < chunks:
                give(chunk + 2)
    return (out, lse) if return_lse else out


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, tensor_layout: str = "HND"
) -> None:  # fmt: skip
    """Merge a part of one attention into another, over different keys, in place.

    Args:
        out, other: [B, H, N, D] ("HND") or [B, N, H, D] ("NHD"), the parts' outputs; `out` becomes that of both.
        lse, other_lse: [B, H, N] fp32, natural log; `lse` becomes that of both. -inf: the part has no key for this query.
    """
    if out.is_cuda and kernels.merge(out, lse, other, other_lse, tensor_layout):
        return
    whole = torch.logaddexp(lse, other_lse)
    total = torch.zeros((), dtype=torch.float32, device=out.device)
    for part, share in ((out, lse), (other, other_lse)):
        weight = (share - whole).exp().masked_fill(share == -torch.inf, 0)[..., None]
        total = total + layout.to_hnd(part, tensor_layout).float() * weight
    layout.to_hnd(out, tensor_layout).copy_(total)
    lse.copy_(whole)


@torch.no_grad()
def ulysses(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    attention: Callable[..., Any] = sageattn,
    **options: Any,
) -> torch.Tensor:
    """Attention of this process's queries over the keys of all processes of `group`, each of which computes its share of the heads.

    Args:
        q, k, v: as for `ring`; the numbers of heads are multiples of the number of processes.
        attention: what computes them, `sageattn` or `sageattn_sparse`: called with all tokens of some heads, `tensor_layout`,
            `is_causal`, `sm_scale` and `options`.
        options: further keywords of it, such as `variant`, the same in every process. Tensors are for all tokens, and of `tau`, `keep`,
            `block_mask` and `attn_mask` for all heads: each process takes its own.

    Returns:
        out like q, and nothing else.

    Raises:
        ValueError: the heads can't be shared out evenly, q, k and v are of several dtypes, or `attention` returns more than the output.
    """
    _one_dtype(q, k, v)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    axis_heads, axis_tokens = layout.AXES[tensor_layout]
    heads_q, heads_kv = q.shape[axis_heads], k.shape[axis_heads]
    if heads_q % size or heads_kv % size:
        raise ValueError(f"{heads_q} query heads and {heads_kv} of keys can't be shared by {size} processes evenly; `ring` can")
    chunks = _chunks(heads_kv // size, ULYSSES_CHUNKS)
    others = tuple(p for p in range(size) if p != rank)
    places = _Places(tensor_layout, size, chunks)
    forth = Form(min(2, chunks), tuple(places.shape(t, size) for t in (q, k, v)), places.by_process, others, others)
    part_shape = places.heads(q, 0, size).shape
    back = Form(min(2, chunks), ((size, *part_shape),), lambda whole: whole, others, others)
    result = torch.empty_like(q)

    def give(chunk: int) -> None:
        parts = {p: [places.heads(t, p * chunks + chunk, size) for t in (q, k, v)] for p in range(size)}
        link.send(arriving[chunk % 2], parts, idle=not chunk)

    def take(chunk: int) -> None:
        targets = {p: [places.heads(result, p * chunks + chunk, size)] for p in others}
        link.collect(returning[chunk % 2], targets, idle=chunk + 1 == chunks)

    with exchange.opened(q, group, forth, back) as (link, (arriving, returning)):
        for chunk in range(min(2, chunks)):
            give(chunk)
        for chunk in range(chunks):
            box = arriving[chunk % 2]
            link.wait(box)
            if chunk:
                take(chunk - 1)
            mine = _of_heads(options, heads_q, (rank * chunks + chunk) * heads_q // size // chunks, heads_q // size // chunks)
            out = attention(*box.wholes, tensor_layout=tensor_layout, is_causal=is_causal, sm_scale=sm_scale, **mine)
            if not isinstance(out, torch.Tensor):
                raise ValueError("attention returned more than the output, which is all that `ulysses` brings back; ask it for that alone")
            link.done(box)
            parts = places.by_process(out.to(q.dtype))
            link.send(returning[chunk % 2], {p: [parts[p]] for p in others})
            link.copy(places.heads(result, rank * chunks + chunk, size), parts[rank], idle=chunk + 1 == chunks)
            if chunk + 2 < chunks:
                give(chunk + 2)
        take(chunks - 1)
    return result


def _of_heads(options: dict[str, Any], heads: int, first: int, count: int) -> dict[str, Any]:
    """The options for some of all query heads."""
    cut = dict(options)
    for name, axis in HEAD_AXES.items():
        value = options.get(name)
        if isinstance(value, torch.Tensor) and value.dim() > axis and value.shape[axis] == heads:
            cut[name] = value.narrow(axis, first, count)
    return cut


def _one_dtype(*tensors: torch.Tensor) -> None:
    """What is exchanged is bytes."""
    if len({t.dtype for t in tensors}) > 1:
        raise ValueError(f"q, k and v are {', '.join(str(t.dtype) for t in tensors)}; convert them to one dtype")


def _chunks(heads: int, most: int) -> int:
    """How many equal chunks to make of so many heads."""
    return next(n for n in range(most, 0, -1) if not heads % n)


class _Places:
    """Where chunks of heads and processes' tokens lie in tensors of a layout."""

    def __init__(self, tensor_layout: str, size: int, chunks: int):
        self._axis_heads, self._axis_tokens = layout.AXES[tensor_layout]
        self._size, self._chunks = size, chunks

    def heads(self, t: torch.Tensor, index: int, shares: int = 1) -> torch.Tensor:
        """A chunk's heads of all, where `shares` processes have `chunks` each."""
        count = t.shape[self._axis_heads] // shares // self._chunks
        return t.narrow(self._axis_heads, index * count, count)

    def shape(self, t: torch.Tensor, shares: int) -> tuple[int, ...]:
        """Of the same heads with all processes' tokens."""
        shape = list(self.heads(t, 0, shares).shape)
        shape[self._axis_tokens] *= self._size
        return tuple(shape)

    def by_process(self, whole: torch.Tensor) -> torch.Tensor:
        """All processes' tokens → view [process, …]."""
        each = whole.shape[self._axis_tokens] // self._size
        return whole.unflatten(self._axis_tokens, (self._size, each)).movedim(self._axis_tokens, 0)


def release(group: dist.ProcessGroup | None = None) -> None:
    """Give back the memory that `ring` and `ulysses` of a group keep for what comes from its other GPUs; all its processes call it."""
    exchange.release(group)
