"""Calibration without a GPU, on a made-up card and clock: the file, its place, what can be wrong with it; what `auto` makes of it."""

from __future__ import annotations

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
from sageattention.planning.plan import plan  # noqa: E402
from sageattention.planning.problem import Problem  # noqa: E402
from sageattention.variants import Candidate  # noqa: E402

CARD = Capability("cuda", 89, 100, "native", "NVIDIA GeForce RTX 4090")
TRITON = "sageattn_qk_int8_pv_fp16_triton"
FP8 = "sageattn_qk_int8_pv_fp8_cuda:fp32+fp16"


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
    return Point(head_dim, mask, 24, length, length, sdpa_ms, ms, off or {})


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


GOOD = {"head_dim": 128, "mask": "none", "heads": 24, "len_q": 4096, "len_kv": 4096, "sdpa_ms": 2.0, "ms": {FP8: 1.0}, "off": {}}
BAD_POINTS = [
    {**GOOD, "sdpa_ms": 0},
    {**GOOD, "sdpa_ms": float("nan")},
    {**GOOD, "sdpa_ms": 10**400},
    {**GOOD, "ms": {FP8: -1.0}},
    {**GOOD, "ms": {FP8: "fast"}},
    {**GOOD, "ms": {FP8: None}},
    {**GOOD, "ms": [1.0]},
    {**GOOD, "ms": {"sageattn9": 1.0}},
    {**GOOD, "ms": {FP8 + "x": 1.0}},
    {**GOOD, "len_q": "4096"},
    {**GOOD, "mask": "triangular"},
    {**GOOD, "off": ["sdpa"]},
    {**GOOD, "colour": "red"},
    {"head_dim": 128},
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
        b'{"format": 2}',
        b'{"format": 1}',
        b'{"format": 1, "made_for": 5, "points": []}',
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
    assert "calibration of" in chosen.reason and "head_dim 128, 24 heads, 4,096 queries" in chosen.reason


def test_auto_takes_nothing_that_was_slower_than_sdpa():
    known = kept(point({TRITON: 1.99, FP8: 2.5}, off={"sageattn_qk_int8_pv_int8_cuda:int32+fp32": "not SDPA's result"}))
    chosen = plan(problem(), CARD, calibration=known)
    assert chosen.variant.name == "sdpa" and chosen.basis == "calibrated"
    why = {str(candidate): reason for candidate, reason in chosen.rejected}
    assert why[TRITON] == "1.99 ms, SDPA 2 ms" and "2.5 ms" in why[FP8] and "not SDPA" in why["sageattn_qk_int8_pv_int8_cuda:int32+fp32"]


def test_auto_passes_by_what_has_gone_since():
    known = kept(point({TRITON: 1.0}))
    chosen = plan(problem(), CARD._replace(triton="none"), calibration=known)
    assert chosen.variant.name == "sdpa" and "Triton is not installed" in dict(chosen.rejected)[Candidate(TRITON)]


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"len_q": 32760, "len_kv": 32760}, 16384),
        ({"len_q": 16384, "len_kv": 5000}, 4096),
        ({"len_q": 3000, "len_kv": 4096}, 1024),
        ({"len_q": 1000, "len_kv": 4096}, None),
        ({"heads_q": 20}, 1024),  # less work than what was timed at 4096
        ({"heads_q": 20, "len_q": 5000}, 4096),
        ({"heads_q": 1, "heads_kv": 1, "len_q": 2048}, None),
        ({"head_dim": 96}, 4096),
        ({"head_dim": 64}, None),
        ({"causal": True}, None),
        ({"mask": "bool"}, None),
    ],
)
def test_the_longest_call_that_is_not_longer_counts(changes, length):
    found = kept(*(point({FP8: 1.0}, length=n) for n in (16384, 1024, 4096))).point(problem(**changes))
    assert (found and found.len_q) == length


