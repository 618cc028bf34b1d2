"""The call forms of other programs: parameters by other names, and torch's function with ours in its place."""

from __future__ import annotations

import functools
import inspect
import logging

import pytest

torch = pytest.importorskip("torch")

import callforms  # noqa: E402
from callforms import BY_KEYWORD, IN_TORCHS_PLACE, TORCH, TORCHS, in_torchs_place, torchs  # noqa: E402

import sageattention  # noqa: E402
from sageattention import Unsupported, neutral, sageattn, settings  # noqa: E402
from sageattention.device import capability  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.planning import calibration  # noqa: E402
from sageattention.variants import VARIANTS  # noqa: E402

NAMES = ["sageattn", "explain", "sageattn_varlen", *(name for name in VARIANTS if name.startswith("sageattn_"))]
BOUND = 0.03
reference = functools.partial(sageattn, variant="reference")


def call(name, **given):
    """A good call of a function, but for what is given; on a CPU a CUDA variant refuses q, once all else is good."""
    packed = name == "sageattn_varlen"
    q, k, v = (torch.randn((20, 2, 64) if packed else (1, 2, 20, 64)) for _ in range(3))
    cu_seqlens = torch.tensor([0, 8, 20])
    offsets = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=12, max_seqlen_k=12) if packed else {}
    return getattr(sageattention, name)(**{"q": q, "k": k, "v": v, **offsets, **given})


def accepted(name, **given):
    """Whether a function takes the parameters: by their result, or as far as the card that a CUDA variant needs."""
    try:
        call(name, **given)
    except Unsupported as refusal:
        return refusal.parameter == "q" and "NVIDIA GPU" in refusal.reason
    except sageattention.KernelMissing:
        return True
    return True


# --- other libraries' parameters


@pytest.mark.parametrize("name", NAMES)
def test_every_function_names_the_neutral_parameters(name):
    """As the table has them, and nothing by `**kwargs`."""
    parameters = inspect.signature(getattr(sageattention, name)).parameters
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    defaults = dict.fromkeys(neutral.ALIASES) | {p.name: p.accepted[0] for p in neutral.NEUTRAL}
    found = {p.name: p.default for p in parameters.values() if p.name in defaults and p.kind is p.KEYWORD_ONLY}
    assert found == defaults
    assert all(target in parameters for target in neutral.ALIASES.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parameter", neutral.NEUTRAL, ids=lambda p: p.name)
def test_only_neutral_values_are_accepted(name, parameter):
    for value in parameter.accepted:
        assert accepted(name, **{parameter.name: value})
    bad = {"enable_gqa": "no", "deterministic": "yes", "window_size": (128, 0), "alibi_slopes": torch.ones(2)}
    for value in (bad.get(parameter.name, 0.5), bad.get(parameter.name, True)):
        with pytest.raises(Unsupported, match=f"^{parameter.name}: got .*accepted: .*{parameter.reason[:20]}"):
            call(name, **{parameter.name: value})


@pytest.mark.parametrize("name", NAMES)
def test_another_name_with_another_value_is_refused(name):
    assert accepted(name, scale=0.5, softmax_scale=0.5, sm_scale=0.5) and accepted(name, causal=True, is_causal=True)
    assert accepted(name, causal=False)
    for given, parameter in (
        ({"scale": 0.5, "sm_scale": 0.25}, "scale"),
        ({"softmax_scale": 0.5, "scale": 0.25}, "softmax_scale"),
        ({"causal": False, "is_causal": True}, "causal"),
    ):
        with pytest.raises(Unsupported, match=f"^{parameter}: got"):
            call(name, **given)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_causal_mask_that_flash_attention_aligns_otherwise_is_refused(layout):
    q, k = torch.randn(1, 4, 6, 64), torch.randn(1, 4, 8, 64)
    if layout == "NHD":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    for function in (sageattn, sageattention.explain, sageattention.sageattn_qk_int8_pv_fp16_cuda):
        with pytest.raises(Unsupported, match=r"^causal: .*last query to the last key.*is_causal=True"):
            function(q, k, k, layout, causal=True)
    assert sageattn(q, k, k, layout, is_causal=True).shape == sageattn(q, k, k, layout, causal=False).shape
    assert sageattn(q, q, q, layout, causal=True).equal(sageattn(q, q, q, layout, is_causal=True))


def test_a_causal_mask_of_packed_sequences_needs_equal_lengths():
    lengths, others = torch.tensor([0, 8, 20]), torch.tensor([0, 9, 20])
    assert accepted("sageattn_varlen", causal=True)
    for cu_seqlens_k in (others, lengths.clone()):
        with pytest.raises(Unsupported, match=r"^causal: .*one tensor"):
            call("sageattn_varlen", causal=True, cu_seqlens_q=lengths, cu_seqlens_k=cu_seqlens_k)


@pytest.mark.parametrize("form", BY_KEYWORD.values(), ids=BY_KEYWORD)
@pytest.mark.parametrize("function", [sageattn, reference], ids=["auto", "reference"])
def test_programs_calls(form, function):
    (q, k, v), mask = form.tensors()
    assert callforms.error(form.call(function, q, k, v, mask), form.truth(q, k, v, mask)) < BOUND


@pytest.mark.parametrize("form", BY_KEYWORD.values(), ids=BY_KEYWORD)
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("sageattn_qk")])
def test_the_variants_functions_take_programs_calls(form, name):
    """As far as the card that they need."""
    (q, k, v), mask = form.tensors()
    with pytest.raises((Unsupported, sageattention.KernelMissing), match=r"NVIDIA GPU|Triton"):
        form.call(getattr(sageattention, name), q, k, v, mask)


