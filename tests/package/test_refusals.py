"""What is refused, by the parameter at fault, before anything runs; and a missing kernel, which is never another variant."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from api_calls import CUDA_FUNCTIONS, QUANTISED, qkv  # noqa: E402

import sageattention  # noqa: E402
from sageattention import KernelMissing, Unsupported, dispatch, sageattn  # noqa: E402
from sageattention.device import capability  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.variants import Candidate  # noqa: E402


@pytest.fixture
def nothing_runs(monkeypatch):

    monkeypatch.setattr(dispatch.Call, "run", lambda call: pytest.fail(f"{call.plan.variant.name} ran"))


NAMES = ("sageattn", "explain", "sageattn_qk_int8_pv_fp16_triton", *CUDA_FUNCTIONS)
FUNCTIONS = {name: getattr(sageattention, name) for name in NAMES}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_bad_input_is_refused_by_every_function(function):
    q, k, v = qkv()
    torchs = (  # which auto leaves to torch's own attention
        ((q[0], k, v), "q"), ((q[..., ::2], k[..., ::2], v[..., ::2]), "q"), ((q, k[:1], v[:1]), "k"), ((q, k, v[:, :1]), "v"),
    )  # fmt: skip
    for arguments, parameter in (
        *(() if function in (sageattn, sageattention.explain) else torchs),
        ((q, k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)), "k"),
        ((q, k, v[:, :, :-1]), "v"),
        ((q, k.half(), v), "k"),
        ((q, k, v, "NDH"), "tensor_layout"),
    ):
        with pytest.raises(Unsupported) as caught:
            function(*arguments)
        assert caught.value.parameter == parameter
    with pytest.raises(Unsupported, match="attn_mask"):
        function(q, k, v, attn_mask=torch.zeros(33, 71))
    with pytest.raises(Unsupported, match="sm_scale"):
        function(q, k, v, sm_scale=float("nan"))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("function", CUDA_FUNCTIONS.values(), ids=CUDA_FUNCTIONS)
def test_cuda_functions(function):
    q, k, v = qkv()
    with pytest.raises(Unsupported, match=f"^q: {function.__name__} needs .* not on cpu"):
        function(q, k, v)
    with pytest.raises(Unsupported, match=r"qk_quant_gran.*'per_block'.*'per_warp', 'per_thread'"):
        function(q, k, v, qk_quant_gran="per_block")
    for given in ("fp8", "", "fp32 "):
        with pytest.raises(Unsupported, match=f"^pv_accum_dtype: got '{given}', accepted are '"):
            function(q, k, v, pv_accum_dtype=given)


@pytest.mark.usefixtures("nothing_runs")
def test_unknown_choices():
    with pytest.raises(Unsupported, match=r"^variant: got 'sage3'"):
        sageattn(*qkv(), variant="sage3")
    with pytest.raises(Unsupported, match="quantization_backend"):
        sageattention.sageattn_qk_int8_pv_fp16_triton(*qkv(), quantization_backend="cutlass")


@pytest.mark.parametrize("given", [None, [], 3, QUANTISED.encode()], ids=str)
def test_a_choice_that_is_no_text(given):
    with pytest.raises(Unsupported, match=r"^variant: got"):
        sageattn(*qkv(), variant=given)
    with pytest.raises(Unsupported, match=r"^pv_accum_dtype: got"):
        sageattention.sageattn_qk_int8_pv_fp16_cuda(*qkv(), pv_accum_dtype=given)


def odd_tensors():
    x = torch.zeros(1, 2, 40, 64)
    nested = torch.nested.nested_tensor([torch.zeros(2, n, 64) for n in (40, 30)])
    jagged = torch.nested.nested_tensor([torch.zeros(n, 64) for n in (40, 30)], layout=torch.jagged)
    return {"nested": nested, "jagged": jagged, "sparse": x.to_sparse(), "compressed": x[0, 0].to_sparse_csr()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "variant, kind",
    [(QUANTISED, kind) for kind in ("nested", "jagged", "sparse", "compressed")] + [("auto", "sparse"), ("auto", "compressed")],
)
def test_tensors_without_strides_are_refused_by_name(kind, variant):
    odd, x = odd_tensors()[kind], torch.zeros(1, 2, 40, 64)
    sageattn(x, x, x, variant=variant)  # a call that was checked before hides nothing
    for name, given in {"q": (odd, x, x), "k": (x, odd, x), "v": (x, x, odd)}.items():
        with pytest.raises(Unsupported, match=f"^{name}: .*accepted is a dense"):
            sageattn(*given, variant=variant)
    with pytest.raises(Unsupported, match=r"^attn_mask: .*accepted is a dense"):
        sageattn(x, x, x, attn_mask=odd, variant=variant)


@pytest.mark.usefixtures("hopper_without_kernels", "nothing_runs")
def test_a_missing_kernel_is_never_another_variant():
    with pytest.raises(KernelMissing, match="Triton is not installed") as caught:
        sageattention.sageattn_qk_int8_pv_fp16_triton(*qkv())
    assert caught.value.variant == "sageattn_qk_int8_pv_fp16_triton"


def test_auto_runs_its_next_candidate_where_a_kernel_is_missing(monkeypatch, caplog):
    """A made-up card whose Triton has no C compiler: that comes out at the first launch only."""
    from sageattention.planning import rules

    triton, calls = "sageattn_qk_int8_pv_fp16_triton", []
    monkeypatch.setattr(capability, "of_device", lambda device, index: Capability("cuda", 89, 1, "native", "RTX 4090"))
    monkeypatch.setattr(rules, "choose", lambda *given: rules.Choice((Candidate(triton),), "a test", "static"))

    def missing(call):
        calls.append(call)
        raise KernelMissing(triton, "no C compiler")

    monkeypatch.setitem(dispatch._BACKENDS, "triton", SimpleNamespace(run=missing))
    q, k, v = qkv()
    assert sageattention.explain(q, k, v).variant == triton
    for _ in range(3):
        assert torch.equal(sageattn(q, k, v), sageattn(q, k, v, variant="sdpa"))
    found = sageattention.explain(q, k, v)
    assert (found.variant, found.rejected) == ("sdpa", ((triton, "no C compiler"),))
    assert len(calls) == 1 and caplog.text.count(f"auto passes by {triton}: no C compiler") == 1
    with pytest.raises(KernelMissing, match="no C compiler"):
        sageattn(q, k, v, variant=triton)


def test_auto_passes_by_every_kernel_that_is_missing(monkeypatch):
    from sageattention.planning import rules

    names, calls = ["sageattn_qk_int8_pv_fp16_triton", "sageattn_qk_int8_pv_fp16_cuda"], []
    monkeypatch.setattr(capability, "of_device", lambda device, index: Capability("cuda", 89, 1, "native", "RTX 4090"))
    monkeypatch.setattr(rules, "choose", lambda *given: rules.Choice(tuple(map(Candidate, names)), "a test", "measured"))

    def missing(call):
        calls.append(call.plan.variant.name)
        assert len(calls) < 9, "one takes the other's place without end"
        raise KernelMissing(calls[-1], "its image can't be loaded")

    for backend in ("triton", "cuda"):
        monkeypatch.setitem(dispatch._BACKENDS, backend, SimpleNamespace(run=missing))
    q, k, v = qkv()
    for _ in range(3):
        assert torch.equal(sageattn(q, k, v), sageattn(q, k, v, variant="sdpa"))
    found = sageattention.explain(q, k, v)
    assert calls == names and found.variant == "sdpa"
    assert [name.partition(" ")[0] for name, reason in found.rejected if "be loaded" in reason] == names
