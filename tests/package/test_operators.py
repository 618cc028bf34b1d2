"""Under torch.compile a call is one registered operator: no graph break, the eager call's bits, and room for a second copy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import sageattention  # noqa: E402
from sageattention import Unsupported, api, dispatch, torch_library  # noqa: E402
from sageattention.backends import sdpa  # noqa: E402

PACKAGE = Path(sageattention.__file__).parent


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(layout="HND", heads_kv=2, head_dim=40):
    generator = torch.Generator().manual_seed(5)

    def one(heads, tokens):
        shape = (2, heads, tokens, head_dim) if layout == "HND" else (2, tokens, heads, head_dim)
        return torch.randn(shape, generator=generator)

    return one(4, 65), one(heads_kv, 70), one(heads_kv, 70)


def nodes(function, *args):
    """The graphs that torch.compile makes of a call, as lists of call targets; and its result."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    return torch.compile(function, fullgraph=True, backend=backend)(*args), graphs


CALLS = {
    "auto": dict(),
    "reference": dict(variant="reference"),
    "lse": dict(variant="reference", return_lse=True),
    "causal": dict(variant="reference", is_causal=True, sm_scale=0.3),
    "bool mask": dict(variant="reference", attn_mask=torch.ones(65, 70).tril().bool()),
    "NHD": dict(variant="reference", tensor_layout="NHD", return_lse=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_call_is_one_operator_with_the_eager_bits(name):
    arguments = CALLS[name]
    q, k, v = tensors(arguments.get("tensor_layout", "HND"))
    call = lambda q, k, v: sageattention.sageattn(q, k, v, **arguments)  # noqa: E731
    compiled, graphs = nodes(call, q, k, v)
    expected = call(q, k, v)
    operator = "attention_lse" if arguments.get("return_lse") else "attention"
    assert [t for t in graphs[0] if "getitem" not in t] == [f"{torch_library.NAMESPACE}.{operator}.default"]
    for got, want in zip(*((r if isinstance(r, tuple) else (r,)) for r in (compiled, expected))):
        assert torch.equal(got, want) and got.stride() == want.stride() and got.dtype == want.dtype


def test_an_eager_call_after_a_compiled_one_compiles_nothing_anew(monkeypatch):
    monkeypatch.setattr(api, "_loaded", None)  # as in a process whose first call is compiled
    graphs, (q, k, v) = [], tensors()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *args: sageattention.sageattn(*args), fullgraph=True, backend=backend)
    for call in (compiled, sageattention.sageattn, compiled):
        call(q, k, v)
    assert len(graphs) == 1 and api._loaded is dispatch


def test_the_legacy_names_compile_to_the_same_operator():
    q, k, v = tensors()

    def call(q, k, v):
        return sageattention.sageattn_qk_int8_pv_fp16_cuda(q, k, v, pv_accum_dtype="fp32")

    with pytest.raises(Exception, match="sageattn_qk_int8_pv_fp16_cuda needs a tensor on an NVIDIA GPU") as caught:
        nodes(call, q, k, v)
    assert isinstance(caught.value, Unsupported) or isinstance(caught.value.__cause__, Unsupported)


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_compiled_call_keeps_its_gradient_or_refuses_it(return_lse):
    """An operator has no gradient; behind AOTAutograd, as in every real compilation, it would give none in silence."""
    q, k, v = tensors()
    q.requires_grad_()

    def call(q, k, v, variant):
        out = sageattention.sageattn(q, k, v, variant=variant, return_lse=return_lse)
        return (out[0] if return_lse else out) * 2

    compiled = torch.compile(call, backend="aot_eager")
    expected = torch.autograd.grad(call(q, k, v, "auto").square().sum(), q)[0]
    assert torch.equal(torch.autograd.grad(compiled(q, k, v, "auto").square().sum(), q)[0], expected)
    with pytest.raises(Unsupported, match="gradient"):
        compiled(q, k, v, "reference")
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v, "reference"), call(q, k, v, "reference"))


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_weights_for_constants(strict):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(40, 40)

        def forward(self, q, k, v):
            return sageattention.sageattn(self.linear(q), k, v, variant="reference")

    q, k, v = tensors()
    layer = Layer()
    # torch < 2.7 does not tell a strict export from torch.compile, whose calls with a gradient are no operators.
    told = hasattr(torch.compiler, "is_exporting")
    with torch.set_grad_enabled(told or not strict):
        exported = torch.export.export(layer, (q, k, v), strict=strict)
    with torch.no_grad():
        assert torch.equal(exported.module()(q, k, v), layer(q, k, v))


