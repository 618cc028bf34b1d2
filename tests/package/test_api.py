"""The public functions on CPU tensors: signatures, results, refusals."""

from __future__ import annotations

import contextlib
import inspect
import logging
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import sageattention  # noqa: E402
from sageattention import CudaError, KernelMissing, Unsupported, dispatch, sageattn, settings  # noqa: E402
from sageattention.cli import workloads  # noqa: E402
from sageattention.device import capability  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.numerics.reference import oracle  # noqa: E402
from sageattention.variants import VARIANTS, Candidate  # noqa: E402

CUDA_FUNCTIONS = {name: getattr(sageattention, name) for name, variant in VARIANTS.items() if variant.backend == "cuda"}
QUANTISED = "reference"


def qkv(len_q=33, len_kv=70, heads=2, heads_kv=None, head_dim=64, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (heads, len_q), (heads_kv or heads, len_kv), (heads_kv or heads, len_kv)
    return tuple(torch.randn(2, h, n, head_dim, generator=g).to(dtype) for h, n in shapes)


def check(out, lse, exact, exact_lse, bound=0.02):
    assert workloads.relative_l2(out, exact) < bound
    if lse is not None:
        seen = exact_lse != -torch.inf
        assert torch.equal(lse == -torch.inf, ~seen)
        assert (lse - exact_lse)[seen].abs().max() < 0.03


# --- signatures


def test_comfyui_finds_attn_mask():
    assert "attn_mask" in inspect.signature(sageattn).parameters


GRANULAR = ("tensor_layout", "is_causal", "qk_quant_gran", "sm_scale", "pv_accum_dtype", "smooth_k", "smooth_v", "return_lse")
POSITIONAL = {
    "sageattn": ("tensor_layout", "is_causal", "sm_scale", "return_lse"),
    "sageattn_qk_int8_pv_fp16_triton": (
        "tensor_layout", "quantization_backend", "is_causal", "attn_mask", "sm_scale", "smooth_k", "return_lse",
    ),
    **dict.fromkeys(CUDA_FUNCTIONS, GRANULAR),
    "sageattn_qk_int8_pv_fp8_cuda_sm90": tuple(name for name in GRANULAR if name != "smooth_v"),
    "sageattn_varlen": (
        "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "is_causal", "sm_scale", "smooth_k",
    ),
    "explain": ("tensor_layout", "is_causal", "sm_scale", "return_lse"),
}  # fmt: skip


@pytest.mark.parametrize("name", POSITIONAL)
def test_positional_order_is_upstream_s(name):
    parameters = inspect.signature(getattr(sageattention, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == ["q", "k", "v", *POSITIONAL[name]]
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


@pytest.mark.parametrize("name", [n for n in POSITIONAL if n != "sageattn_varlen"])
def test_every_function_takes_a_mask(name):
    assert "attn_mask" in inspect.signature(getattr(sageattention, name)).parameters


@pytest.mark.parametrize("name", POSITIONAL)
def test_unknown_keyword(name):
    offsets = {n: None for n in POSITIONAL[name][:4]} if name == "sageattn_varlen" else {}
    with pytest.raises(TypeError, match="sm_scales"):
        getattr(sageattention, name)(*qkv(), sm_scales=1.0, **offsets)


def test_everything_public_is_exported():
    assert all(hasattr(sageattention, name) for name in sageattention.__all__)
    assert {*POSITIONAL, "quantize_kv", "attend", "available_variants"} <= set(sageattention.__all__)
    assert torch.torch_version.TorchVersion(sageattention.__version__) >= (2, 1, 1)  # what diffusers asks for


@pytest.mark.parametrize("name", CUDA_FUNCTIONS)
def test_a_variant_by_name_is_its_function_s_default(name):
    """`variant=name`, as the node says it, and the function of that name round alike."""
    default = inspect.signature(CUDA_FUNCTIONS[name]).parameters["pv_accum_dtype"].default
    assert next(iter(VARIANTS[name].accum)) == default and VARIANTS[name].accum[default] == VARIANTS[name].scheme
    assert all(default in kernels.schemes for kernels in VARIANTS[name].kernels)


def test_errors():
    assert issubclass(Unsupported, ValueError)
    assert issubclass(KernelMissing, RuntimeError) and issubclass(CudaError, RuntimeError)
    assert not issubclass(KernelMissing, CudaError) and not issubclass(CudaError, KernelMissing)


# --- results


@pytest.mark.parametrize("variant", ["auto", "sdpa", QUANTISED])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("heads_kv", [4, 2, 1])
@pytest.mark.parametrize("return_lse", [False, True])
def test_layouts_groups_and_lse(variant, layout, heads_kv, return_lse):
    q, k, v = qkv(heads=4, heads_kv=heads_kv)
    exact, exact_lse = oracle(q, k, v)
    given = (q, k, v) if layout == "HND" else tuple(t.transpose(1, 2).contiguous() for t in (q, k, v))
    result = sageattn(*given, layout, return_lse=return_lse, variant=variant)
    out, lse = result if return_lse else (result, None)
    assert out.shape == given[0].shape and out.dtype == q.dtype and out.is_contiguous()
    assert lse is None or (lse.shape == (2, 4, 33) and lse.dtype == torch.float32)
    check(out if layout == "HND" else out.transpose(1, 2), lse, exact, exact_lse)


@pytest.mark.parametrize("variant", ["sdpa", QUANTISED])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("shape", [(70,), (33, 1), (33, 70), (2, 33, 70), (1, 1, 70), (2, 1, 1, 70), (1, 2, 33, 70), (2, 2, 33, 70)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks(variant, return_lse, shape, dtype, is_causal):
    q, k, v = qkv()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = noise > -0.5 if dtype == torch.bool else 2 * noise.to(dtype)
    exact, exact_lse = oracle(q, k, v, attn_mask=mask, is_causal=is_causal)
    result = sageattn(q, k, v, is_causal=is_causal, attn_mask=mask, return_lse=return_lse, variant=variant)
    out, lse = result if return_lse else (result, None)
    check(out, lse, exact, exact_lse)


@pytest.mark.parametrize("variant", ["sdpa", QUANTISED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_a_fully_masked_row_is_zero_and_a_row_of_finfo_min_is_not(variant, dtype, mask_dtype):
    q, k, v = qkv(dtype=dtype)
    v = v + 1
    mask = torch.ones(33, 70, dtype=torch.bool)
    mask[5] = False
    if mask_dtype != torch.bool:
        mask = torch.zeros(33, 70).masked_fill(~mask, -torch.inf)
        mask[7] = torch.finfo(torch.float32).min
    out, lse = sageattn(q, k, v, attn_mask=mask, return_lse=True, variant=variant)
    plain = sageattn(q, k, v, attn_mask=mask, variant=variant)
    for o in (out, plain):
        assert o.isfinite().all()
        assert (o[:, :, 5] == 0).all() and (lse[:, :, 5] == -torch.inf).all()
        if mask_dtype != torch.bool:
            # As fp32 attention has it, the bias drowns the scores and leaves the average. SDPA in fp16 holds it at −65504, which does not.
            survive = variant == "sdpa" and dtype == torch.float16
            expected = oracle(q, k, v)[0][:, :, 7] if survive else v.double().mean(2)
            assert workloads.relative_l2(o[:, :, 7], expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_finite_bias_hides_a_key(dtype, mask_dtype):
    """Of the smallest number in a whole row, whatever dtype it is in; −inf does."""
    q, k, v = qkv(dtype=dtype)
    mask = torch.zeros(33, 70, dtype=mask_dtype)
    mask[7] = torch.finfo(mask_dtype).min
    mask[8, 1:] = -torch.inf
    out = sageattn(q, k, v, attn_mask=mask)
    assert out.isfinite().all() and out[:, :, 7].abs().sum() > 0
    torch.testing.assert_close(out[:, :, 8], v[:, :, 0])


@pytest.mark.parametrize("variant", ["auto", QUANTISED])
def test_strided_inputs(variant):
    packed = torch.randn(2, 40, 3, 2, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = (packed[:, :, i, :, :64].transpose(1, 2) for i in range(3))
    assert not q.is_contiguous()
    out = sageattn(q, k, v, variant=variant)
    assert torch.equal(out, sageattn(q.contiguous(), k.contiguous(), v.contiguous(), variant=variant))
    keys = torch.randn(1, 1, 50, 64).bfloat16().expand(2, 2, 50, 64)
    check(sageattn(q, keys, keys, variant=variant), None, oracle(q, keys, keys)[0], None)


@pytest.mark.parametrize("variant", ["auto", QUANTISED])
@pytest.mark.parametrize("sm_scale", [0.0, 0.3, -0.1, 1])
def test_softmax_scale(variant, sm_scale):
    q, k, v = qkv(dtype=torch.float32)
    check(sageattn(q, k, v, sm_scale=sm_scale, variant=variant), None, oracle(q, k, v, sm_scale=sm_scale)[0], None, bound=0.12)


@pytest.mark.parametrize("variant", ["auto", QUANTISED])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("len_q, len_kv, heads", [(0, 70, 2), (33, 0, 2), (0, 0, 2), (33, 70, 0)])
def test_zero_lengths_give_what_sdpa_gives(variant, layout, len_q, len_kv, heads):
    q, k, v = qkv(len_q, len_kv, heads)
    if layout == "NHD":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = sageattn(q, k, v, layout, return_lse=True, variant=variant)
    assert out.shape == q.shape and out.dtype == q.dtype and (out == 0).all()
    assert lse.shape == (2, heads, len_q) and (lse == -torch.inf).all()


def test_compatibility_switches_change_nothing():
    q, k, v = qkv()
    assert torch.equal(sageattn(q, k, v, smooth_k=False, variant=QUANTISED), sageattn(q, k, v, smooth_k=True, variant=QUANTISED))


def test_the_quantised_path_is_really_taken():
    q, k, v = qkv()
    exact = oracle(q, k, v)[0]
    error = workloads.relative_l2(sageattn(q.float(), k.float(), v.float(), variant=QUANTISED), exact)
    assert 0.003 < error < 0.011


def test_gradients_flow_through_auto_and_are_refused_by_quantised_variants():
    q, k, v = (t.requires_grad_() for t in qkv(dtype=torch.float32))
    sageattn(q, k, v).sum().backward()
    assert q.grad.isfinite().all() and v.grad.abs().sum() > 0
    with pytest.raises(Unsupported, match="gradient"):
        sageattn(q, k, v, variant=QUANTISED)
    with torch.no_grad():
        sageattn(q, k, v, variant=QUANTISED)


def with_tangent(*tensors):
    return [torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in tensors]


@pytest.mark.parametrize("which", ["q", "k", "v", "attn_mask"])
def test_a_forward_mode_gradient_is_refused_and_never_dropped(which):
    q, k, v = qkv(dtype=torch.float32)
    given = {"q": q, "k": k, "v": v, "attn_mask": torch.zeros(q.shape[2], k.shape[2])}
    expected = sageattn(**given, variant=QUANTISED)
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(sageattn(**given, variant=QUANTISED), expected)  # nothing here has a tangent
        (given[which],) = with_tangent(given[which])
        for context in (torch.enable_grad(), torch.no_grad()):  # which is about the other mode
            with context, pytest.raises(Unsupported, match="gradient"):
                sageattn(**given, variant=QUANTISED)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            tangent = torch.autograd.forward_ad.unpack_dual(sageattn(**given)).tangent
        assert tangent is not None and tangent.isfinite().all()


def test_torch_func_finds_a_gradient_or_a_refusal():
    q, k, v = qkv(dtype=torch.float32)
    for variant in ("auto", QUANTISED):
        mapped = torch.func.vmap(lambda q: sageattn(q, k, v, variant=variant))(torch.stack([q, 2 * q]))  # noqa: B023
        for one, scale in zip(mapped, (1, 2)):
            torch.testing.assert_close(one, sageattn(scale * q, k, v, variant=variant))
    assert torch.func.grad(lambda q: sageattn(q, k, v).square().sum())(q).abs().sum() > 0
    with pytest.raises(Unsupported, match="gradient"):
        torch.func.grad(lambda q: sageattn(q, k, v, variant=QUANTISED).sum())(q)
    with pytest.raises(Unsupported, match="gradient"):
        torch.func.jvp(lambda q: sageattn(q, k, v, variant=QUANTISED), (q,), (q,))
    with pytest.raises(Unsupported, match=r"k: .*torch\.func"):
        torch.func.vmap(lambda k: sageattention.quantize_kv(k, k, variant=QUANTISED))(torch.stack([k, k]))


# --- refusals, before anything runs


@pytest.fixture
def nothing_runs(monkeypatch):
    from sageattention import dispatch

    monkeypatch.setattr(dispatch.Call, "run", lambda call: pytest.fail(f"{call.plan.variant.name} ran"))


FUNCTIONS = {name: getattr(sageattention, name) for name in POSITIONAL if name != "sageattn_varlen"}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_bad_input_is_refused_by_every_function(function):
    q, k, v = qkv()
    torchs = (((q[0], k, v), "q"), ((q[..., ::2], k[..., ::2], v[..., ::2]), "q"))  # which auto leaves to torch's own attention
    for arguments, parameter in (
        *(() if function in (sageattn, sageattention.explain) else torchs),
        ((q, k[:1], v[:1]), "k"),
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


@pytest.fixture
def hopper_without_kernels(monkeypatch):
    """CPU tensors that the planner takes for a GPU's, in an installation that holds no kernel."""
    monkeypatch.setattr(capability, "of_device", lambda device, index: Capability("cuda", 90, 132, "none", "H200"))


@pytest.mark.usefixtures("hopper_without_kernels", "nothing_runs")
def test_a_missing_kernel_is_never_another_variant():
    with pytest.raises(KernelMissing, match="Triton is not installed") as caught:
        sageattention.sageattn_qk_int8_pv_fp16_triton(*qkv())
    assert caught.value.variant == "sageattn_qk_int8_pv_fp16_triton"


def test_auto_runs_its_next_candidate_where_a_kernel_is_missing(monkeypatch, caplog):
    """A made-up card whose Triton has no C compiler: that comes out at the first launch only."""
    from sageattention import dispatch
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


@pytest.mark.parametrize("given", [None, (torch.zeros(1, 2, 3, 64),) * 2], ids=["None", "a tuple"])
def test_what_was_not_quantised_is_not_attended(given):
    with pytest.raises(Unsupported, match=r"^kv: got .*quantize_kv"):
        sageattention.attend(qkv()[0], given)


@pytest.mark.parametrize("capturing", [(), ("own",), ("own", "other")], ids=str)
def test_quantised_k_and_v_wait_for_the_stream_that_makes_them(capturing, monkeypatch):
    """By a stand-in for torch.cuda's streams; on a GPU test_gpu_behaviour has it."""
    from dataclasses import dataclass

    from sageattention.backends.call import QuantizedKV

    told, active = [], ["own"]

    @dataclass(frozen=True)
    class Stream:
        name: str

        def wait_stream(self, other):
            told.append((self.name, "waits for", other.name))

    class Buffer(torch.Tensor):
        def record_stream(self, stream):
            told.append(("a buffer is kept for", stream.name))

    @contextlib.contextmanager
    def inside(stream):
        active.append(stream.name)
        yield
        active.pop()

    @dataclass(frozen=True)
    class Kept(QuantizedKV):
        buffer: torch.Tensor
        slots: int

    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: active[-1] in capturing)
    kv = Kept(None, None, torch.zeros(3).as_subclass(Buffer), 3, made_on=Stream("other"))
    kv.join(Stream("other"))
    assert told == []
    kv.join(Stream("own"))
    waits = [("own", "waits for", "other")] if capturing != ("own",) else []  # work of before a capture is done by then
    assert told == [*waits, ("a buffer is kept for", "own")]
    Kept(None, None, torch.zeros(3), 3).join(Stream("own"))


@pytest.mark.parametrize("mask", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_additive_mask_may_have_another_dtype(dtype, mask):
    q, k, v = qkv(dtype=getattr(torch, dtype))
    shape, kind = (q.shape[2], k.shape[2]), getattr(torch, mask)
    keep = torch.ones(shape, dtype=torch.bool).tril(3)
    for masked in (-torch.inf, torch.finfo(kind).min):
        bias = torch.zeros(shape, dtype=kind).masked_fill(~keep, masked)
        assert torch.allclose(sageattn(q, k, v, attn_mask=bias), sageattn(q, k, v, attn_mask=keep), atol=1e-2)


# --- tensors that are looked at only, or hold no data by strides


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


@pytest.mark.parametrize("variant", ["auto", QUANTISED])
def test_a_fake_tensor_gives_a_fake_result_and_is_nothing_to_quantise(variant):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    x = torch.zeros(1, 2, 40, 64)
    with FakeTensorMode():
        fake = torch.zeros(1, 2, 40, 64)
        out, lse = sageattn(fake, fake, fake, return_lse=True, variant=variant)
    assert isinstance(out, FakeTensor) and out.shape == x.shape and lse.shape == (1, 2, 40) and lse.dtype == torch.float32
    assert isinstance(sageattn(fake, fake, fake, variant=variant), FakeTensor)  # also outside of the mode
    sageattn(x, x, x, variant=variant)
    with pytest.raises(Unsupported, match=r"^k: is a FakeTensor"):
        sageattn(x, fake, fake, variant=variant)
    for function in (sageattention.explain, lambda q, k, v, **kw: sageattention.quantize_kv(k, v, **kw)):
        with pytest.raises(Unsupported, match="is a FakeTensor"):
            function(fake, fake, fake, variant=variant)


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"k": torch.zeros(1, 2, 40)}, r"^k: got 3 dimensions"),
        ({"k": torch.zeros(1, 2, 40, 64, dtype=torch.float64)}, r"^k: its dtype is torch.float64"),
        ({"v": torch.zeros(1, 2, 40, 64, dtype=torch.float16)}, r"^v: its dtype is torch.float16, k's is torch.float32"),
        ({"v": torch.zeros(1, 2, 41, 64)}, r"^v: its shape is"),
        ({"k": torch.zeros(1, 2, 40, 300), "v": torch.zeros(1, 2, 40, 300)}, r"^k: its head_dim is 300"),
        ({"variant": "sageattn_qk_int8_pv_fp16_cuda"}, r"^k: sageattn_qk_int8_pv_fp16_cuda needs .* not on cpu"),
        ({"tensor_layout": "BHND"}, r"^tensor_layout: got 'BHND'"),
        ({"key_mask": [True] * 40}, r"^key_mask: got list"),
        ({"key_mask": torch.ones(1, 40)}, r"^key_mask: got torch.float32 of shape \(1, 40\), accepted is bool"),
        ({"key_mask": torch.ones(40, dtype=torch.bool)}, r"^key_mask: got torch.bool of shape \(40,\)"),
        ({"key_mask": torch.ones(2, 40, dtype=torch.bool)}, r"^key_mask: got torch.bool of shape \(2, 40\), .* = \[1, 40\]"),
        ({"key_mask": torch.ones(1, 41, dtype=torch.bool)}, r"^key_mask: got torch.bool of shape \(1, 41\)"),
        ({"key_mask": torch.ones(1, 40, dtype=torch.bool, device="meta")}, r"^key_mask: is on meta, k is on cpu"),
    ],
)
def test_quantising_k_and_v_names_what_is_at_fault(changes, fault):
    x = torch.zeros(1, 2, 40, 64)
    given = {"k": x, "v": x, "variant": "sageattn_qk_int8_pv_fp16_triton", **changes}
    with pytest.raises(Unsupported, match=fault):
        sageattention.quantize_kv(given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_traced_call_is_the_operator(mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    from sageattention import torch_library

    q, k, v = qkv()
    graph = make_fx(lambda q, k, v: sageattn(q, k, v, variant=QUANTISED), tracing_mode=mode)(q, k, v)
    assert len(graph.graph.find_nodes(op="call_function", target=torch_library.attention)) == 1
    assert torch.equal(graph(q, k, v), sageattn(q, k, v, variant=QUANTISED))


@pytest.mark.parametrize("variant", ["auto", QUANTISED])
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_call_under_jit_trace_is_the_operator_for_any_length(variant, return_lse):
    q, k, v = qkv()

    def call(q, k, v):
        return sageattn(q, k, v, variant=variant, return_lse=return_lse)

    traced = torch.jit.trace(call, (q, k, v))
    assert [n.kind() for n in traced.graph.nodes() if "attention" in n.kind()] == [f"sageattention::attention{'_lse' * return_lse}"]
    q = torch.cat([q, q], 2)
    for got, want in zip(*((r if return_lse else (r,)) for r in (traced(q, k, v), call(q, k, v)))):
        torch.testing.assert_close(got, want)


def test_a_layer_with_weights_is_traced_with_its_gradient_or_refused():
    q, k, v = qkv(dtype=torch.float32)

    class Layer(torch.nn.Module):
        def __init__(self, variant):
            super().__init__()
            self.variant, self.linear = variant, torch.nn.Linear(q.shape[-1], q.shape[-1])

        def forward(self, q, k, v):
            return sageattn(self.linear(q), k, v, variant=self.variant)

    traced = torch.jit.trace(Layer("auto"), (q, k, v))
    traced(q, k, v).sum().backward()
    assert traced.linear.weight.grad.abs().sum() > 0
    with pytest.raises(Unsupported, match="gradient"):
        torch.jit.trace(Layer(QUANTISED), (q, k, v))


# --- explain, available_variants, the environment


def test_explain():
    q, k, v = qkv()
    explanation = sageattention.explain(q, k, v)
    assert (explanation.variant, explanation.device) == ("sdpa", "cpu") and "cpu" in str(explanation)
    assert sageattention.explain(q, k, v, variant=QUANTISED).variant == QUANTISED
    with pytest.raises(Unsupported, match="NVIDIA"):
        sageattention.explain(q, k, v, variant=next(iter(CUDA_FUNCTIONS)))


def test_available_variants_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = {a.name: a for a in sageattention.available_variants("cpu")}
    assert list(found) == list(VARIANTS)
    assert found["sdpa"].status == found["reference"].status == "ready"
    for name in CUDA_FUNCTIONS:
        assert found[name].status == "unsupported" and "NVIDIA" in found[name].reason
    assert found["sageattn_qk_int8_pv_fp16_triton"].status in ("unsupported", "missing")
    assert all(a.summary and (a.reason or a.status == "ready") for a in found.values())


@pytest.mark.usefixtures("hopper_without_kernels")
def test_available_variants_names_what_is_missing():
    found = {a.name: a for a in sageattention.available_variants("cpu")}
    assert found["sageattn_qk_int8_pv_fp16_triton"].status == "missing"
    assert "install" in found["sageattn_qk_int8_pv_fp16_triton"].reason


@pytest.mark.parametrize("variant", ["auto", QUANTISED])
def test_autocast_changes_nothing(variant):
    q, k, v = qkv(dtype=torch.float32)
    plain = sageattn(q, k, v, variant=variant, return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sageattn(q, k, v, variant=variant, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(out, plain)) and out[0].dtype == torch.float32


@pytest.mark.parametrize("poisoned", range(3))
def test_a_nan_is_not_hidden(poisoned):
    tensors = qkv(dtype=torch.float32)
    tensors[poisoned][0, 0, 3, 1] = float("nan")
    out, lse = sageattn(*tensors, variant=QUANTISED, return_lse=True)
    assert torch.equal(out.isnan(), sageattn(*tensors).isnan())
    assert bool(lse.isnan().any()) == (poisoned < 2)


@pytest.mark.parametrize("given", [None, [], 3, QUANTISED.encode()], ids=str)
def test_a_choice_that_is_no_text(given):
    with pytest.raises(Unsupported, match=r"^variant: got"):
        sageattn(*qkv(), variant=given)
    with pytest.raises(Unsupported, match=r"^pv_accum_dtype: got"):
        sageattention.sageattn_qk_int8_pv_fp16_cuda(*qkv(), pv_accum_dtype=given)


def test_meta_tensors_have_a_shape_only():
    assert sageattn(*(t.to("meta") for t in qkv())).is_meta


def test_variant_from_the_environment(monkeypatch, caplog):
    q, k, v = qkv()
    monkeypatch.setenv("SAGEATTENTION_VARIANT", QUANTISED)
    assert sageattention.explain(q, k, v).variant == QUANTISED
    assert torch.equal(sageattn(q, k, v), sageattn(q, k, v, variant=QUANTISED))
    assert sageattention.explain(q, k, v, variant="sdpa").variant == "sdpa"  # a name in the call wins
    monkeypatch.setenv("SAGEATTENTION_VARIANT", "")
    settings.forget()
    assert sageattention.explain(q, k, v).variant == "sdpa"
    monkeypatch.setenv("SAGEATTENTION_VARIANT", "fastest")
    settings.forget()
    for _ in range(2):
        assert torch.equal(sageattn(q, k, v), sageattn(q, k, v, variant="sdpa"))
    assert caplog.text.count("SAGEATTENTION_VARIANT is 'fastest'") == caplog.text.count("'sageattn_qk_int8_pv_fp16_triton'") == 1
    monkeypatch.setenv("SAGEATTENTION_VARIANT", "sageattn_qk_int8_pv_fp8_cuda")
    settings.forget()
    for _ in range(2):
        assert torch.equal(sageattn(q, k, v), sageattn(q, k, v, variant="sdpa"))
    assert caplog.text.count("needs a tensor on an NVIDIA GPU") == 1
    with pytest.raises(Unsupported, match="NVIDIA"):  # a name in the call is an order
        sageattn(q, k, v, variant="sageattn_qk_int8_pv_fp8_cuda")


def test_the_first_call_of_each_variant_is_told_whichever_way_it_came(monkeypatch, caplog):
    q, k, v = qkv()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            sageattn(q, k, v)
            sageattn(q, k, v, variant=QUANTISED)
            sageattention.scaled_dot_product_attention(q, k, v)
        torch._dynamo.reset()
        monkeypatch.setattr(dispatch, "_ran", {"sdpa"})
        torch.compile(lambda q: sageattn(q, k, v, variant=QUANTISED), backend="eager")(q)
    told = [r.getMessage() for r in caplog.records if r.name == "sageattention"]
    assert [line.split(":")[1].split()[-1] for line in told] == ["sdpa", QUANTISED, QUANTISED]
    assert "on cpu tensors quantising gains nothing" in told[0]


def test_arch_from_the_environment(monkeypatch):
    monkeypatch.setenv("SAGEATTENTION_ARCH", "turing")
    with pytest.raises(Unsupported, match="SAGEATTENTION_ARCH"):
        sageattn(*qkv())


# --- in two steps


def test_a_prepared_call_computes_itself_or_says_why_it_is_left():
    q, k, v = qkv()
    call = sageattention.prepare(q, k, v, return_lse=True, variant=QUANTISED)
    assert call.left_to_model == ""
    for given, expected in zip(call.run(), sageattn(q, k, v, return_lse=True, variant=QUANTISED)):
        assert torch.equal(given, expected)
    left = sageattention.prepare(q, k, v)
    assert "cpu" in left.left_to_model and left.attempt() is None
    assert torch.equal(left.run()[0], sageattn(q, k, v)) and left.run()[1] is None
    with pytest.raises(Unsupported, match="tensor_layout"):
        sageattention.prepare(q, k, v, "BSHD")


def test_a_call_lets_go_of_k_and_v_only_where_they_are_kept_quantised():
    q, k, v = qkv()
    released = []
    call = sageattention.prepare(q, k, v, variant=QUANTISED)
    call.run(release=lambda: released.append(True))
    assert not released and call.k is k  # this variant has no halves
