"""A call that was checked and planned once is not again; anything that a check, a plan or a launch looks at makes it another call."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")

import sageattention  # noqa: E402
from sageattention import Unsupported, dispatch, settings  # noqa: E402
from sageattention.device import capability  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.planning import calibration, problem  # noqa: E402
from sageattention.planning.cost import TORCH, Form  # noqa: E402
from sageattention.variants import Candidate  # noqa: E402


def tensors(**changes):
    shape = {"q": (1, 4, 9, 64), "k": (1, 4, 7, 64), "v": (1, 4, 7, 64)}
    return {name: torch.zeros(changes.get(name, shape[name])) for name in shape}


DEFAULTS = dict(tensor_layout="HND", is_causal=False, attn_mask=None, sm_scale=None, return_lse=False, variant="auto")


def prepare(**given):
    return dispatch.prepare(**(DEFAULTS | given))


def test_equal_calls_are_checked_and_planned_once(monkeypatch):
    first, others = prepare(**tensors(), sm_scale=0.5), tensors()
    monkeypatch.setattr(problem, "_check_kv", None)  # calling it would raise
    monkeypatch.setattr(dispatch, "plan_for", None)
    second = prepare(**others, sm_scale=0.5)
    assert second.problem is first.problem and second.plan is first.plan and second.bound is first.bound
    assert second.q is others["q"] and second.k is others["k"] and second.v is others["v"]
    with pytest.raises(TypeError):
        prepare(**tensors(), sm_scale=0.25)


GOOD = {
    "other length": dict(q=(1, 4, 5, 64)),
    "other heads": dict(k=(1, 2, 7, 64), v=(1, 2, 7, 64)),
}
OPTIONS = {
    "layout": dict(tensor_layout="NHD"),
    "causal": dict(is_causal=True),
    "scale": dict(sm_scale=2),
    "lse": dict(return_lse=True),
    "bool mask": dict(attn_mask=torch.ones(9, 7, dtype=torch.bool)),
    "float mask": dict(attn_mask=torch.ones(9, 7)),
}


def test_different_calls_stay_different():
    shapes = [tensors()] + [tensors(**c) for c in GOOD.values()]
    found = [prepare(**t) for t in shapes]
    square = tensors(q=(1, 4, 4, 64), k=(1, 4, 4, 64), v=(1, 4, 4, 64))
    found += [prepare(**square, **options) for name, options in OPTIONS.items() if "mask" not in name]
    found += [prepare(**tensors(), **OPTIONS[name]) for name in ("bool mask", "float mask")]
    found.append(prepare(**{n: t.half() for n, t in tensors().items()}))
    assert len({call.problem for call in found}) == len(found)


STRIDES = {
    "q's": lambda t: t | {"q": torch.zeros(1, 4, 9, 128)[..., :64]},
    "k's": lambda t: t | {"k": torch.zeros(1, 7, 4, 64).transpose(1, 2)},
    "v's": lambda t: t | {"v": torch.zeros(1, 1, 7, 64).expand(1, 4, 7, 64)},
    "the mask's": lambda t: t | {"attn_mask": torch.ones(7, 9).T},
    "the mask's, and its shape": lambda t: t | {"attn_mask": torch.ones(1, 7)},
}


def test_what_launches_are_made_of_is_no_other_call_s():
    """Launches are kept in `forms`: no two calls with other strides may share one."""
    found = [prepare(**tensors()), prepare(**tensors(), attn_mask=torch.ones(9, 7))] + [prepare(**c(tensors())) for c in STRIDES.values()]
    assert len({id(call.bound) for call in found}) == len(found)
    assert len({call.problem for call in found}) == 3  # without a mask, with one for each query, with one for all


def test_a_variant_and_its_accumulator_make_another_call():
    reference = prepare(**tensors(), variant="reference")
    assert prepare(**tensors()).plan.variant.name == "sdpa" and reference.plan.variant.name == "reference"
    with pytest.raises(Unsupported, match="pv_accum_dtype"):
        dispatch.prepare(**tensors(), **(DEFAULTS | {"variant": "reference"}), accum="fp16")


def test_the_environment_is_honoured_once_it_is_read_anew(monkeypatch):
    assert prepare(**tensors()).plan.variant.name == "sdpa"
    monkeypatch.setenv("SAGEATTENTION_VARIANT", "reference")
    settings.forget()
    assert prepare(**tensors()).plan.variant.name == "reference"


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A made-up card; the file that holds its calibration."""
    found = Capability("cuda", 89, 1, "native", "RTX 4090")
    monkeypatch.setattr(capability, "of_device", lambda device, index: found)
    monkeypatch.setattr(calibration, "made_for", lambda card: {"card": card.name})
    monkeypatch.setenv(calibration.FOLDER, str(tmp_path))
    return found


