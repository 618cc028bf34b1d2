"""Attention over a sequence that is spread over several GPUs, by torch.distributed; each process has one GPU and one part of the tokens.

`ring` keeps queries where they are and passes keys and values round; `ulysses` exchanges tokens for heads, so that each process computes
whole heads. Ulysses is the faster one where heads suffice, and serves any attention, block-sparse ones too. Parts are equally long and in
the order of ranks. Neither has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from . import exchange, layout
from .api import sageattn
from .backends.cuda import merge as kernels
from .exchange.boxes import Form

ULYSSES_CHUNKS = 5  # of heads, at most: one's exchange is under way while another's attention is computed


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
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    to, source = (rank + 1) % size, (rank - 1) % size
    form = Form(min(2, size - 1), (k.shape, v.shape), lambda whole: whole.expand(size, *whole.shape), (source,), (to,))
    found: tuple[torch.Tensor, torch.Tensor] | None = None
    kv: Sequence[torch.Tensor] = k, v
    with exchange.opened(q, group, form) as (link, (boxes,)):
        for step in range(size):
            last = step + 1 == size
            if not last:
                link.send(boxes[step % 2], {to: kv})
            part = (rank - step) % size  # whose keys these are
            if not is_causal or part <= rank:
                own = sageattn(q, kv[0], kv[1], tensor_layout, is_causal and part == rank, sm_scale, return_lse=True, variant=variant)
                assert isinstance(own, tuple)
                if found is None:
                    found = own
                else:
                    merge(*found, *own, tensor_layout)
            if step:
                link.flush()  # the next process has them
                link.done(boxes[(step - 1) % 2])
            if not last:
                link.wait(boxes[step % 2])
                kv = boxes[step % 2].wholes
    assert found is not None  # its own part, at least
    return found if return_lse else found[0]


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
    total = torch.zeros((), device=out.device)
    for part, share in ((out, lse), (other, other_lse)):
        weight = (share - whole).exp().masked_fill(share == -torch.inf, 0)[..., None]
        total = total + layout.to_hnd(part, tensor_layout).float() * weight
    layout.to_hnd(out, tensor_layout).copy_(total)
    lse.copy_(whole)


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
        options: further keywords of it, such as `variant`.

    Returns:
        out like q.

    Raises:
        ValueError: the heads can't be shared out evenly.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    axis_heads, axis_tokens = layout.AXES[tensor_layout]
    heads_q, heads_kv = q.shape[axis_heads], k.shape[axis_heads]
    if heads_q % size or heads_kv % size:
        raise ValueError(f"{heads_q} query heads and {heads_kv} of keys can't be shared by {size} processes evenly; `ring` can")
    chunks = next(n for n in range(ULYSSES_CHUNKS, 0, -1) if not heads_kv // size % n)
    tokens = q.shape[axis_tokens]

    def shape_of(t: torch.Tensor) -> tuple[int, ...]:
        """Of a chunk with all tokens."""
        shape = list(t.shape)
        shape[axis_heads], shape[axis_tokens] = shape[axis_heads] // size // chunks, size * tokens
        return tuple(shape)

    def by_process(whole: torch.Tensor) -> torch.Tensor:
        """[…, tokens of all, …] as [process, …, its tokens, …]."""
        return whole.unflatten(axis_tokens, (size, tokens)).movedim(axis_tokens, 0)

    def heads_of(t: torch.Tensor, process: int, chunk: int) -> torch.Tensor:
        """Those of a chunk of what a process computes."""
        count = t.shape[axis_heads] // size // chunks
        return t.narrow(axis_heads, (process * chunks + chunk) * count, count)

    everyone = range(size)
    others = tuple(p for p in everyone if p != rank)
    ways = Form(min(2, chunks), tuple(shape_of(t) for t in (q, k, v)), by_process, others, others)
    back = Form(min(2, chunks), (by_process(q.new_empty(shape_of(q), device="meta")).shape,), lambda whole: whole, others, others)
    result = torch.empty_like(q)
    with exchange.opened(q, group, ways, back) as (link, (arriving, returning)):

        def give(chunk: int) -> None:
            link.send(arriving[chunk % 2], {p: [heads_of(t, p, chunk) for t in (q, k, v)] for p in everyone})

        def take(chunk: int) -> None:
            link.collect(returning[chunk % 2], {p: [heads_of(result, p, chunk)] for p in everyone})

        for chunk in range(min(2, chunks)):
            give(chunk)
        for chunk in range(chunks):
            link.wait(arriving[chunk % 2])
            if chunk:
                take(chunk - 1)
            whole = arriving[chunk % 2].wholes
            out = attention(*whole, tensor_layout=tensor_layout, is_causal=is_causal, sm_scale=sm_scale, **options)
            link.done(arriving[chunk % 2])
            link.send(returning[chunk % 2], {p: [part] for p, part in enumerate(by_process(out))})
            if chunk + 2 < chunks:
                give(chunk + 2)
        take(chunks - 1)
    return result


def release(group: dist.ProcessGroup | None = None) -> None:
    """Give back the memory that `ring` and `ulysses` of a group keep for what comes from its other GPUs; all its processes call it."""
    exchange.release(group)
