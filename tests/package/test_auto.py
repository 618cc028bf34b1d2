"""What `auto` chooses by its predictions, and that the static ones follow the model that they claim to rest on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sageattention.device.capability import Capability
from sageattention.kernels.architectures import ARCHITECTURES
from sageattention.planning import datasheet, rules
from sageattention.planning.cost import ALIGNED, KINDS, RESIDENT, TORCH, UNALIGNED, Form
from sageattention.planning.measured import MEASURED
from sageattention.planning.problem import Problem
from sageattention.planning.rules import CANDIDATES, choose
from sageattention.planning.ways import kinds_of, way_of
from sageattention.variants import TRITON_FP16, VARIANTS, Candidate

ARCHS = tuple(ARCHITECTURES)
STATIC = tuple(arch for arch in ARCHS if arch not in MEASURED and CANDIDATES[arch])
TRITON = Candidate(TRITON_FP16.name)


def mma_gain(arch: int, candidate: Candidate) -> float:
    """How many times less the tensor cores work than in fp16 attention with fp32 accumulators."""
    return 2 / datasheet.MMA_RATES[arch]["fp16", "fp32"] / datasheet.products(arch, candidate)


def gpu(arch, name="some card", multiprocessors=100):
    return Capability("cuda", arch, multiprocessors, "native", name)


def problem(**changes):
    good = {"batch": 1, "heads_q": 24, "heads_kv": 24, "len_q": 4096, "len_kv": 4096, "head_dim": 128, "dtype": "bfloat16"}
    return Problem(**{**good, "device": "cuda", "device_index": 0, **changes})


@pytest.mark.parametrize("arch", ARCHS)
def test_candidates_are_what_there_is(arch):
    for candidate in CANDIDATES[arch]:
        variant = VARIANTS[candidate.variant]
        assert variant.has_kernels and candidate.accum in ("", *variant.accum)
        assert arch >= variant.min_arch and (not variant.archs or arch in variant.archs)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kind_of_call_has_a_prediction_for_every_candidate(arch):
    for kind in KINDS:
        for candidate in (TORCH, *CANDIDATES[arch]):
            assert all(candidate in rules.table(arch, 100)[own] for own in kinds_of(candidate, kind, arch))


@pytest.mark.parametrize("arch", STATIC)
def test_a_static_order_follows_the_rates_of_the_tensor_cores(arch):
    """Fastest first; Triton, the same products with more around them, last."""
    cuda = [mma_gain(arch, candidate) for candidate in CANDIDATES[arch] if candidate != TRITON]
    assert cuda == sorted(cuda, reverse=True) and cuda[-1] > 1.3
    found = choose(problem(len_q=32760, len_kv=32760), gpu(arch), arch)
    assert found.candidates == CANDIDATES[arch][: len(found.candidates)] and found.candidates[0] == CANDIDATES[arch][0]
    assert TRITON not in CANDIDATES[arch][:-1]


def test_the_model_in_figures():
    """What the white papers' rates make of it: 2 / (1 / INT8 + 1 / PV), in units of fp16 with fp32 sums."""
    assert mma_gain(86, Candidate.parse("sageattn_qk_int8_pv_int8_cuda")) == pytest.approx(4)
    assert mma_gain(86, Candidate.parse("sageattn_qk_int8_pv_fp16_cuda")) == pytest.approx(1.6)
    assert mma_gain(89, Candidate.parse("sageattn_qk_int8_pv_fp8_cuda:fp32+fp16")) == pytest.approx(4)
    assert mma_gain(89, Candidate.parse("sageattn_qk_int8_pv_fp8_cuda:fp32")) == pytest.approx(8 / 3)
    assert mma_gain(90, Candidate.parse("sageattn_qk_int8_pv_fp16_cuda")) == pytest.approx(4 / 3)


def test_a_static_cost_in_figures():
    """An RTX 4090's clocks a pair: 1 + .086 for PyTorch, .25 + .109 for INT8; two thirds of them count by waves."""
    per_key = datasheet.IN_WAVES * 128 * 1024 / 2.4e3
    torch, int8 = (datasheet.static_cost(89, candidate, (128, "none"), 128) for candidate in (TORCH, CANDIDATES[89][0]))
    assert torch.wave_keys == pytest.approx(per_key * (128 * 2 / 256 + 11 / 128))
    assert int8.wave_keys == pytest.approx(per_key * (128 * 2 / 1024 + 14 / 128))
    assert datasheet.static_cost(89, TORCH, (128, ALIGNED), 128).wave_keys == pytest.approx(2 * torch.wave_keys)