def measured(triton_ms: float) -> list[calibration.Point]:
    return [calibration.Point(Form(4, 4, 9, 7, 64), {TORCH: 1.0, Candidate("sageattn_qk_int8_pv_fp16_triton"): triton_ms})]


def test_a_calibration_that_was_written_meanwhile_is_honoured(card):
    calibration.save(card, measured(2.0))
    slow = sageattention.explain(**tensors())
    calibration.save(card, measured(0.5))
    fast = sageattention.explain(**tensors())
    calibration.reset()
    assert (slow.variant, fast.variant) == ("sdpa", "sageattn_qk_int8_pv_fp16_triton")
    assert sageattention.explain(**tensors()).basis != "calibrated"


def test_a_plan_in_the_making_when_a_calibration_is_written_does_not_outlive_it(card, monkeypatch):
    calibration.save(card, measured(2.0))
    planning, written = threading.Event(), threading.Event()
    real = dispatch.plan_for

    def slow(*arguments):
        chosen = real(*arguments)
        planning.set()
        assert written.wait(60)
        return chosen

    monkeypatch.setattr(dispatch, "plan_for", slow)
    other = threading.Thread(target=lambda: prepare(**tensors()))
    other.start()
    assert planning.wait(60)
    calibration.save(card, measured(0.5))
    written.set()
    other.join()
    assert prepare(**tensors()).plan.variant.name == "sageattn_qk_int8_pv_fp16_triton"


BAD = {
    "a strided q": lambda t: t | {"q": torch.zeros(1, 4, 9, 128)[..., ::2]},
    "a strided v": lambda t: t | {"v": torch.zeros(1, 4, 7, 128)[..., ::2]},
    "another dtype": lambda t: t | {"k": t["k"].half()},
    "another device": lambda t: t | {"v": t["v"].to("meta")},
    "another length": lambda t: t | {"v": torch.zeros(1, 4, 8, 64)},
    "no tensor": lambda t: t | {"q": None},
    "no dimensions": lambda t: t | {"k": torch.zeros(())},
    "an integer": lambda t: {n: x.int() for n, x in t.items()},
    "a mask that does not fit": lambda t: t | {"attn_mask": torch.ones(9, 6)},
    "a mask of integers": lambda t: t | {"attn_mask": torch.ones(9, 7, dtype=torch.int32)},
    "an expanded head_dim": lambda t: t | {"q": torch.zeros(1, 4, 9, 1).expand(1, 4, 9, 64)},
    "a sparse q": lambda t: t | {"q": t["q"].to_sparse()},
    "a sparse mask": lambda t: t | {"attn_mask": torch.ones(9, 7).to_sparse()},
    "another memory format": lambda t: {n: x.to_mkldnn() for n, x in t.items()},
    "a mask elsewhere": lambda t: t | {"attn_mask": torch.ones(9, 7, device="meta")},
    "an unknown layout": lambda t: t | {"tensor_layout": "NDH"},
    "a layout of another type": lambda t: t | {"tensor_layout": ["HND"]},
    "an infinite scale": lambda t: t | {"sm_scale": float("inf")},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_is_refused_every_time_also_after_a_good_one(name):
    prepare(**tensors())
    prepare(**tensors(), attn_mask=torch.ones(9, 7))
    for _ in range(2):
        with pytest.raises(Unsupported):
            prepare(**BAD[name](tensors()))


def test_a_scale_in_a_tensor_is_read_at_every_call():
    scale = torch.tensor(0.5)
    assert prepare(**tensors(), sm_scale=scale).problem.sm_scale == 0.5
    scale.fill_(0.25)
    assert prepare(**tensors(), sm_scale=scale).problem.sm_scale == 0.25


def test_the_memory_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(dispatch._prepared, "limit", 8)
    given = tensors()
    for n in range(1, 30):
        prepare(**given, sm_scale=float(n))
        assert len(dispatch._prepared) <= 8
