"""The values of cu_seqlens: what a kernel would trust is read once and refused by name."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from sageattention import Unsupported, dispatch, sageattn_varlen  # noqa: E402
from sageattention.planning import tensor_values, varlen  # noqa: E402
from sageattention.planning.plan import Plan  # noqa: E402
from sageattention.variants import TRITON_FP16  # noqa: E402


def check(offsets, total=12, longest=7, dtype=torch.int32):
    varlen.check("cu_seqlens_k", torch.tensor(offsets, dtype=dtype), "k", total, "max_seqlen_k", longest)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets", [[0, 12], [0, 5, 12], [0, 0, 7, 12, 12], [0, 7, 7, 12]])
def test_good_offsets(offsets, dtype):
    check(offsets, longest=12, dtype=dtype)


@pytest.mark.parametrize(
    ("offsets", "parameter", "words"),
    [
        ([1, 12], "cu_seqlens_k", "starts with 1"),
        ([-1, 12], "cu_seqlens_k", "starts with -1"),
        ([0, 5, 4, 12], "cu_seqlens_k", "falls from 5 to 4 at index 2"),
        ([0, 5, 11], "cu_seqlens_k", "ends with 11, k has 12 tokens"),
        ([0, 5, 13], "cu_seqlens_k", "ends with 13, k has 12 tokens"),
        ([0], "cu_seqlens_k", "ends with 0, k has 12 tokens"),
        ([0, 4, 12], "max_seqlen_k", "got 7, cu_seqlens_k holds a sequence of 8"),
    ],
)
def test_bad_offsets(offsets, parameter, words):
    with pytest.raises(Unsupported) as caught:
        check(offsets)
    assert caught.value.parameter == parameter and words in caught.value.reason
    assert "accepted" in caught.value.reason or "must be" in caught.value.reason


def test_values_are_read_once_and_again_after_a_change(monkeypatch):
    offsets, looks = torch.tensor([0, 5, 12]), []
    look = varlen._look
    monkeypatch.setattr(varlen, "_look", lambda *arguments: looks.append(1) or look(*arguments))

    def again(total=12, longest=7):
        varlen.check("cu_seqlens_q", offsets, "q", total, "max_seqlen_q", longest)

    again()
    again()
    assert len(looks) == 1
    with pytest.raises(Unsupported, match="ends with 12"):  # the rest of the call may differ
        again(total=13)
    with pytest.raises(Unsupported, match="max_seqlen_q"):
        again(longest=6)
    assert len(looks) == 1
    offsets[1] = 13
    with pytest.raises(Unsupported, match="falls from 13 to 12"):
        again()
    offsets[1] = 6
    again()
    assert len(looks) == 3


def test_an_inference_tensor_has_no_version_and_is_read_once():
    with torch.inference_mode():
        check([0, 5, 12])


def test_a_forgotten_tensor_is_not_kept():
    tensor_values._read.clear()
    check([0, 5, 12])
    assert len(tensor_values._read) == 0


def test_offsets_with_strides_reach_the_kernels_without(monkeypatch):
    class KernelFamily:
        Packed = staticmethod(lambda *offsets: offsets)
        run_packed = staticmethod(lambda q, k, v, offsets, problem, plan: offsets)

    monkeypatch.setattr(dispatch, "plan_for", lambda problem, variant: Plan(TRITON_FP16, "a test"))
    monkeypatch.setattr(dispatch, "_kernel_backend", lambda variant: KernelFamily)
    q = torch.zeros(12, 2, 64)
    strided = torch.tensor([0, 99, 5, 99, 12])[::2]
    for offsets in sageattn_varlen(q, q, q, strided, strided, 7, 7):
        assert offsets.is_contiguous() and offsets.tolist() == [0, 5, 12]


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"])
def test_a_call_checks_both(name, monkeypatch):
    """Before anything runs, also where the longest length says that there is nothing to do."""
    monkeypatch.setattr(dispatch, "plan_for", lambda problem, variant: Plan(TRITON_FP16, "a test"))
    monkeypatch.setattr(dispatch, "_kernel_backend", lambda variant: pytest.fail("it ran"))
    q = torch.zeros(12, 2, 64)
    given = {"cu_seqlens_q": torch.tensor([0, 5, 12]), "cu_seqlens_k": torch.tensor([0, 4, 12]), "max_seqlen_q": 7, "max_seqlen_k": 8}
    given[name] = torch.tensor([0, 5, 11]) if name.startswith("cu") else 0
    with pytest.raises(Unsupported, match=f"^{name}: "):
        sageattn_varlen(q, q, q, **given)