def test_the_document_has_the_model_s_figures():
    text = (Path(__file__).parents[2] / "docs" / "auto.md").read_text(encoding="utf-8")
    section = text[text.index("## The static model") :]
    order = ("int8_cuda", "fp8_cuda:fp32+fp16", "fp8_cuda:fp32", "fp16_cuda:fp16+fp32", "fp16_cuda")
    for arch, rates in datasheet.MMA_RATES.items():
        if arch == 100:
            continue
        row = re.search(rf"^\| {arch // 10}\.{arch % 10} \|(.*)\|$", section, re.MULTILINE)[1].split("|")
        for cell, name in zip(row, order):
            known = name.partition("_")[0] != "fp8" or ("fp8", "fp16") in rates
            assert cell.strip() == (f"{mma_gain(arch, Candidate.parse(f'sageattn_qk_int8_pv_{name}')):.2f}" if known else "–"), (arch, name)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("lengths", [(256, 256), (4096, 77), (77, 512)])
def test_short_calls_stay_with_sdpa(arch, lengths):
    found = choose(problem(len_q=lengths[0], len_kv=lengths[1]), gpu(arch), arch)
    assert not found.candidates and found.basis and found.reason


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if CANDIDATES[arch]])
def test_long_calls_are_quantised(arch):
    found = choose(problem(len_q=16384, len_kv=16384), gpu(arch), arch)
    assert found.candidates and found.predicted[found.candidates[0]] < found.predicted[TORCH]


def test_a_choice_says_both_times_and_what_they_rest_on():
    found = choose(problem(), gpu(89), 89)
    ours, torch_ms = found.predicted[found.candidates[0]], found.predicted[TORCH]
    assert found.reason.startswith(f"{ours:.3g} ms predicted, PyTorch's attention {torch_ms:.3g} ms") and "not measured" in found.reason
    assert found.basis == "static" and choose(problem(), gpu(90), 90).basis == "measured"


def test_no_gain_is_one_reason_for_all_calls():  # the log has a line for each reason
    found = [choose(problem(len_q=n, len_kv=n), gpu(89), 89) for n in (64, 256)]
    assert {f.reason for f in found} == {"no variant is predicted to gain (by its data sheet, not measured)"}
    assert all(set(f.predicted) == {TORCH, *CANDIDATES[89]} and not f.rejected for f in found)


def test_a_gain_within_the_margin_is_none():
    static = {TORCH: 1.0, TRITON: 0.95}
    assert rules.faster(static, "static") == () and rules.faster(static, "measured") == (TRITON,)


def test_fp32_is_slower_for_torch():
    single, half = (rules.predict(Form.of(problem(dtype=dtype)), gpu(89), 89)[0][TORCH] for dtype in ("float32", "bfloat16"))
    assert single > 1.9 * half


def test_an_unknown_number_of_multiprocessors_is_a_middling_one():  # `doctor` without a card
    assert choose(problem(), gpu(89, multiprocessors=0), 89).candidates


@pytest.mark.parametrize(
    ("name", "has"),
    [
        ("NVIDIA GeForce RTX 2060", True),
        ("NVIDIA GeForce RTX 2080 Ti", True),
        ("Tesla T4", True),
        ("Quadro RTX 4000", True),
        ("NVIDIA GeForce GTX 1650", False),
        ("NVIDIA GeForce GTX 1660 SUPER", False),
        ("NVIDIA GeForce MX450", False),
        ("NVIDIA T1000", False),
        ("Quadro T2000", False),
        ("NVIDIA T400 4GB", False),
    ],
)
def test_turing_without_tensor_cores_is_known_by_its_name(name, has):
    found = choose(problem(), gpu(75, name), 75)
    assert bool(found.candidates) == has
    assert has or "no tensor cores" in found.reason


@pytest.mark.parametrize(("arch", "family"), [(61, 75), (75, 75), (87, 86), (90, 90), (103, 100), (121, 120), (130, 120)])
def test_an_unknown_architecture_is_taken_for_the_one_before(arch, family):
    assert rules.family(arch) == family


