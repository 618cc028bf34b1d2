"""README.md and docs/ against the package: tables hold what the planner does, the picture the recorded figures, links lead somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from sageattention.cli.workloads import SHAPES
from sageattention.kernels.architectures import ARCHITECTURES
from sageattention.planning.measured import MEASURED
from sageattention.planning.rules import CANDIDATES
from sageattention.variants import VARIANTS, Candidate

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHORT = {name: short for short, name in re.findall(r"^\| ([\w ]+) \| `(\w+)` \|", README, re.MULTILINE)}


def short(candidate: Candidate) -> str:
    """As the README's table of cards names it."""
    return SHORT[candidate.variant] + (f" ({candidate.accum})" if candidate.accum else "")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_of_cards_is_that_of_auto(arch: int) -> None:
    """In the row of each card its candidates, PyTorch last, and what predictions rest on."""
    cells = next(line for line in README.splitlines() if f"| {arch // 10}.{arch % 10} |" in line).strip("| ").split(" | ")
    cards = ARCHITECTURES[arch].cards
    assert cells[0] == cards
    assert cells[2].split(", ") == [*map(short, CANDIDATES[arch]), "PyTorch"]
    assert cells[3] == ("measured" if arch in MEASURED else "static")


def test_every_variant_is_described() -> None:
    assert SHORT.keys() >= VARIANTS.keys() - {"reference"}
    for name in VARIANTS:
        assert f"`{name}`" in README, name


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 100


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(page: Path) -> None:
    """Those of the repository, written with their folder; an entry of a dated log keeps the names of its day."""
    if page.name in ("log.md", "CHANGELOG.md"):
        return
    for name in re.findall(r"`((?:csrc|sageattention|tests|nodes|docs|wheels|installer)/[\w/.]+\.\w+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed", ROOT / "docs" / "speed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_that_of_the_recorded_figures(speed: ModuleType) -> None:
    known = json.loads(speed.FIGURES.read_text(encoding="utf-8"))
    assert speed.PICTURE.read_text(encoding="utf-8") == speed.draw(known), "run python docs/speed.py"
    assert speed.SHOWN.keys() <= SHAPES.keys() and speed.SERIES.keys() <= VARIANTS.keys()
    assert {row["shape"] for row in known["rows"]} == speed.SHOWN.keys()  # the slow ones, too


def test_the_picture_takes_its_figures_from_bench(speed: ModuleType) -> None:
    fp8 = "sageattn_qk_int8_pv_fp8_cuda_sm90"
    plain = {"mask": "", "event_ms": 3.0, "graph_ms": None}
    rows = [
        {"shape": "flux_1024", "candidate": speed.BASELINE, **plain},
        {"shape": "flux_1024", "candidate": fp8, **plain, "graph_ms": 2.0},
        {"shape": "flux_1024", "candidate": fp8, **plain, "mask": "key"},
        {"shape": "flux_1024", "candidate": "sdpa_flash", **plain},
        {"shape": "wan_480p", "candidate": fp8, **plain, "event_ms": None},
    ]
    found = speed.record({"machine": {"gpu": "H200"}, "rows": rows})
    assert [(row["candidate"], row["ms"]) for row in found["rows"]] == [(speed.BASELINE, 3.0), (fp8, 2.0)]
    assert speed.ratios(found) == {"flux_1024": {fp8: 1.5}}
    assert ">1.50<" in speed.draw(found) and "H200" in speed.draw(found)


@pytest.fixture
def sparse_speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/sparse_speed.py."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("sparse_speed")


def test_the_picture_of_error_against_time_is_drawn_from_its_figures(sparse_speed: ModuleType) -> None:
    known = json.loads(sparse_speed.FIGURES.read_text(encoding="utf-8"))
    assert sparse_speed.PICTURE.read_text(encoding="utf-8") == sparse_speed.draw(known), "run python docs/sparse_speed.py"
    assert {row["curve"] for row in known["rows"]} == {"dense, FP8", "dense, FP16", *sparse_speed.COLOURS}


def test_a_picture_of_error_against_time_has_every_setting(sparse_speed: ModuleType) -> None:
    rows = [{"curve": "dense, FP8", "value": 0, "ms": 80.0, "error": 0.03}]
    for number, curve in enumerate(sparse_speed.CURVES):
        rows += [{"curve": curve.name, "value": v, "ms": 5.0 + number + v, "error": 0.2 / (1 + v)} for v in curve.values]
    drawn = sparse_speed.draw({"gpu": "H200 <&>", "date": "2026-11-30", "rows": rows})
    picture = ElementTree.fromstring(drawn)
    assert len(picture.findall("{*}circle")) == len(rows) + len(sparse_speed.CURVES)  # the legend has one of each curve
    assert len(picture.findall("{*}polyline")) == len(sparse_speed.CURVES)
    said = [text.text for text in picture.findall("{*}text")]
    assert {curve.name for curve in sparse_speed.CURVES} <= set(said) and "dense, FP8" in said
    places = [float(circle.get(axis)) for circle in picture.findall("{*}circle") for axis in ("cx", "cy")]
    assert all(0 <= place <= sparse_speed.WIDTH for place in places)
