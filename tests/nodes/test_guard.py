"""The guard: it finds the layers that quantising hurts, and a step whose output is not finite does not reach the picture."""

from __future__ import annotations

import importlib
import math
import pickle
import sys
import weakref
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from comfy_standin import Container, Model, NewCore, OldCore, sample, sdpa  # noqa: E402
from pack import load_pack  # noqa: E402

PACK = load_pack()
slot, guard, exactness = PACK.nodes.slot, PACK.nodes.guard, PACK.nodes.exactness
NODE = PACK.NODE_CLASS_MAPPINGS["PatchSageAttention"]
FP8, FP16 = "sageattn_qk_int8_pv_fp8_cuda", "sageattn_qk_int8_pv_fp16_cuda"
HEADS, LEN, DIM = 2, 200, 64


def part(name: str):
    return importlib.import_module(f"{PACK.sageattention.__name__}.{name}")


def tensors(gain: float = 1.0, heads_kv: int = HEADS, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k and v, [B, L, heads·D], with logits of a standard deviation of `gain`."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, LEN, heads * DIM, generator=generator) for heads in (HEADS, heads_kv, heads_kv))
    return [t.to(dtype) for t in (q * gain**0.5, k * gain**0.5, v)]


def patched(max_error: float, variant: str = "reference", model: Model | None = None) -> Model:
    return NODE().execute(model or Model(), variant, max_error=max_error)[0]


def network(core, *layers):
    """A model of attention layers, one a block: the sum of their outputs."""

    def run(options):
        outs = [core.attention(*qkv, HEADS, transformer_options={**options, "block_index": i}) for i, qkv in enumerate(layers)]
        return torch.stack(outs).sum(0)

    return run


def errors(model: Model) -> dict[str, float]:
    return {entry.layer.name: entry.error for entry in slot.record_of(model).entries if entry.error is not None}


@pytest.mark.parametrize("core", [OldCore, NewCore])
def test_a_bound_that_nothing_meets_leaves_every_layer_to_the_model_bit_for_bit(core):
    layers = [tensors(seed=i) for i in range(3)]
    model, used = patched(1e-9), core()
    outs = sample(model, network(used, *layers))
    for out in outs:
        assert torch.equal(out, torch.stack([sdpa(*qkv, HEADS) for qkv in layers]).sum(0))
    assert not slot.record_of(model).ran and slot.record_of(model).kept == {guard.OFF: 12} and len(used.own_calls) == 12
    assert all(1e-4 < error < 0.02 for error in errors(model).values()) and len(errors(model)) == 3


def test_a_bound_that_all_meet_changes_nothing_but_measures():
    layers = [tensors(seed=i) for i in range(3)]
    watched, plain, core = patched(0.05), NODE().execute(Model(), "reference")[0], OldCore()
    for a, b in zip(sample(watched, network(core, *layers)), sample(plain, network(core, *layers))):
        assert torch.equal(a, b)
    assert slot.record_of(watched).ran == {"reference": 12} and not core.own_calls
    assert all(1e-4 < error < 0.02 for error in errors(watched).values()) and not errors(plain)


def test_a_layer_with_peaked_logits_is_found_and_the_others_stay_fast():
    layers = [tensors(), tensors(gain=2000, seed=1), tensors(seed=2)]
    model, core = patched(0.05), OldCore()
    outs = sample(model, network(core, *layers))
    assert errors(model)["block 1"] > 0.05 > max(errors(model)["block 0"], errors(model)["block 2"])
    assert slot.record_of(model).ran == {"reference": 8} and len(core.own_calls) == 4
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_program_under_autocast_changes_no_finding(dtype):
    """Exact attention in bfloat16 is far off where logits are peaked, and in float16 it overflows."""
    q, k, v = (t.unflatten(-1, (-1, DIM)).transpose(1, 2) for t in tensors(gain=2e4))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    error, wrong = (exactness.worst_head(given, q, k, v, None, DIM**-0.5) for given in (out, out.roll(1, 2)))
    assert error < 1e-3 and wrong > 0.5
    with torch.autocast("cpu", dtype):
        found = [exactness.worst_head(given, q, k, v, None, DIM**-0.5) for given in (out, out.roll(1, 2))]
    assert found == [error, wrong]


def test_a_default_dtype_of_16_bits_changes_no_finding():
    """It rounds the number of a row beyond the last one."""
    q = torch.randn(1, 1, 4_096, 16)
    out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    error = exactness.worst_head(out, q, q, q, None, 0.25)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert exactness.worst_head(out, q, q, q, None, 0.25) == error < 1e-5
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_bad_head_decides():
    q, k, v = tensors()
    q[..., DIM:] *= 2000
    model = patched(0.05)
    sample(model, network(OldCore(), [q, k, v]))
    assert not slot.record_of(model).ran


def test_a_layer_is_its_block_or_its_place_among_the_calls():
    def anonymous(options):
        return sum(core.attention(*qkv, HEADS, transformer_options=options) for qkv in (tensors(), tensors(gain=2000, seed=1)))

    model, core = patched(0.05), OldCore()
    sample(model, anonymous, passes=2)
    assert set(errors(model)) == {"call 0", "call 1"}
    assert slot.record_of(model).ran == {"reference": 8} and len(core.own_calls) == 8


def test_shapes_of_one_layer_are_judged_apart():
    own, cross = tensors(), [tensors()[0], *(t[:, :40] for t in tensors(gain=2000, seed=1)[1:])]
    cross[0] = cross[0] * 2000
    model = patched(0.05)

    def block(options):
        options = {**options, "block_index": 0}
        return core.attention(*own, HEADS, transformer_options=options) + core.attention(*cross, HEADS, transformer_options=options)

    core = OldCore()
    sample(model, block)
    assert slot.record_of(model).ran == {"reference": 4} and len(core.own_calls) == 4


def test_it_looks_once_and_again_at_a_few_later_steps(monkeypatch):
    looks = []
    monkeypatch.setattr(guard, "of_call", lambda out, call: looks.append(len(ran)) or 0.01)
    model, ran = patched(0.05), []
    layers = [tensors(seed=i) for i in range(6)]

    def run(options):
        out = network(OldCore(), *layers)(options)
        ran.append(1)
        return out

    sample(model, run, sigmas=torch.linspace(1, 0.05, 20).tolist())
    assert {step: looks.count(step) for step in looks} == {0: 6, 6: 2, 10: 2, 14: 2}
    looks.clear()
    sample(model, network(OldCore(), *layers), sigmas=[1.0, 0.5])  # another sampling: other inputs, other weights maybe
    assert len(looks) == 6


def test_it_looks_once_a_step_where_several_passes_make_one(monkeypatch):
    looks, model = [], patched(0.05)
    monkeypatch.setattr(guard, "of_call", lambda out, call: looks.append(1) or 0.01)
    sample(model, network(OldCore(), tensors()), sigmas=torch.linspace(1, 0.05, 7).tolist(), passes=2)
    assert len(looks) == 2  # at the first step and at the seventh


def test_a_step_that_begins_with_values_that_are_not_finite_is_not_run_again():
    """Nothing that a node of ours does can have made them."""
    model, ran = patched(0.05), []
    guider = SimpleNamespace(model_options=model.model_options, model_patcher=model)
    wrapper = model.wrappers["calc_cond_batch"]["sageattention"][0]

    def step(*arguments):
        ran.append(1)
        return [torch.full((1,), math.nan)]

    slot.record_of(model).begin()
    for x, runs in ((torch.full((1,), math.inf), 1), (torch.zeros(1), 3)):
        out = wrapper(step, guider, [], x, torch.ones(1), model.model_options)
        assert len(ran) == runs and out[0].isnan()
    assert len(slot.record_of(model).notes) == 2


def test_a_layer_that_turns_bad_later_is_found(monkeypatch):
    model, core, steps = patched(0.05), OldCore(), []

    def drifting(options):
        steps.append(1)
        return core.attention(*tensors(2000 if len(steps) > 5 else 1), HEADS, transformer_options={**options, "block_index": 0})

    sample(model, drifting, sigmas=torch.linspace(1, 0.05, 20).tolist())
    assert slot.record_of(model).ran == {"reference": 6} and len(core.own_calls) == 14


@pytest.fixture
def card(monkeypatch) -> dict[str, float]:
    """A made-up card: how much too large each variant's output is; one that is not named has no kernel."""
    found = part("device.capability").Capability("cuda", 89, 1, "native", "RTX 4090")
    monkeypatch.setattr(part("device.capability"), "of_device", lambda device, index: found)
    monkeypatch.setattr(part("planning.plan").store, "missing", lambda image: "")
    gains: dict[str, float] = {}

    def run(call):
        name = call.plan.variant.name
        if name not in gains:
            raise PACK.sageattention.KernelMissing(name, "its cubin is not here")
        q, k, v = call.hnd()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=call.problem.sm_scale)
        return out.transpose(1, 2) * gains[name], None

    monkeypatch.setitem(part("dispatch")._BACKENDS, "cuda", SimpleNamespace(run=run))
    ready = [SimpleNamespace(name=name, status="ready") for name in (FP8, FP16)]
    for module in (guard, PACK.nodes.patch):
        monkeypatch.setattr(module, "available_variants", lambda device: ready)
    return gains


