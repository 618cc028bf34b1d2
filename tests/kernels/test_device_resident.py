"""Kernels whose K and V stay in shared memory, without a GPU: emulated lane by lane (tests/emulated_card.py), dense and packed."""

from __future__ import annotations

import matrix
import pytest
import torch
from emulated_card import Lanes, install, lanes_of, needs_compiler, on_card
from packed_calls import check_sequences, inputs, offsets

from sageattention.backends.call import PreparedCall
from sageattention.backends.cuda import host, workspace
from sageattention.backends.cuda import packed as backend
from sageattention.kernels.resident import RESIDENT_FP16
from sageattention.numerics.reference import emulate, oracle
from sageattention.planning import resident as planning
from sageattention.planning.packed import PackedProblem
from sageattention.planning.plan import CudaPlan, plan
from sageattention.planning.problem import Problem
from sageattention.variants import CUDA_FP16

pytestmark = needs_compiler


@pytest.fixture(scope="module", params=[64, 128], ids="d{}".format)
def lanes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lanes:
    return lanes_of(90, request.param, tmp_path_factory.mktemp("resident"), wgmma=True)


@pytest.fixture
def card(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> Lanes:
    workspace.resident_plan_of.cache_clear()
    monkeypatch.setattr(planning, "pays", lambda *_: True)
    return install(monkeypatch, lanes)


def resident(problem: Problem, card: Lanes) -> CudaPlan:
    chosen = plan.__wrapped__(problem, card.capability, CUDA_FP16.name)  # not from the cache
    assert isinstance(chosen, CudaPlan) and chosen.kernels in RESIDENT_FP16 and chosen.halves is not None
    return chosen


@pytest.mark.parametrize(
    "dtype, layout, heads, lengths",
    [
        ("bfloat16", "HND", (2, 1), (200, 300)),
        ("float16", "NHD", (3, 3), (129, 77)),  # a block's share begins within a head
        ("float16", "HND", (2, 2), (70, 129)),
        ("bfloat16", "NHD", (1, 1), (65, 512)),
        ("float16", "HND", (4, 2), (1, 1)),
        ("bfloat16", "HND", (1, 1), (400, 64)),
    ],
)
def test_dense_calls_agree_with_the_emulation(card: Lanes, dtype: str, layout: str, heads: tuple, lengths: tuple) -> None:
    t, _ = matrix.tensors(matrix.Case(card.head_dim - 24, dtype, layout, "none", *heads, *lengths))  # padded inside the kernels
    given = t if layout == "HND" else {n: x.transpose(1, 2).contiguous() for n, x in t.items()}
    problem = on_card(given, tensor_layout=layout)
    chosen = resident(problem, card)
    out, lse = host.run(PreparedCall(*given.values(), None, problem, chosen, {}))
    out = out if layout == "HND" else out.transpose(1, 2)
    expected, expected_lse = emulate(**t, scheme=chosen.scheme)
    exact, _ = oracle(**t)
    assert lse is not None and out.isfinite().all()
    assert matrix.workloads.relative_l2(out, expected) <= matrix.EMULATION_BOUND[chosen.scheme.pv] + matrix.OUTPUT_STEP[dtype]
    assert matrix.workloads.relative_l2(out, exact) <= 0.02
    assert (lse - expected_lse).abs().mean() <= 2e-3


@pytest.mark.parametrize(
    "lengths_q, lengths_k, dtype, heads",
    [
        ([70, 0, 5, 129, 64], [70, 33, 0, 200, 1], "bfloat16", (2, 1)),
        ([300, 77, 193], [300, 77, 193], "float16", (2, 2)),
        ([0, 0, 3], [0, 0, 260], "bfloat16", (1, 1)),
    ],
    ids=["cross", "windows", "late"],
)
def test_each_sequence_is_a_call_of_its_own(card: Lanes, lengths_q: list, lengths_k: list, dtype: str, heads: tuple) -> None:
    t = inputs(card.head_dim - 24, dtype, heads, lengths_q, lengths_k)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k, torch.int64)
    problem = Problem.from_packed(
        **t, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max(lengths_q), max_seqlen_k=max(lengths_k), return_lse=True
    )._replace(device="cuda", device_index=0)
    chosen, packed = resident(problem, card), PackedProblem(problem, len(t["q"]), len(t["k"]))
    out, lse = backend.run(**t, cu_seqlens=(cu_q, cu_k), packed=packed, plan=chosen, known={})
    check_sequences(t, out, lse, chosen.scheme, lengths_q, lengths_k, False, dtype)


