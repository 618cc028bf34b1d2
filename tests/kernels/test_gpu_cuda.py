"""The CUDA variants on a GPU: the matrix over their accumulators, the kernels of other architectures, groups of heads (marker gpu)."""

from __future__ import annotations

from collections.abc import Callable

import matrix
import pytest
import torch

from sageattention import KernelMissing, Unsupported, attend, dispatch, quantize_kv, sageattn, settings
from sageattention.backends.cuda import workspace
from sageattention.cli import workloads
from sageattention.kernels import binaries
from sageattention.kernels.architectures import TEST_TARGETS
from sageattention.planning.here import plan_for
from sageattention.planning.plan import CudaPlan, Plan
from sageattention.planning.problem import Problem
from sageattention.variants import VARIANTS

pytestmark = pytest.mark.gpu
CUDA = [v for v in VARIANTS.values() if v.kernels]
# Each accumulator that computes something else than the ones before it.
ACCUMULATORS = [(v.name, a) for v in CUDA for a in dict(reversed([(s, a) for a, s in v.accum.items()])).values()]
each_variant = pytest.mark.parametrize("variant", [v.name for v in CUDA])
each_accumulator = pytest.mark.parametrize("variant, accum", ACCUMULATORS)
# Beside its own kernels a Hopper card runs mma.sync's, and as PTX those of older architectures, with their tiles.
FAMILIES = ("sm_90", "compute_75", "compute_80", "compute_89")


def planned(variant: str, accum: str = "", head_dim: int = 128) -> Plan:
    """The plan of a call; skips where it is not for this card, or is by images that are only built for tests and were not."""
    shape = {"batch": 2, "heads_q": 2, "heads_kv": 2, "len_q": 64, "len_kv": 64, "head_dim": head_dim, "dtype": "bfloat16"}
    try:
        return plan_for(Problem(**shape, device="cuda", device_index=0), variant, accum)
    except Unsupported as error:
        pytest.skip(str(error))
    except KernelMissing as error:
        if settings.read(binaries.FORCE) not in TEST_TARGETS:
            raise  # the package is to hold it
        pytest.skip(str(error))


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch, nothing_is_remembered: Callable[[], None]) -> None:
    """One (batch, kv head) pair a group, two groups alive."""
    monkeypatch.setattr(CudaPlan, "WORKSPACE_LIMIT", 1)
    nothing_is_remembered()


@each_accumulator
@pytest.mark.parametrize("case", matrix.full(), ids=str)
def test_matrix(case: matrix.Case, variant: str, accum: str) -> None:
    planned(variant, accum, case.head_dim)
    matrix.check(case, variant, accum, device="cuda")


@pytest.mark.parametrize("mask", matrix.MASKS)
@pytest.mark.parametrize("head_dim", [40, 128, 256])
@each_accumulator
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_of_other_architectures(
    family: str, variant: str, accum: str, head_dim: int, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(binaries.FORCE, family)
    assert not planned(variant, accum, head_dim).kernels.arch
    matrix.check(matrix.Case(head_dim, mask=mask, heads_q=4), variant, accum, device="cuda")


@each_accumulator
def test_accuracy_on_every_kind_of_input(variant: str, accum: str) -> None:
    pv = planned(variant, accum).scheme.pv
    for kind in workloads.KINDS.values():
        shape = kind.sized(workloads.ACCURACY)
        q, k, v = workloads.make(kind.name, shape, device="cuda")
        call = dispatch.prepare(
            q, k, v, tensor_layout="HND", is_causal=False, attn_mask=None, sm_scale=None, return_lse=False, variant=variant, accum=accum
        )
        out, exact = call.run()[0], torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
        assert workloads.relative_l2(out, exact) <= kind.bounds[pv], kind.name
        if kind.gain is not None:
            assert abs(workloads.gain(out, exact) - 1) <= kind.gain, kind.name


@each_variant
@pytest.mark.parametrize("size", [1e-38, 1e30, 3.38e38])
def test_any_finite_input_gives_finite_output(variant: str, size: float) -> None:
    planned(variant)
    g = torch.Generator().manual_seed(0)
    q, k, v = (((torch.rand(1, 1, n, 128, generator=g) * 2 - 1) * size).bfloat16().cuda() for n in (200, 700, 700))
    k[0, 0, 3, 5] = v[0, 0, 9, 1] = 3.38e38
    v[0, 0, :, 7], v[0, 0, 8, 7] = 3.38e38, -3.38e38
    out, lse = sageattn(q, k, v, return_lse=True, variant=variant)
    assert out.isfinite().all() and lse.isfinite().all()


@each_variant
def test_groups_of_heads_change_nothing(variant: str, request: pytest.FixtureRequest) -> None:
    planned(variant)
    t, _ = matrix.tensors(matrix.Case(128, heads_q=10, heads_kv=5, len_q=500, len_kv=3000), "cuda")
    whole = sageattn(**t, return_lse=True, variant=variant)
    request.getfixturevalue("small_groups")
    chosen = plan_for(Problem.from_tensors(**t, return_lse=True), variant)
    first = sageattn(**t, return_lse=True, variant=variant)
    for _ in range(20):
        parts = sageattn(**t, return_lse=True, variant=variant)
        assert torch.equal(parts[0], first[0]) and torch.equal(parts[1], first[1])
    if chosen.scheme.v_mean:  # a sum over tokens whose order depends on how many blocks there are for a head
        assert workloads.relative_l2(first[0], whole[0]) <= 2e-3 and torch.allclose(first[1], whole[1], atol=1e-3)
    else:
        assert torch.equal(first[0], whole[0]) and torch.equal(first[1], whole[1])
    problem = Problem.from_tensors(**t, return_lse=True)
    assert len(workspace.launch_plan_of(problem, chosen).groups) == 10


@each_variant
def test_groups_of_heads_in_a_graph(variant: str, request: pytest.FixtureRequest) -> None:
    planned(variant)
    t, _ = matrix.tensors(matrix.Case(64, heads_q=4, heads_kv=4, len_q=300, len_kv=700), "cuda")
    expected = sageattn(**t, variant=variant)
    request.getfixturevalue("small_groups")
    sageattn(**t, variant=variant)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sageattn(**t, variant=variant)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@each_variant
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_two_halves_are_the_call(is_causal: bool, variant: str) -> None:
    """Where the whole call knows of no key that nobody sees; `test_gpu_masks` has the others."""
    planned(variant)
    t, _ = matrix.tensors(matrix.Case(80, heads_q=4, len_q=333 if is_causal else 197), "cuda")
    options = {"is_causal": is_causal, "return_lse": True}
    whole = sageattn(**t, **options, variant=variant)
    kv = quantize_kv(t["k"], t["v"], variant=variant)
    halves = attend(t["q"], kv, **options)
    assert torch.equal(whole[0], halves[0]) and torch.equal(whole[1], halves[1])


@each_variant
def test_memory_at_wan_480p(variant: str) -> None:
    planned(variant)
    q, k, v = (torch.randn(1, 40, 32760, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = sageattn(q, k, v, variant=variant)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert extra <= 128 << 20, f"{extra / 2**20:.0f} MiB beyond the output"