def test_from_the_fastest_variant_to_the_safest(card):
    card.update({FP8: 1.2, FP16: 1.01})
    model, core = patched(0.05, FP8), OldCore()
    sample(model, network(core, tensors(dtype=torch.float16)))
    assert slot.record_of(model).ran == {FP16: 4} and not core.own_calls
    assert errors(model)["block 0"] == pytest.approx(0.01, abs=2e-3)
    reasons = [entry.reasons for entry in slot.record_of(model).entries]
    assert reasons == [(f"{FP8}: {guard.NOT_ALL_OFF}",), (), (), ()]


def test_a_safer_variant_lets_k_and_v_go_before_the_output_is_made(card, monkeypatch):
    """Two calls hold them: the one that was planned, and the one that runs in its place."""
    card.update({FP8: 1.2, FP16: 1.0})
    backend, alive = part("dispatch")._BACKENDS["cuda"], []

    def attend(q, kv, problem, mask):
        alive.append([ref() is not None for ref in references])
        return backend.run(
            SimpleNamespace(plan=SimpleNamespace(variant=SimpleNamespace(name=FP16)), problem=problem, hnd=lambda: in_hnd(q, *kv))
        )

    def in_hnd(*given):
        return (t.transpose(1, 2) for t in given)

    backend.load, backend.quantize, backend.attend = lambda *call: None, lambda k, v, problem, plan, mask: (k.clone(), v.clone()), attend
    monkeypatch.setattr(part("dispatch").Call, "_halves_pay", lambda call, plan: True)
    model, core, references, queries = patched(0.05, FP8), NewCore(), [], []

    def run(options):
        held = [Container(t) for t in tensors(dtype=torch.float16)]
        queries[:] = [held[0].tensor]  # which the model goes on to use, so that the output has no place there
        references[:] = [weakref.ref(c.tensor) for c in held]
        return core.attention(*held, HEADS, transformer_options={**options, "block_index": 0})

    first, *others = sample(model, run)
    assert slot.record_of(model).ran == {FP16: 4} and all(torch.equal(out, first) for out in others)
    assert alive == [[True, False, False]] * 3  # the first call is looked at, and needs them for the error


