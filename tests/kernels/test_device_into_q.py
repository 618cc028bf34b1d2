"""Calls that write their output into q, without a GPU (tests/emulated_card.py): the bits of one that does not, and nothing else touched."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import matrix
import pytest
import torch
from emulated_card import Lanes, install, lanes_of, needs_compiler

from sageattention import dispatch, sparse_dispatch
from sageattention.backends.cuda import driver, host, sparse
from sageattention.errors import KernelMissing
from sageattention.planning import resident
from sageattention.planning.plan import plan
from sageattention.planning.problem import Problem
from sageattention.planning.sparse_plan import sparse_plan
from sageattention.planning.sparse_problem import SparseProblem
from sageattention.variants import VARIANTS

pytestmark = needs_compiler
HEADS = 2
G = torch.Generator().manual_seed(1)


@pytest.fixture(scope="module", params=[(89, 128, False), (90, 64, True)], ids=["mma", "hopper"])
def lanes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lanes:
    return lanes_of(*request.param[:2], tmp_path_factory.mktemp("into_q"), wgmma=request.param[2])


@pytest.fixture
def card(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> Lanes:
    return install(monkeypatch, lanes)


def variants(card: Lanes) -> list[str]:
    """Those of which the card has kernels of its own."""
    arch = card.capability.arch
    found = (v for v in VARIANTS.values() if v.backend == "cuda" and v.min_arch <= arch)
    return [v.name for v in found if any(k.arch == (90 if arch == 90 else 0) for k in v.kernels)]


def made(card: Lanes, memory: str, layout: str, lengths: tuple[int, int], heads_kv: int, dtype: str = "bfloat16") -> list[torch.Tensor]:
    """q, k and v, each in memory of its own or as parts of one."""
    case = matrix.Case(card.head_dim - 24, dtype, layout, "none", HEADS, heads_kv, *lengths)
    q, k, v = matrix.tensors(case)[0].values()
    if memory == "separate":
        return [q, k, v] if layout == "HND" else [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    if layout == "HND":  # [B, N, H, 3, D] has rows of its own for each head
        whole = torch.stack([q, k, v], -2)
        return [whole[..., i, :] for i in range(3)]
    sizes = [t.shape[1] * t.shape[3] for t in (q, k, v)]
    whole = torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], -1)
    return [t.unflatten(-1, (-1, q.shape[3])) for t in whole.split(sizes, -1)]


def memory_of(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def check(given: list[torch.Tensor], call: Any, expected: torch.Tensor) -> None:
    """Run a call, which is the last to have its tensors but for `given`, and look at q's memory."""
    address, strides = given[0].data_ptr(), given[0].stride()
    before = memory_of(given[0]).clone()
    out, *_ = (call.compute if isinstance(call, dispatch.Call) else call.run)(given.clear)
    assert call.into_q and not given
    assert (out.data_ptr(), out.stride()) == (address, strides) and torch.equal(out, expected)
    after = memory_of(out).view(out.dtype).clone()
    places = torch.as_strided(after, out.shape, strides, out.storage_offset())
    places.copy_(torch.as_strided(before.view(out.dtype), out.shape, strides, out.storage_offset()))
    assert torch.equal(after.view(torch.uint8), before)  # but for q's own elements


def on_card(problem: Problem) -> Problem:
    return problem._replace(device="cuda", device_index=0)


