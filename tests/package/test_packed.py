"""Packed sequences: offsets that are trusted are read once and refused by name; what runs them where no kernel does."""

from __future__ import annotations

import itertools
import sys
import types
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")

from sageattention import Unsupported, packed_dispatch, sageattn_varlen  # noqa: E402
from sageattention.backends import sdpa_packed  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.numerics.reference import oracle  # noqa: E402
from sageattention.planning import tensor_values, varlen  # noqa: E402
from sageattention.planning.plan import Plan  # noqa: E402
from sageattention.planning.problem import Problem  # noqa: E402
from sageattention.variants import TRITON_FP16  # noqa: E402


def check(offsets, total=12, longest=7, dtype=torch.int32):
    return varlen.check("cu_seqlens_k", torch.tensor(offsets, dtype=dtype), "k", total, "max_seqlen_k", longest)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets", [[0, 12], [0, 5, 12], [0, 0, 7, 12, 12], [0, 7, 7, 12]])
def test_good_offsets(offsets, dtype):
    assert check(offsets, longest=12, dtype=dtype) == tuple(offsets)


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


def test_an_inference_tensor_has_no_version_and_is_read_once(monkeypatch):
    looks, look = [], varlen._look
    monkeypatch.setattr(varlen, "_look", lambda *arguments: looks.append(1) or look(*arguments))
    with torch.inference_mode():
        offsets = torch.tensor([0, 5, 12])
        for _ in range(2):
            assert varlen.check("cu_seqlens_k", offsets, "k", 12, "max_seqlen_k", 7) == (0, 5, 12)
    assert len(looks) == 1


def test_a_forgotten_tensor_is_not_kept():
    tensor_values._read.clear()
    offsets = torch.tensor([0, 5, 12])
    varlen.check("cu_seqlens_k", offsets, "k", 12, "max_seqlen_k", 7)
    assert len(tensor_values._read) == 1
    del offsets
    assert len(tensor_values._read) == 0


class Triton:
    """In the place of the Triton backend: gives what it is given."""

    Packed = staticmethod(lambda *offsets: offsets)
    run_packed = staticmethod(lambda q, k, v, offsets, problem, plan: (offsets, None))


def by_triton(monkeypatch, backend=Triton):
    monkeypatch.setattr(packed_dispatch, "plan_for", lambda problem, variant, accum: Plan(TRITON_FP16, "a test"))
    monkeypatch.setattr(packed_dispatch, "kernel_backend", lambda variant: backend)


def test_offsets_with_strides_reach_the_kernels_without(monkeypatch):
    by_triton(monkeypatch)
    q = torch.zeros(12, 2, 64)
    strided = torch.tensor([0, 99, 5, 99, 12])[::2]
    for offsets in sageattn_varlen(q, q, q, strided, strided, 7, 7):
        assert offsets.is_contiguous() and offsets.tolist() == [0, 5, 12]


@pytest.mark.parametrize("variant", ["sdpa", "reference", TRITON_FP16.name])
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"])
def test_a_call_checks_both(name, variant, monkeypatch):
    """Before anything runs, where the variant would trust them."""
    if variant == TRITON_FP16.name:
        by_triton(monkeypatch, None)
    q = torch.zeros(12, 2, 64)
    given = {"cu_seqlens_q": torch.tensor([0, 5, 12]), "cu_seqlens_k": torch.tensor([0, 4, 12]), "max_seqlen_q": 7, "max_seqlen_k": 8}
    given[name] = torch.tensor([0, 5, 11]) if name.startswith("cu") else 3
    with pytest.raises(Unsupported, match=f"^{name}: "):
        sageattn_varlen(q, q, q, **given, variant=variant)


# --- without kernels


LENGTHS = [([5, 0, 7], [5, 4, 3], False), ([5, 0, 7], [0, 4, 8], False), ([1, 6, 5], [1, 6, 5], True)]