def test_a_safer_variant_without_a_kernel_is_passed_by(card):
    card.update({FP8: 1.2})
    model, core = patched(0.05, FP8), OldCore()
    sample(model, network(core, tensors(dtype=torch.float16)))
    assert len(core.own_calls) == 4 and slot.record_of(model).kept == {guard.OFF: 4} and not slot.record_of(model).fallbacks


def test_the_variant_that_was_asked_for_falls_back_without_a_kernel_as_without_the_guard(card):
    model, core = patched(0.05, FP8), OldCore()
    sample(model, network(core, tensors(dtype=torch.float16)))
    assert len(core.own_calls) == 4 and slot.record_of(model).fallbacks == {f"{FP8}: its cubin is not here": 4}


def test_containers_are_not_let_go_before_the_error_is_known():
    model, core = patched(1e-9), NewCore()
    modules = core.importable()
    held = [Container(t) for t in tensors()]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        out = core.attention(*held, HEADS, transformer_options=model.options)
    assert torch.equal(out, sdpa(*tensors(), HEADS)) and all(c.tensor is None for c in held)


@pytest.mark.parametrize("name", ["attention_sage", "attention_pytorch"])
def test_the_last_resort_is_exact_also_where_the_start_flag_makes_sage_the_model_s_own(name, monkeypatch):
    model, core, ran = patched(1e-9), NewCore(), []
    modules = core.importable()
    attention = modules["comfy.ldm.modules.attention"]

    def attention_pytorch(*args, **kwargs):
        ran.append("pytorch")
        return sdpa(*args, **kwargs)

    def own(*args, **kwargs):
        ran.append("own")
        return sdpa(*args, **kwargs)

    attention.attention_pytorch, own.__name__ = attention_pytorch, name
    for key, module in modules.items():
        monkeypatch.setitem(sys.modules, key, module)
    slot.owner(model)(own, *tensors(), HEADS, transformer_options=model.options)
    assert ran == ["pytorch" if name == "attention_sage" else "own"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_runs_again_on_the_model_s_own_attention(value, caplog):
    layers = [tensors(seed=i) for i in range(2)]
    model, core = patched(0.05), OldCore()

    def run(options):  # as a model of which something overflows unless attention is the model's own
        before = len(core.own_calls)
        out = network(core, *layers)(options)
        return out if len(core.own_calls) > before else out * value

    outs = sample(model, run)
    for out in outs:
        assert torch.equal(out, torch.stack([sdpa(*qkv, HEADS) for qkv in layers]).sum(0))
    record = slot.record_of(model)
    assert record.notes == [PACK.nodes.sampler.OUTPUT_BAD] and caplog.text.count(record.notes[0]) == 1


def test_a_model_that_is_not_finite_by_itself_is_run_again_once(caplog):
    model, core = patched(0.05), OldCore()
    outs = sample(model, lambda options: network(core, tensors())(options) * math.nan)
    assert all(out.isnan().all() for out in outs) and len(core.own_calls) == 1
    assert slot.record_of(model).notes == [PACK.nodes.sampler.OUTPUT_BAD, PACK.nodes.sampler.OUTPUT_STILL_BAD]


def test_without_the_guard_no_step_is_tested():
    model = NODE().execute(Model(), "reference")[0]
    assert "calc_cond_batch" in patched(0.05).wrappers
    assert not model.wrappers.get("calc_cond_batch") and model.wrappers["outer_sample"]
    off = NODE().execute(patched(0.05), "reference")[0]
    assert not off.wrappers.get("calc_cond_batch")
    gone = NODE().execute(off, "disabled")[0]
    assert not gone.wrappers["outer_sample"] and PACK.nodes.record.KEY not in gone.options


def attention_call(q, k, v, **options):
    return PACK.sageattention.prepare(*(t.unflatten(2, (-1, DIM)) for t in (q, k, v)), "NHD", variant="reference", **options)


@pytest.mark.parametrize("heads_kv", [1, 2])
@pytest.mark.parametrize("masked", ["none", "bool", "by head", "additive", "rows hidden"])
def test_the_reference_is_fp32_attention(masked, heads_kv, monkeypatch):
    q, k, v = tensors(heads_kv=heads_kv)
    mask = None
    if masked != "none":
        mask = torch.rand(2, HEADS if masked == "by head" else 1, LEN, LEN, generator=torch.Generator().manual_seed(7)) > 0.5
        mask[:, :, 50] = masked != "rows hidden"
    if masked == "additive":
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
    call = attention_call(q, k, v, attn_mask=mask, sm_scale=0.2)
    exact = sdpa(q, k, v, HEADS, mask, scale=0.2, enable_gqa=True).unflatten(2, (HEADS, DIM))
    for memory in (exactness.MEMORY, 1):  # all heads at a time, and one
        monkeypatch.setattr(exactness, "MEMORY", memory)
        assert exactness.of_call(exact, call) < 1e-5
        off = exact.clone()
        off[1, :, 1] *= 1.1  # one head of one batch
        assert exactness.of_call(off, call) == pytest.approx(0.1, rel=1e-3)
    off[0, 0, 0, 0] = math.nan
    assert exactness.of_call(off, call) == math.inf


def test_the_tensor_cores_way_is_as_exact(monkeypatch):
    """By products in fp32 of what has been rounded to bf16, as they give."""
    monkeypatch.setattr(exactness, "_by_tensor_cores", lambda t: t.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype=None, bmm=torch.bmm: bmm(a.float(), b.float()))
    q, k, v = tensors(dtype=torch.bfloat16)
    exact = sdpa(q.float(), k.float(), v.float(), HEADS).unflatten(2, (HEADS, DIM))
    assert exactness.of_call(exact, attention_call(q, k, v)) < 2e-5


def test_values_of_3e5_are_right():
    """Black elsewhere: V in fp16 or FP8 without a scale is infinite, or its sum is."""
    q, k, v = tensors(dtype=torch.bfloat16)
    v = (v.float() * 3e5).bfloat16()
    model, core = patched(0.05), OldCore()
    (out,) = sample(model, network(core, [q, k, v]), sigmas=[1.0])
    exact = sdpa(q.float(), k.float(), v.float(), HEADS)
    assert out.isfinite().all() and float((out.float() - exact).norm() / exact.norm()) < 0.02
    assert slot.record_of(model).ran == {"reference": 1} and not core.own_calls


def test_a_guard_is_pickled_without_what_it_learnt():
    model = patched(0.05)
    sample(model, network(OldCore(), tensors()))
    copied = pickle.loads(pickle.dumps(slot.owner(model)))
    assert copied.guard.max_error == 0.05 and copied.guard._choices == {} and slot.owner(model).guard._choices


@pytest.mark.gpu
def test_every_variant_of_this_gpu_with_values_of_3e5():
    found = [a.name for a in PACK.sageattention.available_variants("cuda") if a.status == "ready" and a.name != "sdpa"]
    q, k, v = (t.cuda() for t in tensors(dtype=torch.bfloat16))
    v = (v.float() * 3e5).bfloat16()
    exact = sdpa(q.float(), k.float(), v.float(), HEADS)
    assert len(found) > 1
    for variant in found:
        model = Model()
        model.load_device = torch.device("cuda")
        model = patched(0.05, variant, model)
        (out,) = sample(model, network(OldCore(), [q, k, v]), sigmas=[1.0])
        assert out.isfinite().all() and float((out.float() - exact).norm() / exact.norm()) < 0.05
        assert sum(slot.record_of(model).ran.values()) == 1 and 0 < errors(model)["block 0"] < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_tensor_cores_of_this_gpu_are_as_exact(dtype):
    q, k, v = (t.cuda() for t in tensors(dtype=dtype))
    exact = sdpa(q.double(), k.double(), v.double(), HEADS).float().unflatten(2, (HEADS, DIM))
    call = PACK.sageattention.prepare(*(t.unflatten(2, (-1, DIM)) for t in (q, k, v)), "NHD", variant="reference")
    assert exactness._by_tensor_cores(q) and exactness.of_call(exact, call) < 2e-5
