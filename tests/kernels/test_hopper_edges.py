"""Hopper's attention kernels on the host, where test_hopper_lanes.py does not look: work tiles shared by CTAs, any number of
multiprocessors, tails that FP8 would lose, inputs near the ends of their range.
"""

from __future__ import annotations

import matrix
import pytest
import torch
from emulated_card import Lanes, install, lanes_of, needs_compiler, on_card

from sageattention import dispatch
from sageattention.backends.call import PreparedCall
from sageattention.backends.cuda import host, workspace
from sageattention.numerics.reference import emulate, oracle
from sageattention.planning.plan import CudaPlan, plan
from sageattention.variants import CUDA_FP8_SM90, CUDA_FP16

pytestmark = needs_compiler
VARIANTS = {"fp16": CUDA_FP16, "fp8": CUDA_FP8_SM90}
each_pv = pytest.mark.parametrize("pv", VARIANTS)


@pytest.fixture(scope="module", params=[128, 256], ids="d{}".format)
def lanes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lanes:
    return lanes_of(90, request.param, tmp_path_factory.mktemp("hopper"), wgmma=True)


@pytest.fixture
def card(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> Lanes:
    return install(monkeypatch, lanes)


def run(card: Lanes, tensors: dict[str, torch.Tensor], mask: torch.Tensor | None, pv: str, **options) -> tuple:
    """(out, lse, plan, launch plan) of the call by wgmma."""
    problem = on_card(tensors, attn_mask=mask, **options)
    chosen = plan(problem, card.capability, VARIANTS[pv].name)
    assert isinstance(chosen, CudaPlan) and chosen.kernels.arch == 90
    chosen = chosen.halves or chosen  # kernels that quantise K and V themselves have tests of their own (test_device_resident.py)
    out, lse = host.run(PreparedCall(*tensors.values(), dispatch._four_dims(mask), problem, chosen, {}))
    return out, lse, chosen, workspace.launch_plan_of(problem, chosen)


@each_pv
@pytest.mark.parametrize("tiles", [3, 5])
def test_ctas_that_share_a_work_tile_merge_its_parts(card: Lanes, pv: str, tiles: int) -> None:
    """`tiles` work tiles on two CTAs: the last one is split, and its rows are as right as the others."""
    t, _ = matrix.tensors(matrix.Case(card.head_dim, heads_q=1, heads_kv=1, len_q=128 * tiles, len_kv=700))
    t = {name: x[:1] for name, x in t.items()}
    out, lse, chosen, launches = run(card, t, None, pv)
    assert launches.shares and launches.workspace.split_kv_ready > launches.workspace.split_kv_workspace
    expected, _ = emulate(**t, scheme=chosen.scheme)
    exact, exact_lse = oracle(**t)
    for row in range(0, 128 * tiles, 128):
        rows = slice(row, row + 128)
        off, own = (matrix.workloads.relative_l2(x[:, :, rows], exact[:, :, rows]) for x in (out, expected))
        assert off <= 1.05 * own + matrix.OUTPUT_STEP["bfloat16"], row
    assert (lse - exact_lse).abs().max() <= 0.02


@each_pv
def test_a_flat_tail_far_below_a_sink_keeps_its_weight(card: Lanes, pv: str) -> None:
    """One key, the last, 10 nats above 2,048 alike ones whose values say the opposite. FP8 PV without the tail's boost is off by .12."""
    d, n = card.head_dim, 2049
    q = torch.zeros(1, 1, 4, d)
    q[..., 0] = d**0.5
    k, v = torch.zeros(1, 1, n, d), 0.2 * torch.randn(1, 1, n, d, generator=torch.Generator().manual_seed(0)) - 1
    k[..., -1, 0], v[..., -1, :] = 10.0, 1.0
    out, *_ = run(card, {"q": q, "k": k, "v": v}, None, pv)
    assert matrix.workloads.relative_l2(out, oracle(q, k, v)[0]) <= 0.01


@each_pv
def test_any_finite_input_gives_finite_output(card: Lanes, pv: str) -> None:
    for size in (0.0, 1e-38, 1e30, 3.38e38):
        g = torch.Generator().manual_seed(0)
        q, k, v = (((torch.rand(1, 1, n, card.head_dim, generator=g) * 2 - 1) * size).bfloat16() for n in (20, 300, 300))
        k[0, 0, 3, 5] = v[0, 0, 9, 1] = 3.38e38
        out, lse, *_ = run(card, {"q": q, "k": k, "v": v}, None, pv)
        assert out.isfinite().all() and lse.isfinite().all(), size


@each_pv
@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
def test_the_number_of_multiprocessors_changes_rounding_alone(card: Lanes, monkeypatch: pytest.MonkeyPatch, pv: str, mask: str) -> None:
    t, given = matrix.tensors(matrix.Case(card.head_dim, mask=mask, heads_q=2, heads_kv=1, len_q=260, len_kv=260))
    exact = oracle(**t, is_causal=mask == "causal", attn_mask=given)[0]
    errors = []
    for count in (1, 3, 100):
        monkeypatch.setattr(card, "capability", card.capability._replace(multiprocessors=count))
        workspace.launch_plan_of.cache_clear()
        out, *_ = run(card, t, given, pv, is_causal=mask == "causal")
        errors.append(matrix.workloads.relative_l2(out, exact))
    assert max(errors) <= 1.05 * min(errors)
