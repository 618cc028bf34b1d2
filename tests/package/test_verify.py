"""Cards that nobody has tried verify our kernels themselves: on a made-up card whose kernels are right, wrong or slow as a test has it."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from fake_gpu import install  # noqa: E402

from sageattention import CudaError, KernelMissing, dispatch, explain, sageattn, settings, verify  # noqa: E402
from sageattention.backends import sdpa  # noqa: E402
from sageattention.device import capability, libcuda  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.kernels import proven  # noqa: E402
from sageattention.numerics import reference  # noqa: E402
from sageattention.numerics.constants import ERROR_BOUNDS  # noqa: E402
from sageattention.planning import calibration, rules, verdicts  # noqa: E402
from sageattention.planning.cost import TORCH, Form  # noqa: E402
from sageattention.planning.measured import MEASURED  # noqa: E402
from sageattention.planning.verdicts import Class  # noqa: E402
from sageattention.variants import Candidate, settled  # noqa: E402

CARD = Capability("cuda", 89, 4, "none", "NVIDIA GeForce RTX 4090")  # of which a small call fills all
HOPPER8 = "sageattn_qk_int8_pv_fp8_cuda_sm90"
INT8, FP8, FP16 = (f"sageattn_qk_int8_pv_{pv}_cuda" for pv in ("int8", "fp8", "fp16"))
FIRST, SECOND = Candidate(INT8), Candidate(FP8, "fp32+fp16")


class Card:
    """What the made-up card's kernels do, and what was asked of them.

    Attributes:
        ms: of a variant's calls, by name.
        factors: what a variant's right result is multiplied with.
        errors: what a variant raises.
        emulated: the variant whose result is its emulation's instead.
        calls: (variant, heads, queries) of each call.
    """

    def __init__(self, clock):
        self.clock = clock
        self.ms = {"sdpa": 3.0, INT8: 1.0, FP8: 2.0, FP16: 2.5}
        self.factors, self.errors, self.calls, self.emulated = {}, {}, [], ""

    def run(self, call):
        name = call.plan.variant.name
        self.calls.append((name, call.problem.heads_q, call.problem.len_q))
        self.clock.spend(self.ms[name])
        if name in self.errors:
            raise self.errors[name]
        p = call.problem
        if name == self.emulated:
            out, _ = reference.emulate(*call.hnd(), call.plan.scheme, is_causal=p.causal, attn_mask=call.mask, sm_scale=p.sm_scale)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(
                *call.hnd(), call.mask, is_causal=p.causal, scale=p.sm_scale, enable_gqa=p.heads_q != p.heads_kv
            )
        return out * self.factors.get(name, 1.0), None

    def ran(self, name: str) -> int:
        return sum(name == ran for ran, *_ in self.calls)


@pytest.fixture
def card(monkeypatch, tmp_path) -> Card:
    made_up = Card(install(monkeypatch))
    monkeypatch.setattr(capability, "of_device", lambda device, index: CARD)
    monkeypatch.setenv(calibration.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(libcuda, "driver_version", lambda: "580.95.05, CUDA 13.0")
    backend = SimpleNamespace(run=made_up.run)
    monkeypatch.setitem(dispatch._BACKENDS, "cuda", backend)
    monkeypatch.setitem(dispatch._BACKENDS, "sdpa", backend)
    return made_up


def qkv(heads=2, length=1500, head_dim=64, heads_kv=0):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, length, head_dim, generator=generator).half() for h in (heads, heads_kv or heads, heads_kv or heads)]


def exact(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def seen() -> verdicts.Verdicts:
    return verdicts.of_card(CARD)


# --- what `auto` makes of a first call


def test_the_first_long_call_is_verified_and_timed_once(card, caplog):
    caplog.set_level(logging.INFO)
    q, k, v = qkv()
    assert explain(q, k, v).basis == "static"
    assert torch.equal(sageattn(q, k, v), exact(q, k, v))
    assert [card.ran(name) for name in ("sdpa", INT8, FP8, FP16)] == [1 + verify.TURNS, 2 + verify.TURNS, 1 + verify.TURNS, 0]
    verdict = seen().classes[Class(64, "none", 1)]
    assert verdict.ms == pytest.approx({TORCH: 3.0, FIRST: 1.0, Candidate(FP8): 2.0}) and verdict.right == {FIRST, Candidate(FP8)}
    assert "verified on NVIDIA GeForce RTX 4090" in caplog.text
    card.calls.clear()
    found = explain(q, k, v)
    assert (found.variant, found.basis) == (INT8, "verified") and "1 ms measured, PyTorch's attention 3 ms" in found.reason
    sageattn(q, k, v)
    assert card.calls == [(INT8, 2, 1500)]


def test_the_second_likeliest_wins_where_it_is_faster(card):
    card.ms |= {INT8: 2.5, FP8: 1.5}
    q, k, v = qkv()
    sageattn(q, k, v)
    assert card.calls[-1][0] == FP8 and explain(q, k, v).variant == FP8


def test_a_slow_kernel_does_not_stay(card):
    card.ms |= {INT8: 5.0, FP8: 4.0}
    q, k, v = qkv()
    sageattn(q, k, v)
    found = explain(q, k, v)
    assert card.calls[-1][0] == "sdpa" and found.variant == "sdpa" and found.basis == "verified"
    assert found.predicted_ms == pytest.approx({"sdpa": 3.0, INT8: 5.0, FP8: 4.0})


@pytest.mark.parametrize("factor", [0.9, float("nan"), float("inf"), 0.0])
def test_a_wrong_kernel_is_out_on_the_card(factor, card, caplog):
    card.factors[INT8] = factor
    q, k, v = qkv()
    assert torch.equal(sageattn(q, k, v), exact(q, k, v))
    assert card.calls[-1][0] == FP8
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1 and f"{INT8} is not used on {CARD.name} any more: its result is off by" in told[0] and "report" in told[0]
    longer = qkv(length=3100)  # another class, where nobody has looked
    assert explain(*longer).variant == FP8 and "off by" in dict(explain(*longer).rejected)[INT8]
    with pytest.raises(KernelMissing, match="off by"):
        sageattn(*longer, variant=INT8)


def test_a_second_device_s_call_waits_for_the_first_one_s_verdict(card, monkeypatch):
    """It would run the very kernel that is being looked at."""
    card.factors[INT8], run, others = 0.9, card.run, []

    def meanwhile(call):
        if not others:
            others.append(threading.Thread(target=lambda: results.append(sageattn(q, k, v))))
            others[0].start()
            others[0].join(0.3)
        return run(call)

    monkeypatch.setitem(dispatch._BACKENDS, "cuda", SimpleNamespace(run=meanwhile))
    (q, k, v), results = qkv(), []
    results.append(sageattn(q, k, v))
    others[0].join()
    assert len(results) == 2 and all(torch.equal(result, exact(q, k, v)) for result in results)
    assert card.ran(INT8) == 1 + verify.TURNS  # one of them has looked


def test_what_is_off_by_less_than_twice_its_bound_is_right(card):
    q, k, v = qkv()
    card.factors[INT8] = 1 + 1.9 * ERROR_BOUNDS["int8"]
    sageattn(q, k, v)
    assert explain(q, k, v).variant == INT8
    verdicts.reset()
    card.factors[INT8] = 1 + 2.1 * ERROR_BOUNDS["int8"]
    sageattn(q, k, v)
    assert explain(q, k, v).variant == FP8


@pytest.mark.parametrize("form", ["none", "causal", "bool", "additive", "heads that share keys"])
def test_data_harder_than_the_bounds_make_no_kernel_wrong(form, card, caplog):
    """Scores far apart: INT8 is off by more there, of right kernels as of their emulation."""
    q, k, v = qkv(heads=4, length=300, head_dim=128, heads_kv=2 if form == "heads that share keys" else 0)
    call = {"sm_scale": 8.0, "is_causal": form == "causal", "variant": INT8}
    if form in ("bool", "additive"):
        keeps = torch.rand(300, 300, generator=torch.Generator().manual_seed(1)) > 0.3
        call["attn_mask"] = keeps if form == "bool" else torch.zeros(300, 300).masked_fill(~keeps, -torch.inf).half()
    card.emulated = INT8
    out = sageattn(q, k, v, **call)
    right, _ = reference.oracle(q, k, v, **{name: value for name, value in call.items() if name != "variant"})
    assert float((out - right).norm() / right.norm()) > verify.TOLERANCE * ERROR_BOUNDS["int8"]
    assert not caplog.records and [verdict.right for verdict in seen().classes.values()] == [{FIRST}]
    verdicts.reset()
    card.factors[INT8] = 0.5
    with pytest.raises(KernelMissing, match="off by"):
        sageattn(q, k, v, **call)


def test_where_all_are_wrong_torch_computes(card):
    card.factors |= {INT8: 0.5, FP8: 0.5, FP16: 0.5}
    for length in (1500, 3100):
        q, k, v = qkv(length=length)
        assert torch.equal(sageattn(q, k, v), exact(q, k, v))
    assert explain(q, k, v).variant == "sdpa" and set(seen().off) == {FIRST, Candidate(FP8), Candidate(FP16, "fp16+fp32")}


def test_each_kind_and_class_of_length_is_verified(card):
    for given, masked in ((qkv(), False), (qkv(length=3100), False), (qkv(head_dim=72), False), (qkv(), True)):
        mask = torch.ones(1, 1, given[0].shape[2], given[0].shape[2], dtype=torch.bool) if masked else None
        sageattn(*given, attn_mask=mask)
        sageattn(*given, attn_mask=mask)
    assert set(seen().classes) == {Class(64, "none", 1), Class(64, "none", 2), Class(128, "none", 1), Class(64, "bool", 1)}


def test_a_long_call_is_looked_at_in_part(card, monkeypatch):
    """Heads first, groups of them as they are; then queries."""
    q, k, v = qkv(heads=8, heads_kv=2)
    monkeypatch.setattr(verify, "PART_MS", 0.5 * rules.predict(Form(8, 2, 1500, 1500, 64), CARD, 89)[0][TORCH])
    assert torch.equal(sageattn(q, k, v), exact(q, k, v))
    assert {heads for _, heads, _ in card.calls[:-1]} == {4} and card.calls[-1] == (INT8, 8, 1500)
    verdicts.reset()
    monkeypatch.setattr(verify, "PART_MS", 0.0)
    sageattn(q, k, v)
    assert card.calls[-2][1:] == (4, verify.MIN_ROWS)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_part_is_of_the_call_s_own_tensors(layout, card, monkeypatch):
    monkeypatch.setattr(verify, "PART_MS", 0.0)
    q, k, v = (t if layout == "HND" else t.transpose(1, 2) for t in qkv())
    mask = torch.rand(1, 2, 1500, 1500) > 0.5
    call = dispatch.prepare(
        q, k, v, tensor_layout=layout, is_causal=False, attn_mask=mask, sm_scale=0.3, return_lse=True, variant="auto"
    )  # fmt: skip
    part = verify._part(call, Form.of(call.problem))
    rows = slice(0, verify.MIN_ROWS)
    assert torch.equal(part.q, q[:, :1, rows] if layout == "HND" else q[:, rows, :1]) and torch.equal(part.mask, mask[:, :1, rows])
    assert torch.equal(part.v, v[:, :1] if layout == "HND" else v[:, :, :1])
    assert (part.problem.sm_scale, part.problem.layout, part.problem.return_lse) == (0.3, layout, False)


# --- by name


def test_a_variant_by_name_is_verified_and_not_timed(card):
    q, k, v = qkv()
    sageattn(q, k, v, variant=FP16)
    sageattn(q, k, v, variant=FP16)
    assert [name for name, *_ in card.calls] == ["sdpa", FP16, FP16, FP16]
    assert seen().classes[Class(64, "none", 1)] == verdicts.Verdict({}, frozenset({Candidate(FP16)}))
    sageattn(q, k, v)  # "auto" still has to time
    assert seen().classes[Class(64, "none", 1)].ms and explain(q, k, v).basis == "verified"


def test_a_variant_by_name_that_is_wrong_is_refused(card, caplog):
    card.factors[FP16] = 0.5
    for _ in range(2):
        with pytest.raises(KernelMissing, match=r"off by 0\.5, at most 0\.06 is accepted.*choose 'auto' or another variant"):
            sageattn(*qkv(), variant=FP16)
    assert caplog.text.count("is not used on") == 1 and card.ran(FP16) == 1


def test_a_variant_by_the_environment_that_is_wrong_gives_way_to_auto(card, monkeypatch, caplog):
    monkeypatch.setenv("SAGEATTENTION_VARIANT", FP16)
    settings.forget()
    card.factors[FP16] = 0.5
    q, k, v = qkv()
    for _ in range(2):
        assert torch.equal(sageattn(q, k, v), exact(q, k, v))
    assert card.calls[-1][0] == INT8 and "SAGEATTENTION_VARIANT is" in caplog.text


def test_an_accumulator_that_was_asked_for_is_verified_too(card):
    q, k, v = qkv()
    sageattn(q, k, v)
    card.calls.clear()
    card.factors[FP16] = 0.5
    assert explain(q, k, v, pv_accum_dtype="fp16").variant == FP16
    assert torch.equal(sageattn(q, k, v, pv_accum_dtype="fp16"), exact(q, k, v))
    assert card.ran(FP16) == 1 + verify.TURNS and Candidate(FP16, "fp16") in seen().off
    found = explain(q, k, v, pv_accum_dtype="fp16")
    assert (found.variant, found.accum) != (FP16, "fp16") and "off by 0.5" in dict(found.rejected)[f"{FP16}:fp16"]


# --- when nothing is verified


def test_never_in_a_graph_capture(card):
    q, k, v = qkv()
    card.clock.capturing = []
    sageattn(q, k, v)
    assert [name for name, *_ in card.calls] == [INT8] and not seen().classes
    card.clock.capturing = None
    sageattn(q, k, v)
    assert seen().classes


def test_never_in_a_compiled_graph(card):
    from sageattention import torch_library

    q, k, v = qkv()
    torch_library.attention(q, k, v, None, "HND", False, None, "auto", "")
    assert [name for name, *_ in card.calls] == [INT8] and not seen().classes


def test_the_environment_turns_it_off(card, monkeypatch):
    card.factors[INT8] = 0.5
    q, k, v = qkv()
    sageattn(q, k, v)
    monkeypatch.setenv(verdicts.VARIABLE, "0")
    settings.forget()
    card.calls.clear()
    sageattn(q, k, v)
    assert [name for name, *_ in card.calls] == [INT8]


@pytest.fixture
def hopper(card, monkeypatch) -> Capability:
    measured = Capability("cuda", 90, 132, "none", "NVIDIA H200")
    monkeypatch.setattr(capability, "of_device", lambda device, index: measured)
    card.ms[HOPPER8] = 1.0
    return measured


def test_not_where_the_architecture_was_measured(card, hopper, monkeypatch):
    monkeypatch.setattr(proven, "PROVEN", {90: proven.digest(90)})
    sageattn(*qkv(length=5000))
    assert len(card.calls) == 1 and "not needed" in verdicts.lines(hopper, 90)[0]


def test_images_that_have_changed_since_the_tests_are_verified_and_not_timed(card, hopper, monkeypatch):
    monkeypatch.setattr(proven, "PROVEN", {90: "another build's"})
    q, k, v = qkv(length=5000)
    sageattn(q, k, v)
    found = verdicts.of_card(hopper).of(Form(2, 2, 5000, 5000, 64))
    assert Candidate(HOPPER8) in found.right and not found.ms and card.ran("sdpa") == 1
    assert explain(q, k, v).basis == "measured"


def test_what_has_changed_and_is_wrong_is_out(card, hopper, monkeypatch, caplog):
    monkeypatch.setattr(proven, "PROVEN", {})
    card.factors[HOPPER8] = float("nan")
    q, k, v = qkv(length=5000)
    assert (sageattn(q, k, v) - exact(q, k, v)).norm() < 0.05 * exact(q, k, v).norm()
    assert explain(q, k, v).variant != HOPPER8 and f"{HOPPER8} is not used on NVIDIA H200" in caplog.text


def test_a_tool_records_what_has_been_proven(tmp_path):
    copy = tmp_path / "sageattention"
    shutil.copytree(Path(proven.__file__).parents[1], copy, ignore=shutil.ignore_patterns("*.xz", "__pycache__"))
    tool = tmp_path / "csrc" / "tools" / "prove.py"
    tool.parent.mkdir(parents=True)
    shutil.copy(Path(proven.__file__).parents[2] / "csrc" / "tools" / "prove.py", tool)
    subprocess.run([sys.executable, str(tool), "90"], check=True)
    subprocess.run([sys.executable, "-c", "from sageattention.kernels.proven import proven; assert proven(90)"], cwd=tmp_path, check=True)


def test_not_where_the_card_is_calibrated(card):
    calibration.save(CARD, [calibration.Point(Form(2, 2, 1500, 1500, 64), {TORCH: 3.0, Candidate(FP8): 1.0})])
    q, k, v = qkv()
    sageattn(q, k, v)
    assert [name for name, *_ in card.calls] == [FP8] and not seen().classes


def test_short_calls_tell_nothing(card):
    sageattn(*qkv(length=200), variant=INT8)
    assert card.calls == [(INT8, 2, 200)]


def test_where_memory_is_short_it_is_left_until_the_next_start(card):
    card.errors[INT8] = torch.cuda.OutOfMemoryError("full")
    q, k, v = qkv()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        sageattn(q, k, v)
    card.errors.clear()
    card.calls.clear()
    sageattn(q, k, v)
    assert [name for name, *_ in card.calls] == [INT8] and not seen().classes


def test_what_torch_refuses_ends_no_call(card, caplog):
    q, k, v = qkv()
    card.errors["sdpa"] = RuntimeError("no such mask")
    for _ in range(2):
        assert torch.equal(sageattn(q, k, v), exact(q, k, v))
    assert card.ran("sdpa") == 1 and caplog.text.count("no such mask") == 1


def test_an_error_of_the_card_s_is_heard(card):
    card.errors[INT8] = CudaError("an illegal memory access")
    with pytest.raises(CudaError):
        sageattn(*qkv())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_for_torch_tells_nothing(value, card, caplog):
    q, k, v = qkv()
    v[:] = value
    sageattn(q, k, v)
    assert not seen().classes and not seen().off and not caplog.records


def test_a_kernel_that_turns_out_to_be_missing_is_none_that_is_wrong(card, caplog):
    card.errors[INT8] = KernelMissing(INT8, "its image can't be loaded")
    q, k, v = qkv()
    assert torch.equal(sageattn(q, k, v), exact(q, k, v))
    assert not seen().off and not caplog.records and explain(q, k, v).variant == FP8


# --- what is kept


def test_what_was_found_is_there_at_the_next_start(card, tmp_path):
    card.factors[INT8] = 0.5
    q, k, v = qkv()
    sageattn(q, k, v)
    before = seen()
    verdicts.forget()
    assert (seen().classes, seen().off) == (before.classes, before.off) and seen() is not before
    card.calls.clear()
    sageattn(q, k, v)
    assert [name for name, *_ in card.calls] == [FP8]
    file = tmp_path / "cache" / "verified-NVIDIA-GeForce-RTX-4090.json"
    assert json.loads(file.read_text())["made_for"]["card"] == CARD.name


def test_another_driver_is_another_card(card, monkeypatch, caplog):
    card.factors[INT8] = 0.5
    sageattn(*qkv())
    monkeypatch.setattr(libcuda, "driver_version", lambda: "590.10, CUDA 13.1")
    verdicts.forget()
    caplog.clear()
    assert not seen().off and not caplog.records


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}'])
def test_a_file_that_is_none_is_made_anew(text, card, tmp_path):
    sageattn(*qkv())
    file = next((tmp_path / "cache").glob("verified*"))
    whole = file.read_text()
    file.write_text(text)
    verdicts.forget()
    settings.forget()
    sageattn(*qkv())
    assert json.loads(file.read_text())["classes"] == json.loads(whole)["classes"]


@pytest.mark.parametrize(
    "change",
    [{"mask": "triangular"}, {"head_dim": 300}, {"length": "1"}, {"ms": {INT8: 1.0}}, {"ms": {"sdpa": -1.0}}, {"right": ["sageattn9"]}],
    ids=str,
)
def test_a_verdict_that_is_none_is_not_taken(change, card, tmp_path):
    sageattn(*qkv())
    file = next((tmp_path / "cache").glob("verified*"))
    content = json.loads(file.read_text())
    content["classes"][0] |= change
    file.write_text(json.dumps(content))
    verdicts.forget()
    assert not seen().classes


def test_a_place_that_cannot_be_written_is_said(card, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv(calibration.FOLDER, str(tmp_path / "file"))
    verdicts.forget()
    q, k, v = qkv()
    sageattn(q, k, v)
    assert "can't be kept" in caplog.text and explain(q, k, v).basis == "verified"


def test_forced_kernels_say_nothing_about_the_card_s_own(card, monkeypatch, tmp_path):
    monkeypatch.setenv("SAGEATTENTION_ARCH", "80")
    settings.forget()
    sageattn(*qkv(head_dim=128, length=3000))
    monkeypatch.delenv("SAGEATTENTION_ARCH")
    settings.forget()
    assert not seen().classes and verdicts.of_card(CARD, "sm_80").classes
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["verified-sm_80-NVIDIA-GeForce-RTX-4090.json"]


def test_doctor_shows_it_and_reset_undoes_it(card, monkeypatch, capsys):
    from sageattention import __main__ as cli
    from sageattention.cli import doctor

    assert doctor._device(CARD, True, [])["verified"] == ["nothing yet; the first long call of each kind is"]
    card.factors[INT8] = 0.5
    sageattn(*qkv())
    found = doctor._device(CARD, True, [])["verified"]
    assert (
        found[0].startswith(f"{INT8} is out: its result is off by 0.5") and "sdpa 3 ms" in found[1] and "head_dim 64, mask none" in found[1]
    )
    monkeypatch.setenv(verdicts.VARIABLE, "0")
    settings.forget()
    assert doctor._device(CARD, True, [])["verified"] == ["off, by SAGEATTENTION_VERIFY"]
    assert cli.main(["bench", "--calibrate", "--reset"]) == 0
    assert "verified-NVIDIA" in capsys.readouterr().out and not seen().off


# --- on a card that we have, as if nobody had measured its architecture


@pytest.fixture
def unmeasured(monkeypatch, tmp_path, nothing_is_remembered):
    for arch in list(MEASURED):
        monkeypatch.delitem(MEASURED, arch)
    monkeypatch.setitem(rules.MARGINS, "static", 0.5)  # by its data sheet a Hopper card would leave such calls to PyTorch
    monkeypatch.setenv(calibration.FOLDER, str(tmp_path))
    nothing_is_remembered()
    card = capability.of_device("cuda", torch.cuda.current_device())
    yield card
    monkeypatch.undo()
    nothing_is_remembered()


def on_gpu(length=4096):
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(1, 24, length, 128, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def tampered(monkeypatch, name, change):
    """Have a variant's kernels followed by `change`, which may spoil the result or take time."""
    from sageattention.backends.cuda import host

    run = host.run

    def changed(call):
        out, lse = run(call)
        return (change(out) if call.plan.variant.name == name else out), lse

    monkeypatch.setattr(host, "run", changed)


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["right", "wrong", "slow", "wrong in one head"])
def test_on_a_gpu(what, unmeasured, monkeypatch):
    q, k, v = on_gpu()
    first = explain(q, k, v)
    likeliest = Candidate(first.variant, first.accum)
    assert first.basis == "static" and likeliest != TORCH
    if what == "wrong":
        tampered(monkeypatch, likeliest.variant, lambda out: out * 1.2)
    elif what == "wrong in one head":
        tampered(monkeypatch, likeliest.variant, lambda out: out.index_fill(1, torch.tensor([out.shape[1] - 1], device=out.device), 0.0))
    elif what == "slow":
        tampered(monkeypatch, likeliest.variant, lambda out: (torch.cuda._sleep(20_000_000), out)[1])
    exact = sdpa.by_torch_alone(q, k, v, None, False, None).float()
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = sageattn(q, k, v)
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 1.0
    assert float((out.float() - exact).norm() / exact.norm()) < max(ERROR_BOUNDS.values())
    known = verdicts.of_card(unmeasured)
    assert set(known.off) == ({settled(likeliest)} if what.startswith("wrong") else set())
    found, chosen = known.classes[Class(128, "none", 2)], explain(q, k, v)
    best = min(found.ms, key=found.ms.__getitem__)
    assert chosen.basis == "verified"
    assert chosen.variant == (best.variant if found.ms[best] * rules.MARGINS["verified"] < found.ms[TORCH] else "sdpa")
    assert all(0.01 < ms < 20 for ms in found.ms.values()) and len(found.ms) == (2 if what.startswith("wrong") else 3)
    assert (settled(likeliest) in found.right) == (not what.startswith("wrong"))
    assert what == "right" or chosen.variant != likeliest.variant  # right, it may still be the second fastest


@pytest.mark.gpu
def test_on_a_gpu_in_a_capture_and_by_name(unmeasured, monkeypatch):
    q, k, v = on_gpu()
    first = explain(q, k, v).variant
    sageattn(q, k, v, variant=FP16)
    assert verdicts.of_card(unmeasured).classes[Class(128, "none", 2)].right == {Candidate(FP16)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sageattn(q, k, v)
    graph.replay()
    torch.cuda.synchronize()
    assert out.isfinite().all() and not verdicts.of_card(unmeasured).classes[Class(128, "none", 2)].ms
    tampered(monkeypatch, first, lambda out: out * 0.9)
    with pytest.raises(KernelMissing, match=r"off by 0\.1"):
        sageattn(q, k, v, variant=first)


def test_a_long_call_is_verified_within_a_second():
    """As predicted: PyTorch's attention and two candidates, four turns each, by a factor of two."""
    assert 3 * (1 + verify.TURNS) * verify.PART_MS * 2 <= 1000
