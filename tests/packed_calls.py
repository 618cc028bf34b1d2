"""Calls of packed sequences: their inputs, each sequence against the exact result, and graphs replayed with other lengths."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import matrix
import torch

from sageattention.numerics.reference import emulate, oracle


def offsets(lengths: list[int], dtype: torch.dtype = torch.int32, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


def inputs(
    head_dim: int, dtype: str, heads: tuple[int, int], lengths_q: list[int], lengths_k: list[int]
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Packed q, k and v. Each sequence has a K and a V of its own size and mean: one scale for all would be far off."""
    g, (heads_q, heads_kv) = torch.Generator().manual_seed(0), heads
    q = torch.randn(sum(lengths_q), heads_q, head_dim, generator=g)
    parts = []
    for number, length in enumerate(lengths_k):
        k, v = (torch.randn(length, heads_kv, head_dim, generator=g) for _ in range(2))
        parts.append((k + 4 * torch.randn(1, heads_kv, head_dim, generator=g), v * 30.0 ** (number % 3 - 1) + number % 2))
    k, v = (torch.cat(tensors) for tensors in zip(*parts))
    return {name: t.to(getattr(torch, dtype)) for name, t in (("q", q), ("k", k), ("v", v))}


def check_sequences(t, out, lse, scheme, lengths_q: list[int], lengths_k: list[int], causal: bool, dtype: str) -> None:
    starts = zip(itertools.accumulate([0, *lengths_q]), itertools.accumulate([0, *lengths_k]), lengths_q, lengths_k)
    for q0, k0, len_q, len_k in starts:
        found, found_lse = out[q0 : q0 + len_q], lse[:, q0 : q0 + len_q]
        if not len_k:
            assert (found == 0).all() and (found_lse == -torch.inf).all()
            continue
        if not len_q:
            continue
        own = {"q": t["q"][q0 : q0 + len_q], "k": t["k"][k0 : k0 + len_k], "v": t["v"][k0 : k0 + len_k]}
        own = {name: x.transpose(0, 1)[None] for name, x in own.items()}
        exact, exact_lse = oracle(**own, is_causal=causal)
        emulated, _ = emulate(**own, scheme=scheme, is_causal=causal)
        found = found.transpose(0, 1)[None]
        assert matrix.workloads.relative_l2(found, emulated) <= matrix.EMULATION_BOUND[scheme.pv] + matrix.OUTPUT_STEP[dtype]
        assert matrix.workloads.relative_l2(found, exact) <= 0.08
        assert (found_lse[None] - exact_lse).abs().mean() <= 0.02


def check_replays(call: Callable[[], torch.Tensor], cu: torch.Tensor, *others: list[int]) -> None:
    """A CUDA graph of a call gives what the call itself gives, also where its offsets `cu` are those of other lengths by then."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for lengths in others:
        cu.copy_(offsets(lengths))
        graph.replay()
        assert torch.equal(out, call())
