"""csrc/tools/fit_costs.py: from what `bench --calibrate --json` prints to the module that `auto` goes by."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc/tools"))

import fit_costs

from sageattention.planning import measured, rules
from sageattention.planning.calibration import Point
from sageattention.planning.cost import KINDS, TORCH, UNALIGNED, Cost, Form
from sageattention.planning.ways import kinds_of


def calibration(arch: str) -> dict:
    """Of a card on which PyTorch's attention takes twice as long as the first candidate."""
    first = rules.CANDIDATES[int(arch.removeprefix("sm_"))][0]
    forms = [Form(24, 24, n, n, 128) for n in (512, 1024, 2048, 4096, 8192)]
    points = [Point(form, {TORCH: 2e-7 * form.len_q**2, first: 1e-7 * form.len_q**2}) for form in forms]
    made_for = {"card": "a card", "arch": arch, "multiprocessors": "100", "driver": "580", "torch": "2.11"}
    return {"made_for": made_for, "points": [point.as_json() for point in points]}


@pytest.fixture
def module(monkeypatch, tmp_path) -> Path:
    """Where the module is written; what is known is put back afterwards."""
    for known in (measured.MEASURED, measured.MADE_FROM):
        before = dict(known)
        monkeypatch.setattr(measured, "MEASURED" if known is measured.MEASURED else "MADE_FROM", before)
    monkeypatch.setattr(rules, "MEASURED", measured.MEASURED)
    monkeypatch.setattr(measured, "__file__", str(tmp_path / "measured.py"))
    return tmp_path / "measured.py"


def test_an_architecture_is_added_and_the_others_stay(module, monkeypatch, tmp_path, capsys):
    others = dict(measured.MEASURED)
    (tmp_path / "calibration.json").write_text(json.dumps(calibration("sm_89")))
    monkeypatch.setattr(sys, "argv", ["fit_costs.py", str(tmp_path / "calibration.json")])
    assert fit_costs.main() == 0
    assert "5 of 5" in capsys.readouterr().out
    written: dict = {"__package__": "sageattention.planning"}
    exec(compile(module.read_text(encoding="utf-8"), "measured.py", "exec"), written)
    found = written["MEASURED"]
    assert set(found) == {89, *others} and "a card" in written["MADE_FROM"][89]
    named = (TORCH, *rules.CANDIDATES[89])
    assert set(found[89]) == {own for kind in KINDS for candidate in named for own in kinds_of(candidate, kind, 89)}
    assert set(found[89][128, "none"]) == set(named) and set(found[89][128, UNALIGNED]) == {TORCH}
    assert all(isinstance(cost, Cost) for costs in found[89].values() for cost in costs.values())
    for arch, kinds in others.items():
        for kind, costs in kinds.items():
            assert found[arch][kind] == {candidate: pytest.approx(cost, rel=0.01) for candidate, cost in costs.items()}


def test_several_runs_of_one_card_are_one(module, monkeypatch, tmp_path, capsys):
    first, other = calibration("sm_89"), calibration("sm_90")
    for name, run in (("a", first), ("b", first), ("c", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    monkeypatch.setattr(sys, "argv", ["fit_costs.py", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert fit_costs.main() == 0 and "5 of 5" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["fit_costs.py", str(tmp_path / "a.json"), str(tmp_path / "c.json")])
    with pytest.raises(SystemExit, match="different cards"):
        fit_costs.main()


def test_a_call_that_was_timed_twice_has_the_mean_of_both():
    form = Form(8, 8, 512, 512, 64)
    (point,) = fit_costs.merged([Point(form, {TORCH: 1.0}, {}, 5.0), Point(form, {TORCH: 4.0}, {}, 5.0)])
    assert point.ms == {TORCH: pytest.approx(2.0)} and point.weight == 5.0


def test_the_module_in_the_package_is_what_the_tool_writes():
    assert Path(measured.__file__).read_text(encoding="utf-8") == fit_costs.text()