@pytest.mark.parametrize(
    ("timed", "length", "counts"),
    [(2048, 4000, True), (2048, 4096, False), (2048, 4608, False), (4096, 7000, True), (16384, 65536, True)],
)
def test_where_sdpa_won_counts_for_calls_of_about_that_length(timed, length, counts):
    found = kept(point({FP8: 9.0}, length=timed)).point(problem(len_q=length, len_kv=length))
    assert (found is not None) == counts
    assert kept(point({FP8: 1.0}, length=timed)).point(problem(len_q=length, len_kv=length)).faster() == [Candidate.parse(FP8)]


def test_beyond_what_was_timed_the_table_decides():
    known = kept(point({TRITON: 1.0}))
    for other in (problem(head_dim=64), problem(mask="bool"), problem(heads_q=1, heads_kv=1)):
        assert rules.choose(other, CARD, 89, known) == rules.choose(other, CARD, 89)
    assert rules.choose(problem(), CARD, 80, known) == rules.choose(problem(), CARD, 80)  # SAGEATTENTION_ARCH


def test_a_call_uses_its_card_s(monkeypatch):
    kept(point({TRITON: 1.0}, length=1024, head_dim=64))
    monkeypatch.setattr(capability, "of_device", lambda device, index: CARD)
    from sageattention import explain

    q = torch.zeros(1, 24, 1024, 64)
    found = explain(q, q, q)
    assert (found.variant, found.basis) == (TRITON, "calibrated")
    calibration.reset()
    assert explain(q, q, q).basis != "calibrated"


# --- measuring


def forms(monkeypatch, *given):
    small = [calibrate.Form(64, mask, n, n) for mask, n in given]
    monkeypatch.setattr(calibrate, "FORMS", tuple(small))


def run(gpu, monkeypatch, *timed, seconds=0.0):
    """The points, and what was told; every look at the clock takes `seconds`."""
    monkeypatch.setattr(calibrate, "candidates", lambda device: [attention(gpu, "sdpa", 2.0), *timed])
    ticks, told = iter(range(10**6)), []
    points = list(calibrate.measure(torch.device("cpu"), now=lambda: next(ticks) * seconds, tell=told.append))
    return points, told


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(calibrate, "HEADS", 2)
    return install(monkeypatch)


def test_times_are_the_calls_own(gpu, monkeypatch):
    forms(monkeypatch, ("none", 64), ("causal", 64), ("dense", 64))
    points, told = run(gpu, monkeypatch, attention(gpu, TRITON, 1.0), attention(gpu, FP8, 4.0))
    assert [p.mask for p in points] == ["none", "causal", "dense"]
    for found in points:
        assert found.sdpa_ms == pytest.approx(2.0)
        assert found.ms == pytest.approx({TRITON: 1.0, FP8: 4.0}) and found.faster() == [Candidate(TRITON)]
    assert len(told) == 3 and "[1/3]" in told[0] and "2.00 x SDPA" in told[0]


def test_a_wrong_result_is_left_out(gpu, monkeypatch):
    forms(monkeypatch, ("none", 64))
    points, _ = run(gpu, monkeypatch, attention(gpu, TRITON, 1.0, factor=0.8), attention(gpu, FP8, 1.0, factor=float("nan")))
    assert not points[0].ms and set(points[0].off) == {TRITON, FP8} and "not SDPA's" in points[0].off[FP8]


@pytest.mark.parametrize(
    "error",
    [Unsupported("q", "no"), KernelMissing(FP8, "no C compiler"), torch.cuda.OutOfMemoryError("full")],
    ids=lambda e: type(e).__name__,
)
def test_a_refusal_is_a_reason(error, gpu, monkeypatch):
    def refuse(q, k, v, **keywords):
        raise error

    forms(monkeypatch, ("none", 64))
    points, _ = run(gpu, monkeypatch, calibrate.Attention(FP8, refuse, None), attention(gpu, TRITON, 1.0))
    assert points[0].off == {FP8: str(error)} and points[0].faster() == [Candidate(TRITON)]


