"""The table of `auto`: which rule decides, and that its static rows follow the model that they claim to rest on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sageattention.device.capability import Capability
from sageattention.kernels.architectures import ARCHITECTURES
from sageattention.numerics.constants import HEAD_DIMS
from sageattention.planning import rules
from sageattention.planning.problem import Problem
from sageattention.planning.rules import MIN_TOKENS, RULES, choose
from sageattention.variants import TRITON_FP16, VARIANTS, Candidate

ARCHS = tuple(ARCHITECTURES)
TRITON = Candidate(TRITON_FP16.name)

# Dense multiply-accumulates per clock and multiprocessor, by operands and accumulator, of the GeForce card of each architecture
# (white papers: Turing, A100, GA102, Ada, H100, RTX Blackwell). Professional cards of 7.5, 8.6, 8.9 and 12.0 accumulate in fp32 at the
# full rate, so that 16-bit attention is twice as fast there. 9.0 by wgmma.
MMA_RATES: dict[int, dict[tuple[str, str], int]] = {
    75: {("int8", "int32"): 1024, ("fp16", "fp16"): 512, ("fp16", "fp32"): 256},
    80: {("int8", "int32"): 2048, ("fp16", "fp16"): 1024, ("fp16", "fp32"): 1024},
    86: {("int8", "int32"): 1024, ("fp16", "fp16"): 512, ("fp16", "fp32"): 256},
    89: {("int8", "int32"): 1024, ("fp16", "fp16"): 512, ("fp16", "fp32"): 256, ("fp8", "fp16"): 1024, ("fp8", "fp32"): 512},
    90: {("int8", "int32"): 4096, ("fp16", "fp16"): 2048, ("fp16", "fp32"): 2048, ("fp8", "fp16"): 4096, ("fp8", "fp32"): 4096},
}
MMA_RATES[120] = MMA_RATES[89]


def mma_gain(arch: int, candidate: Candidate) -> float:
    """By the static model, how many times less the tensor cores work than in fp16 attention with fp32 accumulators."""
    variant = VARIANTS[candidate.variant]
    rates, scheme = MMA_RATES[rules.family(arch)], variant.accum.get(candidate.accum, variant.scheme)
    both = 1 / rates["int8", "int32"] + 1 / rates[scheme.pv, {"fp8": "fp32"}.get(scheme.accumulate, scheme.accumulate)]
    return 2 / rates["fp16", "fp32"] / both


def gpu(arch, name="some card", multiprocessors=100):
    return Capability("cuda", arch, multiprocessors, "native", name)


def problem(**changes):
    good = {"batch": 1, "heads_q": 24, "heads_kv": 24, "len_q": 4096, "len_kv": 4096, "head_dim": 128, "dtype": "bfloat16"}
    return Problem(**{**good, "device": "cuda", "device_index": 0, **changes})


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_names_what_there_is(rule):
    assert rule.basis in rules.BASIS and rule.reason
    assert set(rule.head_dims) <= set(HEAD_DIMS) and set(rule.masks) <= {"none", "causal", "list"}
    for candidate in rule.candidates:
        variant = VARIANTS[candidate.variant]
        assert variant.has_kernels and candidate.accum in ("", *variant.accum)
        for arch in rule.archs:
            assert arch >= variant.min_arch and (not variant.archs or arch in variant.archs)


def test_every_family_has_a_rule_that_holds_for_a_long_call():
    for arch in ARCHS:
        assert choose(problem(len_q=32760, len_kv=32760), gpu(arch), arch).basis


@pytest.mark.parametrize("rule", [r for r in RULES if r.basis == "static" and r.candidates], ids=str)
def test_a_static_order_follows_the_rates_of_the_tensor_cores(rule):
    """Fastest first; Triton, the same products with more around them, last."""
    for arch in rule.archs:
        cuda = [mma_gain(arch, candidate) for candidate in rule.candidates if candidate != TRITON]
        assert cuda == sorted(cuda, reverse=True) and cuda[-1] > 1.3
        assert TRITON not in rule.candidates[:-1]


def test_the_model_in_figures():
    """What the white papers' rates make of it: 2 / (1 / INT8 + 1 / PV), in units of fp16 with fp32 sums."""
    assert mma_gain(86, Candidate.parse("sageattn_qk_int8_pv_int8_cuda")) == pytest.approx(4)
    assert mma_gain(86, Candidate.parse("sageattn_qk_int8_pv_fp16_cuda")) == pytest.approx(1.6)
    assert mma_gain(89, Candidate.parse("sageattn_qk_int8_pv_fp8_cuda:fp32+fp16")) == pytest.approx(4)
    assert mma_gain(89, Candidate.parse("sageattn_qk_int8_pv_fp8_cuda:fp32")) == pytest.approx(8 / 3)
    assert mma_gain(90, Candidate.parse("sageattn_qk_int8_pv_fp16_cuda")) == pytest.approx(4 / 3)