@pytest.mark.parametrize("variant", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("lengths_q, lengths_k, causal", LENGTHS, ids=["cross", "no keys", "causal"])
def test_each_sequence_is_a_call_of_its_own(lengths_q, lengths_k, causal, variant):
    torch.manual_seed(0)
    q = torch.randn(sum(lengths_q), 4, 64)
    k, v = (torch.randn(sum(lengths_k), 2, 64) for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(lengths)]) for lengths in (lengths_q, lengths_k))
    given = (q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), causal, 0.2)
    out, lse = sageattn_varlen(*given, variant=variant, return_lse=True)
    assert out.shape == q.shape and lse.shape == (4, len(q)) and lse.dtype == torch.float32
    assert torch.equal(sageattn_varlen(*given, variant=variant), out)
    assert torch.equal(sageattn_varlen(*given, variant=variant, return_lse=True, lse_layout="NH")[1], lse.t())
    for q0, k0, len_q, len_k in zip(cu_q.tolist(), cu_k.tolist(), lengths_q, lengths_k):
        own = (q[q0 : q0 + len_q], k[k0 : k0 + len_k], v[k0 : k0 + len_k])
        exact, exact_lse = oracle(*(t.transpose(0, 1)[None] for t in own), is_causal=causal, sm_scale=0.2)
        assert (out[q0 : q0 + len_q].transpose(0, 1)[None] - exact).norm() <= 0.03 * exact.norm()
        finite = exact_lse[0] > -torch.inf
        assert (lse[:, q0 : q0 + len_q] - exact_lse[0])[finite].abs().sum() <= 0.02 * finite.sum()
        assert (lse[:, q0 : q0 + len_q][~finite] == -torch.inf).all()


def test_without_sequences_or_tokens():
    q, cu = torch.randn(6, 2, 64), torch.tensor([0])
    out, lse = sageattn_varlen(q, q, q, cu, cu, 6, 6, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert sageattn_varlen(q[:0], q, q, torch.tensor([0, 0]), torch.tensor([0, 6]), 0, 6).shape == (0, 2, 64)


def test_gradients_are_torchs():
    q = torch.randn(6, 2, 64, requires_grad=True)
    cu = torch.tensor([0, 2, 6])
    sageattn_varlen(q, q, q, cu, cu, 4, 4).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_an_unknown_layout_of_the_log_sum_exp_is_refused():
    q, cu = torch.randn(6, 2, 64), torch.tensor([0, 6])
    with pytest.raises(Unsupported, match=r"^lse_layout: got 'NHD', accepted are 'HN', 'NH'"):
        sageattn_varlen(q, q, q, cu, cu, 6, 6, lse_layout="NHD")


# --- torch's own function for packed sequences, as its releases have it


class Aux(NamedTuple):
    lse: bool = False


def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return given_back(is_causal=is_causal, return_aux=return_aux, offsets=(cu_seq_q, cu_seq_k), query=query)


def new(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False):
    causal = window_size == (-1, 0)
    return given_back(
        is_causal=causal, return_aux=return_aux, offsets=(cu_seq_q, cu_seq_k), query=query, scale=scale, enable_gqa=enable_gqa
    )


def given_back(query, offsets, return_aux, **given):
    assert all(t.dtype == torch.int32 for t in offsets)
    seen.append(given)
    lse = query.new_tensor([[0.5, torch.inf]], dtype=torch.float32)
    return (query, lse) if return_aux else query


seen: list[dict] = []


@pytest.fixture(params=[old, new])
def torchs(request, monkeypatch):
    """torch's function of one release, on a card that it runs on."""
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn, module.AuxRequest = request.param, Aux
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(sdpa_packed.capability, "of_device", lambda *_: Capability("cuda", 80, 1, "none", "a card"))
    sdpa_packed._function.cache_clear()
    seen.clear()
    yield request.param
    sdpa_packed._function.cache_clear()


def problem(**changed):
    q = torch.zeros(12, 2, 64, dtype=torch.float16)
    cu = torch.tensor([0, 5, 12])
    described = Problem.from_packed(q, q, q, cu, cu, 7, 7, return_lse=True)._replace(device="cuda", device_index=0)
    return described._replace(**changed)


def test_torchs_function_is_called_as_its_release_takes_it(torchs):
    q, cu = torch.zeros(2, 1, 64), torch.tensor([0, 2])
    out, lse = sdpa_packed.run(q, q, q, cu, cu, problem(causal=True))
    assert out is q and lse.tolist() == [[0.5, -torch.inf]]
    assert seen[-1] == ({"is_causal": True} if torchs is old else {"is_causal": True, "scale": 0.125, "enable_gqa": False})
    assert sdpa_packed.run(q, q, q, cu, cu, problem(return_lse=False)) == (q, None)
    assert not seen[-1]["is_causal"]


@pytest.mark.parametrize(
    "changed, equal, reads",
    [
        ({}, False, (True, True)),
        ({"causal": True}, True, (True, True)),
        ({"causal": True}, False, (False, False)),
        ({"sm_scale": 0.5}, True, (False, True)),
        ({"heads_kv": 1}, True, (False, True)),
        ({"dtype": "float32"}, True, (False, False)),
        ({"head_dim": 60, "sm_scale": 60**-0.5}, True, (False, False)),
        ({"device": "cpu"}, True, (False, False)),
    ],
    ids=str,
)
def test_what_torchs_function_reads(torchs, changed, equal, reads):
    assert sdpa_packed.reads(problem(**changed), equal) == reads[torchs is new]
