"""`bench` without a GPU: its arithmetic and its refusals, on a stand-in for torch.cuda whose time is the calls' own."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

from fake_gpu import Gpu, attention, install  # noqa: E402

from sageattention import Unsupported  # noqa: E402
from sageattention.cli import bench, workloads  # noqa: E402
from sageattention.cli.candidates import Attention  # noqa: E402
from sageattention.cli.mask_forms import MASK_FORMS  # noqa: E402

SHAPE = workloads.Shape("small", 1, 2, 64, 96, 64)


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    return install(monkeypatch)


def run(candidates: list[Attention]) -> dict[str, bench.Row]:
    rows = bench.time_shape(SHAPE, candidates, torch.device("cpu"), kind="normal", repeats=3, budget_ms=20)
    return {row.candidate: row for row in rows}


def test_times_ratios_memory_and_error(gpu):
    rows = run([attention(gpu, "sdpa_cudnn", 2.0), attention(gpu, "fast", 1.0), attention(gpu, "wrong", 0.5, factor=0.9)])
    fast = rows["fast"]
    assert fast.event_ms == pytest.approx(1.0)
    assert fast.graph_ms == pytest.approx(0.8)
    assert fast.event_ratio == pytest.approx(2.0) and fast.graph_ratio == pytest.approx(2.0)
    assert fast.tflops == pytest.approx(SHAPE.flops / 0.8e-3 / 1e12)
    assert len(fast.events) == len(fast.graphs) == 3
    output_mib = 2 * SHAPE.batch * SHAPE.heads * SHAPE.len_q * SHAPE.head_dim / bench.MIB
    assert fast.extra_mib == pytest.approx(3 - output_mib)
    assert fast.error < 0.005
    assert rows["wrong"].error == pytest.approx(0.1, rel=0.05)


def test_masks_beside_the_same_call_without(gpu):
    def masked(q, k, v, attn_mask=None):
        gpu.spend(1.0 if attn_mask is None else 1.5)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)

    candidates = [attention(gpu, "sdpa_cudnn", 2.0), Attention("ours", masked, None)]
    form = MASK_FORMS["key bool"]
    plain, rows = (
        bench.time_shape(SHAPE, candidates, torch.device("cpu"), kind="normal", repeats=3, budget_ms=20, form=f) for f in (None, form)
    )
    bench._of_plain(rows, plain)
    assert [row.of_plain for row in rows] == pytest.approx([1.0, 1.5])
    assert all(row.mask == "key bool" and row.error < 0.005 for row in rows)
    assert all(not row.mask and row.of_plain is None for row in plain)


def test_the_exact_sample_is_masked_as_the_call_is():
    shape = workloads.Shape("square", 2, 4, 90, 90, 64, heads_kv=2)
    q, k, v = workloads.make("normal", shape)
    for form in MASK_FORMS.values():
        keywords = form.keywords(shape, q.dtype, "cpu")
        sample, exact = bench._exact_sample(q, k, v, **keywords)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **keywords)
        assert workloads.relative_l2(sample(out), exact) < 0.005, form.name


def test_without_cudnn_the_fastest_backend_is_the_baseline(gpu, capsys):
    rows = run([attention(gpu, "sdpa_flash", 3.0), attention(gpu, "sdpa_efficient", 2.0), attention(gpu, "ours", 1.0)])
    assert rows["ours"].event_ratio == pytest.approx(2.0) and rows["ours"].baseline == "sdpa_efficient"
    bench._print_shape(str(SHAPE), list(rows.values()))
    assert "x sdpa_efficient" in capsys.readouterr().out


def test_a_shape_that_does_not_fit_the_card_is_skipped(gpu, monkeypatch):
    def full(*arguments, **keywords):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(bench.workloads, "make", full)
    row = run([attention(gpu, "ours", 1.0)])["ours"]
    assert "memory" in row.skipped and row.event_ms is None
    bench._print_shape(str(SHAPE), [row])


def test_turing_is_timed_in_fp16(monkeypatch):
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert bench.dtype_of(torch.device("cuda", 0)) == dtype


def test_a_refusal_is_a_reason_and_stops_nothing(gpu):
    def refuse(q, k, v):
        raise Unsupported("q", "its head_dim is 512, accepted are 1 to 256")

    def no_backend(q, k, v):
        raise RuntimeError("No available kernel.\nAborting execution.")

    rows = run([Attention("sdpa_flash", no_backend, None), Attention("ours", refuse, None), attention(gpu, "fine", 1.0)])
    assert rows["sdpa_flash"].skipped == "No available kernel."
    assert rows["ours"].skipped.startswith("q: its head_dim is 512")
    assert rows["fine"].event_ms and rows["fine"].event_ratio is None


def test_our_own_failure_is_not_taken_for_a_refusal(gpu):
    def crash(q, k, v):
        raise RuntimeError("launch failed")

    with pytest.raises(RuntimeError, match="launch failed"):
        run([Attention("ours", crash, None)])


def test_what_cannot_be_captured_still_has_its_event_time(gpu):
    def call(q, k, v):
        if gpu.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        gpu.spend(1.0)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    row = run([Attention("eager", call, None)])["eager"]
    assert row.event_ms == pytest.approx(1.0) and row.graph_ms is None
    assert "capturing" in row.graph_refused


class Clock:
    """A host whose time is the calls' own, in µs."""

    now = 0.0

    def __call__(self) -> float:
        return self.now * 1e-6

    def candidate(self, name: str, us) -> Attention:
        """Its n-th call takes `us(n)`."""
        calls = itertools.count()

        def call(q, k, v):
            self.now += us(next(calls))

        return Attention(name, call, None)


