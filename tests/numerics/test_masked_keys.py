"""Keys that a mask hides from every query are absent: whatever they hold, the error is that of the call without them."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

import masked  # noqa: E402
from schemes import each_scheme  # noqa: E402

from sageattention.cli import workloads  # noqa: E402
from sageattention.numerics.constants import NEGLIGIBLE_BIAS  # noqa: E402
from sageattention.numerics.live_keys import CHUNK, live_keys  # noqa: E402
from sageattention.numerics.reference import emulate, oracle  # noqa: E402


@each_scheme
@pytest.mark.parametrize("case", masked.CASES, ids=lambda case: case.name)
def test_error_is_that_of_the_keys_cut_off(case: masked.Case, scheme) -> None:
    spoilt, cut = case.spoilt(), case.cut()
    exact = oracle(**cut)[0]
    error = workloads.relative_l2(emulate(**spoilt, scheme=scheme)[0], exact)
    alone = workloads.relative_l2(emulate(**cut, scheme=scheme)[0], exact)
    assert error <= 1.05 * alone


# --- which keys are live


def expected(mask: torch.Tensor, heads_kv: int, len_q: int, len_kv: int, is_causal: bool) -> torch.Tensor:
    """The definition, a query at a time in fp64."""
    batch, heads = mask.shape[:2]
    live = torch.zeros(batch, heads_kv if heads > 1 else 1, len_kv, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(len_q):
                row = mask[b, h].expand(len_q, len_kv)[i].clone()
                bias = torch.where(row, 0.0, -math.inf).double() if row.dtype == torch.bool else row.double()
                if is_causal:
                    bias[i + 1 :] = -math.inf
                live[b, h * heads_kv // heads] |= (bias > -math.inf) & (bias >= bias.max() - NEGLIGIBLE_BIAS)
    return live


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 33), (2, 1, 1, 33), (2, 4, 20, 33), (1, 4, 20, 1), (1, 1, 20, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32])
def test_live_keys(dtype: torch.dtype, shape: tuple, is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=g) > 0.9
    if dtype != torch.bool:
        bias = torch.where(torch.rand(shape, generator=g) < 0.2, -2e4, 3 * torch.randn(shape, generator=g))
        mask = bias.masked_fill(~mask, -math.inf).to(dtype)
    for chunk in (CHUNK, 100):  # all rows at once and one at a time
        monkeypatch.setattr("sageattention.numerics.live_keys.CHUNK", chunk)
        assert torch.equal(live_keys(mask, 2, 20, 33, is_causal), expected(mask, 2, 20, 33, is_causal))


def test_what_is_the_same_for_all_is_looked_at_once() -> None:
    mask = torch.rand(2, 1, 1, 33) > 0.5
    assert torch.equal(live_keys(mask.expand(2, 4, 20, 33), 2, 20, 33), mask[:, :, 0])


@pytest.mark.parametrize("lowest", [-1e4, torch.finfo(torch.float32).min])
def test_a_finite_bias_on_all_keys_of_a_row_hides_none(lowest: float) -> None:
    mask = torch.zeros(1, 1, 2, 10)
    mask[0, 0, 0, 3:] = -math.inf
    mask[0, 0, 1] = lowest
    assert live_keys(mask, 1, 2, 10).all()


# --- rows without a key, rows of finite biases


@each_scheme
@pytest.mark.parametrize("additive", [False, True])
def test_rows_without_a_key_are_zero_whatever_keys_hold(additive: bool, scheme) -> None:
    call = masked.Case("", 300, masked.one_in(3), masked.filled(math.nan), "dense", heads=2).spoilt()
    call["attn_mask"][:, :, 5] = False
    if additive:
        call["attn_mask"] = torch.zeros(call["attn_mask"].shape).masked_fill(~call["attn_mask"], -math.inf)
    out, lse = emulate(**call, scheme=scheme)
    assert (out[:, :, 5] == 0).all() and (lse[:, :, 5] == -math.inf).all()
    out, lse = out[:, :, torch.arange(128) != 5], lse[:, :, torch.arange(128) != 5]
    assert out.isfinite().all() and lse.isfinite().all() and out.any()


@each_scheme
@pytest.mark.parametrize("hidden", [torch.tensor(False), torch.tensor(-math.inf)], ids=["bool", "additive"])
def test_no_key_for_anyone(hidden: torch.Tensor, scheme) -> None:
    q = torch.randn(1, 2, 5, 64)
    nothing = torch.full((1, 2, 100, 64), math.nan)
    out, lse = emulate(q, nothing, nothing, scheme, attn_mask=hidden.expand(1, 1, 5, 100))
    assert (out == 0).all() and (lse == -math.inf).all()


@each_scheme
@pytest.mark.parametrize("lowest", [-1e4, torch.finfo(torch.float32).min])
def test_rows_of_one_finite_bias_are_softmax_over_all_keys(lowest: float, scheme) -> None:
    """ComfyUI's masks of finfo.min: where a whole row has it, torch's own attention is the plain softmax over all its keys."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 64, generator=g) for n in (40, 300, 300))
    mask = torch.zeros(1, 1, 40, 300)
    mask[..., 100:] = lowest
    mask[:, :, 7] = lowest
    exact = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), attn_mask=mask.double())
    out, _ = emulate(q, k, v, scheme, attn_mask=mask)
    if lowest < -1e30:  # fp32 keeps nothing of a score beside it: the plain average
        exact[:, :, 7] = v.double().mean(2)
    assert workloads.relative_l2(out[:, :, 7], exact[:, :, 7]) < 0.06
    assert workloads.relative_l2(out, exact) < 0.06
