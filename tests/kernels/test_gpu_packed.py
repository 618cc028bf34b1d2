"""Packed sequences on a GPU: every variant against each sequence's exact result, graphs, wrong offsets, memory (marker gpu)."""

from __future__ import annotations

import functools
import itertools

import packed_calls
import pytest
import torch

from sageattention import available_variants, packed_dispatch, sageattn_varlen
from sageattention.backends.cuda import packed as backend
from sageattention.planning.plan import CudaPlan
from sageattention.variants import VARIANTS

pytestmark = pytest.mark.gpu
offsets = functools.partial(packed_calls.offsets, device="cuda")
OWN = [v.name for v in VARIANTS.values() if v.backend in ("triton", "cuda")]
BOUND = {"fp16": 0.02, "int8": 0.03, "fp8": 0.05}  # relative L2, by the type of P and V
each_cuda_variant = pytest.mark.parametrize("variant", [v.name for v in VARIANTS.values() if v.backend == "cuda"])


@pytest.fixture(autouse=True)
def for_this_card(request: pytest.FixtureRequest) -> None:
    """Skips the variants that this card can't run; one whose kernel is missing fails."""
    variant = request.getfixturevalue("variant") if "variant" in request.fixturenames else ""
    refused = {found.name: found.reason for found in available_variants("cuda") if found.status == "unsupported"}
    if variant in refused:
        pytest.skip(refused[variant])


@pytest.fixture
def small_workspace(monkeypatch: pytest.MonkeyPatch):
    """Sets the workspace's limit."""

    def limit(size: int) -> None:
        monkeypatch.setattr(CudaPlan, "WORKSPACE_LIMIT", size)
        backend.packed_plan.cache_clear()
        packed_dispatch._prepared.clear()

    yield limit
    monkeypatch.undo()
    backend.packed_plan.cache_clear()
    packed_dispatch._prepared.clear()