def test_eager_calls_do_not_pass_through_the_operator(monkeypatch):
    monkeypatch.setattr(torch_library, "attention", None)
    q, k, v = tensors()
    assert sageattention.sageattn(q, k, v, variant="reference").shape == q.shape


@pytest.mark.parametrize("variant", ["reference", "auto"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("operator", ["attention", "attention_lse"])
def test_the_operators_keep_torchs_rules(operator, layout, variant):
    """Schema, fake implementation and dynamic shapes, as torch checks them."""
    q, k, v = tensors(layout)
    mask = torch.randn(1, 1, 65, 70)
    arguments = (q, k.transpose(1, 2).contiguous().transpose(1, 2), v, mask, layout, False, None, variant, "")
    torch.library.opcheck(getattr(torch_library, operator), arguments)


@pytest.mark.parametrize("operator", ["varlen", "varlen_lse"])
def test_the_packed_operators_keep_torchs_rules(operator):
    q, k, v = (t[0].transpose(0, 1) for t in tensors())
    offsets = torch.tensor([0, 20, 65]), torch.tensor([0, 30, 70])
    torch.library.opcheck(getattr(torch_library, operator), (q, k, v, *offsets, 45, 40, False, None, "auto", ""))


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_the_sparse_operator_keeps_torchs_rules(layout):
    q, k, v = tensors(layout)
    of_heads = torch.full((4,), 0.5)
    arguments = ("topk", None, None, None, of_heads, 0.0, 128, True, None, None, [0, 4], [], None, None, None, None, torch.ones_like(q))
    torch.library.opcheck(torch_library.sparse, (q, k, v, layout, False, None, "reference", *arguments))


def test_a_non_contiguous_result_is_handed_over_as_the_fake_says(monkeypatch):
    q, k, v = tensors()
    want = sageattention.prepare(q, k, v, variant="sdpa").run()
    monkeypatch.setattr(sdpa, "run", lambda call: (want[0].transpose(1, 2).contiguous().transpose(1, 2), None))
    got = torch_library.attention(q, k, v, None, "HND", False, None, "sdpa", "")
    assert got.is_contiguous() and torch.equal(got, want[0])


def load_copy(name):
    """The package once more, under another name, as a node pack that bundles it does."""
    spec = importlib.util.spec_from_file_location(name, PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def forget_copy(name):
    for key in [key for key in sys.modules if key == name or key.startswith(name + ".")]:
        del sys.modules[key]


def test_copies_of_the_package_live_side_by_side():
    q, k, v = tensors()
    want = sageattention.sageattn(q, k, v, variant="reference")
    seen, alive = [], []
    for _ in range(2):  # the second time under a name that is taken
        copy = load_copy("_a_pack_bundled")
        try:
            got, graphs = nodes(lambda q, k, v: copy.sageattn(q, k, v, variant="reference"), q, k, v)  # noqa: B023
            assert torch.equal(got, want)
            seen.append(graphs[0][0])
            alive.append(sys.modules["_a_pack_bundled.torch_library"])
        finally:
            forget_copy("_a_pack_bundled")
        torch._dynamo.reset()
        for name in [name for name in globals() if name.startswith("__import__a_pack")]:  # torch 2.5's compiler keeps the modules here
            del globals()[name]
    assert seen == ["_a_pack_bundled.attention.default", "_a_pack_bundled_2.attention.default"]
    _, graphs = nodes(lambda q, k, v: sageattention.sageattn(q, k, v, variant="reference"), q, k, v)
    assert graphs[0][0] == "sageattention.attention.default"


def test_a_copy_in_a_folder_whose_name_torch_would_refuse():
    """ComfyUI names a pack's modules by its path; torch's namespaces are ASCII."""
    q, k, v = tensors()
    name = "/home/Jörg/ComfyUI/custom_nodes/注意/sage-pack_x_1"
    copy = load_copy(name)
    try:
        got, graphs = nodes(lambda q, k, v: copy.sageattn(q, k, v, variant="reference"), q, k, v)
        assert torch.equal(got, sageattention.sageattn(q, k, v, variant="reference"))
        assert graphs[0][0] == "_home_J_rg_ComfyUI_custom_nodes____sage_pack_x_1.attention.default"
    finally:
        forget_copy(name)
