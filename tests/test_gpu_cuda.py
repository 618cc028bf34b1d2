"""The mma.sync kernels on a GPU: the matrix over accumulators, the kernels of other architectures as PTX, groups of heads (marker gpu)."""

from __future__ import annotations

import matrix
import pytest
import torch

from sageattention import attend, cuda_ops, images, inputs, ops, quantize_kv, sageattn, store
from sageattention.variants import CUDA_FP16, IMAGES, kv_tile_bytes

ABSENT = store.missing(next(i for i in IMAGES if i.arch == "sm_90a"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(ABSENT), reason="no kernel images in this checkout; run dev.py build")]
VARIANT = CUDA_FP16.name
FAMILIES = ("compute_75", "compute_80", "compute_89")


@pytest.mark.parametrize("accum", ["fp32", "fp16+fp32"])
@pytest.mark.parametrize("case", matrix.full(), ids=str)
def test_matrix(case: matrix.Case, accum: str) -> None:
    matrix.check(case, VARIANT, accum, device="cuda")


@pytest.mark.parametrize("mask", matrix.MASKS)
@pytest.mark.parametrize("head_dim", [40, 128, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_architectures_as_ptx(family: str, head_dim: int, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver compiles the sm_75, sm_80 and sm_89 kernels for this card: their code really runs, with their tiles."""
    monkeypatch.setenv(images.FORCE, family)
    for accum in ("fp32", "fp16+fp32"):
        matrix.check(matrix.Case(head_dim, mask=mask, heads_q=4), VARIANT, accum, device="cuda")


@pytest.mark.parametrize("accum", list(CUDA_FP16.accum))
def test_accuracy_on_every_kind_of_input(accum: str) -> None:
    for kind in inputs.KINDS.values():
        shape = kind.sized(inputs.ACCURACY)
        q, k, v = inputs.make(kind.name, shape, device="cuda")
        call = ops.prepare(
            q, k, v, tensor_layout="HND", is_causal=False, attn_mask=None, sm_scale=None, return_lse=False, variant=VARIANT, accum=accum
        )
        out, exact = ops.run(call)[0], torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
        assert inputs.relative_l2(out, exact) <= kind.bounds["fp16"], kind.name
        if kind.gain is not None:
            assert abs(inputs.gain(out, exact) - 1) <= kind.gain, kind.name


def test_groups_of_heads_change_nothing_and_keep_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = matrix.Case(128, heads_q=10, heads_kv=5, len_q=500, len_kv=3000)
    t, _ = matrix.tensors(case, "cuda")
    whole = sageattn(**t, return_lse=True, variant=VARIANT)
    limit = 4 * 47 * kv_tile_bytes(128)  # of the ten (batch, kv head) pairs, two a group
    monkeypatch.setattr(cuda_ops, "WORKSPACE_LIMIT", limit)
    monkeypatch.setattr(cuda_ops, "_recipes", {})
    groups = cuda_ops.head_groups(10, 47 * kv_tile_bytes(128), limit)
    assert len(groups) == 5
    for _ in range(20):
        parts = sageattn(**t, return_lse=True, variant=VARIANT)
        assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])


def test_groups_of_heads_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    t, _ = matrix.tensors(matrix.Case(64, heads_q=4, heads_kv=4, len_q=300, len_kv=700), "cuda")
    expected = sageattn(**t, variant=VARIANT)
    monkeypatch.setattr(cuda_ops, "WORKSPACE_LIMIT", 4 * 11 * kv_tile_bytes(64))
    monkeypatch.setattr(cuda_ops, "_recipes", {})
    sageattn(**t, variant=VARIANT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sageattn(**t, variant=VARIANT)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_the_two_halves_are_the_call() -> None:
    case = matrix.Case(80, mask="additive", heads_q=4)
    t, mask = matrix.tensors(case, "cuda")
    whole = sageattn(**t, attn_mask=mask, return_lse=True, variant=VARIANT)
    kv = quantize_kv(t["k"], t["v"], variant=VARIANT)
    halves = attend(t["q"], kv, attn_mask=mask, return_lse=True)
    assert torch.equal(whole[0], halves[0]) and torch.equal(whole[1], halves[1])


def test_memory_at_wan_480p() -> None:
    q, k, v = (torch.randn(1, 40, 32760, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = sageattn(q, k, v, variant=VARIANT)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert extra <= 128 << 20, f"{extra / 2**20:.0f} MiB beyond the output"
