"""What a sampling leaves behind: which call stood where, who computed it, and what the line on the node says of it."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from comfy_standin import KEY, Model, OldCore, sample, sdpa  # noqa: E402
from pack import load_pack  # noqa: E402

PACK = load_pack()
slot, record, sampling, override, progress = (
    getattr(PACK.nodes, name) for name in ("slot", "record", "sampling", "override", "progress")
)  # fmt: skip
NODE = PACK.NODE_CLASS_MAPPINGS["PatchSageAttention"]
QKV = [torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Half(override.Override):
    """Stands in front of dense attention, computes every second call, and leaves the others."""

    RANK = 1

    def __init__(self):
        super().__init__()
        self.calls = 0

    def settings(self):
        return {"node": "Half"}

    def attempt(self, entry, args, kwargs, contained):
        self.calls += 1
        if self.calls % 2:
            entry.ran("sparse", share=torch.tensor(0.25), node="Half")
            return sdpa(*args, **kwargs)
        entry.pass_on("its turn is another")
        return None


def patched(variant: str = "reference", model: Model | None = None, **inputs) -> Model:
    return NODE().execute(model or Model(), variant, **inputs)[0]


def blocks(core, count: int = 2):
    def network(options):
        return sum(core.attention(*QKV, 4, transformer_options={**options, "block_index": i}) for i in range(count))

    return network


def what(model: Model) -> list[tuple[int, str, str, tuple[str, ...]]]:
    return [(e.step.number, e.layer.name, e.variant, e.reasons) for e in slot.record_of(model).entries]


def test_steps_and_layers_are_told_apart():
    model = patched()
    sample(model, blocks(OldCore()), sigmas=[1.0, 0.5], passes=2)
    assert [(step, layer) for step, layer, *_ in what(model)] == [(s, f"block {b}") for s in (0, 1) for _ in (0, 1) for b in (0, 1)]
    assert slot.record_of(model).sampling.steps == 2
    sample(model, blocks(OldCore()), sigmas=[1.0])
    assert len(what(model)) == 2 and slot.record_of(model).ran == {"reference": 10}  # the last sampling's calls, and all counts


def test_calls_of_no_block_are_numbered_in_each_pass():
    model, core = patched(), OldCore()
    sample(model, lambda options: sum(core.attention(*QKV, 4, transformer_options=dict(options)) for _ in range(3)), [1.0], passes=2)
    assert [layer for _, layer, *_ in what(model)] == ["call 0", "call 1", "call 2"] * 2


def test_equal_sigmas_of_two_steps_are_two_steps():
    model = patched()
    sample(model, blocks(OldCore(), 1), sigmas=[0.5, 0.5])
    assert [step for step, *_ in what(model)] == [0, 1]


@pytest.mark.parametrize("first", ["sparse", "dense"])
def test_two_nodes_of_ours_share_one_record_and_one_entry_a_call(first):
    """Whatever the order of the nodes, the one that computes less stands in front."""
    model = Model()
    for kind in ["sparse", "dense"] if first == "sparse" else ["dense", "sparse"]:
        model = slot.install(model, Half()) if kind == "sparse" else patched(model=model)
    assert [type(one).__name__ for one in slot.ours(slot.owner(model))] == ["Half", "SageOverride"]
    core = OldCore()
    sample(model, blocks(core), sigmas=[1.0, 0.5])
    left = ("its turn is another",)
    assert what(model) == [(s, f"block {b}", *(("reference", left) if b else ("sparse", ()))) for s in (0, 1) for b in (0, 1)]
    assert slot.record_of(model).ran == {"sparse": 2, "reference": 2} and not core.own_calls
    assert [entry.blocks for entry in slot.record_of(model).entries] == [0.25, None] * 2


def test_taking_one_of_two_out_leaves_the_other():
    both = patched(model=slot.install(Model(), Half()))
    assert [type(one).__name__ for one in slot.ours(slot.owner(patched("disabled", both)))] == ["Half"]
    assert [type(one).__name__ for one in slot.ours(slot.owner(slot.remove(both, Half)))] == ["SageOverride"]
    assert KEY not in patched("disabled", slot.remove(both, Half)).options
    again = patched("auto", both)
    assert [getattr(one, "variant", None) for one in slot.ours(slot.owner(again))] == [None, "auto"]


def foreign(previous):
    """Another pack's override, which calls the one that it replaced."""

    def call(func, *args, **kwargs):
        return previous(func, *args, **kwargs) if previous else func(*args, **kwargs)

    return call


