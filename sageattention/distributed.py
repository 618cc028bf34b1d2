"""Attention over a sequence that is spread over several GPUs, by torch.distributed; each process has one GPU and one part of the tokens.

`ring` keeps queries where they are and passes keys and values round; `ulysses` exchanges tokens for heads, so that each process computes
whole heads. Ulysses is the faster one where heads suffice, and serves any attention, block-sparse ones too. Parts are equally long and in
the order of ranks. Neither has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from . import layout
from .api import sageattn
from .backends.cuda import merge as kernels

ULYSSES_CHUNKS = 2  # of heads: one's exchange is under way while another's attention is computed


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
    to, source = ((rank + step) % size for step in (1, -1))
    if group is not None:
        to, source = dist.get_global_rank(group, to), dist.get_global_rank(group, source)
    kv = k.contiguous(), v.contiguous()
    found: tuple[torch.Tensor, torch.Tensor] | None = None
    for step in range(size):
        coming, requests = kv, []
        if step + 1 < size:
            coming = torch.empty_like(kv[0]), torch.empty_like(kv[1])
            operations = [dist.P2POp(dist.isend, t, to, group) for t in kv]
            requests = dist.batch_isend_irecv(operations + [dist.P2POp(dist.irecv, t, source, group) for t in coming])
        part = (rank - step) % size  # whose keys these are
        if not is_causal or part <= rank:
            own = sageattn(q, *kv, tensor_layout, is_causal and part == rank, sm_scale, return_lse=True, variant=variant)
            assert isinstance(own, tuple)
            if found is None:
                found = own
            else:
                merge(*found, *own, tensor_layout)
        for request in requests:
            request.wait()
        kv = coming
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
    size = dist.get_world_size(group)
    axis_heads, axis_tokens = layout.AXES[tensor_layout]
    heads_q, heads_kv = q.shape[axis_heads], k.shape[axis_heads]
    if heads_q % size or heads_kv % size:
        raise ValueError(f"{heads_q} query heads and {heads_kv} of keys can't be shared by {size} processes evenly; `ring` can")
    chunks = next(n for n in range(ULYSSES_CHUNKS, 0, -1) if not (heads_kv // size) % n)
    by_tokens = [t.movedim((axis_tokens, axis_heads), (1, 2)) for t in (q, k, v)]  # [B, n, H, D]
    batch, tokens = by_tokens[0].shape[:2]
    sent = [_Exchange(_send(by_tokens, size, chunk, chunks), group) for chunk in range(chunks)]
    back = []
    for exchange in sent:
        whole = exchange.wait().transpose(0, 1).reshape(batch, size * tokens, -1, q.shape[-1])  # a view where there is one batch
        parts = whole.split([heads_q // size // chunks, *[heads_kv // size // chunks] * 2], 2)
        parts = parts if tensor_layout == "NHD" else [t.transpose(1, 2) for t in parts]
        out = attention(*parts, tensor_layout=tensor_layout, is_causal=is_causal, sm_scale=sm_scale, **options)
        out = out.movedim((axis_tokens, axis_heads), (1, 2)).unflatten(1, (size, tokens)).transpose(0, 1)
        back.append(_Exchange(out.contiguous(), group))
    result = torch.empty_like(q)
    places = result.movedim((axis_tokens, axis_heads), (1, 2)).unflatten(2, (size, chunks, -1))
    for chunk, exchange in enumerate(back):
        places[:, :, :, chunk].copy_(exchange.wait().movedim(0, 2))  # [process, B, n, heads, D]
    return result


def _send(by_tokens: list[torch.Tensor], size: int, chunk: int, chunks: int) -> torch.Tensor:
    """[process, B, n, heads of q, k and v, D]: what of a chunk each process computes."""
    parts = [t.unflatten(2, (size, chunks, -1))[:, :, :, chunk].movedim(2, 0) for t in by_tokens]
    return torch.cat(parts, 3)


class _Exchange:
    """An exchange of equal parts between all processes, under way."""

    def __init__(self, parts: torch.Tensor, group: dist.ProcessGroup | None):
        self.parts, self.received = parts, torch.empty_like(parts)
        self.work = dist.all_to_all_single(self.received, parts, group=group, async_op=True)

    def wait(self) -> torch.Tensor:
        """What came, in the order of ranks."""
        self.work.wait()
        return self.received