def inputs(
    lengths_q: list[int], lengths_k: list[int], heads: tuple[int, int], head_dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Each sequence has a K and a V of its own size and mean: one scale for all would be far off."""
    g = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, head_dim, generator=g, device="cuda")

    k, v = zip(*(
        (random(n, heads[1]) + 4 * random(1, heads[1]), random(n, heads[1]) * 30.0 ** (i % 3 - 1) + i % 2) for i, n in enumerate(lengths_k)
    ))  # fmt: skip
    return random(sum(lengths_q), heads[0]).to(dtype), torch.cat(k).to(dtype), torch.cat(v).to(dtype)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of one sequence, [N, H, D], in fp64."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def check(variant: str, tensors: tuple, lengths_q: list[int], lengths_k: list[int], causal: bool) -> None:
    q, k, v = tensors
    cu = offsets(lengths_q), offsets(lengths_k, torch.int64)
    out, lse = sageattn_varlen(q, k, v, *cu, max(lengths_q), max(lengths_k), causal, variant=variant, return_lse=True)
    assert torch.equal(sageattn_varlen(q, k, v, *cu, max(lengths_q), max(lengths_k), causal, variant=variant), out)
    scheme = VARIANTS[variant].scheme
    assert scheme is not None
    starts = zip(itertools.accumulate([0, *lengths_q]), itertools.accumulate([0, *lengths_k]), lengths_q, lengths_k)
    for q0, k0, len_q, len_k in starts:
        found, found_lse = out[q0 : q0 + len_q], lse[:, q0 : q0 + len_q]
        if not len_k:
            assert (found == 0).all() and (found_lse == -torch.inf).all()
        elif len_q:
            expected, expected_lse = exact(q[q0 : q0 + len_q], k[k0 : k0 + len_k], v[k0 : k0 + len_k], causal)
            assert (found - expected).norm() <= BOUND[scheme.pv] * expected.norm()
            assert (found_lse - expected_lse).abs().mean() <= 0.02


@pytest.mark.parametrize("variant", OWN)
@pytest.mark.parametrize(
    "lengths_q, lengths_k, heads, causal",
    [
        ([70, 0, 5, 129, 1000], [70, 33, 0, 200, 1000], (4, 2), False),
        ([700, 1, 0, 130], [700, 1, 0, 130], (2, 2), True),
        ([300, 100, 77] * 30, [300, 100, 77] * 30, (2, 1), False),
        ([3000, 5000], [3000, 5000], (2, 2), True),
        ([0, 64], [512, 4096], (2, 1), False),
    ],
    ids=["cross", "causal", "many", "long", "few queries"],
)
@pytest.mark.parametrize(
    "head_dim, dtype", [(64, torch.float16), (104, torch.bfloat16), (128, torch.float32), (200, torch.bfloat16)], ids=str
)
def test_each_sequence_is_a_call_of_its_own(
    lengths_q: list, lengths_k: list, heads: tuple, causal: bool, head_dim: int, dtype: torch.dtype, variant: str
) -> None:
    check(variant, inputs(lengths_q, lengths_k, heads, head_dim, dtype), lengths_q, lengths_k, causal)


@each_cuda_variant
@pytest.mark.parametrize("mebibytes", [1, 4, 16])
def test_groups_of_sequences_and_heads(small_workspace, mebibytes: int, variant: str) -> None:
    lengths = [300, 0, 77, 513] * 30
    small_workspace(mebibytes << 20)
    check(variant, inputs(lengths, lengths, (4, 2)), lengths, lengths, True)


@each_cuda_variant
@pytest.mark.parametrize("groups", [False, True])
def test_a_graph_is_replayed_with_other_offsets(small_workspace, groups: bool, variant: str) -> None:
    if groups:
        small_workspace(1 << 20)
    tensors, cu = inputs([1024], [1024], (4, 4)), offsets([200, 600, 0, 224])

    def call() -> torch.Tensor:
        return sageattn_varlen(*tensors, cu, cu, 1024, 1024, variant=variant)

    packed_calls.check_replays(call, cu, [1, 1023, 0, 0], [256] * 4)


@each_cuda_variant
@pytest.mark.parametrize(
    "wrong", [[0, 300, 100, 9999], [-7, -5, 600, 20], [0, 2**31 - 1, -(2**31), 512], [0, 512, 0, 512], [512, 512, 0, 0]], ids=str
)
def test_wrong_offsets_do_no_harm(wrong: list[int], variant: str) -> None:
    q, k, v = inputs([512], [512], (4, 4))
    cu = torch.tensor(wrong, device="cuda")
    sageattn_varlen(q, k, v, cu, cu, 512, 512, variant=variant)
    torch.cuda.synchronize()  # an access outside would be told here
    check(variant, (q, k, v), [512], [512], False)


@each_cuda_variant
@pytest.mark.parametrize(
    "lengths, heads", [([300] * 1500, 20), ([32768] * 2, 16), ([20000] + [77] * 1000, 8)], ids=["windows", "long", "both"]
)
def test_workspace(lengths: list[int], heads: int, variant: str) -> None:
    q, k, v = inputs(lengths, lengths, (heads, heads))
    cu = offsets(lengths)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = sageattn_varlen(q, k, v, cu, cu, max(lengths), max(lengths), variant=variant)
    assert torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size() <= 128 << 20


@pytest.mark.parametrize("variant", ["auto", "sdpa", *OWN])
@pytest.mark.parametrize("return_lse", [False, True])
def test_compiled(return_lse: bool, variant: str) -> None:
    torch._dynamo.reset()
    tensors, cu = inputs([300, 212], [300, 212], (2, 2)), offsets([300, 212])

    def call() -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return sageattn_varlen(*tensors, cu, cu, 300, 300, True, variant=variant, return_lse=return_lse, lse_layout="NH")

    found, expected = torch.compile(call, backend="aot_eager", fullgraph=True)(), call()
    for one, other in zip(found, expected) if return_lse else ((found, expected),):
        assert torch.equal(one, other)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pytorchs_own(dtype: torch.dtype, causal: bool) -> None:
    """In place where it reads them so, else one by one."""
    lengths = [300, 0, 212]
    q, k, v = inputs(lengths, lengths, (2, 2), dtype=dtype)
    cu = offsets(lengths)
    out, lse = sageattn_varlen(q, k, v, cu, cu, 300, 300, causal, variant="sdpa", return_lse=True)
    for start, length in ((0, 300), (300, 212)):
        own = slice(start, start + length)
        expected, expected_lse = exact(q[own], k[own], v[own], causal)
        assert (out[own] - expected).norm() <= 0.01 * expected.norm()
        assert (lse[:, own] - expected_lse).abs().max() <= 0.01
