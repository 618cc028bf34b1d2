"""Block-sparse calls on Hopper's own kernels without a GPU: router, quantisers and attention, emulated lane by lane (tests/lanes)."""

from __future__ import annotations

import pytest
import routing
import torch
from emulated_card import Lanes, install, lanes_of, needs_compiler

from sageattention.backends import sparse_reference
from sageattention.backends.cuda import sparse
from sageattention.cli.workloads import relative_l2
from sageattention.planning.problem import Problem
from sageattention.planning.sparse_plan import sparse_plan
from sageattention.planning.sparse_problem import SparseProblem
from sageattention.variants import VARIANTS

pytestmark = needs_compiler

BOUND = {"fp16": 0.02, "fp8": 0.06}  # of the relative L2 error
TOKENS, LISTS, BLOCKS = 700, 6, 11
HOPPER = {v.name: k.pv for v in VARIANTS.values() for k in v.sparse_kernels if k.arch == 90}
G = torch.Generator().manual_seed(1)


def lists(*exact: int) -> torch.Tensor:
    """A block mask, [1, 1, LISTS, BLOCKS], with so many blocks in each list."""
    return (torch.rand(1, 1, LISTS, BLOCKS, generator=G).argsort(-1).argsort(-1) < torch.tensor(exact)[:, None]).contiguous()


CALLS = {
    "none to a few": {"selection": "static", "block_mask": lists(0, 1, 2, 3, 4, 5)},
    "odd, even, all": {"selection": "static", "block_mask": lists(6, 7, 8, 9, 10, 11), "tail": False},
    "order": {"tau": 0.5, "order": torch.randperm(TOKENS, generator=G).int(), "sinks": 70, "query_sinks": (600, 640)},
    "key mask": {"selection": "topk", "keep": 0.3, "key_mask": torch.rand(1, TOKENS, generator=G) < 0.8},
    "causal": {"selection": "mass", "is_causal": True},
}


@pytest.fixture(params=[64, 128], ids="d{}".format)
def card(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Lanes:
    return install(monkeypatch, lanes_of(90, request.param, tmp_path_factory.mktemp("hopper"), wgmma=True))


@pytest.mark.parametrize("variant", HOPPER)
@pytest.mark.parametrize("name", CALLS)
def test_calls_agree_with_the_algorithm(card: Lanes, name: str, variant: str) -> None:
    given = CALLS[name].copy()
    causal = given.pop("is_causal", False)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, TOKENS, card.head_dim, generator=g).bfloat16() for heads in (2, 1, 1))
    dense = Problem.from_tensors(q, k, v, is_causal=causal, return_lse=True)
    problem, tensors = SparseProblem.from_call(dense, q, **{**routing.DEFAULTS, **given})
    expected = sparse_reference.run(q, k, v, problem, tensors)
    problem = problem._replace(problem=dense._replace(device="cuda", device_index=0))
    plan = sparse_plan(problem, card.capability, variant)
    assert plan.kernels.arch == 90
    found = sparse.run(q, k, v, problem, tensors, plan)
    assert relative_l2(found.out, expected.out) <= BOUND[HOPPER[variant]] and abs(found.share - expected.share) <= 1e-2
    nothing = expected.lse == -torch.inf
    assert torch.equal(nothing, found.lse == -torch.inf) and (found.lse - expected.lse)[~nothing].abs().mean() <= 0.01
