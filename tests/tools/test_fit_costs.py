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
from sageattention.planning.cost import KINDS, TORCH, Cost, Form


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
    assert set(found[89]) == set(KINDS) and set(found[89][128, "none"]) == {TORCH, *rules.CANDIDATES[89]}
    assert all(isinstance(cost, Cost) for costs in found[89].values() for cost in costs.values())
    for arch, kinds in others.items():
        for kind, costs in kinds.items():
            assert found[arch][kind] == {candidate: pytest.approx(cost, rel=0.01) for candidate, cost in costs.items()}


def test_the_module_in_the_package_is_what_the_tool_writes():
    assert Path(measured.__file__).read_text(encoding="utf-8") == fit_costs.text()