@pytest.mark.parametrize(
    ("layout", "lengths", "heads_kv", "dtype", "causal", "memory", "per_group"),
    [
        ("NHD", (300, 300), 2, "bfloat16", False, "fused", 1),
        ("NHD", (301, 301), 1, "float32", False, "fused", 100),
        ("HND", (165, 165), 2, "float16", True, "fused", 3),
        ("HND", (200, 70), 2, "bfloat16", False, "separate", 3),
        ("NHD", (129, 129), 1, "bfloat16", True, "separate", 100),
    ],
)
def test_dense_calls(
    card: Lanes, layout: str, lengths: tuple, heads_kv: int, dtype: str, causal: bool, memory: str, per_group: int
) -> None:
    for variant in variants(card):
        given = made(card, memory, layout, lengths, heads_kv, dtype)
        problem = on_card(Problem.from_tensors(*given, tensor_layout=layout, is_causal=causal, return_lse=False))
        chosen = plan(problem, card.capability, variant)
        chosen = replace(chosen.halves or chosen, heads_per_group=min(per_group, 2 * heads_kv))
        expected, _ = dispatch.Call(*(t.clone() for t in given), None, problem, chosen, {}).compute()
        check(given, dispatch.Call(*given, None, problem, chosen, {}), expected)


def test_masked_and_resident_calls(card: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "pays", lambda *_: card.capability.arch == 90)
    t, mask = matrix.tensors(matrix.Case(card.head_dim, "bfloat16", "HND", "bool", HEADS, 1, 140, 170))
    for attn_mask in (mask, None):
        for variant in variants(card):
            given = [x.clone() for x in t.values()]
            problem = on_card(Problem.from_tensors(*given, attn_mask=attn_mask, return_lse=False))
            chosen = plan.__wrapped__(problem, card.capability, variant)
            expected, _ = dispatch.Call(*t.values(), attn_mask, problem, chosen, {}).compute()
            check(given, dispatch.Call(*given, attn_mask, problem, chosen, {}), expected)


def test_calls_alike_do_not_take_each_other_s_strides(card: Lanes) -> None:
    bound: dict = {}
    for _ in range(2):
        given = made(card, "fused", "NHD", (140, 140), HEADS)
        problem = on_card(Problem.from_tensors(*given, tensor_layout="NHD", return_lse=False))
        chosen = plan(problem, card.capability, variants(card)[0])
        expected, _ = dispatch.Call(*given, None, problem, chosen, bound).compute()
        assert expected.is_contiguous()
        check(given, dispatch.Call(*given, None, problem, chosen, bound), expected)


SPARSE: dict[str, dict[str, Any]] = {
    "order": {"tau": 0.5, "order": torch.randperm(301, generator=G).int(), "sinks": 70, "query_sinks": (200, 240)},
    "without tails": {"selection": "topk", "keep": 0.3, "tail": False},
    "by torch": {"selection": "cdf", "similarity": 1e-9},
    "key mask": {"selection": "mass", "key_mask": torch.rand(2, 301, generator=G) < 0.8},
    "all": {"sinks": 301},
}