# What is known of the H200 by other measurements than the fit's (docs/kernels.md).
H200 = gpu(90, "NVIDIA H200", 132)


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({"len_q": 4608, "len_kv": 4608}, True),
        ({"batch": 2, "heads_q": 10, "heads_kv": 10, "head_dim": 64}, True),
        ({"batch": 2, "heads_q": 8, "heads_kv": 8, "head_dim": 40}, True),
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 32760}, True),
        ({"batch": 2, "heads_q": 10, "heads_kv": 10, "head_dim": 64, "len_kv": 77}, False),
        ({"len_q": 1024, "len_kv": 1024}, False),
        ({"heads_q": 48, "heads_kv": 12, "len_q": 4608, "len_kv": 4608, "causal": True}, True),
        ({"len_q": 4608, "len_kv": 4608, "mask": "bool"}, True),
        ({"heads_q": 18, "heads_kv": 18, "len_q": 4352, "len_kv": 4352, "head_dim": 256}, True),
    ],
    ids=str,
)
def test_the_h200_is_as_it_was_measured(changes, ours):
    assert bool(choose(problem(**changes), H200, 90).candidates) == ours


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 512}, True),  # wan_cross
        ({"heads_q": 32, "heads_kv": 32, "len_q": 8160, "len_kv": 512, "head_dim": 64}, True),  # ltx_av
        ({"heads_q": 32, "heads_kv": 32, "len_q": 16384, "len_kv": 512, "head_dim": 64}, True),
        ({"heads_q": 24, "heads_kv": 24, "len_q": 4096, "len_kv": 256}, False),
        ({"heads_q": 40, "heads_kv": 40, "len_q": 2048, "len_kv": 960, "head_dim": 64}, False),
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 513}, False),
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 512, "dtype": "float32"}, False),
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 512, "mask": "bool"}, False),
    ],
    ids=str,
)
def test_long_calls_of_few_keys_are_for_kernels_that_keep_them_in_shared_memory(changes, first):
    own, call = Candidate.parse("sageattn_qk_int8_pv_fp16_cuda"), problem(**changes)
    found = choose(call, H200, 90)
    assert (found.candidates[:1] == (own,) and "shared memory" in found.reason) == first
    assert {own, TORCH} <= set(found.predicted)
    assert "shared memory" not in choose(call, gpu(89), 90).reason + choose(call, gpu(89), 89).reason  # another card, forced or not


def test_which_kernels_a_call_gets() -> None:
    own = Candidate.parse("sageattn_qk_int8_pv_fp16_cuda")
    cross = Form(40, 40, 32760, 512, 128)
    assert way_of(own, cross, 90, 132).kind == (128, RESIDENT) and way_of(own, cross, 90, 132).block == 192
    for other in (cross._replace(len_kv=513), cross._replace(mask="keys"), cross._replace(itemsize=4), cross._replace(heads=1, len_q=64)):
        assert way_of(own, other, 90, 132).kind == other.kind
    assert way_of(own, cross, 89, 132).kind == way_of(own, cross, 0, 132).kind == cross.kind  # another card, forced or not
    masked = cross._replace(mask="bool", len_kv=511)
    assert way_of(TORCH, masked, 90, 132).kind == (128, UNALIGNED) and way_of(own, masked, 90, 132).kind == masked.kind
    assert way_of(TORCH, masked._replace(len_kv=510, mask="additive"), 90, 132).kind == (128, ALIGNED)


MANY = {"heads_q": 200, "heads_kv": 200}


@pytest.mark.parametrize(
    ("arch", "changes", "ours"),
    [
        (90, {"len_q": 1024, "len_kv": 1024}, True),
        (90, {"len_q": 300, "len_kv": 300}, False),
        (90, {"len_q": 300, "len_kv": 300, **MANY}, True),  # K and V of a head in shared memory
        (90, {"len_q": 200, "len_kv": 200, **MANY}, False),
        (90, {"len_q": 300, "len_kv": 300, **MANY, "dtype": "float32"}, False),
        (90, {"len_q": 300, "len_kv": 300, **MANY, "causal": True}, False),
        (90, {"len_q": 700, "len_kv": 700, **MANY}, False),
        (90, {"len_q": 700, "len_kv": 700, **MANY, "head_dim": 64}, True),
        (90, {"len_q": 300, "len_kv": 300, **MANY, "head_dim": 64}, False),
        (89, {"len_q": 300, "len_kv": 300, **MANY}, False),
        (90, {"len_q": 4096, "len_kv": 4096, "head_dim": 64}, False),
        (89, {"len_q": 4096, "len_kv": 4096, "head_dim": 64, "causal": True}, True),
        (100, {"len_q": 4096, "len_kv": 4096}, False),
    ],
    ids=str,
)
def test_packed_sequences_go_by_the_longest_one(arch, changes, ours):
    found = choose(problem(varlen=True, batch=4, **changes), gpu(arch), arch)
    assert bool(found.candidates) == ours and found.reason
