"""Validation: what a call is, and every input that is refused – by the argument's name, what was given, what is accepted."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from sageattention import Unsupported  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.planning.plan import plan  # noqa: E402
from sageattention.planning.problem import Problem  # noqa: E402
from sageattention.variants import VARIANTS  # noqa: E402


def zeros(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def call(**changes):
    """`Problem.from_tensors` of a good call, with some arguments replaced."""
    good = {"q": zeros(2, 4, 10, 64), "k": zeros(2, 4, 12, 64), "v": zeros(2, 4, 12, 64)}
    return Problem.from_tensors(**{**good, **changes})


# (arguments that replace good ones, the argument that the error names, words it holds)
REFUSED = {
    "rank of q": ({"q": zeros(4, 10, 64)}, "q", "3 dimensions (4, 10, 64) accepted are 4 HND"),
    "rank of k": ({"k": zeros(1, 2, 4, 12, 64)}, "k", "5 dimensions accepted are 4"),
    "rank of v": ({"v": zeros(64)}, "v", "1 dimensions accepted are 4"),
    "q is no tensor": ({"q": [1.0]}, "q", "got list accepted torch.Tensor"),
    "v is None": ({"v": None}, "v", "got NoneType accepted torch.Tensor"),
    "layout": ({"tensor_layout": "BHND"}, "tensor_layout", "'BHND' 'HND' 'NHD'"),
    "layout is None": ({"tensor_layout": None}, "tensor_layout", "None 'HND' 'NHD'"),
    "batch of k": ({"k": zeros(3, 4, 12, 64), "v": zeros(3, 4, 12, 64)}, "k", "batch is 3 q's is 2"),
    "batch of v": ({"v": zeros(1, 4, 12, 64)}, "v", "(1, 4, 12, 64) (2, 4, 12, 64) equal"),
    "length of v": ({"v": zeros(2, 4, 13, 64)}, "v", "(2, 4, 13, 64) (2, 4, 12, 64) equal"),
    "heads of v": ({"v": zeros(2, 2, 12, 64)}, "v", "(2, 2, 12, 64) equal"),
    "heads not divisible": ({"k": zeros(2, 3, 12, 64), "v": zeros(2, 3, 12, 64)}, "k", "4 heads k has 3 multiple"),
    "more kv heads": ({"k": zeros(2, 8, 12, 64), "v": zeros(2, 8, 12, 64)}, "k", "4 heads k has 8 multiple"),
    "no kv heads": ({"k": zeros(2, 0, 12, 64), "v": zeros(2, 0, 12, 64)}, "k", "4 heads k has 0 multiple"),
    "head_dim of k": ({"k": zeros(2, 4, 12, 32), "v": zeros(2, 4, 12, 32)}, "k", "head_dim is 32 q's is 64"),
    "head_dim 0": ({n: zeros(2, 4, 12, 0) for n in "qkv"}, "q", "head_dim is 0 accepted are 1 to 256"),
    "head_dim 0 of v": ({"v": zeros(2, 4, 12, 0)}, "v", "head_dim is 0 accepted are 1 to 256"),
    "integers": ({n: zeros(2, 4, 12, 64, dtype=torch.int32) for n in "qkv"}, "q", "torch.int32 accepted"),
    "dtype of k": ({"k": zeros(2, 4, 12, 64, dtype=torch.float16)}, "k", "torch.float16 torch.bfloat16 equal"),
    "dtype of v": ({"v": zeros(2, 4, 12, 64, dtype=torch.float32)}, "v", "torch.float32 torch.bfloat16 equal"),
    "device of k": ({"k": zeros(2, 4, 12, 64, device="meta")}, "k", "meta cpu one device"),
    "device of v": ({"v": zeros(2, 4, 12, 64, device="meta")}, "v", "meta cpu one device"),
    "last stride of q": ({"q": zeros(2, 4, 64, 10).mT}, "q", "last stride is 10 accepted is 1"),
    "last stride of k": ({"k": zeros(2, 4, 12, 128)[..., ::2]}, "k", "last stride is 2 accepted is 1"),
    "last stride of v": ({"v": zeros(1).expand(2, 4, 12, 64)}, "v", "last stride is 0 accepted is 1"),
    "mask length": ({"attn_mask": zeros(10, 11)}, "attn_mask", "(10, 11) broadcasts [2, 4, 10, 12]"),
    "mask heads": ({"attn_mask": zeros(2, 3, 10, 12)}, "attn_mask", "(2, 3, 10, 12) broadcasts [2, 4, 10, 12]"),
    "mask [B, Nk]": ({"attn_mask": zeros(2, 12)}, "attn_mask", "(2, 12) broadcasts"),
    "mask rank": ({"attn_mask": zeros(1, 1, 1, 10, 12)}, "attn_mask", "(1, 1, 1, 10, 12) broadcasts"),
    "mask of integers": ({"attn_mask": zeros(10, 12, dtype=torch.uint8)}, "attn_mask", "torch.uint8 bool float16"),
    "mask of fp64": ({"attn_mask": zeros(10, 12, dtype=torch.float64)}, "attn_mask", "torch.float64 bool float16"),
    "mask on another device": ({"attn_mask": zeros(10, 12, device="meta")}, "attn_mask", "meta cpu one device"),
    "mask is a list": ({"attn_mask": [[True]]}, "attn_mask", "got list accepted torch.Tensor"),
    "scale NaN": ({"sm_scale": float("nan")}, "sm_scale", "nan finite"),
    "scale inf": ({"sm_scale": float("inf")}, "sm_scale", "inf finite"),
    "scale beyond float": ({"sm_scale": 10**400}, "sm_scale", "finite number"),
    "scale is a truth": ({"sm_scale": True}, "sm_scale", "True number is_causal"),
    "scale of two": ({"sm_scale": torch.ones(2)}, "sm_scale", "finite number"),
    "scale is text": ({"sm_scale": "auto"}, "sm_scale", "'auto' finite number"),
    "causal is text": ({"is_causal": "False"}, "is_causal", "'False' accepted True"),
    "causal of two": ({"is_causal": torch.ones(2)}, "is_causal", "tensor accepted True"),
    "causal is a mask": ({"is_causal": zeros(10, 12)}, "is_causal", "tensor accepted True"),
    "lse is text": ({"return_lse": "no"}, "return_lse", "'no' accepted True"),
}


@pytest.mark.parametrize("changes, parameter, words", REFUSED.values(), ids=REFUSED)
def test_refused(changes, parameter, words):
    with pytest.raises(Unsupported) as caught:
        call(**changes)
    assert caught.value.parameter == parameter
    text = str(caught.value)
    assert text.startswith(f"{parameter}: ")
    for word in words.split():
        assert word.strip("(),[]") in text, (word, text)


BEYOND = {
    "head_dim of v": ({"v": zeros(2, 4, 12, 32)}, "v", "head_dim is 32, q's is 64"),
    "head_dim 257": ({n: zeros(2, 4, 12, 257) for n in "qkv"}, "q", "head_dim is 257, accepted are 1 to 256"),
    "fp64": ({n: zeros(2, 4, 12, 64, dtype=torch.float64) for n in "qkv"}, "q", "float64, accepted are float16, bfloat16, float32"),
    "fp64 and its mask": (
        {n: zeros(2, 4, 12, 64, dtype=torch.float64) for n in "qkv"} | {"attn_mask": zeros(12, 12, dtype=torch.float64)}, "q", "float64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, parameter, words", BEYOND.values(), ids=BEYOND)
def test_calls_beyond_the_variants_are_torchs(changes, parameter, words):
    problem = call(**changes)
    assert problem.beyond_variants.parameter == parameter and words in str(problem.beyond_variants)
    card = Capability("cuda", 89, 128, "native", "RTX 4090")
    chosen = plan(problem, card)
    assert chosen.variant.name == plan(problem, card, "sdpa").variant.name == "sdpa" and words in chosen.reason
    for name in VARIANTS.keys() - {"sdpa"}:
        with pytest.raises(Unsupported, match=f"^{parameter}: .*{words[:12]}"):
            plan(problem, card, name)


@pytest.mark.parametrize("given", [True, 1, torch.tensor(True), None, 0, False], ids=str)
def test_a_flag_in_other_words(given):
    assert call(is_causal=given).causal is call(return_lse=given).return_lse is bool(given)


def test_unsupported_is_a_value_error():
    with pytest.raises(ValueError):
        call(tensor_layout="?")


def test_what_a_call_is():
    assert call() == Problem(2, 4, 4, 10, 12, 64, "bfloat16", "cpu", -1, sm_scale=64**-0.5)
    grouped = call(k=zeros(2, 2, 12, 64), v=zeros(2, 2, 12, 64), is_causal=True, sm_scale=2, return_lse=True)
    assert grouped == Problem(2, 4, 2, 10, 12, 64, "bfloat16", "cpu", -1, "HND", True, "none", 2.0, True)


def test_layouts_describe_the_same_problem():
    q, k, v = zeros(2, 10, 4, 64), zeros(2, 12, 4, 64), zeros(2, 12, 4, 64)
    assert call(q=q, k=k, v=v, tensor_layout="NHD")._replace(layout="HND") == call()


@pytest.mark.parametrize(
    "shape", [(), (12,), (1,), (10, 1), (10, 12), (4, 10, 12), (1, 1, 12), (2, 1, 1, 12), (1, 4, 10, 1), (2, 4, 10, 12)]
)
def test_masks_that_broadcast(shape):
    assert call(attn_mask=zeros(*shape, dtype=torch.bool)).mask == "bool"
    for dtype in (torch.float16, torch.bfloat16, torch.float32):  # need not be q's
        assert call(attn_mask=zeros(*shape, dtype=dtype)).mask == "additive"


def test_strides_other_than_the_last_are_free():
    wide = zeros(2, 10, 4, 3, 128)
    assert call(q=wide[:, :, :, 1, :64].transpose(1, 2)) == call()
    assert call(k=zeros(1, 1, 1, 64).expand(2, 4, 12, 64)) == call()


def test_the_last_stride_of_one_channel_does_not_matter():
    odd = zeros(2, 4, 1, 10).mT  # contiguous to torch, so .contiguous() would not change the stride
    assert odd.is_contiguous() and odd.stride(-1) == 10
    assert call(q=odd, k=zeros(2, 4, 12, 1), v=zeros(2, 4, 12, 1)).head_dim == 1


def test_a_gradient_of_the_mask_counts():
    mask = torch.zeros(10, 12, requires_grad=True)
    assert call(attn_mask=mask).needs_grad and not call(attn_mask=mask.detach()).needs_grad
    with torch.no_grad():
        assert not call(attn_mask=mask).needs_grad
    with pytest.raises(Unsupported, match="gradient"):
        call().with_query(zeros(2, 4, 10, 64), attn_mask=mask)


@pytest.mark.parametrize(
    "name, given", [("cu_seqlens_q", [0, 10]), ("cu_seqlens_k", torch.zeros(2, dtype=torch.complex64)), ("max_seqlen_q", None)]
)
def test_packed_arguments_of_a_wrong_type(name, given):
    cu = torch.tensor([0, 10])
    good = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 10, "max_seqlen_k": 10}
    with pytest.raises(Unsupported) as caught:
        Problem.from_packed(*(zeros(10, 4, 64) for _ in range(3)), **{**good, name: given})
    assert caught.value.parameter == name


def test_the_last_stride_of_nothing_does_not_matter():
    assert call(q=zeros(2, 4, 64, 0).mT).empty


@pytest.mark.parametrize(
    "q, kv, empty", [((2, 4, 0, 64), 12, True), ((2, 4, 10, 64), 0, True), ((2, 0, 10, 64), 12, True), ((2, 4, 10, 64), 1, False)]
)
def test_empty(q, kv, empty):
    heads = q[1]
    assert call(q=zeros(*q), k=zeros(2, heads, kv, 64), v=zeros(2, heads, kv, 64)).empty is empty


def test_a_gradient_is_noticed():
    q = zeros(2, 4, 10, 64).requires_grad_()
    assert call(q=q).needs_grad
    with torch.no_grad():
        assert not call(q=q).needs_grad
    with torch.inference_mode():
        assert not call(q=q).needs_grad


# --- packed sequences


def packed(**changes):
    offsets = torch.tensor([0, 3, 10], dtype=torch.int32)
    good = {"q": zeros(10, 4, 64), "k": zeros(10, 2, 64), "v": zeros(10, 2, 64), "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    return Problem.from_packed(**{**good, "max_seqlen_q": 7, "max_seqlen_k": 7, **changes})


PACKED_REFUSED = {
    "rank": ({"q": zeros(1, 10, 4, 64)}, "q"),
    "heads": ({"k": zeros(10, 3, 64), "v": zeros(10, 3, 64)}, "k"),
    "v unlike k": ({"v": zeros(9, 2, 64)}, "v"),
    "head_dim": ({"k": zeros(10, 2, 32), "v": zeros(10, 2, 32)}, "k"),
    "float offsets": ({"cu_seqlens_q": torch.zeros(3)}, "cu_seqlens_q"),
    "short integers": ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int16)}, "cu_seqlens_k"),
    "no offsets": ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens_q"),
    "2-D offsets": ({"cu_seqlens_q": torch.zeros(1, 3, dtype=torch.int32)}, "cu_seqlens_q"),
    "different batch": ({"cu_seqlens_k": torch.zeros(4, dtype=torch.int32)}, "cu_seqlens_k"),
    "offsets elsewhere": ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32, device="meta")}, "cu_seqlens_k"),
    "negative length": ({"max_seqlen_q": -1}, "max_seqlen_q"),
    "no length": ({"max_seqlen_k": None}, "max_seqlen_k"),
    "length is text": ({"max_seqlen_k": "7"}, "max_seqlen_k"),
    "length NaN": ({"max_seqlen_q": float("nan")}, "max_seqlen_q"),
    "length inf": ({"max_seqlen_q": float("inf")}, "max_seqlen_q"),
    "lengths": ({"max_seqlen_q": torch.ones(2)}, "max_seqlen_q"),
    "causal is text": ({"is_causal": "False"}, "is_causal"),
    "scale": ({"sm_scale": float("inf")}, "sm_scale"),
}


@pytest.mark.parametrize("changes, parameter", PACKED_REFUSED.values(), ids=PACKED_REFUSED)
def test_packed_refused(changes, parameter):
    with pytest.raises(Unsupported) as caught:
        packed(**changes)
    assert caught.value.parameter == parameter
    assert "accepted" in caught.value.reason or "must be" in caught.value.reason


def test_packed():
    assert packed() == Problem(2, 4, 2, 7, 7, 64, "bfloat16", "cpu", -1, "NHD", sm_scale=0.125, varlen=True)


def test_no_packed_sequence_is_longer_than_all_are():
    """A bound far above it, such as a model's longest context, is no grid of empty blocks."""
    assert packed(max_seqlen_q=2**40, max_seqlen_k=torch.tensor(2**40))[3:5] == packed(max_seqlen_q=10, max_seqlen_k=10)[3:5]


# --- another q for k and v that are quantised already


def test_with_query():
    kv = call(q=zeros(2, 4, 12, 64))
    assert kv.with_query(zeros(2, 8, 5, 64), is_causal=True)[1:5] == (8, 4, 5, 12)
    for bad, parameter in (
        (zeros(1, 4, 5, 64), "q"),
        (zeros(2, 4, 5, 32), "q"),
        (zeros(2, 4, 5, 64, dtype=torch.float16), "q"),
        (zeros(2, 6, 5, 64), "k"),
        (zeros(2, 4, 64), "q"),
        (zeros(2, 4, 5, 64).requires_grad_(), "q"),
    ):
        with pytest.raises(Unsupported) as caught:
            kv.with_query(bad)
        assert caught.value.parameter == parameter
    with pytest.raises(Unsupported, match="attn_mask"):
        kv.with_query(zeros(2, 4, 5, 64), attn_mask=zeros(5, 13))
