"""Calibration without a GPU, on a made-up card and clock: the file, its place, what can be wrong with it; what `auto` makes of it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from fake_gpu import attention, install  # noqa: E402

from sageattention import KernelMissing, Unsupported, _version  # noqa: E402
from sageattention import __main__ as cli  # noqa: E402
from sageattention.cli import calibrate  # noqa: E402
from sageattention.device import capability, libcuda  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.planning import calibration, rules  # noqa: E402
from sageattention.planning.calibration import Calibration, Ignored, Point  # noqa: E402
from sageattention.planning.cost import KINDS, TORCH, Form  # noqa: E402
from sageattention.planning.plan import plan  # noqa: E402
from sageattention.planning.problem import Problem  # noqa: E402
from sageattention.variants import Candidate  # noqa: E402

CARD = Capability("cuda", 89, 100, "native", "NVIDIA GeForce RTX 4090")
TRITON = "sageattn_qk_int8_pv_fp16_triton"
FP8, INT8 = "sageattn_qk_int8_pv_fp8_cuda", "sageattn_qk_int8_pv_int8_cuda"


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv(calibration.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(libcuda, "driver_version", lambda: "580.95.05, CUDA 13.0")
    calibration.forget()
    yield tmp_path / "cache"
    calibration.forget()


def problem(**changes):
    good = {"batch": 1, "heads_q": 24, "heads_kv": 24, "len_q": 4096, "len_kv": 4096, "head_dim": 128, "dtype": "bfloat16"}
    return Problem(**{**good, "device": "cuda", "device_index": 0, **changes})


def point(ms, sdpa_ms=2.0, length=4096, head_dim=128, mask="none", off=None):
    named = {TORCH: sdpa_ms} | {Candidate.parse(name): time for name, time in ms.items()}
    form = Form(24, 24, length, length, head_dim, mask, length if mask in ("bool", "additive") else 1)
    return Point(form, named, {Candidate.parse(name): reason for name, reason in (off or {}).items()})


def kept(*points) -> Calibration:
    calibration.save(CARD, list(points))
    return calibration.load(CARD)


# --- the place


@pytest.mark.parametrize(
    ("system", "environ", "expected"),
    [
        ("Linux", {}, "/home/me/.cache/sageattention"),
        ("Linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/sageattention"),
        ("Linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/sageattention"),
        ("Darwin", {"XDG_CACHE_HOME": "/xdg"}, "/home/me/Library/Caches/sageattention"),
        ("Windows", {"LOCALAPPDATA": "/users/me/local"}, "/users/me/local/sageattention"),
        ("Windows", {}, "/home/me/AppData/Local/sageattention"),
        ("Linux", {"SAGEATTENTION_CACHE": "/mine", "XDG_CACHE_HOME": "/xdg"}, "/mine"),
    ],
)
def test_the_folder_is_the_system_s(system, environ, expected):
    assert calibration.folder(environ, system, "/home/me") == Path(expected)


def test_a_user_without_a_home_has_no_calibration(monkeypatch):
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    with pytest.raises(Ignored, match="set SAGEATTENTION_CACHE"):
        calibration.folder({}, "Linux")
    assert calibration.of_card(CARD) is None


# --- the file


def test_what_is_saved_is_loaded():
    found = kept(point({FP8: 1.0}, off={TRITON: "broken"}))
    assert found.points == (point({FP8: 1.0}, off={TRITON: "broken"}),)
    assert calibration.path(CARD.name).name == "calibration-NVIDIA-GeForce-RTX-4090.json"
    assert "1 calls timed" in calibration.state(CARD)


def test_without_a_file_there_is_none_and_nothing_is_said(caplog):
    assert calibration.of_card(CARD) is None and not caplog.records
    assert "--calibrate" in calibration.state(CARD)


def test_a_failed_save_leaves_the_old_file(monkeypatch, place):
    kept(point({FP8: 1.0}))
    monkeypatch.setattr(calibration.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        calibration.save(CARD, [])
    assert len(calibration.load(CARD).points) == 1 and len(list(place.iterdir())) == 1


OTHERS = {
    "card": Capability("cuda", 89, 100, "native", "NVIDIA GeForce RTX  4090"),  # the same file name
    "arch": CARD._replace(arch=120),
    "multiprocessors": CARD._replace(multiprocessors=50),  # half of it
    "driver": "590.10, CUDA 13.1",
    "torch": "99.0",
    "sageattention": "9.9.9",
}


@pytest.mark.parametrize("what", OTHERS)
def test_one_made_for_something_else_is_ignored_with_one_line(what, monkeypatch, caplog):
    kept(point({FP8: 1.0}))
    card = OTHERS[what] if isinstance(OTHERS[what], Capability) else CARD
    if what == "driver":
        monkeypatch.setattr(libcuda, "driver_version", lambda: OTHERS[what])
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", OTHERS[what])
    elif what == "sageattention":
        monkeypatch.setattr(_version, "__version__", OTHERS[what])
    assert [calibration.of_card(card) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1 and f"made for {what} " in caplog.text and "--calibrate" in caplog.text
    assert calibration.state(card).startswith("ignored: ")


FORM = Form(24, 24, 4096, 4096, 128)._asdict()
GOOD = {"form": FORM, "ms": {"sdpa": 2.0, FP8: 1.0}, "off": {}, "weight": 1.0}
BAD_POINTS = [
    {**GOOD, "ms": {"sdpa": 0, FP8: 1.0}},
    {**GOOD, "ms": {"sdpa": float("nan"), FP8: 1.0}},
    {**GOOD, "ms": {"sdpa": 10**400, FP8: 1.0}},
    {**GOOD, "ms": {"sdpa": 2.0, FP8: -1.0}},
    {**GOOD, "ms": {"sdpa": 2.0, FP8: "fast"}},
    {**GOOD, "ms": {"sdpa": 2.0, FP8: None}},
    {**GOOD, "ms": {FP8: 1.0}},
    {**GOOD, "ms": [1.0]},
    {**GOOD, "ms": {"sdpa": 2.0, "sageattn9": 1.0}},
    {**GOOD, "ms": {"sdpa": 2.0, FP8 + "x": 1.0}},
    {**GOOD, "form": {**FORM, "len_q": "4096"}},
    {**GOOD, "form": {**FORM, "heads": 0}},
    {**GOOD, "form": {**FORM, "mask": "triangular"}},
    {**GOOD, "form": {**FORM, "head_dim": 300}},
    {**GOOD, "form": {**FORM, "colour": "red"}},
    {**GOOD, "off": ["sdpa"]},
    {**GOOD, "weight": 0},
    {**GOOD, "weight": "heavy"},
    {"form": FORM},
    [],
    None,
]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"[]",
        b"null",
        b"3",
        b"{}",
        b'{"format": 1}',
        b'{"format": 2}',
        b'{"format": 2, "made_for": 5, "points": []}',
        *BAD_POINTS,
    ],
    ids=lambda t: str(t)[:40],
)
def test_one_that_cannot_be_read_is_ignored_with_one_line(text, caplog):
    kept(point({FP8: 1.0}))
    file = calibration.path(CARD.name)
    if not isinstance(text, bytes):
        content = json.loads(file.read_text())
        text = json.dumps({**content, "points": [text]}).encode()
    file.write_bytes(text)
    assert [calibration.of_card(CARD) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1 and str(file) in caplog.text and "--calibrate" in caplog.text


def test_a_folder_in_the_file_s_place_is_ignored(caplog):
    calibration.path(CARD.name).mkdir(parents=True)
    assert calibration.of_card(CARD) is None and "can't be read" in caplog.text


def test_a_driver_that_fails_is_no_error(monkeypatch, caplog):
    kept(point({FP8: 1.0}))

    def none():
        raise libcuda.NoDriver("there is none")

    monkeypatch.setattr(libcuda, "driver_version", none)
    assert calibration.of_card(CARD) is None and "there is none" in caplog.text


def test_importing_reads_nothing(place):
    place.mkdir()
    calibration.path(CARD.name).write_text("{")
    code = "import sageattention, logging; sageattention.available_variants('cpu'); print('fine')"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout == "fine\n" and done.stderr == ""


# --- what `auto` makes of it


def test_auto_takes_what_was_fastest_here():
    known = kept(point({TRITON: 1.1, FP8: 1.5}))
    chosen = plan(problem(), CARD, calibration=known)
    assert chosen.variant.name == TRITON and chosen.basis == "calibrated"
    assert chosen.reason == "1.1 ms predicted, PyTorch's attention 2 ms (measured on this card)"
    assert {str(candidate): ms for candidate, ms in chosen.predicted} == pytest.approx({"sdpa": 2.0, TRITON: 1.1, FP8: 1.5}, rel=0.01)


def test_auto_takes_nothing_that_was_slower_than_sdpa():
    known = kept(point({TRITON: 1.99, FP8: 2.5}, off={INT8: "not SDPA's result"}))
    chosen = plan(problem(), CARD, calibration=known)
    assert chosen.variant.name == "sdpa" and chosen.basis == "calibrated"
    assert {str(candidate): reason for candidate, reason in chosen.rejected} == {INT8: "not SDPA's result"}
    assert {str(candidate): ms for candidate, ms in chosen.predicted} == pytest.approx({"sdpa": 2.0, TRITON: 1.99, FP8: 2.5}, rel=0.01)


def test_what_was_wrong_is_out_for_calls_of_its_kind():
    known = kept(point({INT8: 0.5}, off={INT8: "not SDPA's result"}), point({INT8: 0.5}, head_dim=64))
    assert plan(problem(), CARD, calibration=known).variant.name == "sdpa"
    assert plan(problem(head_dim=40), CARD, calibration=known).variant.name == INT8


def test_auto_passes_by_what_has_gone_since():
    known = kept(point({TRITON: 1.0}))
    chosen = plan(problem(), CARD._replace(triton="none"), calibration=known)
    assert chosen.variant.name == "sdpa" and "Triton is not installed" in dict(chosen.rejected)[Candidate(TRITON)]


def test_times_of_other_lengths_are_predicted():
    """Of two variants one has less to do before it starts, the other is faster then."""
    times = {256: (0.02, 0.04), 512: (0.05, 0.055), 1024: (0.18, 0.13), 2048: (0.7, 0.43), 4096: (2.8, 1.63), 8192: (11.2, 6.4)}
    known = kept(*(point({FP8: ours}, sdpa_ms=sdpa, length=length) for length, (sdpa, ours) in times.items()))
    assert plan(problem(len_q=300, len_kv=300), CARD, calibration=known).variant.name == "sdpa"
    for length in (1500, 3000, 32768):
        chosen = plan(problem(len_q=length, len_kv=length), CARD, calibration=known)
        assert chosen.variant.name == "sageattn_qk_int8_pv_fp8_cuda"
        predicted = dict(chosen.predicted)
        assert predicted[TORCH] / predicted[Candidate.parse(FP8)] == pytest.approx(1.6 if length == 1500 else 1.75, abs=0.15)


def test_beyond_what_was_timed_the_table_decides():
    known = kept(point({TRITON: 1.0}))
    for other in (problem(head_dim=64), problem(mask="bool")):
        assert rules.choose(other, CARD, 89, known) == rules.choose(other, CARD, 89)
    assert rules.choose(problem(), CARD, 80, known) == rules.choose(problem(), CARD, 80)  # SAGEATTENTION_ARCH


def test_costs_are_fitted_once(monkeypatch):
    known = kept(point({TRITON: 1.0}))
    timed = Candidate(TRITON)
    first = known.cost(timed, (128, "none"), 89, 100)
    monkeypatch.setattr(calibration, "fit", None)  # calling it would raise
    assert known.cost(timed, (128, "none"), 89, 100) is first
    assert timed in known.timed((128, "none")) and not known.timed((64, "none"))


def test_a_call_uses_its_card_s(monkeypatch):
    kept(point({TRITON: 0.01}, sdpa_ms=1.0, length=1024, head_dim=64))
    monkeypatch.setattr(capability, "of_device", lambda device, index: CARD)
    from sageattention import explain

    q = torch.zeros(1, 24, 1024, 64, dtype=torch.float16)
    found = explain(q, q, q)
    assert (found.variant, found.basis) == (TRITON, "calibrated") and found.predicted_ms["sdpa"] == pytest.approx(1.0)
    calibration.reset()
    assert explain(q, q, q).basis != "calibrated"


# --- measuring


def forms(*given):
    return [Form(2, 2, n, n, 64, mask, n if mask in ("bool", "additive") else 1) for mask, n in given]


def run(monkeypatch, gpu, given, *timed, seconds=0.0):
    """The points, and what was told; every look at the clock takes `seconds`."""
    monkeypatch.setattr(calibrate, "candidates", lambda device: [attention(gpu, "sdpa", 2.5), *timed])
    ticks, told = iter(range(10**6)), []
    points = list(calibrate.measure(torch.device("cpu"), given, now=lambda: next(ticks) * seconds, tell=told.append))
    return points, told


@pytest.fixture
def gpu(monkeypatch):
    return install(monkeypatch)


def test_times_are_the_calls_own(gpu, monkeypatch):
    kinds = [(mask, 64) for mask in ("none", "causal", "keys", "bool", "additive")]
    points, _ = run(monkeypatch, gpu, forms(*kinds), attention(gpu, TRITON, 2.1), attention(gpu, FP8, 3.0))
    assert {point.weight for point in points} == {1.0}
    assert [(p.form.mask, p.form.len_q) for p in points] == kinds
    for found in points:
        assert found.ms == pytest.approx({TORCH: 2.5, Candidate(TRITON): 2.1, Candidate.parse(FP8): 3.0})


def test_the_gpu_waits_until_all_is_launched(gpu, monkeypatch):
    from sageattention import torch_internals

    waits = []
    monkeypatch.setattr(torch_internals, "gpu_sleep", lambda cycles: (waits.append(cycles), gpu.spend(100.0)))
    points, _ = run(monkeypatch, gpu, forms(("none", 64)), attention(gpu, TRITON, 1.5))
    assert points[0].ms == pytest.approx({TORCH: 2.5, Candidate(TRITON): 1.5})  # waiting does not count
    assert len(waits) == 2 * calibrate.TURNS and min(waits) > 0


def test_a_wrong_result_is_left_out(gpu, monkeypatch):
    wrong = attention(gpu, TRITON, 1.0, factor=0.8), attention(gpu, FP8, 1.0, factor=float("nan"))
    points, _ = run(monkeypatch, gpu, forms(("none", 64)), *wrong)
    assert set(points[0].ms) == {TORCH} and set(map(str, points[0].off)) == {TRITON, FP8}
    assert "not SDPA's" in points[0].off[Candidate.parse(FP8)]


@pytest.mark.parametrize(
    "error",
    [Unsupported("q", "no"), KernelMissing(FP8, "no C compiler"), torch.cuda.OutOfMemoryError("full")],
    ids=lambda e: type(e).__name__,
)
def test_a_refusal_is_a_reason(error, gpu, monkeypatch):
    def refuse(q, k, v, **keywords):
        raise error

    points, _ = run(monkeypatch, gpu, forms(("none", 64)), calibrate.Attention(FP8, refuse, None), attention(gpu, TRITON, 1.0))
    assert points[0].off == {Candidate.parse(FP8): str(error)} and Candidate(TRITON) in points[0].ms


def test_a_failure_of_ours_ends_it(gpu, monkeypatch):
    def crash(q, k, v, **keywords):
        raise RuntimeError("launch failed")

    with pytest.raises(RuntimeError, match="launch failed"):
        run(monkeypatch, gpu, forms(("none", 64)), calibrate.Attention(FP8, crash, None))


def test_the_time_is_limited_and_told(gpu, monkeypatch):
    endless = (forms(("none", 64 + n))[0] for n in range(10**6))
    points, told = run(monkeypatch, gpu, endless, attention(gpu, TRITON, 1.0), seconds=2.0)
    assert 5 < len(points) < 2 * calibrate.LIMIT and told and "calls timed" in told[-1]


def test_what_is_hopeless_is_not_timed_further(gpu, monkeypatch):
    points, _ = run(monkeypatch, gpu, forms(("none", 64)), attention(gpu, FP8, 7.0), attention(gpu, TRITON, 2.0))
    assert set(points[0].ms) == {TORCH, Candidate(TRITON)} and not points[0].off


def test_a_full_card_is_left_alone(monkeypatch):
    clock = install(monkeypatch, free=1 << 20)
    points, told = run(monkeypatch, clock, forms(("none", 4096)), attention(clock, TRITON, 1.0))
    assert points == [] and "memory" in told[0]


def test_what_is_drawn_fits_the_card_and_covers_every_kind():
    for card in (CARD, CARD._replace(arch=75, multiprocessors=30, name="NVIDIA GeForce RTX 2060")):
        found = list(itertools.islice(calibrate.forms(card), 150))
        assert found == list(itertools.islice(calibrate.forms(card), 150))  # seeded
        assert {form.kind for form in found} == set(KINDS) and any(form.heads_kv < form.heads for form in found)
        for form in found:
            assert rules.predict(form, card, card.arch)[0][TORCH] <= calibrate.LONGEST_MS and form.heads % form.heads_kv == 0
    assert Form(24, 24, 4608, 4608, 128) in found


def test_each_way_of_rounding_is_timed_once(monkeypatch):
    from sageattention.cli.candidates import variant

    accums = [variant(f"sageattn_qk_int8_pv_fp16_cuda:{accum}") for accum in ("fp32", "fp16+fp32", "fp16")]
    ready = [variant("sdpa"), variant("reference"), *accums]
    monkeypatch.setattr(calibrate, "ready", lambda device, accumulators: (ready, []))
    monkeypatch.setattr(capability, "of_device", lambda device, index: CARD)
    assert [c.name for c in calibrate.candidates(torch.device("cuda", 0))] == ["sdpa", *(r.name for r in accums[:2])]


def test_triton_is_timed_where_there_is_nothing_else(monkeypatch):
    from sageattention.cli.candidates import variant

    monkeypatch.setattr(capability, "of_device", lambda device, index: CARD)
    for others, expected in (([], ["sdpa", TRITON]), ([INT8], ["sdpa", INT8])):
        monkeypatch.setattr(calibrate, "ready", lambda device, accumulators: ([*map(variant, ("sdpa", TRITON, *others))], []))  # noqa: B023
        assert [c.name for c in calibrate.candidates(torch.device("cuda", 0))] == expected


# --- the command


@pytest.fixture
def machine(gpu, monkeypatch):
    monkeypatch.setattr(calibrate, "forms", lambda card: forms(("none", 1024)))
    monkeypatch.setattr(calibrate, "chosen_device", lambda text: torch.device("cuda", 0))
    monkeypatch.setattr(capability, "of_device", lambda device, index: CARD)
    real = calibrate.measure
    monkeypatch.setattr(calibrate, "measure", lambda device, given, **keywords: real(torch.device("cpu"), given, **keywords))
    monkeypatch.setattr(calibrate, "candidates", lambda device: [attention(gpu, "sdpa", 4.0), attention(gpu, TRITON, 2.5)])


@pytest.mark.usefixtures("machine")
def test_the_command_writes_shows_and_undoes(capsys, place):
    assert cli.main(["bench", "--calibrate"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1" in out and TRITON in out and str(place) in out and "--reset" in out
    assert calibration.of_card(CARD).points[0].ms == pytest.approx({TORCH: 4.0, Candidate(TRITON): 2.5})
    assert cli.main(["bench", "--calibrate", "--reset"]) == 0
    assert "removed" in capsys.readouterr().out
    assert calibration.of_card(CARD) is None and not list(place.iterdir())
    assert cli.main(["bench", "--calibrate", "--reset"]) == 0
    assert "there is no calibration" in capsys.readouterr().out


@pytest.mark.usefixtures("machine")
def test_the_command_as_json(capsys):
    assert cli.main(["bench", "--calibrate", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["points"][0]["ms"][TRITON] == pytest.approx(2.5) and found["made_for"]["card"] == CARD.name
    assert "timing on" in captured.err
    assert cli.main(["bench", "--calibrate", "--reset", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == [found["file"]]


@pytest.mark.usefixtures("machine")
def test_a_place_that_cannot_be_written_is_said(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv(calibration.FOLDER, str(tmp_path / "file"))
    monkeypatch.setattr(calibrate, "measure", None)  # a minute's work, for nothing
    assert cli.main(["bench", "--calibrate"]) == 1
    assert "SAGEATTENTION_CACHE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--calibrate", "--device", "cpu"], "needs a CUDA GPU"),
        (["--calibrate", "--shapes", "qwen"], "--shapes: does not go with --calibrate"),
        (["--reset"], "goes with --calibrate"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, named, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_doctor_shows_it(monkeypatch):
    from sageattention.cli import doctor

    kept(point({TRITON: 0.01}, sdpa_ms=1.0, length=1024))
    found = doctor._device(CARD, True, [])
    assert "1 calls timed" in found["calibration"] and found["auto"]["flux_1024"]["basis"] == "calibrated"
    assert "calibration" not in doctor._device(CARD, False, [])


@pytest.mark.gpu
def test_on_a_gpu_within_a_minute(capsys):
    import time

    start = time.monotonic()
    assert cli.main(["bench", "--calibrate", "--json"]) == 0
    assert time.monotonic() - start < 65
    found = json.loads(capsys.readouterr().out)
    assert len(found["points"]) > 50 and len({(p["form"]["mask"], p["form"]["head_dim"] > 128) for p in found["points"]}) == 10