def test_the_document_has_the_model_s_figures():
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    section = text[text.index("## The static model") :]
    order = ("int8_cuda", "fp8_cuda:fp32+fp16", "fp8_cuda:fp32", "fp16_cuda:fp16+fp32", "fp16_cuda")
    for arch in MMA_RATES:
        row = re.search(rf"^\| {arch // 10}\.{arch % 10} \|(.*)\|$", section, re.MULTILINE)[1].split("|")
        for cell, name in zip(row, order):
            known = name.partition("_")[0] != "fp8" or ("fp8", "fp16") in MMA_RATES[arch]
            assert cell.strip() == (f"{mma_gain(arch, Candidate.parse(f'sageattn_qk_int8_pv_{name}')):.2f}" if known else "–"), (arch, name)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("lengths", [(MIN_TOKENS - 1, 4096), (4096, 77)])
def test_short_calls_stay_with_sdpa(arch, lengths):
    found = choose(problem(len_q=lengths[0], len_kv=lengths[1]), gpu(arch), arch)
    assert not found.candidates
    assert arch == 100 or re.search(r"under [\d,]+ (queries|keys)", found.reason)


def test_a_call_that_does_not_fill_the_card_stays_with_sdpa():
    small = problem(heads_q=2, heads_kv=2)  # 64 blocks of 128 queries
    assert not choose(small, gpu(89), 89).candidates and "fill the card" in choose(small, gpu(89), 89).reason
    assert choose(small, gpu(89, multiprocessors=30), 89).candidates
    assert choose(small, gpu(89, multiprocessors=0), 89).candidates  # not known: `doctor` without a card


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


def test_the_reason_is_the_row():
    found = choose(problem(), gpu(89), 89)
    assert found.reason == str(next(r for r in RULES if 89 in r.archs))
    assert "not measured" in found.reason and found.basis == "static"


def test_a_rule_looks_at_head_dim_and_mask():
    rule = rules.Rule((90,), ("sageattn_qk_int8_pv_fp16_cuda",), "measured", "as a test", head_dims=(64,), masks=("none",))
    assert rule.miss(problem(head_dim=40), gpu(90)) == ""
    assert "head_dim 128" in rule.miss(problem(head_dim=72), gpu(90))
    assert "'causal'" in rule.miss(problem(head_dim=64, causal=True), gpu(90))
    assert "'list'" in rule.miss(problem(head_dim=64, mask="bool"), gpu(90))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("changes", "everywhere"),
    [
        ({"mask": "bool"}, True),
        ({"mask": "bool", "mask_shape": (2, 1, 1), "batch": 2}, True),
        ({"mask": "additive"}, False),
        ({"mask": "bool", "mask_shape": (1, 1, 4096)}, False),
        ({"mask": "bool", "causal": True}, False),
        ({"causal": True}, True),
    ],
)
def test_masks_that_hopper_takes(changes: dict, everywhere: bool, head_dim: int) -> None:
    """At head_dim 64 only those of which no tile needs masking."""
    found = choose(problem(head_dim=head_dim, **changes), gpu(90), 90)
    assert bool(found.candidates) == (everywhere or head_dim == 128)
    assert found.candidates or "bool one of keys alone" in found.reason


@pytest.mark.parametrize(("arch", "family"), [(61, 75), (75, 75), (87, 86), (90, 90), (103, 100), (121, 120), (130, 120)])
def test_an_unknown_architecture_takes_the_rules_of_the_one_before(arch, family):
    assert rules.family(arch) == family
