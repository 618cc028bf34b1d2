"""The cost model by itself: what a call's work is, and that a fit finds costs again."""

from __future__ import annotations

import random

import pytest

from sageattention.planning import cost
from sageattention.planning.cost import KINDS, MI, RESIDENT, Cost, Form, Way, Work, fit
from sageattention.planning.problem import Problem


def form(**changes):
    return Form(**{"heads": 24, "heads_kv": 24, "len_q": 4096, "len_kv": 4096, "head_dim": 128, **changes})


def work_of(form, multiprocessors, kv_bytes=0, **changes):
    return cost.work_of(form, Way(form.kind, **{"kv_bytes": kv_bytes, "torch": not kv_bytes, **changes}), multiprocessors)


def test_work_in_figures():
    """24 heads of 32 blocks over 132 multiprocessors are six waves."""
    work = work_of(form(), 132)
    assert (work.call, work.waves, work.wave_keys, work.idle_keys) == (1, 6, 24, 0)
    assert work.blocks == pytest.approx(24 * 32 / 132) and work.grouped == 0
    assert work.pairs == pytest.approx(24 * 4096 * 4096 / 132 / MI) and work.products == 2 * work.pairs
    assert work.query == work.key == 24 * 4096 * 128 / MI and work.mask == work.converted == 0


def test_work_of_grouped_heads_and_wide_elements():
    work = work_of(form(heads_kv=6, itemsize=4), 132)
    assert work.key == 12 * 4096 * 128 / MI and work.query == 4 * work.key


@pytest.mark.parametrize(("len_q", "len_kv", "keys"), [(4, 4, 2.5), (2, 4, 1.5), (4, 2, 1.75)])
def test_a_causal_query_sees_itself_and_those_before_it(len_q, len_kv, keys):
    assert form(len_q=len_q, len_kv=len_kv, mask="causal").keys_of_a_query == keys


def test_work_of_few_and_of_many_heads():
    """A head of 32 blocks leaves 100 of 132 multiprocessors idle; K and V of 136 heads take more than 126 MiB."""
    assert work_of(form(heads=1, heads_kv=1), 132).idle_keys == pytest.approx(4 * 100 / 132)
    # Three groups of 46 heads, of which two are attended at a time: 92 heads of 32 blocks are 23 waves, the other 44 are 11.
    assert work_of(form(heads=136, heads_kv=136), 132, 256).grouped == 4 * (23 + 11 - 33)
    assert work_of(form(heads=126, heads_kv=126), 132, 256).grouped == work_of(form(heads=136, heads_kv=136), 132).grouped == 0


def test_heads_that_fit_the_workspace_one_by_one_leave_multiprocessors_idle_each_time() -> None:
    """Six heads of a block each, 60 MiB of K and V: two at a time."""
    work = work_of(form(heads=6, heads_kv=6, len_q=128, len_kv=245_760), 132, 256)
    assert work.idle_keys == pytest.approx(3 * 240 * 130 / 132) and work.grouped == 2 * 240


def test_a_tile_of_keys_that_is_not_full_takes_as_long() -> None:
    keys = [work_of(form(len_kv=n), 132, tile=tile).wave_keys * 1024 / 6 for n, tile in ((77, 128), (128, 128), (129, 128), (129, 64))]
    assert keys == [128, 128, 256, 192]
    resident = cost.work_of(form(len_kv=77), Way((128, RESIDENT), 192, 64), 132)
    assert resident.blocks == pytest.approx(24 * 22 / 132) and resident.converted == resident.grouped == 0


def test_a_wave_of_causal_blocks_takes_as_long_as_the_longest() -> None:
    few, many = (work_of(form(heads=heads, heads_kv=heads, mask="causal"), 132) for heads in (1, 33))
    assert few.wave_keys == 4 and many.wave_keys == pytest.approx(8 * 4097 / 2 / 1024)


