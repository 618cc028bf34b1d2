"""The router's device code without a GPU, emulated lane by lane, against the algorithm in fp64."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import routing
import torch
from emulated_card import install, lanes_of, needs_compiler
from lane_compiler import compiled
from routing import Call

from sageattention.backends import sparse_reference
from sageattention.backends.cuda import driver, host, route, sparse
from sageattention.cli.workloads import relative_l2
from sageattention.device.capability import Capability
from sageattention.kernels.table import center_entry, pool_entry, route_entry
from sageattention.numerics import block_bits
from sageattention.planning.problem import Problem
from sageattention.planning.sparse_plan import sparse_plan
from sageattention.planning.sparse_problem import SparseProblem

pytestmark = needs_compiler
TOKENS, BLOCKS, LISTS = 1000, 16, 8
ORDER = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1)).int()
KEYS = torch.arange(TOKENS).expand(2, -1) % 700 < torch.tensor([[690], [300]])
LENGTHS = torch.tensor([[64, 0, 10, 64, 63, 1, 64, 64] * 2, [64] * 16], dtype=torch.int32)
GUARD = 4096  # bytes
TAUS, KEEPS = torch.tensor([0.5, 1.0, 1.5, 2.0]), torch.tensor([0.0, 0.1, 0.35, 1.0])


class RoutedPlan:
    """What the router reads of a `CudaPlan`."""

    def __init__(self, head_dim: int):
        self.head_dim, self.images, self.variant = head_dim, (None, SimpleNamespace(arch="sm_90a")), SimpleNamespace(name="a variant")


class Card:
    """The router's kernels of one compiled head dimension, on the host."""

    def __init__(self, head_dim: int, folder: Path):
        self.head_dim = head_dim
        self.entries = {e.symbol: e for e in (pool_entry(head_dim), center_entry(head_dim), route_entry(head_dim, 90))}
        functions = "".join(
            f'extern "C" void {e.symbol}(const {e.params.__name__}* p, unsigned blocks) '
            f"{{ run_grid(blocks, {e.threads}, [&] {{ {e.expression}(*p); }}); }}\n"
            for e in self.entries.values()
        )
        self.library = compiled(90, folder, ("kernel/route_blocks.cuh",), functions)
        self.plan = RoutedPlan(head_dim)

    def issue(self, device: int, chains: list) -> None:
        for symbol, x, _, _, params, _ in (launch for chain in chains for launch in chain):
            assert len(params) == ctypes.sizeof(self.entries[symbol].params)
            getattr(self.library, symbol)(ctypes.create_string_buffer(params, len(params)), ctypes.c_uint(x))


@pytest.fixture(scope="module", params=[64, 128, 256])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Card:
    return Card(request.param, tmp_path_factory.mktemp("route"))


@pytest.fixture
def card(built: Card, monkeypatch: pytest.MonkeyPatch) -> Card:
    monkeypatch.setattr(route.capability, "of_device", lambda *device: Capability("cuda", 90, 2, name="a card"))
    monkeypatch.setattr(driver, "kernel", lambda index, image, symbol, variant: symbol)
    monkeypatch.setattr(host, "issue", built.issue)
    return built