def test_hoppers_positional_order_is_upstreams():
    q, k, v = (torch.randn(1, 2, 20, 64) for _ in range(3))
    given = dict.fromkeys(["tensor_layout", "is_causal", "qk_quant_gran", "sm_scale", "pv_accum_dtype", "smooth_k", "return_lse"])
    parameters = inspect.signature(sageattention.sageattn_qk_int8_pv_fp8_cuda_sm90).parameters
    assert list(parameters)[3:10] == list(given) and parameters["smooth_v"].kind is inspect.Parameter.KEYWORD_ONLY
    with pytest.raises(Unsupported, match=r"^return_lse: got 'no'"):
        sageattention.sageattn_qk_int8_pv_fp8_cuda_sm90(q, k, v, "HND", False, "per_warp", None, "fp32+fp32", True, "no")


# --- the accumulator of "auto"


def test_an_accumulator_or_granularity_that_does_not_exist_is_refused():
    for name in ("sageattn", "explain"):
        with pytest.raises(Unsupported, match=r"^pv_accum_dtype: got 'fp8', accepted are 'fp32', "):
            call(name, pv_accum_dtype="fp8")
        with pytest.raises(Unsupported, match=r"^qk_quant_gran: got 'per_tensor'"):
            call(name, qk_quant_gran="per_tensor")
        assert accepted(name, pv_accum_dtype="fp32+fp16", qk_quant_gran="per_warp")
    with pytest.raises(Unsupported, match=r"^pv_accum_dtype: .*reference accepts"):
        call("sageattn", pv_accum_dtype="fp32", variant="reference")


