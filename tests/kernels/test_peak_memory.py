"""What a call takes beside its tensors, at the size of a 15-second video of MiniMax H3: q, k, v and the output of a call that takes them over
are 4.5 GB, and nothing else may count. The host side runs, on tensors without data; launches are left out."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sageattention import dispatch
from sageattention.backends.cuda import driver, host, sparse
from sageattention.device.capability import Capability
from sageattention.kernels import store
from sageattention.planning.plan import plan
from sageattention.planning.problem import Problem
from sageattention.planning.sparse_plan import sparse_plan
from sageattention.planning.sparse_problem import SparseProblem
from sageattention.variants import VARIANTS

LIMIT = 256 << 20
HEADS, TOKENS, DIM = 56, 104_050, 128
CARDS = {"H200": Capability("cuda", 90, 132, name="H200"), "RTX 4090": Capability("cuda", 89, 128, name="RTX 4090")}
VARIANTS_OF = [
    (card, v.name) for card, on in CARDS.items() for v in VARIANTS.values()
    if v.backend == "cuda" and v.min_arch <= on.arch and any(k.arch in (0, on.arch) for k in v.kernels)
]  # fmt: skip
SPARSE: dict[str, dict[str, Any]] = {
    "sol": {}, "mass": {"selection": "mass", "order": True, "sinks": 700, "query_sinks": (300, 700)},
    "topk": {"selection": "topk", "keep": 0.2, "tail": False},
}  # fmt: skip


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that are alive, and were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in args if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and id(t.untyped_storage()) not in self.known | given:
                self._count(t.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), id(storage)
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def test_the_count_itself() -> None:
    with Allocations() as made:
        one = torch.empty(1000, device="meta")
        view = one[:10].view(2, 5)
        assert made.alive == 4000
        del one
        assert made.alive == 4000
        del view
        two = torch.empty(10, device="meta") + 1
        assert made.peak == 4000 and made.alive == 40
    assert two.numel() == 10