def tensors(head_dim: int, len_q: int = TOKENS, len_kv: int = TOKENS, dtype: torch.dtype = torch.bfloat16, batch: int = 2, heads: int = 4):
    g = torch.Generator().manual_seed(0)
    return tuple(
        (torch.randn(batch, h, n, head_dim, generator=g) + torch.randn(batch, h, -(-n // 100), head_dim, generator=g)
         .repeat_interleave(100, 2)[:, :, :n]).to(dtype)
        for h, n in ((heads, len_q), (heads // 2, len_kv), (heads // 2, len_kv))
    )  # fmt: skip


def routed(card: Card, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given):
    """A call and what the kernels give for it. Their memory holds NaN before, and so does what lies around it, which has to stay."""
    call, around, empty = Call.of(q, k, v, **given), [], torch.empty

    def guarded(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        count = torch.Size(size).numel() * dtype.itemsize
        around.append(empty(count + 2 * GUARD, dtype=torch.uint8, device=device).fill_(0xFF))
        return around[-1][GUARD : GUARD + count].view(dtype).view(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route.torch, "empty", guarded)
        found, exact = call.route(card.plan)
    assert all((memory[part] == 0xFF).all() for memory in around for part in (slice(GUARD), slice(-GUARD, None)))
    return call, found, exact


CALLS = {
    "sol": {},
    "mass": {"selection": "mass", "tau": 1.2},
    "topk": {"selection": "topk", "keep": 0.25},
    "cdf": {"selection": "cdf", "keep": 0.6},
    "static": {"selection": "static", "block_mask": torch.rand(2, 4, LISTS, BLOCKS, generator=torch.Generator().manual_seed(3)) < 0.3},
    "one mask for all": {"selection": "static", "neighbours": 1, "block_mask": torch.eye(LISTS, BLOCKS)[None, None].bool()},
}
AROUND = {
    "plain": {},
    "no tail": {"tail": False},
    "sinks": {"sinks": [(0, 70), (500, 501)], "query_sinks": (900, 1000)},
    "order": {"order": ORDER, "sinks": 3, "neighbours": 0},
    "key mask": {"key_mask": KEYS, "neighbours": -1},
    "padded tiles": {"block_len": LENGTHS, "sinks": 64},
    "causal": {"is_causal": True, "sinks": 10},
    "scale": {"sm_scale": -0.05},
}


# Head dimensions differ in the shape of the products alone.
FEW = ("plain", "padded tiles", "causal")
CASES = [(d, kind, around) for d in (64, 128, 256) for kind in CALLS for around in AROUND if d == 128 or around in FEW]


@pytest.mark.parametrize(("built", "kind", "around"), CASES, indirect=["built"])
def test_route(card: Card, kind: str, around: str) -> None:
    given = CALLS[kind] | AROUND[around]
    call, found, exact = routed(card, *tensors(card.head_dim - 8 * (around == "plain")), **given)
    call.check(found, exact)


@pytest.mark.parametrize("lengths", [(1, 1), (64, 64), (130, 1000), (1000, 130), (65, 2100), (2200, 70)], ids=str)
@pytest.mark.parametrize("given", [{}, {"selection": "topk", "keep": 0.2}, {"is_causal": True, "q_start": 0}, {"q_start": 100}], ids=str)
def test_lengths(card: Card, lengths: tuple[int, int], given: dict) -> None:
    call, found, exact = routed(card, *tensors(card.head_dim, *lengths, batch=1, heads=2), **given)
    call.check(found, exact)


@pytest.mark.parametrize("given", [{"tau": TAUS}, {"selection": "mass", "tau": TAUS}, {"selection": "topk", "keep": KEEPS}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_thresholds_of_heads(card: Card, dtype: torch.dtype, given: dict) -> None:
    q, k, v = (t[..., 1:] for t in tensors(card.head_dim, dtype=dtype))  # rows that are not aligned
    call, found, exact = routed(card, q, k, v, **given)
    call.check(found, exact)


@pytest.mark.parametrize("kind", ["sol", "mass", "topk", "cdf"])
def test_nan_selects_what_it_meets(card: Card, kind: str) -> None:
    q, k, v = tensors(card.head_dim, batch=1)
    q[0, 1, 300] = float("nan")  # its block of rows
    k[0, 1, 5] = float("nan")  # every block of its KV head
    call, found, _ = routed(card, q, k, v, **CALLS[kind])
    exact = block_bits.unpack(found.lists[..., 0, :], call.view.n)
    assert exact[0, 1, 2].all() and exact[0, 2:].all() and not exact[0, 0].all(-1).any()


def test_more_blocks_than_shared_memory_holds_weights_of(card: Card) -> None:
    q, k, v = tensors(card.head_dim, 64, 64 * 1900, batch=1, heads=2)
    call, found, exact = routed(card, q, k, v, selection="topk", keep=0.1)
    call.check(found, exact)


SMALL = 260  # tokens
G = torch.Generator().manual_seed(5)
PARTS = {
    "sol": ("HND", {
        "tau": TAUS, "key_mask": torch.rand(2, SMALL, generator=G) < 0.8, "block_len": torch.tensor([[64, 50, 64, 3, 4], [64] * 5]).int(),
        "order": torch.randperm(SMALL, generator=G).int(), "sinks": 70,
    }),
    "static": ("NHD", {"selection": "static", "block_mask": torch.rand(2, 4, 3, 5, generator=G) < 0.4}),
    "by torch": ("NHD", {"selection": "cdf", "similarity": 1e-9}),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARTS)
def test_a_call_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A whole call on an emulated card, then cut as if it took too much memory: the same bits, and what the reference gives."""
    lanes = install(monkeypatch, lanes_of(89, 128, tmp_path_factory.mktemp("lanes")))
    layout, given = PARTS[kind]
    q, k, v = tensors(128, SMALL, SMALL)
    if layout == "NHD":
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    dense = Problem.from_tensors(q, k, v, tensor_layout=layout, return_lse=True)
    problem, own = SparseProblem.from_call(dense, q, **{**routing.DEFAULTS, **given})
    expected = sparse_reference.run(q, k, v, problem, own)
    problem = problem._replace(problem=dense._replace(device="cuda", device_index=0))
    plan = sparse_plan(problem, lanes.capability, "sageattn_qk_int8_pv_fp16_cuda")
    whole = sparse.run(q, k, v, problem, own, plan)
    monkeypatch.setattr(sparse, "MEMORY_LIMIT", 0)
    parts = sparse.run(q, k, v, problem, own, plan)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts))
    assert relative_l2(whole.out, expected.out) <= 0.03 and abs(whole.share - expected.share) <= 1e-2
    assert (whole.lse - expected.lse).abs().mean() <= 0.02
