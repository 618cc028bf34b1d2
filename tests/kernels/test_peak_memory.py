"""What a call takes beside its tensors, at the size of a 15-second video of MiniMax H3, whose q, k and v are 4.5 GB: an output of its own
does not count, and the rest is bounded. The host side runs, on tensors without data; launches are left out."""

from __future__ import annotations

import weakref
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
    "sol": {}, "mass": {"selection": "mass", "sinks": 700, "query_sinks": (300, 700)},
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


@pytest.fixture
def qkv(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Tensors [1, N, H, D] of one projection, on a machine without launches."""
    monkeypatch.setattr(store, "missing", lambda image: "")
    monkeypatch.setattr(driver, "kernel", lambda *named: 1)
    monkeypatch.setattr(host, "issue", lambda *launches: None)
    fused = torch.empty(1, TOKENS, 3 * HEADS * DIM, dtype=torch.bfloat16, device="meta")
    return [t.unflatten(-1, (HEADS, DIM)) for t in fused.chunk(3, -1)]


@pytest.fixture(params=VARIANTS_OF, ids=" ".join)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Capability, str]:
    card, variant = request.param
    monkeypatch.setattr(host.launch_plan_of.__wrapped__.__globals__["capability"], "of_device", lambda *device: CARDS[card])
    return CARDS[card], variant


def test_a_dense_call(qkv: list[torch.Tensor], where: tuple[Capability, str]) -> None:
    problem = Problem.from_tensors(*qkv, tensor_layout="NHD", return_lse=False)._replace(device="cuda", device_index=0)
    call = dispatch.Call(*qkv, None, problem, plan(problem, *where), {})
    peaks = {}
    for call.into_q in (True, False):
        with Allocations() as made:
            host.run(call)
        peaks[call.into_q] = made.peak
    assert 20 << 20 < peaks[True] <= LIMIT and peaks[False] - peaks[True] == TOKENS * HEADS * DIM * 2


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_call(qkv: list[torch.Tensor], name: str, where: tuple[Capability, str]) -> None:
    dense = Problem.from_tensors(*qkv, tensor_layout="NHD", return_lse=False)
    problem, tensors = SparseProblem.from_call(dense, qkv[0], **SPARSE[name])
    problem = problem._replace(problem=dense._replace(device="cuda", device_index=0))
    if name == "mass":  # after the check, which looks at the values
        tensors = tensors._replace(order=torch.empty(TOKENS, dtype=torch.int32, device="meta"))
    with Allocations() as made:
        sparse.run(*qkv, problem, tensors, sparse_plan(problem, *where), into_q=True)
    assert 20 << 20 < made.peak <= LIMIT