def test_a_failure_of_ours_ends_it(gpu, monkeypatch):
    def crash(q, k, v, **keywords):
        raise RuntimeError("launch failed")

    forms(monkeypatch, ("none", 64))
    with pytest.raises(RuntimeError, match="launch failed"):
        run(gpu, monkeypatch, calibrate.Attention(FP8, crash, None))


def test_the_time_is_limited(gpu, monkeypatch):
    """Two candidates look at the clock 8 times a call: 2 warm-ups, 6 turns."""
    forms(monkeypatch, ("none", 64), ("none", 65), ("none", 66))
    points, told = run(gpu, monkeypatch, attention(gpu, TRITON, 1.0), seconds=calibrate.LIMIT / 12)
    assert len(points) == 1 and "are over" in told[-1] and len(told) == 2


def test_what_is_hopeless_is_not_timed_again(gpu, monkeypatch):
    forms(monkeypatch, ("none", 64), ("none", 65), ("causal", 64))
    points, _ = run(gpu, monkeypatch, attention(gpu, FP8, 7.0), attention(gpu, TRITON, 1.0))
    assert [set(p.ms) for p in points] == [{FP8, TRITON}, {TRITON}, {FP8, TRITON}]


def test_a_full_card_is_left_alone(monkeypatch):
    clock = install(monkeypatch, free=1 << 20)
    forms(monkeypatch, ("none", 4096))
    points, told = run(clock, monkeypatch, attention(clock, TRITON, 1.0))
    assert points == [] and "memory" in told[0]


def test_half_the_heads_where_memory_is_short(monkeypatch):
    form = calibrate.Form(128, "none", 16384, 16384)
    install(monkeypatch, free=8 << 30)
    assert calibrate._heads(form, torch.device("cpu")) == calibrate.HEADS
    install(monkeypatch, free=500 << 20)
    assert calibrate.HEADS / 3 <= calibrate._heads(form, torch.device("cpu")) < calibrate.HEADS


def test_each_way_of_rounding_is_timed_once(monkeypatch):
    ready = [calibrate.Attention("reference", None, None)]
    for accum in ("fp32", "fp16+fp32", "fp16"):
        ready.append(cli.importlib.import_module("sageattention.cli.candidates").variant(f"sageattn_qk_int8_pv_fp16_cuda:{accum}"))
    monkeypatch.setattr(calibrate, "ready", lambda device, accumulators: (ready, []))
    monkeypatch.setattr(capability, "of_device", lambda device, index: CARD)
    assert [c.name for c in calibrate.candidates(torch.device("cuda", 0))] == ["sdpa", *(r.name for r in ready[1:3])]


# --- the command


@pytest.fixture
def machine(gpu, monkeypatch):
    forms(monkeypatch, ("none", 1024))
    monkeypatch.setattr(calibrate, "chosen_device", lambda text: torch.device("cuda", 0))
    monkeypatch.setattr(capability, "of_device", lambda device, index: CARD)
    real = calibrate.measure
    monkeypatch.setattr(calibrate, "measure", lambda device, **keywords: real(torch.device("cpu"), **keywords))
    monkeypatch.setattr(calibrate, "candidates", lambda device: [attention(gpu, "sdpa", 2.0), attention(gpu, TRITON, 1.0)])


@pytest.mark.usefixtures("machine")
def test_the_command_writes_shows_and_undoes(capsys, place):
    assert cli.main(["bench", "--calibrate"]) == 0
    out = capsys.readouterr().out
    assert "[1/1]" in out and "2.00" in out and str(place) in out and "--reset" in out
    assert calibration.of_card(CARD).points[0].ms == pytest.approx({TRITON: 1.0})
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
    assert found["points"][0]["ms"][TRITON] == pytest.approx(1.0) and found["made_for"]["card"] == CARD.name
    assert "[1/1]" in captured.err
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

    kept(point({TRITON: 1.0}, length=1024))
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
    assert len(found["points"]) > 5 and all(p["sdpa_ms"] > 0 for p in found["points"])
