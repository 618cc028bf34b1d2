"""Hopper's own attention kernels without a GPU: scheduler, producers, main loops and epilogues of a CTA, its products by wgmma and its
barriers emulated lane by lane (tests/lanes). Products are computed when they are waited for.
"""

from __future__ import annotations

import extremes
import matrix
import pytest
import torch
from emulated_card import Lanes, install, lanes_of, needs_compiler, on_card

from sageattention import dispatch
from sageattention.backends.call import PreparedCall
from sageattention.backends.cuda import host
from sageattention.numerics.reference import emulate, oracle
from sageattention.planning.plan import plan
from sageattention.variants import VARIANTS

pytestmark = needs_compiler

HOPPER = [v.name for v in VARIANTS.values() if any(k.arch for k in v.kernels)]


@pytest.fixture(scope="module", params=[64, 128, 256], ids="d{}".format)
def lanes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lanes:
    return lanes_of(90, request.param, tmp_path_factory.mktemp("hopper"), wgmma=True)


@pytest.fixture
def card(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> Lanes:
    return install(monkeypatch, lanes)


@pytest.mark.parametrize("variant", HOPPER)
@pytest.mark.parametrize(
    "mask, dtype, layout, heads, lengths",
    [
        ("none", "bfloat16", "HND", (2, 1), (200, 300)),
        ("none", "float32", "NHD", (3, 3), (130, 520)),
        ("causal", "float16", "NHD", (1, 1), (300, 300)),
        ("causal+bool", "bfloat16", "HND", (2, 2), (140, 170)),
        ("additive", "bfloat16", "NHD", (1, 1), (150, 260)),
        ("row", "float16", "HND", (2, 1), (20, 165)),
    ],
)
def test_kernels_agree_with_the_emulation(
    card: Lanes, mask: str, dtype: str, layout: str, heads: tuple, lengths: tuple, variant: str
) -> None:
    head_dim = card.head_dim - 24  # padded inside the kernels
    t, given_mask = matrix.tensors(matrix.Case(head_dim, dtype, layout, mask, *heads, *lengths))
    given = t if layout == "HND" else {n: x.transpose(1, 2).contiguous() for n, x in t.items()}
    causal = "causal" in mask
    problem = on_card(given, attn_mask=given_mask, tensor_layout=layout, is_causal=causal)
    chosen = plan(problem, card.capability, variant)
    chosen = chosen.halves or chosen  # kernels that quantise K and V themselves have tests of their own (test_device_resident.py)
    assert chosen.kernels.arch == 90 and not chosen.kernels.resident
    out, lse = host.run(PreparedCall(*given.values(), dispatch._four_dims(given_mask), problem, chosen, {}))
    out = out if layout == "HND" else out.transpose(1, 2)
    expected, expected_lse = emulate(**t, scheme=chosen.scheme, is_causal=causal, attn_mask=given_mask)
    exact, exact_lse = oracle(**t, is_causal=causal, attn_mask=given_mask)
    assert out.isfinite().all()
    assert matrix.workloads.relative_l2(out, expected) <= matrix.EMULATION_BOUND[chosen.scheme.pv] + matrix.OUTPUT_STEP[dtype]
    assert matrix.workloads.relative_l2(out, exact) <= 0.08
    masked = exact_lse == -torch.inf
    assert (out[masked] == 0).all() and (lse[masked] == -torch.inf).all()
    assert (lse - expected_lse)[~masked].abs().mean() <= 2e-3


@pytest.mark.parametrize("lanes", [64], ids="d{}".format, indirect=True)
@pytest.mark.parametrize("variant", HOPPER)
def test_one_key_far_below_the_zeros_behind_it_has_a_log_sum_exp(card: Lanes, variant: str) -> None:
    t = extremes.tensors(**extremes.LONE_KEY)
    problem = on_card(t)
    out, lse = host.run(PreparedCall(*t.values(), None, problem, plan(problem, card.capability, variant), {}))
    assert out.isfinite().all()
    torch.testing.assert_close(lse.double(), oracle(**t)[1], rtol=1e-3, atol=0)
