"""Kernels whose K and V stay in shared memory, on a Hopper GPU: the matrix, packed sequences, graphs, wrong offsets (marker gpu).

All calls that they can take run by them here, not only those where that pays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import matrix
import packed_calls
import pytest
import torch

from sageattention import dispatch, packed_dispatch, sageattn, sageattn_varlen
from sageattention.cli.workloads import relative_l2
from sageattention.kernels.resident import RESIDENT_FP16
from sageattention.planning import resident as planning
from sageattention.planning.plan import CudaPlan
from sageattention.variants import CUDA_FP16

pytestmark = pytest.mark.gpu
offsets = functools.partial(packed_calls.offsets, device="cuda")
VARIANT = CUDA_FP16.name
# Few work tiles and many, heads that several blocks share and blocks that have several heads, 1 to as many keys as there is room for.
CASES = [
    *(case for case in matrix.full() if case.mask == "none" and case.head_dim <= 128),
    matrix.Case(128, heads_q=40, heads_kv=10, len_q=1300, len_kv=300),
    matrix.Case(128, "float16", "NHD", heads_q=3, heads_kv=3, len_q=20_000, len_kv=512),
    matrix.Case(64, heads_q=24, heads_kv=24, len_q=700, len_kv=77),
    matrix.Case(64, "float16", "NHD", heads_q=2, heads_kv=1, len_q=9_000, len_kv=RESIDENT_FP16[0].most_keys(64)),
]


@pytest.fixture(autouse=True)
def wherever_it_can(monkeypatch: pytest.MonkeyPatch, nothing_is_remembered: Callable[[], None]) -> Iterator[None]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("made for Hopper")
    monkeypatch.setattr(planning, "pays", lambda *_: True)
    for forget in (nothing_is_remembered, packed_dispatch._prepared.clear):
        forget()
    yield
    monkeypatch.undo()
    for forget in (nothing_is_remembered, packed_dispatch._prepared.clear):
        forget()


def packed(tokens: int, heads: tuple[int, int] = (4, 2), head_dim: int = 128) -> tuple[torch.Tensor, ...]:
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(tokens, h, head_dim, generator=g, device="cuda") for h in (heads[0], heads[1], heads[1]))
    return q.bfloat16(), (k + 3).bfloat16(), (5 * v + 1).bfloat16()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix(case: matrix.Case) -> None:
    t, _ = matrix.tensors(case, "cuda")
    options = {"is_causal": False, "attn_mask": None, "sm_scale": case.sm_scale, "return_lse": True}
    chosen = dispatch.prepare(**t, tensor_layout="HND", **options, variant=VARIANT).plan
    assert isinstance(chosen, CudaPlan) and chosen.kernels.resident == (case.dtype != "float32" and case.head_dim % 8 == 0)
    matrix.check(case, VARIANT, device="cuda")
    first = sageattn(**t, variant=VARIANT, sm_scale=case.sm_scale)
    assert all(torch.equal(sageattn(**t, variant=VARIANT, sm_scale=case.sm_scale), first) for _ in range(10))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix_of_the_launches_that_quantise_first(case: matrix.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "takes", lambda *_: False)
    matrix.check(case, VARIANT, device="cuda")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [[300, 100, 77] * 200, [1, 0, 512, 64, 65, 0], [0, 0, 5]], ids=["windows", "edges", "late"])
def test_a_sequence_is_a_dense_call(lengths: list[int], head_dim: int) -> None:
    (q, k, v), cu = packed(sum(lengths), head_dim=head_dim), offsets(lengths, torch.int64)
    out, lse = sageattn_varlen(q, k, v, cu, cu, 512, 512, variant=VARIANT, return_lse=True)
    for start, length in list(zip(cu.tolist(), lengths))[:12]:
        own = slice(start, start + length)
        if length:
            dense, dense_lse = sageattn(*(t[None, own] for t in (q, k, v)), tensor_layout="NHD", variant=VARIANT, return_lse=True)
            assert relative_l2(out[own], dense[0]) <= 1e-3 and torch.allclose(lse[:, own], dense_lse[0], atol=1e-3)


def test_queries_without_keys_are_zero() -> None:
    q, k, v = packed(300)
    out, lse = sageattn_varlen(q, k[:40], v[:40], offsets([200, 100]), offsets([0, 40]), 200, 40, variant=VARIANT, return_lse=True)
    assert not out[:200].any() and (lse[:, :200] == -torch.inf).all() and lse[:, 200:].isfinite().all()


def test_a_graph_is_replayed_with_other_offsets() -> None:
    tensors, cu = packed(1024), offsets([200, 500, 0, 324])

    def call() -> torch.Tensor:
        return sageattn_varlen(*tensors, cu, cu, 512, 512, variant=VARIANT)

    packed_calls.check_replays(call, cu, [512, 511, 1, 0], [256] * 4)


@pytest.mark.parametrize("wrong", [[0, 300, 100, 9999], [-7, -5, 600, 20], [0, 2**31 - 1, -(2**31), 512], [512, 512, 0, 0]], ids=str)
def test_wrong_offsets_do_no_harm(wrong: list[int]) -> None:
    tensors, cu = packed(512), torch.tensor(wrong, device="cuda")
    sageattn_varlen(*tensors, cu, cu, 512, 512, variant=VARIANT)
    torch.cuda.synchronize()  # an access outside would be told here


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_stays_in_its_head(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 3, 300, 128, device="cuda").to(dtype) for _ in range(3))
    expected = sageattn(q, k, v, variant=VARIANT)
    k[0, 1, 7], v[0, 1, 9] = torch.inf, torch.nan
    assert torch.equal(sageattn(q, k, v, variant=VARIANT)[:, ::2], expected[:, ::2])


def test_it_takes_no_memory_beside_the_output() -> None:
    q, k, v = packed(300 * 500, (20, 20))
    cu = offsets([300] * 500)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = sageattn_varlen(q, k, v, cu, cu, 300, 300, variant=VARIANT)
    assert torch.cuda.max_memory_allocated() - before == out.numel() * out.element_size()