@pytest.mark.usefixtures("gpu")
def test_the_host_time_is_that_of_a_warm_call_whatever_disturbs_some():
    clock = Clock()
    steady = clock.candidate("steady", lambda n: 18.0)
    cold = clock.candidate("cold", lambda n: 2e6 if n == 0 else 300.0 if n < 500 else 30.0)
    disturbed = clock.candidate("disturbed", lambda n: 5000.0 if n % 37 == 0 else 31.0)
    found = bench.host_times([steady, cold, disturbed], torch.device("cpu"), clock)
    assert found == {name: pytest.approx(us) for name, us in (("steady", 18), ("cold", 30), ("disturbed", 31))}


@pytest.mark.usefixtures("gpu")
def test_a_candidate_s_own_slow_phase_is_not_its_host_time():
    """The processor is at half its clock for a quarter of the time, whoever is at work."""
    clock = Clock()
    slowed = lambda us: lambda n: us * (2 if clock.now // 50e3 % 4 == 3 else 1)  # noqa: E731
    found = bench.host_times([clock.candidate("a", slowed(20.0)), clock.candidate("b", slowed(40.0))], torch.device("cpu"), clock)
    assert found == {"a": pytest.approx(20), "b": pytest.approx(40)}


@pytest.mark.usefixtures("gpu")
def test_host_times_end_and_leave_the_collector_as_it_was():
    import gc

    clock, calls = Clock(), []

    def refuse(q, k, v):
        raise Unsupported("q", "no")

    def slow(q, k, v):
        calls.append(gc.isenabled())
        clock.now += 50e3

    found = bench.host_times([Attention("refuses", refuse, None), Attention("slow", slow, None)], torch.device("cpu"), clock)
    assert found == {"refuses": None, "slow": pytest.approx(50e3)}
    assert len(calls) <= 10 * (1 + 1 + 2 + 1) and not any(calls) and gc.isenabled()


def test_the_text_has_every_candidate(gpu, capsys):
    bench._print_shape(str(SHAPE), list(run([attention(gpu, "sdpa_cudnn", 2.0), attention(gpu, "fast", 1.0)]).values()))
    out = capsys.readouterr().out
    assert "small (1, 2, 64, 96, 64)" in out
    assert "fast" in out and "2.00" in out