@pytest.mark.parametrize(
    "arch, accum, chosen",
    [
        (89, "", ("sageattn_qk_int8_pv_int8_cuda", "")),
        (89, "fp32+fp16", ("sageattn_qk_int8_pv_fp8_cuda", "fp32+fp16")),
        (89, "fp16", ("sageattn_qk_int8_pv_fp16_cuda", "fp16")),
        (90, "fp32", ("sageattn_qk_int8_pv_fp8_cuda_sm90", "fp32")),
        (90, "fp16+fp32", ("sageattn_qk_int8_pv_fp16_cuda", "fp16+fp32")),
        (75, "fp32+fp16", ("sageattn_qk_int8_pv_int8_cuda", "")),  # no variant there has it
    ],
)
def test_an_accumulator_narrows_auto_to_the_variants_that_have_it(arch, accum, chosen, monkeypatch):
    card = Capability("cuda", arch, 64, "none", "a card")
    monkeypatch.setattr(capability, "of_device", lambda device, index: card)
    monkeypatch.setattr(calibration, "of_card", lambda card: None)
    settings.planned_anew()
    q = torch.zeros(1, 24, 8192, 128, dtype=torch.float16, device="meta")
    for _ in range(2):
        found = sageattention.explain(q, q, q, pv_accum_dtype=accum or None)
        assert (found.variant, found.accum) == chosen, str(found)
        assert (repr(accum) in found.reason) == bool(accum)
        assert ("no variant that runs here has it" in found.reason) == bool(accum and not chosen[1])
    short = sageattention.explain(q[:, :, :64], q[:, :, :64], q[:, :, :64], pv_accum_dtype=accum or None)
    assert short.variant == "sdpa" and "no variant is predicted to gain" in short.reason
    settings.planned_anew()


# --- in torch's place


@pytest.mark.parametrize("name", IN_TORCHS_PLACE)
@pytest.mark.parametrize("function", [sageattn, reference, sageattention.scaled_dot_product_attention], ids=["auto", "reference", "sdpa"])
def test_in_torchs_place(name, function):
    form = IN_TORCHS_PLACE[name]
    (q, k, v), mask = form.tensors()
    exact = form.truth(q, k, v, mask)
    with in_torchs_place(function):
        result = form.call(torchs, q, k, v, mask)
    assert callforms.error(result, exact) < BOUND and result.dtype == q.dtype
    if name in TORCHS:
        assert torch.equal(result, form.call(TORCH, q, k, v, mask))


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.startswith("sageattn_qk")])
def test_a_variant_in_torchs_place_says_once_what_torch_computes(name, caplog):
    """Here all, for want of a card; and by name, not in torch's place, it refuses."""
    function = functools.partial(getattr(sageattention, name), smooth_k=False)
    triton = name.endswith("triton")  # where Triton is missing that is said, as nobody asked for another
    with in_torchs_place(function), caplog.at_level(logging.WARNING):
        for _ in range(2):
            for form in () if triton else IN_TORCHS_PLACE.values():
                (q, k, v), mask = form.tensors()
                assert torch.equal(form.call(torchs, q, k, v, mask), form.call(TORCH, q, k, v, mask))
    assert caplog.text.count("not on cpu") == (0 if triton else 1)
    q = torch.randn(1, 2, 8, 300)
    with pytest.raises(Unsupported, match="head_dim is 300"):
        function(q, q, q)


def test_a_long_session_in_torchs_place_does_not_fill_the_log(caplog):
    with in_torchs_place(reference):
        for tokens in range(1, 200):
            torchs(*(torch.randn(2, tokens, 8) for _ in range(3)))
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 65 and told[-1] == "sageattention: further warnings are not logged"


@pytest.mark.parametrize("function", [sageattn, sageattention.scaled_dot_product_attention, functools.partial(sageattn, smooth_k=False)])
def test_multihead_attention_in_training_and_not(function):
    torch.manual_seed(0)
    layer, x = torch.nn.MultiheadAttention(64, 4, batch_first=True), torch.randn(2, 9, 64)
    mask = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    for options in ({}, {"attn_mask": mask}, {"attn_mask": mask, "is_causal": True}):
        exact = layer(x, x, x, need_weights=False, **options)[0]
        with in_torchs_place(function):
            out = layer(x, x, x, need_weights=False, **options)[0]
        torch.testing.assert_close(out, exact)
        layer.zero_grad()
        out.sum().backward()
        assert layer.in_proj_weight.grad.abs().sum() > 0


