"""`python -m sageattention card`: one JSON of doctor, check and bench, whatever happens on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from sageattention import __main__ as cli
from sageattention.cli import bench, card, check, doctor

RIGHT = {"variant": "reference", "case": "normal", "status": "ok", "error": 0.01, "bound": 0.02, "detail": ""}
CHECKED = {
    "device": "cuda:0",
    "ok": True,
    "right": 1,
    "wrong": 0,
    "kernels": ["sageattn_qk_int8_pv_fp8_cuda"],
    "results": [RIGHT],
    "not_run": {},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "card.json"


def test_one_command_writes_all_three_on_a_cpu(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the real steps: no kernel of the package runs on a CPU, so the exit code is check's 3."""
    assert cli.main(["card", "--quick", "--device", "cpu", "--out", str(file)]) == 3
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["format"] == card.FORMAT and found["errors"] == {}
    assert found["doctor"]["sageattention"]["version"] and found["check"]["right"] > 0 and found["bench"]["cpu_ms"]["reference"] > 0
    out = capsys.readouterr().out
    assert "NO KERNEL OF THIS PACKAGE WAS CHECKED" in out and str(file) in out


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """check and bench as on a card where all is right."""
    row = {"shape": "flux_1024", "candidate": "auto", "runs": "sageattn_qk_int8_pv_fp8_cuda", "baseline": bench.BASELINE}
    times = {"graph_ms": 0.3061, "event_ms": 0.32, "graph_ratio": 1.324, "event_ratio": 1.3}
    monkeypatch.setattr(check, "findings", lambda device, quick: CHECKED)
    monkeypatch.setattr(bench, "measure_on_cpu", lambda named, ignored: {"rows": [row | times, row | {"candidate": "sdpa_cudnn"} | times]})


def test_summary_has_the_verdict_and_the_times_of_auto(steps: None, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["card", "--device", "cpu", "--out", str(file)]) == 0
    out = capsys.readouterr().out
    assert "check: 1 of 1 are right." in out
    assert "flux_1024 sageattn_qk_int8_pv_fp8_cuda 0.306 1.32" in " ".join(out.split()) and "x cuDNN" in out


def test_a_step_that_raises_is_told_and_the_others_are_kept(
    steps: None, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(device, quick):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(check, "findings", broken)
    assert cli.main(["card", "--device", "cpu", "--out", str(file)]) == 1
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["errors"] == {"check": "RuntimeError: CUDA error: an illegal memory access"}
    assert "doctor" in found and "bench" in found and "check" not in found
    assert "check failed: RuntimeError" in capsys.readouterr().out


def test_what_is_known_before_python_ends_is_in_the_file(steps: None, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(named, ignored):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_on_cpu", ends)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["card", "--device", "cpu", "--out", str(file)])
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["check"] == CHECKED and "bench" not in found


def test_a_file_that_cannot_be_written_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "facts", lambda: pytest.fail("ran"))
    assert cli.main(["card", "--device", "cpu", "--out", str(tmp_path / "nowhere" / "card.json")]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("home", ["/home/jane", "C:\\Users\\Jane"])
def test_the_users_name_is_not_in_it(home: str, steps: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(card.Path, "home", classmethod(lambda cls: Path(home)))
    given = {"sageattention": {"path": f"{home}/ComfyUI/sageattention", "installed": [{"path": f"{home}/venv"}]}, "count": 1, "gpus": []}
    monkeypatch.setattr(doctor, "facts", lambda: given)
    assert cli.main(["card", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["doctor"]
    assert found["sageattention"] == {"path": "~/ComfyUI/sageattention", "installed": [{"path": "~/venv"}]}
    assert found["count"] == 1


def test_a_home_that_is_the_root_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card.Path, "home", classmethod(lambda cls: Path("/")))
    assert card.without_home(["/opt/ComfyUI", 1, None]) == ["/opt/ComfyUI", 1, None]


def test_a_failing_check_is_the_exit_code(steps: None, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "findings", lambda device, quick: CHECKED | {"ok": False, "wrong": 1})
    assert cli.main(["card", "--device", "cpu", "--out", str(file)]) == 1


@pytest.mark.gpu
def test_on_a_gpu(file: Path) -> None:
    assert cli.main(["card", "--quick", "--out", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["check"]["kernels"] and found["bench"]["machine"]["gpu"] == found["doctor"]["gpus"][0]["name"]
    assert {row["shape"] for row in found["bench"]["rows"]} == set(bench.QUICK_SHAPES)
