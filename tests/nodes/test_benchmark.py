"""The benchmark: a model's own shapes, each attention of this machine on them, within a minute."""

from __future__ import annotations

import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from comfy_standin import Model, OldCore, sample, sdpa  # noqa: E402
from pack import load_pack  # noqa: E402

PACK = load_pack()
benchmark, functions, slot = PACK.nodes.benchmark, PACK.nodes.functions, PACK.nodes.slot
benchmark_picture, benchmark_node = PACK.nodes.benchmark_picture, PACK.nodes.benchmark_node
PATCH = PACK.NODE_CLASS_MAPPINGS["PatchSageAttention"]
NODE = PACK.NODE_CLASS_MAPPINGS["SageAttentionBenchmark"]
CPU = torch.device("cpu")
Case, Row, Shape = benchmark.Case, benchmark.Row, benchmark.Shape
QKV = [torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(i)) for i in range(3)]
TEXT = [torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
MASK = torch.ones(1, 1, 1, 20, dtype=torch.bool)


def network(core):
    def run(options):
        out = sum(core.attention(*QKV, 2, transformer_options=options) for _ in range(3))
        hnd = [t.unflatten(2, (2, 64)).transpose(1, 2) for t in QKV]
        out = out + core.attention(*hnd, 2, transformer_options=options, skip_reshape=True)
        return out + core.attention(QKV[0], *TEXT, 2, MASK, enable_gqa=True, transformer_options=options)

    return run


def sampled() -> Model:
    model = PATCH().execute(Model(), "reference")[0]
    sample(model, network(OldCore()), [1.0, 0.5])
    return model


SELF = Shape("1x2x64x64x64", 1, 2, 64, 64, 64)
CROSS = Shape("1x2x64x20x64", 1, 2, 64, 20, 64, heads_kv=1)


def test_the_cases_are_the_model_s_calls_in_either_layout_the_most_work_first():
    assert benchmark.cases(slot.record_of(sampled()).entries) == [
        Case(SELF, torch.float32, False, 4.0), Case(CROSS, torch.float32, True, 1.0),
    ]  # fmt: skip


def test_every_attention_of_this_machine_is_timed_and_its_error_known():
    ticks = []
    timing = benchmark.Benchmark(CPU, tick=lambda: ticks.append(1))
    given = benchmark.cases(slot.record_of(sampled()).entries)
    rows = timing.run(given)
    assert len(ticks) == timing.ticks(given) == len(rows) == 6
    by = {(row.case, row.attention): row for row in rows}
    for case in ("1x2x64x64x64", "1x2x64x20x64 masked"):
        own, ours, sparse = by[case, "pytorch"], by[case, "reference"], by[case, benchmark.SPARSE]
        assert own.error < 1e-5 < ours.error < 0.02 and own.ratio == 1 and ours.ratio == own.ms / ours.ms
        assert sparse.ms is None and "block-sparse" in sparse.note
    step = benchmark.a_step(rows)
    assert step["pytorch"] == 4 * by["1x2x64x64x64", "pytorch"].ms + by["1x2x64x20x64 masked", "pytorch"].ms
    text = benchmark.text("cpu", rows)
    assert "1x2x64x20x64 masked" in text and "A step: pytorch" in text
    assert benchmark_picture.draw("cpu", rows).width == 1024
    assert len(json.loads(json.dumps(benchmark.as_dict("cpu", rows)))["rows"]) == 6


def test_an_attention_that_can_t_do_a_case_counts_with_pytorch_s_time_there():
    rows = [
        *(Row("a", 2, "pytorch", 3.0), Row("b", 1, "pytorch", 5.0)),
        *(Row("a", 2, "fast", 1.0), Row("b", 1, "fast")),
        *(Row("a", 2, "none"), Row("b", 1, "none")),
    ]
    assert benchmark.a_step(rows) == {"pytorch": 11.0, "fast": 7.0}
    rows[1].ms = None
    assert benchmark.a_step(rows) == {}


def test_sparse_attention_tells_the_share_of_its_blocks(monkeypatch):
    monkeypatch.setattr(benchmark, "SPARSE_FROM", 64)
    monkeypatch.setattr(benchmark, "_attentions", lambda device: {"pytorch": benchmark._torch, benchmark.SPARSE: benchmark._sparse})
    rows = benchmark.Benchmark(CPU).run([Case(Shape("s", 1, 1, 512, 512, 64), torch.float32, False, 1.0)])
    assert rows[1].ms > 0 and rows[1].error is None and rows[1].note.endswith("% of the blocks")


def slow(seconds: float):
    def attention(q, k, v, mask):
        time.sleep(seconds)
        return benchmark._torch(q, k, v, mask)

    return attention


def test_it_keeps_to_its_time(monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.5)
    monkeypatch.setattr(benchmark, "_attentions", lambda device: {"pytorch": slow(0.1), "slow": slow(0.3)})
    begun = time.monotonic()
    rows = benchmark.Benchmark(CPU).run([Case(SELF, torch.float32, False, 1.0)] * 6)
    assert time.monotonic() - begun < 2 and rows[-1].note == "no time was left" and rows[0].ms > 90


def test_what_is_too_long_for_a_cpu_is_not_begun():
    rows = benchmark.Benchmark(CPU).run([Case(Shape("wan", 1, 40, 75600, 75600, 128), torch.bfloat16, False, 80.0)])
    assert {row.note for row in rows} == {"too long for a CPU"} and benchmark.a_step(rows) == {}


def test_it_can_be_interrupted():
    def pause():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        benchmark.Benchmark(CPU, pause=pause).run([Case(SELF, torch.float32, False, 1.0)])


def test_a_full_card_is_told(monkeypatch):
    def full(q, k, v, mask):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(benchmark, "_attentions", lambda device: {"pytorch": benchmark._torch, "full": full})
    rows = benchmark.Benchmark(CPU).run([Case(SELF, torch.float32, False, 1.0)])
    assert rows[0].ms and rows[1].ms is None and "memory is too small" in rows[1].note


@pytest.fixture
def attention(monkeypatch) -> ModuleType:
    """ComfyUI's module of attention functions."""
    modules = OldCore(), {name: ModuleType(name) for name in ("comfy", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.attention")}
    found = modules[1]["comfy.ldm.modules.attention"]
    found.REGISTERED_ATTENTION_FUNCTIONS = {"pytorch": sdpa, "flash": sdpa, "sub_quad": sdpa, "sage": sdpa}
    found.register_attention_function = found.REGISTERED_ATTENTION_FUNCTIONS.__setitem__
    found.attention_pytorch = sdpa
    found.wrap_attn = lambda function: function
    for name, module in modules[1].items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_comfyui_s_other_attentions_are_timed_too(attention):
    own = []
    attention.attention_pytorch = lambda *args, **kwargs: own.append(args) or sdpa(*args, **kwargs)
    timing = benchmark.Benchmark(CPU)
    assert list(timing.attentions) == ["pytorch", "flash", "reference", benchmark.SPARSE]
    rows = timing.run([Case(SELF, torch.float32, False, 1.0), Case(CROSS, torch.float32, True, 1.0)])
    flash = [row for row in rows if row.attention == "flash"]
    assert flash[0].error < 1e-5 and flash[0].ms > 0 and "fewer heads" in flash[1].note
    assert {args[0].shape[1] for args in own} == {SELF.heads}  # PyTorch's attention as ComfyUI calls it, where it can


def test_the_variants_are_among_comfyui_s_named_functions(attention, monkeypatch):
    ready = [SimpleNamespace(name=f"sageattn_qk_int8_pv_{n}", status=s) for n, s in (("fp16_cuda", "ready"), ("fp8_cuda", "unsupported"))]
    monkeypatch.setattr(functions, "available_variants", lambda device: [*ready, SimpleNamespace(name="sdpa", status="ready")])
    functions.register()
    functions.register()  # as when a pack is loaded twice
    named = attention.REGISTERED_ATTENTION_FUNCTIONS
    assert [name for name in named if name.startswith("sage_")] == ["sage_auto", "sage_fp16_cuda"]
    for name in ("sage_auto", "sage_fp16_cuda"):  # neither can run on a CPU: PyTorch's attention does
        assert torch.equal(named[name](*QKV, 2), sdpa(*QKV, 2)) and named[name].__name__ == name
        assert torch.equal(named[name](*QKV, heads=2, skip_output_reshape=True), sdpa(*QKV, 2, skip_output_reshape=True))


def test_a_named_function_computes_what_it_can(attention, monkeypatch):
    monkeypatch.setattr(functions, "AUTO", "reference")
    monkeypatch.setattr(functions, "available_variants", lambda device: [])
    functions.register()
    out = attention.REGISTERED_ATTENTION_FUNCTIONS["sage_reference"](*QKV, 2)
    assert 1e-5 < float((out - sdpa(*QKV, 2)).norm() / sdpa(*QKV, 2).norm()) < 0.02


def test_outside_of_comfyui_nothing_is_registered(monkeypatch):
    """Nor is ComfyUI imported, or a card looked at."""
    monkeypatch.setattr(functions, "available_variants", lambda device: pytest.fail("a card was looked at"))
    before = set(sys.modules)
    functions.register()
    assert set(sys.modules) == before and "comfy.ldm.modules.attention" not in before


def test_without_a_sampling_it_says_what_to_connect(monkeypatch):
    for name in ("comfy", "comfy.model_management", "comfy.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["comfy"].model_management = sys.modules["comfy.model_management"]
    sys.modules["comfy"].utils = sys.modules["comfy.utils"]
    with pytest.raises(ValueError, match="connect a latent and a positive conditioning"):
        NODE().execute(Model())


@pytest.mark.parametrize(("hnd", "hnd_out"), [(False, False), (False, True), (True, False), (True, True)])
def test_the_probe_answers_in_the_layout_that_is_asked_for(hnd, hnd_out):
    model, core = slot.install(Model(), benchmark_node._Probe()), OldCore()
    qkv = [t.unflatten(2, (2, 64)).transpose(1, 2) for t in QKV] if hnd else QKV
    flags = {"skip_reshape": hnd, "skip_output_reshape": hnd_out}
    shapes = []

    def run(options):
        out = core.attention(*qkv, 2, transformer_options=options, **flags)
        shapes.append(out.shape)
        return out

    (out,) = sample(model, run, [1.0])
    assert shapes == [sdpa(*qkv, 2, **flags).shape] and not core.own_calls and not out.any()
    assert [case.shape for case in benchmark.cases(slot.record_of(model).entries)] == [SELF]
