"""Calls that are differentiated, transformed, traced, or made of tensors without data."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from api_calls import QUANTISED, qkv  # noqa: E402

import sageattention  # noqa: E402
from sageattention import Unsupported, sageattn  # noqa: E402


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


def test_meta_tensors_have_a_shape_only():
    assert sageattn(*(t.to("meta") for t in qkv())).is_meta


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
