"""Where the host's time counts, a short call that "auto" leaves to PyTorch's attention is computed all the same."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from comfy_standin import KEY, NewCore, sdpa  # noqa: E402
from pack import load_pack  # noqa: E402

PACK = load_pack()
adapter, host_time = PACK.nodes.adapter, importlib.import_module(f"{PACK.nodes.__name__}.host_time")
Plan = importlib.import_module(f"{PACK.sageattention.__name__}.planning.plan").Plan
VARIANTS = importlib.import_module(f"{PACK.sageattention.__name__}.variants").VARIANTS
Candidate = host_time.Candidate
OWN, FP16, INT8 = Candidate("sdpa"), Candidate("sageattn_qk_int8_pv_fp16_cuda"), Candidate("sageattn_qk_int8_pv_int8_cuda")


def plan(own: float, fp16: float, int8: float = 9.0, **changed: object) -> object:
    """Of a call left to PyTorch's attention; milliseconds on the device."""
    known = Plan(VARIANTS["sdpa"], "no gain", 90, auto=True, basis="measured", predicted=((OWN, own), (FP16, fp16), (INT8, int8)))
    return replace(known, **changed)


@pytest.mark.parametrize(
    ("own", "fp16", "int8", "expected"),
    [
        (0.0154, 0.0199, 0.029, FP16),  # SDXL's cross attention: 4 us of the device for 16 of the host
        (0.0154, 0.0199, 0.018, INT8),
        (0.0357, 0.055, 0.0478, INT8),  # its smaller self attention
        (0.060, 0.080, 0.090, None),  # more is lost on the one than won on the other
        (0.400, 0.410, 0.5, None),  # the device takes long enough to hide the host
    ],
)
def test_half_of_a_call_s_cost_is_the_host_s(own, fp16, int8, expected):
    assert host_time.shorter(plan(own, fp16, int8)) == expected


def test_only_what_was_measured_and_can_be_had_counts():
    assert host_time.shorter(plan(0.0154, 0.0199, basis="static")) is None
    assert host_time.shorter(plan(0.0154, 0.0199, rejected=((FP16, "no kernel"),))) is None
    assert host_time.shorter(plan(0.0154, 0.0199, predicted=())) is None
    assert host_time.shorter(plan(0.0154, 0.0199, variant=VARIANTS[FP16.variant])) is None


def run(override, core) -> bool:
    """Whether a call was quantised."""
    q = torch.randn(2, 24, 160, generator=torch.Generator().manual_seed(1))
    out = core.attention(q, q, q, 4, transformer_options={KEY: override})
    return not torch.equal(out, sdpa(q, q, q, 4))


def test_the_node_computes_such_a_call_unless_another_pack_s_attention_is_behind_it(monkeypatch):
    monkeypatch.setattr(adapter.host_time, "shorter", lambda plan: Candidate("reference"))
    override = adapter.SageOverride("auto")
    assert run(override, NewCore()) and run(override, NewCore())
    assert override.record.ran == {"reference": 2} and not override.record.kept
    behind = override.in_front_of(lambda func, *args, **kwargs: func(*args, **kwargs), adapter.SageOverride("auto").record)
    assert not run(behind, NewCore()) and sum(behind.record.kept.values()) == 1
    assert run(override, NewCore())  # what is known of the one is not taken for the other


def test_a_kernel_that_is_missing_leaves_the_call_to_the_model(monkeypatch):
    monkeypatch.setattr(adapter.host_time, "shorter", lambda plan: FP16)
    override = adapter.SageOverride("auto")
    assert not run(override, NewCore())
    assert sum(override.record.kept.values()) == 1 and not override.record.fallbacks