def test_work_of_masks():
    dense = work_of(form(len_kv=4095, mask="additive", mask_rows=4096), 132)
    assert dense.mask == 4096 * 4095 * 2 / MI and dense.converted == 0
    assert work_of(form(mask="bool", mask_rows=4096), 132).mask == 4096 * 4096 / MI
    torch, ours = (work_of(form(mask="bool", mask_rows=4096), 132, kv_bytes) for kv_bytes in (0, 256))
    assert torch.converted == 1 and torch.converted_mask == torch.mask and ours.converted == ours.converted_mask == 0


def test_more_than_192_channels_are_for_other_kernels_of_torch() -> None:
    assert [work_of(form(head_dim=d), 132).wide for d in (192, 256)] == [0, 24] and work_of(form(head_dim=256), 132, 512).wide == 0


@pytest.mark.parametrize(
    ("changes", "mask", "rows"),
    [
        ({}, "none", 1),
        ({"causal": True}, "causal", 1),
        ({"mask": "bool", "mask_shape": (2, 1, 1)}, "keys", 2),
        ({"mask": "additive", "mask_shape": (1, 1, 1)}, "keys", 1),
        ({"mask": "bool", "mask_shape": (1, 1, 64)}, "bool", 64),
        ({"mask": "additive", "mask_shape": (2, 8, 64)}, "additive", 1024),
        ({"mask": "bool", "mask_shape": (1, 1, 1), "causal": True}, "bool", 1),
    ],
)
def test_the_form_of_a_call(changes, mask, rows):
    problem = Problem(2, 8, 4, 64, 96, 40, "float16", "cuda", 0, **changes)
    found = Form.of(problem)
    assert found == Form(16, 8, 64, 96, 40, mask, rows, 2) and found.kind == (64, mask) and found.kind in KINDS


TRUE = Cost(call=12.0, waves=3.0, wave_keys=6.0, pairs=20.0, products=1.5, query=0.5, key=3.0)
PRIOR = Cost(5.0, 2.0, 3.0, 0.3, 1.0, 0.5, 3.0, 0.5, 0.1, 0.5, 1.0, 0.2)


def some(count, seed=0, longest=16384):
    r = random.Random(seed)
    for _ in range(count):
        heads = r.randint(1, 48)
        yield work_of(form(heads=heads, heads_kv=heads, len_q=r.randint(64, longest), len_kv=r.randint(64, longest)), 132)


def test_a_fit_of_many_times_finds_them_again():
    found = fit([(work, TRUE.ms(work), 1.0) for work in some(300)], PRIOR)
    for work in some(60, seed=1, longest=65536):
        assert found.ms(work) == pytest.approx(TRUE.ms(work), rel=0.03)


def test_a_fit_withstands_noise():
    r = random.Random(2)
    found = fit([(work, TRUE.ms(work) * r.uniform(0.95, 1.05), 1.0) for work in some(300)], PRIOR)
    for work in some(60, seed=1):
        assert found.ms(work) == pytest.approx(TRUE.ms(work), rel=0.08)


def test_a_single_time_scales_the_prior():
    work = next(some(1))
    found = fit([(work, 3 * PRIOR.ms(work), 1.0)], PRIOR)
    assert found == pytest.approx([3 * cost for cost in PRIOR])


def test_a_weight_is_so_many_calls():
    timed = [(work, TRUE.ms(work) * (2 if index else 1), 1.0) for index, work in enumerate(some(12))]
    (work, ms, _), others = timed[0], timed[1:]
    found, repeated = fit([(work, ms, 5.0), *others], PRIOR), fit([(work, ms, 1.0)] * 5 + others, PRIOR)
    assert found.ms(work) == pytest.approx(repeated.ms(work), rel=0.2)
    assert abs(found.ms(work) / ms - 1) < abs(fit(timed, PRIOR).ms(work) / ms - 1)


def test_nothing_measured_leaves_the_prior():
    assert fit([], PRIOR) == PRIOR


def test_no_cost_is_negative():
    works = list(some(20))
    found = fit([(work, TRUE.ms(work) * (1 + index % 2), 1.0) for index, work in enumerate(works)], PRIOR)
    assert min(found) >= 0 and isinstance(found, Cost) and Work._fields == Cost._fields