@pytest.mark.parametrize(
    ("name", "layout", "memory", "heads_kv", "limit"),
    [
        ("order", "NHD", "fused", HEADS, 0),
        ("order", "HND", "separate", 1, sparse.MEMORY_LIMIT),
        ("without tails", "HND", "fused", HEADS, 0),
        ("by torch", "NHD", "fused", 1, 0),
        ("key mask", "NHD", "separate", 1, sparse.MEMORY_LIMIT),
        ("all", "NHD", "fused", 1, 0),
    ],
)
def test_sparse_calls(
    card: Lanes, name: str, layout: str, memory: str, heads_kv: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """`limit`: of the memory of a part; 0 gives each KV head one."""
    monkeypatch.setattr(sparse, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(dispatch, "prepare", lambda q, k, v, **how: dense(card, q, k, v, **how))
    variant = next(name for name in variants(card) if VARIANTS[name].sparse_kernels)
    given = made(card, memory, layout, (301, 301), heads_kv)
    whole = Problem.from_tensors(*given, tensor_layout=layout, return_lse=False)
    problem, tensors = SparseProblem.from_call(whole, given[0], **SPARSE[name])
    problem = problem._replace(problem=on_card(whole))
    chosen = sparse_plan(problem, card.capability, variant)
    expected = sparse_dispatch.SparseCall(*(t.clone() for t in given), problem, tensors, chosen).run()
    call = sparse_dispatch.SparseCall(*given, problem, tensors, chosen)
    if name == "all":
        address = given[0].data_ptr()
        assert torch.equal(found := call.run(given.clear).out, expected.out) and found.data_ptr() == address
    else:
        check(given, call, expected.out)


def dense(card: Lanes, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, attn_mask, variant: str, accum: str, **how) -> dispatch.Call:
    problem = on_card(Problem.from_tensors(q, k, v, attn_mask=attn_mask, **how))
    return dispatch.Call(q, k, v, attn_mask, problem, plan(problem, card.capability, variant, accum), {})


def test_a_gate_and_a_log_sum_exp_read_q_behind_the_output(card: Lanes) -> None:
    variant = next(name for name in variants(card) if VARIANTS[name].sparse_kernels)
    for lse, gated in ((True, False), (False, True)):
        given = made(card, "separate", "HND", (200, 200), HEADS)
        before, address = given[0].clone(), given[0].data_ptr()
        whole = Problem.from_tensors(*given, return_lse=lse)
        gate = torch.rand_like(given[0]) if gated else None
        problem, tensors = SparseProblem.from_call(whole, given[0], coarse_gate=gate)
        problem = problem._replace(problem=on_card(whole))
        call = sparse_dispatch.SparseCall(*given, problem, tensors, sparse_plan(problem, card.capability, variant))
        out = call.run(given.clear).out
        assert not given and not call.into_q and out.data_ptr() != address and torch.equal(call.q, before)


@pytest.mark.parametrize("holds", ["q", "k"])
def test_a_q_that_somebody_has_stays_as_it_is(card: Lanes, holds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then K and V go before the output is made, where nobody has them."""
    freed = []
    attend = host.attend

    def attending(*args):
        freed.append(all(ref() is None for ref in references))
        return attend(*args)

    monkeypatch.setattr(host, "attend", attending)
    given = made(card, "separate" if holds == "q" else "fused", "NHD", (300, 300), HEADS, "float32")
    kept, references = given[0 if holds == "q" else 1], [weakref.ref(t) for t in given[1:]]
    before = kept.clone()
    problem = on_card(Problem.from_tensors(*given, tensor_layout="NHD", return_lse=False))
    chosen = plan(problem, card.capability, variants(card)[0])
    chosen = chosen.halves or chosen
    expected, _ = dispatch.Call(*given, None, problem, chosen, {}).compute()
    call = dispatch.Call(*given, None, problem, chosen, {})
    out, _ = call.compute(given.clear)
    assert torch.equal(kept, before) and torch.equal(out, expected) and not call.into_q
    assert freed == ([True] if holds == "q" else [])


def test_a_missing_kernel_is_found_before_anything_is_let_go(card: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    given = made(card, "separate", "NHD", (300, 300), HEADS)
    problem = on_card(Problem.from_tensors(*given, tensor_layout="NHD", return_lse=False))
    own = SparseProblem.from_call(problem._replace(device="cpu"), given[0])
    variant = next(name for name in variants(card) if VARIANTS[name].sparse_kernels)
    before = [t.clone() for t in given]
    calls = [
        (dispatch.Call(*given, None, problem, plan(problem, card.capability, variant), {}).compute, "attend"),
        (sparse_dispatch.SparseCall(*given, own[0]._replace(problem=problem), own[1],
                                    sparse_plan(own[0]._replace(problem=problem), card.capability, variant)).run, "route"),
    ]  # fmt: skip
    launched: list[object] = []
    monkeypatch.setattr(host, "issue", lambda *args: launched.append(args))

    def fail(without: str):
        def kernel(index, image, symbol, variant):
            if without in symbol:
                raise KernelMissing(variant, "its image is damaged")
            return symbol

        return kernel

    for run, without in calls:
        monkeypatch.setattr(driver, "kernel", fail(without))
        with pytest.raises(KernelMissing):
            run(given.clear)
        assert all(torch.equal(t, old) for t, old in zip(given, before)) and len(given) == 3 and not launched