def test_an_override_of_ours_behind_another_pack_s_writes_into_the_model_s_record():
    inner = patched()
    between = inner.clone()
    between.options[KEY] = foreign(inner.options[KEY])
    model, core = slot.install(between, Half()), OldCore()
    sample(model, blocks(core), sigmas=[1.0])
    assert [variant for _, _, variant, _ in what(model)] == ["sparse", "reference"] and not core.own_calls
    assert not slot.record_of(inner).entries


def test_models_of_one_workflow_have_records_of_their_own():
    first = patched()
    second = patched("auto", first)
    sample(first, blocks(OldCore()), sigmas=[1.0])
    assert slot.record_of(first).ran and not slot.record_of(second).ran
    clone = copy.deepcopy(first.options)[record.KEY]
    assert clone is slot.record_of(first)  # a LoRA after our node clones the model
    assert not pickle.loads(pickle.dumps(clone)).ran


def test_a_suspended_model_runs_on_its_own_attention():
    model, core = patched(), OldCore()
    out = core.attention(*QKV, 4, transformer_options={**model.options, override.SUSPENDED: True})
    assert torch.equal(out, sdpa(*QKV, 4)) and len(core.own_calls) == 1 and not slot.record_of(model).ran


def test_an_interrupted_sampling_leaves_a_record_that_ends():
    model, core = patched(), OldCore()

    def network(options):
        if core.own_calls:
            raise InterruptedError
        core.own_calls.append(((), {}))
        return core.attention(*QKV, 4, transformer_options=options)

    with pytest.raises(InterruptedError):
        sample(model, network)
    assert not slot.record_of(model).running and len(what(model)) == 1


def test_an_attention_that_fails_does_not_hold_the_next_call_s_entry():
    model, core = patched("auto"), OldCore()

    def failing(*args, **kwargs):
        raise RuntimeError("the device failed")

    def network(options):
        with pytest.raises(RuntimeError):
            options[KEY](failing, *QKV, 4, transformer_options=options)
        return core.attention(*QKV, 4, transformer_options=options)

    sample(model, network, sigmas=[1.0])
    assert [layer for _, layer, *_ in what(model)] == ["call 0", "call 1"]


def test_devices_that_share_a_step_count_their_own():
    run = sampling.Sampling()
    sigmas = {name: [SimpleNamespace(device=name, numel=lambda: 0) for _ in range(3)] for name in ("cuda:0", "cuda:1")}
    numbers = [(name, run.step({"sigmas": sigmas[name][step]}).number) for step in range(3) for name in sigmas for _ in range(2)]
    assert numbers == [(name, step) for step in range(3) for name in sigmas for _ in range(2)]


def test_a_call_that_is_handed_over_is_not_left_in_the_list_where_another_device_has_opened_one():
    here = record.Record()
    here.begin()

    def elsewhere():
        here.open({"block_index": 1}, *QKV[:2], 4, False, False).close()

    for handed_over in range(2):
        entry = here.open({"block_index": 0}, *QKV[:2], 4, False, False)
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        if handed_over:
            assert len(here.entries) == 4  # they have been read before
        entry.pass_on("its turn is another")
        entry.hand_over()
        entry.close()
        last = here.open({"block_index": 0}, *QKV[:2], 4, False, False)
        last.close()
        assert [e.layer.name for e in here.entries] == ["block 1", "block 0"] * (handed_over + 1)
        assert last.reasons == ("its turn is another",)