def test_a_value_that_is_no_number_stays_in_its_sequence(card: Lanes) -> None:
    lengths = [70, 40]
    t = inputs(card.head_dim, "bfloat16", (1, 1), lengths, lengths)
    cu = offsets(lengths)
    problem = Problem.from_packed(**t, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=70, max_seqlen_k=70)._replace(
        device="cuda", device_index=0
    )
    how = {"cu_seqlens": (cu, cu), "packed": PackedProblem(problem, 110, 110), "plan": resident(problem, card), "known": {}}
    expected, _ = backend.run(**t, **how)
    t["v"][3, 0, 5] = t["k"][4, 0, 7] = torch.nan
    out, _ = backend.run(**t, **how)
    assert torch.equal(out[70:], expected[70:]) and not torch.equal(out[:70], expected[:70])


def unaligned(x: torch.Tensor, how: str) -> torch.Tensor:
    """`x` in memory where its rows are not aligned to 16 bytes: their first, or their distance."""
    *shape, head_dim = x.shape
    wider = torch.zeros(*shape, head_dim + (8 if how == "address" else 1), dtype=x.dtype)
    return (wider[..., 1 : head_dim + 1] if how == "address" else wider[..., :head_dim]).copy_(x)


@pytest.mark.parametrize("how", ["address", "pitch"])
def test_rows_that_are_not_aligned_are_quantised_first(card: Lanes, how: str) -> None:
    t, _ = matrix.tensors(matrix.Case(card.head_dim, "bfloat16", "HND", "none", 2, 1, 70, 40))
    t["v"] = unaligned(t["v"], how)
    chosen, known = resident(on_card(t), card), {}
    assert chosen.halves is not None
    expected, _ = emulate(**t, scheme=chosen.halves.scheme)
    for _ in range(2):  # what is kept for the second is of those launches, too
        out, _ = host.run(PreparedCall(*t.values(), None, on_card(t), chosen, known))
        assert matrix.workloads.relative_l2(out, expected) <= matrix.EMULATION_BOUND["fp16"] + matrix.OUTPUT_STEP["bfloat16"]
    assert known and not any(isinstance(form, host.BoundResident) for form in known.values())


def test_packed_rows_that_are_not_aligned_are_quantised_first(card: Lanes) -> None:
    lengths = [70, 40]
    t = inputs(card.head_dim, "bfloat16", (1, 1), lengths, lengths)
    t["q"], cu = unaligned(t["q"], "address"), offsets(lengths)
    problem = Problem.from_packed(**t, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=70, max_seqlen_k=70, return_lse=True)._replace(
        device="cuda", device_index=0
    )
    chosen, known = resident(problem, card), {}
    assert chosen.halves is not None
    for _ in range(2):
        out, lse = backend.run(**t, cu_seqlens=(cu, cu), packed=PackedProblem(problem, 110, 110), plan=chosen, known=known)
        check_sequences(t, out, lse, chosen.halves.scheme, lengths, lengths, False, "bfloat16")
    assert known and not any(isinstance(form, host.BoundResident) for form in known.values())


@pytest.mark.parametrize("causal, len_kv, dtype", [(True, 300, "bfloat16"), (False, 1100, "bfloat16"), (False, 300, "float32")])
def test_other_calls_are_quantised_first(card: Lanes, causal: bool, len_kv: int, dtype: str) -> None:
    t, _ = matrix.tensors(matrix.Case(card.head_dim, dtype, "HND", "none", 1, 1, 300, len_kv))
    chosen = plan.__wrapped__(on_card(t, is_causal=causal), card.capability, CUDA_FP16.name)
    assert isinstance(chosen, CudaPlan) and not chosen.kernels.resident and chosen.halves is None