def test_dropout_is_torchs_or_refused():
    q = torch.randn(1, 2, 300, 64)
    torch.manual_seed(3)
    exact = TORCH(q, q, q, None, 0.5)
    torch.manual_seed(3)
    assert torch.equal(sageattention.scaled_dot_product_attention(q, q, q, None, 0.5), exact)
    for given in ({"dropout_p": 0.5}, {"tensor_layout": None, "is_causal": 0.5}):
        with pytest.raises(Unsupported, match=r"^dropout_p: got 0.5.*scaled_dot_product_attention"):
            sageattn(q, q, q, **given)


def test_our_function_has_torchs_signature():
    parameters = inspect.signature(sageattention.scaled_dot_product_attention).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == {"scale": None, "enable_gqa": False}
    with pytest.raises(TypeError):
        TORCH(*(torch.zeros(1, 2, 3, 4),) * 3, None, 0.0, False, 0.5)  # the scale is torch's by keyword, too


@pytest.mark.parametrize("name", [n for n in NAMES if n != "sageattn_varlen"])
def test_a_truth_is_no_scale(name):
    """It was meant for is_causal, in a position of torch's."""
    for given in ({"sm_scale": True}, {"scale": True}, {"softmax_scale": False}):
        with pytest.raises(Unsupported, match=r"^sm_scale: got"):
            call(name, **given)


@pytest.mark.parametrize("given", [3, ["HND"], 0.0, torch.float16], ids=str)
def test_a_layout_that_is_neither_text_nor_mask(given):
    for name in ("sageattn", "sageattn_qk_int8_pv_fp16_cuda", "sageattn_qk_int8_pv_fp16_triton"):
        with pytest.raises(Unsupported, match=r"^tensor_layout: got"):
            call(name, tensor_layout=given)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_torchs(layout):
    nested = torch.nested.nested_tensor([torch.randn(2, n, 64) for n in (40, 30)])
    if layout == torch.jagged:
        nested = torch.nested.nested_tensor([torch.randn(n, 2, 64) for n in (40, 30)], layout=layout).transpose(1, 2)
    with in_torchs_place(sageattn):
        found = torchs(nested, nested, nested)
    for one, exact in zip(found.unbind(), TORCH(nested, nested, nested).unbind()):
        assert torch.equal(one, exact)
    with pytest.raises(Unsupported, match=r"^q: is a nested tensor"):
        reference(nested, nested, nested)


@pytest.mark.parametrize("name", ["all by position", "keywords", "fewer heads", "head_dim 384", "a V of another width", "rank 3"])
@pytest.mark.parametrize("function", [sageattn, reference, sageattention.scaled_dot_product_attention], ids=["auto", "reference", "sdpa"])
def test_in_torchs_place_compiled(name, function):
    torch._dynamo.reset()
    form = IN_TORCHS_PLACE[name]
    (q, k, v), mask = form.tensors()
    with in_torchs_place(function):
        compiled = torch.compile(lambda *given: form.call(torchs, *given), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(q, k, v, mask), form.call(torchs, q, k, v, mask))


@pytest.mark.parametrize("form", BY_KEYWORD.values(), ids=BY_KEYWORD)
def test_programs_calls_compiled(form):
    torch._dynamo.reset()
    (q, k, v), mask = form.tensors()
    compiled = torch.compile(lambda *given: form.call(reference, *given), backend="aot_eager", fullgraph=True)
    for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (compiled(q, k, v, mask), form.call(reference, q, k, v, mask)))):
        assert torch.equal(one, other)


# --- names


def test_the_functions_are_where_upstream_has_them():
    from sageattention import core

    for name in core.__all__:
        assert getattr(core, name) is getattr(sageattention, name)
    assert {n for n in sageattention.__all__ if "sageattn" in n} - {"sageattn_sparse"} <= set(core.__all__)  # that one is ours alone
    with pytest.raises(ImportError):
        from sageattention.core import per_channel_fp8  # noqa: F401  by which programs tell that upstream's own formats are there


def test_the_marker_for_hopper_is_found_and_is_no_kernel():
    from sageattention import sm90_compile

    with pytest.raises(Unsupported, match="marker"):
        sm90_compile.qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf_fake_impl(torch.zeros(1))
    assert not hasattr(sm90_compile, "qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf")