def test_threads_have_entries_of_their_own():
    model, core = patched(), OldCore()
    barrier = threading.Barrier(4)

    def network(options):
        def work(block):
            barrier.wait()
            for _ in range(20):
                core.attention(*QKV, 4, transformer_options={**options, "block_index": block})

        threads = [threading.Thread(target=work, args=(block,)) for block in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return QKV[0]

    sample(model, network, sigmas=[1.0])
    layers = [layer for _, layer, *_ in what(model)]
    assert {layer: layers.count(layer) for layer in layers} == {f"block {i}": 20 for i in range(4)}


def test_calls_are_timed_in_some_steps_and_all_steps_are():
    model = patched()
    sample(model, blocks(OldCore(), 1), sigmas=torch.linspace(1, 0, 20).tolist())
    timed = {e.step.number for e in slot.record_of(model).entries if e.begin is not None and e.end is not None}
    assert timed == {n for n in record.TIMED_STEPS if n < 20} and set(slot.record_of(model).starts) == set(range(21))
    assert all(e.end.ms_since(e.begin) > 0 for e in slot.record_of(model).entries if e.begin)


@pytest.mark.parametrize("variant", ["auto", "reference"])
def test_calls_like_an_earlier_one_are_entries_as_any_other(variant):
    """But for the first of each pass they take a shorter way, whether they are kept or computed."""
    model, core = patched(variant), OldCore()
    outs = sample(model, blocks(core), sigmas=torch.linspace(1, 0, 4).tolist(), passes=2)
    entries = slot.record_of(model).entries
    assert [type(e).__name__ for e in entries] == ["Entry", "Again"] * 8
    assert [(e.step.number, e.layer.name) for e in entries] == [(s, f"block {b}") for s in range(4) for _ in (0, 1) for b in (0, 1)]
    for name in ("q_shape", "k_shape", "dtype", "heads", "hnd", "masked", "variant", "kernel", "reasons", "blocks", "error"):
        assert len({getattr(e, name) for e in entries}) == 1, name
    counts = slot.record_of(model).as_dict()
    assert [*counts["kept"].values(), *counts["ran"].values()] == [16] and len(core.own_calls) == (16 if variant == "auto" else 0)
    exact = 2 * sdpa(*QKV, 4)
    assert all(torch.equal(out, outs[0]) and float((out - exact).norm() / exact.norm()) < 0.02 for out in outs)
    assert all(e.begin is None for e in entries if e.step.number > 1 or type(e) is record.Again)


@pytest.mark.parametrize("inputs", [{"start_percent": 0.1}, {"blocks": "0-3"}, {"max_error": 1.0}], ids=str)
def test_calls_that_a_schedule_or_the_guard_decides_about_are_opened_each(inputs):
    model = patched("reference", **inputs)
    sample(model, blocks(OldCore(), 4))
    assert {type(e) for e in slot.record_of(model).entries} == {record.Entry}


def test_a_call_that_only_looks_like_an_earlier_one_is_not_taken_for_it():
    """Of one shape, in one pass: full precision, another scale, other strides, and a step that runs again without us."""
    model, core, outs = patched(), OldCore(), {}
    q, k, v = QKV
    wide = torch.cat([q, q], dim=2)[..., : q.shape[2]]
    forms = {"plain": {}, "exact": {"low_precision_attention": False}, "scaled": {"scale": 0.5}, "strided": {}, "suspended": {}}

    def network(options):
        for _ in range(3):
            for name, more in forms.items():
                own = {override.SUSPENDED: True} if name == "suspended" else {}
                given = wide if name == "strided" else q
                outs.setdefault(name, []).append(core.attention(given, k, v, 4, transformer_options={**options, **own}, **more))
        return q

    sample(model, network, sigmas=[1.0, 0.5])
    exact = {name: sdpa(q, k, v, 4, **more) for name, more in forms.items()}
    for name, of in outs.items():
        assert all(torch.equal(out, of[0]) for out in of), name
        assert torch.equal(of[0], exact[name]) == (name in ("exact", "suspended")), name
        assert float((of[0] - exact[name]).norm() / exact[name].norm()) < 0.02, name
    assert slot.record_of(model).as_dict() == {
        "ran": {"reference": 18}, "kept": {PACK.nodes.adapter.FULL_PRECISION: 6}, "fallbacks": {},
    }  # fmt: skip


@pytest.mark.parametrize("fails", [True, False])
def test_a_kernel_that_turns_out_to_be_missing_later_on(fails, monkeypatch):
    """A call like an earlier one falls back as any other; where another plan computes it, its entry says so."""
    model, core = patched(), OldCore()
    calls, call_type = [], sys.modules[f"{PACK.sageattention.__name__}.dispatch"].Call
    own = call_type.attempt

    def attempt(call, release=None):
        calls.append(call)
        if len(calls) == 3 and not fails:
            call.plan = copy.copy(call.plan)
            object.__setattr__(call.plan, "variant", PACK.sageattention.variants.VARIANTS["sageattn_qk_int8_pv_fp16_triton"])
            return sdpa(*QKV, 4).unflatten(2, (4, -1)), None
        if len(calls) >= 3 and fails:
            raise PACK.sageattention.KernelMissing("reference", "it is gone")
        return own(call, release)

    monkeypatch.setattr(call_type, "attempt", attempt)
    sample(model, blocks(core, 4), sigmas=[1.0])
    ran = [e.variant for e in slot.record_of(model).entries]
    if fails:
        assert ran == ["reference", "reference", "", ""] and slot.record_of(model).fallbacks == {"reference: it is gone": 2}
        assert len(core.own_calls) == 2
    else:
        assert ran == ["reference", "reference", "sageattn_qk_int8_pv_fp16_triton", "reference"]
        assert slot.record_of(model).ran == {"reference": 3, "sageattn_qk_int8_pv_fp16_triton": 1} and not core.own_calls


def test_of_calls_alike_one_in_many_is_timed():
    model, count = patched("auto"), 2 * record.TIMED_OF_ALIKE + 3
    sample(model, blocks(OldCore(), count), sigmas=[1.0, 0.8, 0.6])
    timed = {step: [e.layer.name for e in slot.record_of(model).entries if e.begin and e.step.number == step] for step in range(3)}
    assert timed[0] == [f"block {record.TIMED_OF_ALIKE * i}" for i in range(3)]
    assert 2 <= len(timed[1]) <= 4 and not timed[2]


def test_entries_of_a_sampling_without_end_are_counted_only(monkeypatch):
    monkeypatch.setattr(record, "MAX_ENTRIES", 10)
    model, core = patched("auto"), OldCore()
    sample(model, blocks(core, 4), sigmas=torch.linspace(1, 0, 6).tolist())
    assert 10 <= len(slot.record_of(model).entries) < 14 and list(slot.record_of(model).kept.values()) == [24] == [len(core.own_calls)]


def test_the_override_behind_gets_every_call_of_ours_that_is_kept():
    seen = []

    def behind(func, *args, **kwargs):
        seen.append(func)
        return func(*args, **kwargs)

    model = patched("auto", Model(behind))
    sample(model, blocks(OldCore(), 3))
    assert len(seen) == len(slot.record_of(model).entries) == 12


def test_calls_that_are_kept_again_behind_another_of_ours_stay_one_entry():
    model = slot.install(patched("auto"), Half())
    sample(model, blocks(OldCore()), sigmas=torch.linspace(1, 0, 4).tolist())
    reasons = [e.reasons for e in slot.record_of(model).entries]
    assert len(reasons) == 8 and reasons[0] == () and len(reasons[1]) == 2 and reasons == reasons[:2] * 4


def test_calls_outside_of_a_sampling_are_counted_and_not_kept():
    model, core = patched(), OldCore()
    core.attention(*QKV, 4, transformer_options=model.options)
    assert slot.record_of(model).ran == {"reference": 1} and not slot.record_of(model).entries


@pytest.mark.parametrize("variant", ["auto", "reference"])
def test_calls_like_those_of_a_sampling_that_is_over_are_counted_and_not_kept(variant):
    model, core, last = patched(variant), OldCore(), []
    sample(model, lambda options: last.append(options) or blocks(core)(options), sigmas=[1.0])
    before = what(model)
    for _ in range(3):
        blocks(core)(last[-1])
    assert what(model) == before and len(before) == 2
    found = slot.record_of(model).as_dict()
    assert sum(found["ran"].values()) + sum(found["kept"].values()) == 8


@pytest.mark.parametrize("variant", ["auto", "reference"])
def test_calls_before_a_sampling_are_none_of_its_entries(variant):
    """Neither they nor those like them: they come with one step's tensor and one pass's list, as a sampling's do."""
    model, core = patched(variant), OldCore()
    options = {**model.options, "sigmas": torch.ones(1), "cond_or_uncond": [0]}
    for _ in range(3):
        blocks(core)(dict(options))
    assert not what(model)


def test_a_sampling_that_is_over_does_not_hold_on_to_its_model():
    model, of_sampling = patched(), []
    sample(model, lambda options: of_sampling.append(slot.record_of(model).sampling) or blocks(OldCore())(options), sigmas=[1.0])
    assert of_sampling[0] is slot.record_of(model).sampling and of_sampling[0].percent_to_sigma is None


@pytest.mark.parametrize(("variant", "said"), [("auto", "left to the model's own attention"), ("reference", "attention runs on reference")])
def test_counts_that_begin_anew_are_logged_anew(variant, said, caplog):
    caplog.set_level("INFO")
    model = patched(variant)

    def network(options):
        call = blocks(OldCore())
        call(options)
        slot.record_of(model).reset()
        return call(options)

    sample(model, network, sigmas=[1.0])
    assert caplog.text.count(said) == 2


def test_a_call_that_has_to_be_exact_is_kept_for_that_whatever_is_kept_like_it():
    model, core = patched("auto"), OldCore()

    def network(options):
        return sum(core.attention(*QKV, 4, transformer_options=options, low_precision_attention=low) for low in (True, True, False))

    sample(model, network, sigmas=[1.0])
    why = [reasons[0] for *_, reasons in what(model)]
    assert why[0] == why[1] != why[2] and "full precision" in why[2]


def test_compiled_attention_is_one_entry_a_call_also_through_two_of_ours():
    model = slot.install(patched(), Half())

    def layer(options, q, k, v):
        return options[KEY](sdpa, q, k, v, 4, transformer_options=options)

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    sample(model, lambda options: compiled(options, *QKV), sigmas=[1.0, 0.75, 0.5, 0.25])
    assert [(variant, reasons) for _, _, variant, reasons in what(model)] == [
        ("sparse", ()), ("reference", ("its turn is another",)),
    ] * 2  # fmt: skip


@pytest.fixture
def server(monkeypatch) -> list[tuple[str, str]]:
    """What a ComfyUI server was told to show: (node, text)."""
    shown: list[tuple[str, str]] = []
    module = ModuleType("server")
    instance = SimpleNamespace(send_progress_text=lambda text, node_id: shown.append((node_id, text)))
    module.PromptServer = SimpleNamespace(instance=instance)
    monkeypatch.setitem(sys.modules, "server", module)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    return shown


def test_the_line_on_the_nodes_tells_what_ran_in_the_step_before(server):
    dense, sparse = patched(unique_id="7"), Half()
    sparse.node_id = "12"
    model = slot.install(dense, sparse)
    sample(model, blocks(OldCore()), sigmas=[1.0, 0.5, 0.2])
    said = [f"step {n}, attention calls: sparse 1, reference 1; 25% of the blocks" for n in (1, 2, 3)]
    assert [text for node, text in server if node == "7"] == [text for node, text in server if node == "12"] == said


def test_the_line_tells_of_fallbacks_and_the_model_s_own(server):
    model = patched("reference", unique_id="7")
    core = OldCore()
    sample(model, lambda options: core.attention(*(torch.randn(1, 4, 300) for _ in range(3)), 1, transformer_options=options), [1.0])
    assert server[-1] == ("7", "step 1, attention calls: the model's own 1; fallbacks: 1, see the log")


def test_the_line_is_not_sent_more_often_than_one_can_read(server, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 60.0)
    sample(patched(unique_id="7"), blocks(OldCore()), sigmas=torch.linspace(1, 0, 9).tolist())
    assert [text.split(",")[0] for _, text in server] == ["step 9"]  # the first step has none before it, the end is always told


def test_without_a_server_there_is_no_line():
    assert slot.record_of(patched(unique_id="7")).on_step is None
