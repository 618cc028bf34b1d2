"""The call forms of other programs on a GPU, for every variant that runs there, eager and compiled, against fp32 (marker gpu)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import callforms
import pytest
import torch
from callforms import BY_KEYWORD, IN_TORCHS_PLACE, TORCH, TORCHS, in_torchs_place, torchs

import sageattention
from sageattention import available_variants
from sageattention.variants import VARIANTS

pytestmark = pytest.mark.gpu

BOUND = 0.06  # the FP8 variants' relative L2 on normal inputs is under .04


def functions() -> dict[str, Callable[..., Any]]:
    """`sageattn` and the function of each variant that is ready; without a GPU all, to be listed."""
    found = {"auto": sageattention.sageattn}
    names = [name for name, variant in VARIANTS.items() if variant.has_kernels]
    if torch.cuda.is_available():
        names = [a.name for a in available_variants("cuda") if a.status == "ready" and a.name in names]
    return found | {name: getattr(sageattention, name) for name in names}


FUNCTIONS = functions()


@pytest.fixture(params=FUNCTIONS)
def function(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return FUNCTIONS[request.param]


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def compiled(request: pytest.FixtureRequest) -> bool:
    torch._dynamo.reset()
    return request.param


def run(form: callforms.Form, function: Callable[..., Any], compiled: bool, *given: Any) -> Any:
    """A form's result; a compiled one has no graph break."""
    call = functools.partial(form.call, function)
    return (torch.compile(lambda *given: call(*given), backend="aot_eager", fullgraph=True) if compiled else call)(*given)


@pytest.mark.parametrize("name", BY_KEYWORD)
def test_programs_calls(name: str, function: Callable[..., Any], compiled: bool) -> None:
    form = BY_KEYWORD[name]
    (q, k, v), mask = form.tensors("cuda")
    assert callforms.error(run(form, function, compiled, q, k, v, mask), form.truth(q, k, v, mask)) < BOUND


@pytest.mark.parametrize("bound", [False, True], ids=["function", "partial"])
@pytest.mark.parametrize("name", IN_TORCHS_PLACE)
def test_in_torchs_place(name: str, bound: bool, function: Callable[..., Any], compiled: bool) -> None:
    form = IN_TORCHS_PLACE[name]
    (q, k, v), mask = form.tensors("cuda")
    exact = form.truth(q, k, v, mask)
    with in_torchs_place(functools.partial(function, smooth_k=True) if bound else function):
        result = run(form, torchs, compiled, q, k, v, mask)
    assert result.dtype == q.dtype and callforms.error(result, exact) < BOUND
    if name in TORCHS:
        torch.testing.assert_close(result, form.call(TORCH, q, k, v, mask))


@pytest.mark.parametrize("name", IN_TORCHS_PLACE)
def test_torchs_signature(name: str, compiled: bool) -> None:
    form = IN_TORCHS_PLACE[name]
    (q, k, v), mask = form.tensors("cuda")
    result = run(form, sageattention.scaled_dot_product_attention, compiled, q, k, v, mask)
    assert callforms.error(result, form.truth(q, k, v, mask)) < BOUND


@pytest.mark.parametrize("name", ["ComfyUI", "a ring's step", "fewer heads"])
@pytest.mark.parametrize("head_dim", [40, 128, 256])
def test_long_calls(name: str, head_dim: int, function: Callable[..., Any]) -> None:
    """Above the lengths from which "auto" quantises."""
    form = dataclasses.replace(BY_KEYWORD[name], head_dim=head_dim, len_q=4200, len_kv=4200, dtype=torch.bfloat16)
    (q, k, v), mask = form.tensors("cuda")
    assert callforms.error(form.call(function, q, k, v, mask), form.truth(q, k, v, mask)) < BOUND


def test_multihead_attention(function: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(256, 4, batch_first=True, device="cuda", dtype=torch.float16)
    x = torch.randn(2, 90, 256, device="cuda", dtype=torch.float16)
    mask = torch.zeros(90, 90, device="cuda", dtype=torch.float16).masked_fill(torch.ones(90, 90, device="cuda").triu(1).bool(), -torch.inf)
    for options in ({}, {"attn_mask": mask}):
        exact = layer(x, x, x, need_weights=False, **options)[0]
        with in_torchs_place(function), torch.no_grad():
            out = layer(x, x, x, need_weights=False, **options)[0]
        assert float((out - exact).float().norm() / exact.float().norm()) < BOUND
        with in_torchs_place(function):  # a gradient is torch's
            layer(x, x, x, need_weights=False, **options)[0].sum().backward()
        assert layer.in_proj_weight.grad.isfinite().all()
